"""The missing shards of a planned cache are written, each recorded when it is complete: here, or by actors on Ray."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Generic

from logitcache.assembly.placement import Placement
from logitcache.assembly.plan import P, Plan
from logitcache.assembly.ray_actors import workers
from logitcache.errors import UserError
from logitcache.format.layout import Layout
from logitcache.format.sequences import TokenSequence
from logitcache.format.shards import ShardInfo, ShardWriter
from logitcache.format.targets import SparseTargets
from logitcache.progress import Progress
from logitcache.storage.atomic import space_needed
from logitcache.storage.folder import Folder

logger = logging.getLogger("logitcache")

StoredRow = tuple[TokenSequence, SparseTargets]
RowsOf = Callable[[int], Iterable[StoredRow]]
"""Yields the rows of the shard with an index."""

VISIBLE_S = 90.0
"""Within this time a network file system shows a file of another host: longer than its caches last."""
LOOK_AGAIN_S = 1.0


def complete_shards(plan: Plan, shards: Sequence[int]) -> dict[int, ShardInfo]:
    """Finds those of the shards that are complete, and says so if there are any and some are missing."""
    complete = {index: info for index in shards if (info := plan.finished(index)) is not None}
    if 0 < len(complete) < len(shards):
        logger.info("continuing: %d of %d shards are complete", len(complete), len(shards))
    return complete


def written_shards(plan: Plan, known: Mapping[int, ShardInfo], command: str) -> tuple[ShardInfo, ...]:
    """Returns all shards of a cache, in order; those that are not known are looked up.

    Raises UserError naming those that are not complete, and the command that writes them.
    """
    shards = [known.get(index) or plan.finished(index) for index in range(len(plan.shards))]
    missing = [index for index, shard in enumerate(shards) if shard is None]
    if missing:
        some = ", ".join(map(str, missing[:10])) + (", …" if len(missing) > 10 else "")
        raise UserError(
            f"{plan.folder}: {len(missing)} of {len(shards)} shards are not complete ({some}): run the same `logitcache "
            f"{command}` again, with the shard range that holds them if it had one"
        )
    return tuple(shard for shard in shards if shard is not None)


def write_shard(plan: Plan, index: int, layout: Layout, rows: Iterable[StoredRow]) -> ShardInfo:
    """Writes a shard and records it; if `rows` raises an exception, no file appears."""
    with ShardWriter(plan.folder, plan.shard_name(index), layout) as writer:
        for sequence, targets in rows:
            writer.write(sequence, targets)
    plan.record(index, writer.info)
    return writer.info


def write_missing(
    plan: P, layout: Layout, open_rows: Callable[[P], RowsOf], label: str, placement: Placement | None = None
) -> dict[int, ShardInfo]:
    """Writes the shards of a cache that are not complete. Returns those that it wrote or found; of a range, its own.

    open_rows: called in every process that writes; it travels to other hosts.  label: what the progress calls the work.
    """
    placement = placement or Placement()
    mine = placement.shards(len(plan.shards))
    complete = complete_shards(plan, mine)
    missing = [index for index in mine if index not in complete]
    positions = sum(plan.shards[index].num_positions for index in mine)
    done = sum(plan.shards[index].num_positions for index in complete)
    if placement.shard_range is None:
        plan.folder.remove_leftovers("data")
    if not missing:
        return complete
    progress = Progress(label, positions, done, "positions")
    try:
        if placement.executor == "ray":
            return complete | _write_on_ray(plan, layout, open_rows, missing, progress, placement)
        rows = open_rows(plan)
        for index in missing:
            complete[index] = write_shard(plan, index, layout, _counted(rows(index), progress))
        return complete
    finally:
        progress.close()


def _counted(rows: Iterable[StoredRow], progress: Progress) -> Iterator[StoredRow]:
    for sequence, targets in rows:
        yield sequence, targets
        progress.advance(len(targets))


def _write_on_ray(
    plan: P,
    layout: Layout,
    open_rows: Callable[[P], RowsOf],
    shards: Sequence[int],
    progress: Progress,
    placement: Placement,
) -> dict[int, ShardInfo]:
    written = {}
    folder = str(plan.folder.local or plan.folder.path)
    with workers(ShardsOnRay, (type(plan), folder, layout, open_rows), placement, len(shards)) as pool:
        pool.start()
        progress.start()

        def done(index: int, _: None) -> None:
            written[index] = seen_here(plan, index)
            progress.advance(plan.shards[index].num_positions)

        pool.share("write", shards, done)
    return written


class ShardsOnRay(Generic[P]):
    """An actor that writes shards of a planned cache."""

    def __init__(self, kind: type[P], folder: str, layout: Layout, open_rows: Callable[[P], RowsOf]) -> None:
        self._kind, self._folder, self._layout, self._open_rows = kind, folder, layout, open_rows

    def start(self) -> None:
        """Reads the plan, and opens what the rows come from."""
        self._plan = self._kind.read(Folder(self._folder))
        self._rows = self._open_rows(self._plan)

    def write(self, index: int) -> None:
        """Writes a shard and records it."""
        with space_needed(self._folder):
            write_shard(self._plan, index, self._layout, self._rows(index))


def seen_here(plan: Plan, index: int) -> ShardInfo:
    """Returns the record of a shard that an actor wrote, once this host sees both. Raises UserError if it never does."""
    deadline = time.monotonic() + VISIBLE_S
    while (info := plan.finished(index)) is None:
        if time.monotonic() > deadline:
            raise UserError(
                f"--out {plan.folder}: shard {index} was written on another host and is not to be seen from here; choose a "
                "directory that all hosts share, or a URL"
            )
        time.sleep(LOOK_AGAIN_S)
    return info

"""Rows of finished caches become a new cache beside them.

    OUT/.build/rows/00000       numbers of the source rows of shard 0, little-endian int64, and so on

See `logitcache.assembly.plan` for what else the build directory holds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from logitcache.assembly.card import common_licenses
from logitcache.assembly.finalize import finalize_cache, history_step, trusted_files
from logitcache.assembly.plan import Plan, PlannedShard, new_plan
from logitcache.assembly.resume import begun_plan, finished_cache
from logitcache.assembly.workspace import workspace
from logitcache.assembly.write import StoredRow, write_missing
from logitcache.errors import UserError
from logitcache.format.layout import Layout
from logitcache.format.manifest import (
    BUILD_DIRECTORY,
    MANIFEST_NAME,
    TOKENIZER_DIRECTORY,
    Manifest,
    check_shape,
    source_of,
    without_secrets_of_sources,
)
from logitcache.format.sequences import CachedSequence, TokenSequence
from logitcache.format.shards import ShardInfo
from logitcache.format.tail_parts import TAIL_FILES
from logitcache.format.targets import SparseTargets
from logitcache.format.trusted import read_trusted
from logitcache.maintenance.row_scan import Rows
from logitcache.reading.cache import LogitCache, opened
from logitcache.storage.atomic import space_needed
from logitcache.storage.folder import Folder, refuse_overlap
from logitcache.version import CREATED_BY

_FINGERPRINT = {
    "teacher": dict.fromkeys(["name", "architecture", "dtype", "engine", "engine_version"], object),
    "corpus": {"sources": [{"name": str}]},
    "capture": {"top_k": int, "top_p": (float,), "min_k": (int,)},
}
"""What rewriting needs of a fingerprint, see `check_shape`."""


def open_source(path: LogitCache | str | Path, against: str | None = None) -> LogitCache:
    """Opens a cache to rewrite. Raises UserError as `open_cache` does, and for a fingerprint that no build wrote."""
    cache = opened(path, against)
    without_secrets_of_sources(cache.manifest)  # as the new manifest will hold them, before any work is done
    try:
        check_shape(cache.manifest.fingerprint, _FINGERPRINT, "fingerprint")
    except (KeyError, TypeError) as error:
        raise UserError(f"{cache.path}/{MANIFEST_NAME}: its fingerprint is of no build ({error!r})") from error
    return cache


@dataclass(frozen=True)
class Rewrite:
    """The work of a command that makes a new cache of finished ones.

    command, settings: plain JSON, for the history.  layout, fingerprint, skipped: of the new cache; the fingerprint without
    what follows from its rows.  select: the rows to keep, in ascending order.  transform: what to store of a row.
    left_out: what the history calls the rows that are not kept.
    """

    command: str
    settings: Mapping[str, Any]
    sources: Sequence[LogitCache]
    layout: Layout
    fingerprint: Mapping[str, Any]
    skipped: Mapping[str, int]
    select: Callable[[Folder], Generator[Rows]]
    transform: Callable[[CachedSequence], SparseTargets] = lambda sequence: sequence.targets
    left_out: str = "left_out"

    @property
    def merged(self) -> bool:
        """Tells whether there are several sources."""
        return len(self.sources) > 1


def rewrite(work: Rewrite, out: str | Path, shard_positions: int, overwrite: bool) -> LogitCache:
    """Does the work, from where an interrupted call with the same arguments left it.

    out: a folder, or a URL that fsspec writes.  shard_positions: stored positions of a shard.  overwrite: replace what `out`
    holds, once the rows are chosen. Raises UserError if `out` is, holds or lies in a source or holds something else, for a
    source that is damaged or selects no row, and if the disk is full; shards that are complete by then stay for the next call.
    """
    if shard_positions < 1:
        raise UserError(f"--shard-positions {shard_positions}: at least 1 is needed")
    folder = Folder(out)
    for source in work.sources:
        refuse_overlap(f"--out {folder}", folder, source.folder)
    origins = [_origin(source, work.merged) for source in work.sources]
    spec = {"command": work.command, **work.settings, "shard_positions": shard_positions, "from": origins}
    with workspace(folder), space_needed(out):
        if not overwrite and (finished := finished_cache(folder, spec)):
            return finished
        plan = begun_plan(Plan, folder, spec, overwrite)
        if plan is None:
            plan = new_plan(folder, lambda: _cut(folder, spec, work, shard_positions))
        _copy_files(work.sources[0], folder, work.layout)
        shards = write_missing(plan, work.layout, lambda shard: _rows(work, folder, shard), work.command)
        licenses = common_licenses(source.folder for source in work.sources)
        return finalize_cache(folder, _manifest(plan, work, shards), licenses)


def _cut(folder: Folder, spec: Mapping[str, Any], work: Rewrite, shard_positions: int) -> Plan:
    """Chooses the rows and deals them to shards: each takes rows until it has `shard_positions`."""
    digest = hashlib.sha256()
    shards: list[PlannedShard] = []
    pending: list[np.ndarray] = []
    num_positions = 0

    def close() -> None:
        numbers = np.concatenate(pending).astype("<i8")
        folder.write(_rows_name(len(shards)), numbers.tobytes())
        shards.append(PlannedShard(num_positions, len(numbers)))
        pending.clear()

    with closing(work.select(folder)) as selected:
        for rows in selected:
            digest.update(rows.ids.tobytes().hex().encode())
            numbers, counts = rows.numbers, rows.num_positions
            while len(numbers):
                reached = num_positions + counts.cumsum()
                take = int(np.searchsorted(reached, shard_positions)) + 1
                pending.append(numbers[:take])
                num_positions = int(reached[:take][-1])
                numbers, counts = numbers[take:], counts[take:]
                if num_positions >= shard_positions:
                    close()
                    num_positions = 0
    if pending:
        close()
    plan = Plan(folder=folder, spec=spec, shards=tuple(shards), sequences_sha256=digest.hexdigest())
    if not plan.num_positions:
        raise UserError(f"logitcache {work.command}: no row with a stored position is selected, nothing is written")
    return plan


def _rows_name(shard: int) -> str:
    return f"{BUILD_DIRECTORY}/rows/{shard:05d}"


def _rows(work: Rewrite, folder: Folder, shard: int) -> Iterator[StoredRow]:
    """Yields what is stored of the source rows of a shard. Raises UserError for a row whose id is not that of its tokens."""
    for sequence in _sequences(work.sources, np.frombuffer(folder.read(_rows_name(shard)), "<i8")):
        kept = {name: sequence.columns.get(name) for name in work.layout.columns}
        tokens = TokenSequence(sequence.input_ids, sequence.loss_mask, kept)
        if tokens.row_id != sequence.row_id:
            where = ", ".join(source.path for source in work.sources)
            raise UserError(
                f"{where}: row {sequence.row_id} was altered: the hash of its tokens is {tokens.row_id}. "
                "`logitcache verify` lists all that is wrong"
            )
        yield tokens, work.transform(sequence)


def _sequences(sources: Sequence[LogitCache], numbers: np.ndarray) -> Iterator[CachedSequence]:
    first = np.cumsum([0] + [len(source) for source in sources])
    owners = np.searchsorted(first, numbers, side="right") - 1
    for owner, row in zip(owners.tolist(), (numbers - first[owners]).tolist(), strict=True):
        yield sources[owner][row]


def _copy_files(source: LogitCache, folder: Folder, layout: Layout) -> None:
    """Copies the tokenizer's and the tail's files, checked against the source's manifest, in place of any others."""
    for name in (TOKENIZER_DIRECTORY, *TAIL_FILES):
        folder.remove(name)
    for name in source.manifest.files:
        if name not in TAIL_FILES or name in layout.tail_parts.files:
            folder.write(name, read_trusted(source.folder, source.manifest, name))


def _manifest(plan: Plan, work: Rewrite, shards: tuple[ShardInfo, ...]) -> Manifest:
    """Returns the manifest of the new cache: what follows from its rows joins the fingerprint and the history of its source."""
    before, after = sum(len(source) for source in work.sources), sum(shard.num_sequences for shard in shards)
    step = history_step(plan.spec, shards, **{work.left_out: before - after})
    fingerprint = {
        **work.fingerprint,
        "corpus": {**work.fingerprint["corpus"], "sequences_sha256": plan.sequences_sha256},
        "capture": {**work.fingerprint["capture"], "shard_positions": plan.spec["shard_positions"]},
        "format": {**work.fingerprint.get("format", {}), **work.layout.stored_format},
    }
    former = () if work.merged else work.sources[0].manifest.history
    return Manifest(
        layout=work.layout,
        fingerprint=fingerprint,
        shards=shards,
        skipped=work.skipped,
        created_by=CREATED_BY,
        files=trusted_files(plan.folder),
        history=(*former, step),
    )


def _origin(source: LogitCache, merged: bool) -> dict[str, Any]:
    """Returns the record of a source in the history; if there are several, also what each was made from."""
    manifest = source.manifest
    own = {name: manifest.fingerprint[name] for name in ("corpus", "generation") if name in manifest.fingerprint}
    return {
        **source_of(source.folder, source.identity, manifest),
        **({**own, "history": list(manifest.history)} if merged else {}),
    }

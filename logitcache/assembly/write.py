"""Shards of a planned cache are written one after the other, each recorded when it is complete."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence

from logitcache.assembly.plan import Plan
from logitcache.format.layout import Layout
from logitcache.format.sequences import TokenSequence
from logitcache.format.shards import ShardInfo, ShardWriter
from logitcache.format.targets import SparseTargets
from logitcache.progress import Progress

logger = logging.getLogger("logitcache")

StoredRow = tuple[TokenSequence, SparseTargets]


def complete_shards(plan: Plan, shards: Sequence[int]) -> dict[int, ShardInfo]:
    """Finds those of the shards that are complete, and says so if there are any and some are missing."""
    complete = {index: info for index in shards if (info := plan.finished(index)) is not None}
    if 0 < len(complete) < len(shards):
        logger.info("continuing: %d of %d shards are complete", len(complete), len(shards))
    return complete


def write_shard(plan: Plan, index: int, layout: Layout, rows: Iterable[StoredRow]) -> ShardInfo:
    """Writes a shard and records it; if `rows` raises an exception, no file appears."""
    with ShardWriter(plan.folder, plan.shard_name(index), layout) as writer:
        for sequence, targets in rows:
            writer.write(sequence, targets)
    plan.record(index, writer.info)
    return writer.info


def write_missing(
    plan: Plan, layout: Layout, rows: Callable[[int], Iterable[StoredRow]], label: str
) -> tuple[ShardInfo, ...]:
    """Writes the shards of a cache that are not complete. Returns all its shards, in order.

    rows: yields the rows of the shard with an index.  label: what the progress calls the work.
    """
    every = range(len(plan.shards))
    shards = complete_shards(plan, every)
    done = sum(plan.shards[index].num_positions for index in shards)
    progress = Progress(label, plan.num_positions, done, "positions")

    def counted(index: int) -> Iterator[StoredRow]:
        for sequence, targets in rows(index):
            yield sequence, targets
            progress.advance(len(targets))

    plan.folder.remove_leftovers("data")
    try:
        for index in every:
            shards[index] = shards.get(index) or write_shard(plan, index, layout, counted(index))
    finally:
        progress.close()
    return tuple(shards[index] for index in every)

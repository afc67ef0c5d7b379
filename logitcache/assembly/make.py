"""The way of every command that makes a cache without a teacher: planned, written by one process or many, finished."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic

from logitcache.assembly.placement import Placement, wait_for
from logitcache.assembly.plan import PLAN_NAME, P, new_plan
from logitcache.assembly.resume import begun_plan, finished_cache
from logitcache.assembly.workspace import lock_range, workspace
from logitcache.assembly.write import RowsOf, write_missing, written_shards
from logitcache.format.layout import Layout
from logitcache.format.manifest import MANIFEST_NAME
from logitcache.format.shards import ShardInfo
from logitcache.reading.cache import LogitCache
from logitcache.storage.atomic import space_needed
from logitcache.storage.folder import Folder


@dataclass(frozen=True)
class Work(Generic[P]):
    """The parts of a command that makes a cache.

    kind: type of its plan.  spec: see `Plan`.  label: what the progress calls it.  cut: makes the plan, in the folder.  prepare:
    writes what lies beside the shards.  layout: the columns of the shards.  open_rows: see `write_missing`.  finish: makes a
    cache of all shards.
    """

    kind: type[P]
    spec: Mapping[str, Any]
    label: str
    cut: Callable[[Folder], P]
    prepare: Callable[[Folder], None]
    layout: Callable[[P], Layout]
    open_rows: Callable[[P], RowsOf]
    finish: Callable[[P, tuple[ShardInfo, ...]], LogitCache]


def make_cache(work: Work[P], folder: Folder, placement: Placement, overwrite: bool) -> LogitCache | None:
    """Does the work, from where an interrupted call with the same arguments left it; of a shard range, its part.

    Returns the cache; None if other ranges may have shards to write. Raises UserError if `folder` holds something else or the
    disk is full; shards that are complete by then stay for the next call.
    """
    with workspace(folder, shared=placement.shard_range is not None), space_needed(folder.path):
        if not placement.is_first and not folder.exists(MANIFEST_NAME):
            wait_for(folder, PLAN_NAME, "has dealt the rows to shards")
        if not overwrite and (finished := finished_cache(folder, work.spec)):
            return finished
        with lock_range(folder, placement.shard_range):
            plan = begun_plan(work.kind, folder, work.spec, overwrite)
            if plan is None:
                plan = new_plan(folder, lambda: work.cut(folder))
            if placement.is_first:
                work.prepare(folder)
            written = write_missing(plan, work.layout(plan), work.open_rows, work.label, placement)
        if placement.shard_range is None:
            return work.finish(plan, written_shards(plan, written, str(work.spec["command"])))
    placement.tell_complete(folder)
    return None

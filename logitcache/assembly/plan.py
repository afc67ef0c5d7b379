"""The plan of a cache decides its shards before the first is written, and says which of them are complete.

    OUT/.build/logitcache           marks the folder as ours
    OUT/.build/plan.json            the settings and the shards; its presence means that planning is complete
    OUT/.build/shards/00000.json    what the manifest will say of shard 0, once it is written

Commands keep beside it what else they need to write a shard. What is written of a row depends on nothing but the row, so a
command that was interrupted anywhere ends in the same bytes as one that was not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self, TypeVar

from logitcache.assembly.workspace import abandon, begin, remove_former
from logitcache.format.manifest import BUILD_DIRECTORY
from logitcache.format.shards import ShardInfo, shard_name
from logitcache.storage.folder import Folder

PLAN_NAME = f"{BUILD_DIRECTORY}/plan.json"
SHARD_POSITIONS = 1 << 18
"""Stored positions of a shard, the most that an interruption loses, unless --shard-positions says otherwise."""

P = TypeVar("P", bound="Plan")


@dataclass(frozen=True)
class PlannedShard:
    """Counts of a shard's rows, known before any of them is written.

    num_sequences: rows that it is made from.  num_tokens: tokens that a teacher reads.  file, row: where the rows begin in the
    sources of an import.
    """

    num_positions: int
    num_sequences: int = 0
    num_tokens: int = 0
    file: int = 0
    row: int = 0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The content of plan.json.

    spec: plain JSON of everything that decides what the cache will hold; a command continues its own only.
    column_types: Arrow type of each kept column.  sequences_sha256: of the row ids in order, where they are known.
    """

    folder: Folder
    spec: Mapping[str, Any]
    shards: tuple[PlannedShard, ...]
    column_types: Mapping[str, str] = field(default_factory=dict)
    sequences_sha256: str = ""

    @classmethod
    def read(cls, folder: Folder) -> Self:
        """Reads the plan of an unfinished cache, also as earlier versions wrote it."""
        data = json.loads(folder.read(PLAN_NAME))
        shards = data.pop("shards", None) or [{"num_positions": count} for count in data.pop("num_positions")]
        for shard in shards:
            shard["num_sequences"] = shard.pop("num_rows", shard.get("num_sequences", 0))
        return cls(folder=folder, spec=data.pop("request"), shards=tuple(PlannedShard(**s) for s in shards), **data)

    def write(self) -> None:
        """Writes plan.json atomically."""
        data = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in ("folder", "spec")}
        data |= {"request": self.spec, "shards": [asdict(shard) for shard in self.shards]}
        self.folder.write(PLAN_NAME, json.dumps(data, indent=2, ensure_ascii=False))

    @property
    def num_positions(self) -> int:
        """The stored positions of all shards."""
        return sum(shard.num_positions for shard in self.shards)

    def shard_name(self, index: int) -> str:
        """Returns the final name of a shard, relative to the cache."""
        return shard_name(index, len(self.shards))

    def finished(self, index: int) -> ShardInfo | None:
        """Returns the record of a shard; None if the shard is not complete."""
        if not self.folder.exists(_record_name(index)):
            return None
        info = ShardInfo.from_json(json.loads(self.folder.read(_record_name(index))))
        complete = self.folder.exists(info.name) and self.folder.num_bytes(info.name) == info.num_bytes
        return info if complete else None

    def record(self, index: int, info: ShardInfo) -> None:
        """Marks a shard as complete."""
        self.folder.write(_record_name(index), json.dumps(info.to_json()))


def new_plan(folder: Folder, cut: Callable[[], P], keep: str | None = None) -> P:
    """Plans a cache in an emptied build directory, then removes the cache that it replaces.

    cut: deals the rows to shards; it may write to the build directory, which is emptied again if it raises an exception.  keep:
    name of what stays there in any case.
    """
    begin(folder, keep)
    try:
        plan = cut()
        plan.write()
    except BaseException:
        abandon(folder, keep)
        raise
    remove_former(folder)
    return plan


def _record_name(index: int) -> str:
    return f"{BUILD_DIRECTORY}/shards/{index:05d}.json"

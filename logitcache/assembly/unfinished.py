"""What the build directory of an unfinished cache records: what was asked for, and which shards are complete.

OUT/.build/plan.json            the request, and what was planned for it; its presence means that planning is complete
OUT/.build/shards/00000.json    what the manifest will say of shard 0, once it is written
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from logitcache.errors import UserError
from logitcache.format.manifest import BUILD_DIRECTORY
from logitcache.format.shards import ShardInfo
from logitcache.storage.folder import Folder

PLAN_NAME = f"{BUILD_DIRECTORY}/plan.json"
SHARD_POSITIONS = 1 << 18
"""Stored positions of a shard, the most that an interruption loses, unless --shard-positions says otherwise."""


def read_request(folder: Folder, name: str = PLAN_NAME) -> dict[str, Any] | None:
    """What an unfinished cache was asked to be, if it got as far as a plan, or as the file `name` that records it too."""
    if not folder.exists(name):
        return None
    request: dict[str, Any] = json.loads(folder.read(name))["request"]
    return request


def finished_shard(folder: Folder, index: int) -> ShardInfo | None:
    """What was recorded of a shard, if it is complete."""
    if not folder.exists(_sidecar_name(index)):
        return None
    info = ShardInfo.from_json(json.loads(folder.read(_sidecar_name(index))))
    complete = folder.exists(info.name) and folder.num_bytes(info.name) == info.num_bytes
    return info if complete else None


def record_shard(folder: Folder, index: int, info: ShardInfo) -> None:
    """Marks a shard as complete."""
    folder.write(_sidecar_name(index), json.dumps(info.to_json()))


def differences(recorded: Mapping[str, Any], request: Mapping[str, Any]) -> list[str]:
    """The settings in which two requests differ, in words."""
    return [f"{name} was {old}, now {new}" for name, old, new in compared(recorded, request)]


def refuse_changes(recorded: Mapping[str, Any], request: Mapping[str, Any], folder: Folder, what: str) -> None:
    """Raises UserError naming the first settings in which `request` differs from what `folder` was begun with."""
    changes = differences(recorded, request)
    if changes:
        raise UserError(
            f"--out {folder} holds {what} made otherwise: {first_of(changes)}. "
            "Repeat the former settings, choose another --out, or start anew with --overwrite"
        )


def first_of(changes: list[str]) -> str:
    """Some three of them, and how many more there are."""
    return "; ".join(changes[:3]) + (f" and {len(changes) - 3} more" if len(changes) > 3 else "")


def compared(one: Any, other: Any, path: str = "") -> Iterator[tuple[str, str, str]]:
    """Where two trees of plain JSON types differ: dotted name of the place, its value in the one, in the other, as text."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in {**one, **other}:
            yield from compared(one.get(key), other.get(key), f"{path}.{key}" if path else key)
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for index, (first, second) in enumerate(zip(one, other, strict=True)):
            yield from compared(first, second, f"{path}[{index}]")
    elif one != other:
        yield path, _shown(one), _shown(other)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"{len(value)} items"
    return f"{value[:12]}…" if isinstance(value, str) and len(value) > 48 else str(value)


def _sidecar_name(index: int) -> str:
    return f"{BUILD_DIRECTORY}/shards/{index:05d}.json"

"""The manifest is looked at part by part: all that is wrong with it, and what can still be checked against it."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from logitcache.errors import UserError, one_line
from logitcache.format.layout import NEWEST_FORMAT, Layout
from logitcache.format.manifest import MANIFEST_NAME, Manifest, is_as_written, is_plain
from logitcache.format.shards import ShardInfo
from logitcache.format.tail_parts import PARTS
from logitcache.maintenance.verify.findings import Finding


@dataclass
class Claims:
    """The claims of a manifest, as far as it can be read.

    shards: those whose entries are sound.  named: every file that it names, sound or not.  files: SHA-256 by name.
    sequences_sha256: of the row ids in order.
    """

    shards: list[ShardInfo] = field(default_factory=list)
    named: set[str] = field(default_factory=set)
    files: dict[str, str] = field(default_factory=dict)
    layout: Layout | None = None
    sequences_sha256: str | None = None


def check_manifest(content: bytes, claims: Claims) -> Iterator[Finding]:
    """Yields findings about a manifest; fills `claims`."""
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        yield _finding(f"not JSON in UTF-8 ({one_line(error)})")
        return
    if not isinstance(data, dict):
        yield _finding(f"a JSON object is wanted, this is {json.dumps(data)[:40]}")
        return
    found = list(_check_parts(data, claims))
    version = data.get("format_version", 0)
    if _is_count(version) and version > NEWEST_FORMAT:
        what = f"cache format {version}, this logitcache reads up to format {NEWEST_FORMAT}"
        yield Finding("newer", MANIFEST_NAME, what)  # whose parts may be others
        return
    if not is_as_written(content, data):
        yield _finding("its checksum is not that of its content")
    yield from found
    if not found:
        try:
            Manifest.from_json(data, MANIFEST_NAME)
        except (UserError, ValueError, AttributeError) as error:
            yield _finding(one_line(error))


def _check_parts(data: Mapping[str, Any], claims: Claims) -> Iterator[Finding]:
    for name, holds, wanted in _PARTS:
        if name not in data:
            if name != "history":  # none in format 1
                yield _finding(f"{name} is missing")
        elif not holds(data[name]):
            yield _finding(f"{name} is {_short(data[name])}, {wanted} is wanted")
    layout = data.get("layout")
    if isinstance(layout, dict):
        yield from _check_layout(layout, data.get("fingerprint"), claims)
    files = data.get("files")
    for name, digest in files.items() if isinstance(files, dict) else ():
        claims.named.add(name)
        if not is_plain(name):
            yield _finding(f"files names a file that no cache has: {_short(name)}")
        elif not _is_digest(digest):
            yield _finding(f"files: the SHA-256 of {name} is {_short(digest)}, 64 hexadecimal digits are wanted")
        else:
            claims.files[name] = digest
    entries = data.get("shards")
    for index, entry in enumerate(entries if isinstance(entries, list) else []):
        yield from _check_shard(entry, f"shards[{index}]", claims)
    for name, count in Counter(shard.name for shard in claims.shards).items():
        if count > 1:
            yield _finding(f"names {name} {count} times")
    yield from _check_totals(data, claims)
    fingerprint = data.get("fingerprint")
    corpus = fingerprint.get("corpus") if isinstance(fingerprint, dict) else None
    digest = corpus.get("sequences_sha256") if isinstance(corpus, dict) else None
    claims.sequences_sha256 = digest if isinstance(digest, str) else None


def _check_layout(data: Mapping[str, Any], fingerprint: Any, claims: Claims) -> Iterator[Finding]:
    try:
        layout = Layout.from_json(data)
        numbers = (getattr(layout.tail_parts, part.name) for part in PARTS if part.shape is int)
        counts = (layout.vocab_size, *numbers)
        if not (all(map(_is_count, counts)) and layout.vocab_size):
            raise TypeError("a count is no whole number")
        layout.schema()
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        yield _finding(f"its layout is unreadable ({one_line(error)})")
        return
    claims.layout = layout
    teacher = fingerprint.get("teacher") if isinstance(fingerprint, dict) else None
    vocab_size = teacher.get("vocab_size", layout.vocab_size) if isinstance(teacher, dict) else layout.vocab_size
    if vocab_size != layout.vocab_size:
        yield _finding(
            f"the teacher of its fingerprint has {_short(vocab_size)} tokens, its layout {layout.vocab_size}"
        )


def _check_shard(entry: Any, where: str, claims: Claims) -> Iterator[Finding]:
    if not isinstance(entry, dict):
        yield _finding(f"{where} is {_short(entry)}, an object is wanted")
        return
    name = entry.get("name")
    if isinstance(name, str):
        claims.named.add(name)
        where = f"{where}, {name}"
    problems = [f"{part} is missing" for part in sorted(_SHARD_PARTS.keys() - entry.keys())]
    problems += [f"unknown part {part}" for part in sorted(entry.keys() - _SHARD_PARTS.keys())]
    for part in sorted(_SHARD_PARTS.keys() & entry.keys()):
        holds, wanted = _SHARD_PARTS[part]
        if not holds(entry[part]):
            problems.append(f"{part} is {_short(entry[part])}, {wanted} is wanted")
    if isinstance(name, str) and not is_plain(name):
        problems.append("no cache has a file of this name; it is not opened")
    if problems:
        yield from (_finding(f"{where}: {problem}") for problem in problems)
        return
    shard = ShardInfo.from_json(entry)
    claims.shards.append(shard)
    if sum(shard.row_group_sizes) != shard.num_sequences:
        yield _finding(
            f"{where}: row groups of {sum(shard.row_group_sizes)} rows together, num_sequences is {shard.num_sequences}"
        )


def _check_totals(data: Mapping[str, Any], claims: Claims) -> Iterator[Finding]:
    entries = data.get("shards")
    if not isinstance(entries, list) or len(claims.shards) != len(entries):
        return
    for name in ("num_sequences", "num_positions", "num_bytes"):
        total = sum(getattr(shard, name) for shard in claims.shards)
        if _is_count(data.get(name)) and data[name] != total:
            yield _finding(f"{name} is {data[name]}, its shards add up to {total}")


def _finding(what: str) -> Finding:
    return Finding("manifest", MANIFEST_NAME, what)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _is_share(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and -1e-6 <= value <= 1 + 1e-3


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


_COUNT: tuple[Callable[[Any], bool], str] = (_is_count, "a whole number ≥ 0")
_OBJECT: tuple[Callable[[Any], bool], str] = (lambda value: isinstance(value, dict), "an object")
_LIST: tuple[Callable[[Any], bool], str] = (lambda value: isinstance(value, list), "a list")
_PARTS = [
    ("format_version", *_COUNT),
    ("created_by", _is_text, "text"),
    ("num_sequences", *_COUNT),
    ("num_positions", *_COUNT),
    ("num_bytes", *_COUNT),
    ("skipped", *_OBJECT),
    ("history", *_LIST),
    ("fingerprint", *_OBJECT),
    ("layout", *_OBJECT),
    ("files", *_OBJECT),
    ("shards", *_LIST),
]
_SHARD_PARTS: dict[str, tuple[Callable[[Any], bool], str]] = {f.name: _COUNT for f in fields(ShardInfo)} | {
    "name": (_is_text, "text"),
    "sha256": (_is_digest, "64 hexadecimal digits"),
    "mean_tail_mass": (_is_share, "a number from 0 to 1"),
    "row_group_sizes": (
        lambda sizes: isinstance(sizes, list) and all(_is_count(size) and size for size in sizes),
        "a list of whole numbers ≥ 1",
    ),
}

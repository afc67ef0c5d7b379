"""The manifest, logitcache.json, says what a cache is and was made from. It is written last: with it, a cache is complete."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from types import UnionType
from typing import Any, Self

from logitcache.errors import UserError
from logitcache.format.layout import FORMAT_VERSION, Layout, check_version
from logitcache.format.quantization import PRESETS
from logitcache.format.shards import ShardInfo
from logitcache.format.tail_parts import PARTS
from logitcache.storage.folder import Folder
from logitcache.urls import public_url

MANIFEST_NAME = "logitcache.json"
CARD_NAME = "README.md"
SIGNATURE_NAME = "logitcache.json.sig"
"""Where `ssh-keygen -Y sign` leaves a signature of the manifest; nothing here reads it, it travels with the cache."""
UNFINISHED_NAME = "logitcache.json.unfinished"
"""The manifest of a cache whose files are on their way to where this one lies; removed when logitcache.json is there."""
BUILD_DIRECTORY = ".build"
TOKENIZER_DIRECTORY = "tokenizer"
CHECKSUM_NAME = "checksum"
"""Part of the manifest that tells damage of it. Whoever alters a cache can take a new one: the identity tells that."""

MAX_MANIFEST_BYTES = 1 << 26
"""A cache of 10 billion positions has a manifest of some 20 MB."""
MAX_NAME_BYTES, MAX_PART_BYTES = 1000, 240
"""Of a file's name in a cache, and of each part between its slashes: of the latter file systems take 255 bytes."""
MAX_VOCAB_SIZE = 1 << 24
"""A hundred times that of any tokenizer: what is altered to more would be asked for as memory."""


@dataclass(frozen=True)
class Manifest:
    """The content of logitcache.json.

    layout: the columns.  fingerprint: teacher, tokenizer, corpus and capture settings, as the build recorded them.  skipped:
    documents left out, by reason.  shards: in row order.  files: SHA-256 of every other file that a reader trusts, by its name
    in the cache (tokenizer, tail groups).  history: the steps that made this cache of others, oldest first: {"command":
    "slice", …} with its settings and the `created_by` of the version that ran it.
    """

    layout: Layout
    fingerprint: Mapping[str, Any]
    shards: tuple[ShardInfo, ...]
    skipped: Mapping[str, int]
    created_by: str
    files: Mapping[str, str] = field(default_factory=dict)
    history: tuple[Mapping[str, Any], ...] = ()

    @property
    def num_sequences(self) -> int:
        """Rows of the cache."""
        return sum(shard.num_sequences for shard in self.shards)

    @property
    def num_positions(self) -> int:
        """Stored positions of the cache."""
        return sum(shard.num_positions for shard in self.shards)

    @property
    def num_entries(self) -> int:
        """Entries of all positions."""
        return sum(shard.num_entries for shard in self.shards)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max((shard.longest for shard in self.shards), default=0)

    @property
    def mean_tail_mass(self) -> float:
        """Mean over all positions of the teacher's probability outside the entries."""
        return sum(shard.mean_tail_mass * shard.num_positions for shard in self.shards) / max(self.num_positions, 1)

    @property
    def num_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.num_bytes for shard in self.shards)

    def to_json(self) -> dict[str, Any]:
        """Returns plain JSON types; totals are there for people and checked against the shards on reading."""
        return {
            "format_version": self.layout.format_version,
            "created_by": self.created_by,
            "num_sequences": self.num_sequences,
            "num_positions": self.num_positions,
            "num_bytes": self.num_bytes,
            "skipped": dict(self.skipped),
            "history": [dict(step) for step in self.history],
            "fingerprint": dict(self.fingerprint),
            "layout": self.layout.to_json(),
            "files": dict(self.files),
            "shards": [shard.to_json() for shard in self.shards],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str) -> Self:
        """Returns the manifest of `to_json`.

        Raises UserError for a newer format, values of another kind than ours, names of files that no cache has or that stand
        there twice, SHA-256 that are none, and totals that are not theirs.
        """
        try:
            check_version(data["format_version"], where)
            check_shape(data, _SHAPE, "manifest")
            json.dumps(
                data["fingerprint"], ensure_ascii=False
            ).encode()  # its digest is taken; half a surrogate has none
            shards = tuple(ShardInfo.from_json(shard) for shard in data["shards"])
            manifest = cls(
                Layout.from_json(data["layout"]),
                data["fingerprint"],
                shards,
                data["skipped"],
                data["created_by"],
                data["files"],
                tuple(data.get("history", ())),
            )
            totals = {name: data[name] for name in ("num_sequences", "num_positions", "num_bytes")}
            names = manifest.layout.schema().names
            if len(set(names)) < len(names):
                raise ValueError("its layout has a column twice")
        except UserError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{where} is not a cache manifest of format {FORMAT_VERSION}: {error!r}") from error
        if manifest.layout.vocab_size > MAX_VOCAB_SIZE:
            raise UserError(
                f"{where}: no vocabulary has {manifest.layout.vocab_size} tokens, at most {MAX_VOCAB_SIZE} are read"
            )
        digests = {shard.name: shard.sha256 for shard in shards}
        if len(digests) < len(shards):
            raise UserError(f"{where} was altered: it names a shard twice")
        for name, digest in (*digests.items(), *manifest.files.items()):
            if not is_plain(name):
                raise UserError(f"{where} names a file that no cache has: {name[:80]!r}")
            if not re.fullmatch("[0-9a-f]{64}", digest):
                raise UserError(f"{where} was altered: {digest[:80]!r} of {name} is no SHA-256")
        for shard in shards:
            if shard.num_sequences > shard.num_bytes:  # each has an id of 128 bits
                raise UserError(
                    f"{where} was altered: {shard.num_sequences} rows in {shard.num_bytes} bytes of {shard.name}"
                )
            if sum(shard.row_group_sizes) != shard.num_sequences:
                raise UserError(
                    f"{where} was altered: the row groups of {shard.name} have not {shard.num_sequences} rows"
                )
        for total, value in totals.items():
            if value != (found := getattr(manifest, total)):
                raise UserError(f"{where} was altered: {total} is {value}, its shards add up to {found}")
        return manifest

    def to_bytes(self) -> bytes:
        """Returns the content of logitcache.json, with its own checksum at the end."""
        data = self.to_json() | {CHECKSUM_NAME: _NO_CHECKSUM}
        content = (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()
        return content[:_CHECKSUM_AT] + _checksum(content).encode() + content[_CHECKSUM_AT + len(_NO_CHECKSUM) :]

    def write(self, folder: Folder) -> None:
        """Writes logitcache.json."""
        folder.write(MANIFEST_NAME, self.to_bytes())


_NO_CHECKSUM = "0" * 64
_CHECKSUM_AT = -len(f'{_NO_CHECKSUM}"\n}}\n')


def _checksum(content: bytes) -> str:
    """Returns the SHA-256 of a manifest's content with zeros for the digits of its own checksum."""
    end = content[_CHECKSUM_AT + len(_NO_CHECKSUM) :]
    return hashlib.sha256(content[:_CHECKSUM_AT] + _NO_CHECKSUM.encode() + end).hexdigest()


def is_as_written(content: bytes, parts: Container[str]) -> bool:
    """Tells whether a manifest is, byte for byte, as it was written; True if it has no checksum of its own to tell by.

    parts: the names of its parts. The checksum is known by its place too, should its name be what is damaged.
    """
    if CHECKSUM_NAME not in parts and not re.fullmatch(rb'[0-9a-f]{64}"\n}\n', content[_CHECKSUM_AT:]):
        return True
    return content[_CHECKSUM_AT:][: len(_NO_CHECKSUM)] == _checksum(content).encode()


_OF_A_TEACHER = ("architecture", "dtype", "engine", "engine_version", "route", "revision", "content_sha256")
_SHARD: dict[str, Any] = {
    **dict.fromkeys(["name", "sha256"], str),
    **dict.fromkeys(["num_sequences", "num_tokens", "num_positions", "num_entries", "longest", "num_bytes"], int),
    "mean_tail_mass": float,
    "row_group_sizes": [int],
}
_SHAPE: dict[str, Any] = {
    "created_by": str,
    "skipped": {...: int},
    "history": ([{"command": str}],),
    "fingerprint": {
        "teacher": ({"name": (str,), **dict.fromkeys(_OF_A_TEACHER, (str | None,))},),
        "tokenizer": (
            {
                **{"vocab_size": int, "vocabulary_sha256": str, "special_tokens": (dict,)},
                **dict.fromkeys(["merges_sha256", "chat_template_sha256"], (str | None,)),
            },
        ),
        "corpus": ({"sources": ([{"name": str}],)},),
        "capture": ({"top_k": (int | None,)},),
        **dict.fromkeys(["generation", "format"], (dict,)),
    },
    "layout": {
        "vocab_size": int,
        **{part.layout_key: part.shape if part.since == 1 else (part.shape,) for part in PARTS},
        "columns": {...: str},
        "precision": (set(PRESETS),),
    },
    "files": {...: str},
    "shards": [_SHARD],
}
"""What readers rely on, see `check_shape`; format 1 has neither history nor precision."""


def check_shape(value: Any, shape: Any, where: str) -> None:
    """Raises TypeError naming a part that has not the shape, KeyError for one that is missing.

    shape: a type, or a union of types; a set of texts, one of which it is; [the shape of every item]; {name: shape of that
    part}, with other parts beside them, or with `...` for the name of any part. The shape of a part that may be missing stands
    in a tuple. Numbers are finite and not below 0; whole numbers pass for floats.
    """
    kind = shape if isinstance(shape, type | UnionType) else str if isinstance(shape, set) else type(shape)
    fits = isinstance(value, (int, float) if kind is float else kind)
    if kind in (int, float):
        fits = fits and not isinstance(value, bool) and 0 <= value < 1 << 63
    if not fits or (isinstance(shape, set) and value not in shape):
        raise TypeError(f"{where} is {value!r}"[:200])
    if isinstance(shape, list):
        for index, item in enumerate(value):
            check_shape(item, shape[0], f"{where}[{index}]")
    elif isinstance(shape, dict):
        for name, part in (dict.fromkeys(value, shape[...]) if ... in shape else shape).items():
            if not isinstance(part, tuple):
                check_shape(value[name], part, f"{where}.{name}")
            elif name in value:
                check_shape(value[name], part[0], f"{where}.{name}")


def is_plain(name: str) -> bool:
    """Tells whether a file name in a manifest is a path that stays in the cache, as every file system writes and holds it."""
    path = PurePosixPath(name)
    plain = name.isprintable() and str(path) == name and not {"\\", ":"} & set(name)
    if not plain or path.is_absolute() or ".." in path.parts:
        return False
    return len(name.encode()) <= MAX_NAME_BYTES and all(len(part.encode()) <= MAX_PART_BYTES for part in path.parts)


def fingerprint_digest(fingerprint: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of a fingerprint as JSON with sorted keys, 64 hexadecimal digits: equal for caches made alike."""
    canonical = json.dumps(fingerprint, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def cache_identity(folder: Folder) -> str:
    """Returns the SHA-256 of logitcache.json, which names that of every file, 64 hexadecimal digits: it identifies the cache."""
    return hashlib.sha256(folder.read(MANIFEST_NAME)).hexdigest()


def read_identity(text: str) -> str:
    """Reads the identity that somebody wrote for `--against`, in lower case. Raises UserError if it is none."""
    if not re.fullmatch("[0-9a-fA-F]{64}", text):
        raise UserError(
            f"--against {text[:80]}: the 64 hexadecimal digits of a cache's identity are wanted, as `logitcache build` and "
            "`logitcache push` print it"
        )
    return text.lower()


def check_identity(identity: str, against: str | None, where: str) -> None:
    """Raises UserError if the identity of a cache is not `against`, the one that somebody trusts, unless that is None."""
    if against is not None and identity != read_identity(against):
        raise UserError(f"{where} is not the cache that --against names: its identity is {identity}")


def read_manifest(folder: Folder) -> Manifest:
    """Reads logitcache.json of a finished cache.

    Raises UserError if there is none (saying how to finish an interrupted build), if it does not parse, and for a newer format.
    """
    return parse_manifest(manifest_content(folder), folder.where(MANIFEST_NAME))


def manifest_content(folder: Folder) -> bytes:
    """Reads logitcache.json of a finished cache as it is. Raises UserError if there is none."""
    if not folder.exists(MANIFEST_NAME):
        if folder.exists(UNFINISHED_NAME):
            raise UserError(
                f"{folder} is not whole: `logitcache push` did not get to its end, the same push continues it"
            )
        if folder.exists(BUILD_DIRECTORY):
            raise UserError(f"{folder} is an unfinished build: run the same `logitcache` command again to finish it")
        if not folder.exists():
            raise UserError(folder.absence())
        raise UserError(f"{folder} is not a cache: it has no {MANIFEST_NAME}")
    return folder.read(MANIFEST_NAME, MAX_MANIFEST_BYTES)


def parse_manifest(content: bytes, path: str) -> Manifest:
    """Parses a manifest; `path` names it in messages. Raises UserError as `read_manifest` does."""
    try:
        data = json.loads(content)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON that can be read ({error})") from error
    return Manifest.from_json(data, path)


_PLACES = ("path", "name")
"""Keys of a record under which a path or URL may stand."""


def source_of(folder: Folder, identity: str, manifest: Manifest) -> dict[str, Any]:
    """Returns, as plain JSON, where a cache lay, by which hashes it is told from others, how much it held."""
    return {
        "path": folder.location,
        "manifest_sha256": identity,
        "fingerprint_sha256": fingerprint_digest(manifest.fingerprint),
        "sequences": manifest.num_sequences,
        "positions": manifest.num_positions,
        "bytes": manifest.num_bytes,
    }


def without_secrets_of_sources(manifest: Manifest) -> Manifest:
    """Returns a manifest whose records of sources, of an earlier version perhaps, hold no secrets of URLs.

    Raises UserError for records within records without end, which no command writes.
    """
    fingerprint = dict(manifest.fingerprint)
    try:
        if "corpus" in fingerprint:
            fingerprint["corpus"] = _public(fingerprint["corpus"])
        return replace(manifest, fingerprint=fingerprint, history=tuple(_public(step) for step in manifest.history))
    except RecursionError:
        raise UserError("the manifest was altered: its history or its corpus is nested too deep to be read") from None


def _public(record: Any) -> Any:
    if isinstance(record, Mapping):
        return {
            name: public_url(value) if name in _PLACES and isinstance(value, str) else _public(value)
            for name, value in record.items()
        }
    return [_public(item) for item in record] if isinstance(record, list | tuple) else record

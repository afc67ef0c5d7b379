"""Verification of a cache: everything that is wrong with it, found in one pass over its files."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np

from logitcache.errors import one_line
from logitcache.format.layout import Layout
from logitcache.format.manifest import BUILD_DIRECTORY, MANIFEST_NAME, TOKENIZER_DIRECTORY, read_identity, read_manifest
from logitcache.format.shards import ShardInfo
from logitcache.format.tail_basis import check_tail_basis, read_tail_basis
from logitcache.format.tail_groups import read_tail_groups
from logitcache.format.tail_parts import TAIL_BASIS_NAME, TAIL_FILES, TAIL_GROUPS_NAME
from logitcache.maintenance.verify.findings import Finding
from logitcache.maintenance.verify.manifest import Claims, check_manifest
from logitcache.maintenance.verify.shard import Claimed, check_shard, fetched_sha256, shard_files
from logitcache.progress import Progress
from logitcache.reading.row_index import deal
from logitcache.storage.atomic import space_needed
from logitcache.storage.folder import Folder, Stored

RECORD = np.dtype([("id", "S16"), ("shard", "<i4"), ("row", "<i8")])
"""A row id in one of the 256 files to which they are dealt: of a thousand million rows, each holds some 120 MiB."""
WAITING_ROWS = 1 << 16
"""Row ids that are kept until they are dealt to the files."""


class Verification(Iterator[Finding]):
    """One pass over the cache at a path or a URL: an iterator of everything that is wrong with it.

    against: the identity that the cache must have. If it has another (is_another), that is the only finding, and nothing else
    is read.  num_rows, num_positions, num_bytes, num_shards: checked so far.

    Raises UserError if there is no cache at all, for an identity that is none, and for a store that stops answering. What is
    damaged does not keep the rest from being checked. Memory and disk are bounded: one row group is in memory at a time, of a
    remote cache up to four shards lie in temporary files; row ids go to others, in which repeated ones are then looked for.
    """

    def __init__(self, path: str | Path, against: str | None = None) -> None:
        against = None if against is None else read_identity(against)
        self._folder = Folder(path)
        self._has_manifest = self._folder.exists(MANIFEST_NAME)
        if not self._has_manifest and (self._folder.exists(BUILD_DIRECTORY) or not self._folder.names("data")):
            read_manifest(self._folder)  # says why this is no cache
        self._manifest = self._read_manifest() if self._has_manifest else b""
        self._identity = hashlib.sha256(self._manifest).hexdigest() if isinstance(self._manifest, bytes) else "unknown"
        self._against = against
        self.is_another = against not in (None, self._identity)
        self._began = time.monotonic()
        self._ended: float | None = None
        self.num_rows = self.num_positions = self.num_bytes = self.num_shards = 0
        self._findings = self._check()

    def __next__(self) -> Finding:
        try:
            return next(self._findings)
        except StopIteration:
            self._ended = self._ended or time.monotonic()
            raise

    def summary(self) -> str:
        """Says in one line what was checked."""
        seconds = (self._ended or time.monotonic()) - self._began
        return (
            f"{self.num_rows:,} rows, {self.num_positions:,} positions and {self.num_bytes:,} bytes in "
            f"{self.num_shards:,} shard{'s' * (self.num_shards != 1)} checked in {seconds:.1f} s"
        )

    def _read_manifest(self) -> bytes | Exception:
        try:
            return self._folder.read(MANIFEST_NAME)
        except Exception as error:  # every store has its own kinds
            return error

    def _stored(self) -> dict[str, Stored]:
        """Lists the files of a URL; nothing, if the store lists none."""
        if self._folder.local is not None:
            return {}
        try:
            return self._folder.stored()
        except FileNotFoundError:
            return {}

    def _check(self) -> Iterator[Finding]:
        claims = Claims()
        if not self._has_manifest:
            yield Finding("missing", MANIFEST_NAME, "there are shards, and no manifest")
        elif isinstance(self._manifest, Exception):
            yield Finding("damaged", MANIFEST_NAME, f"cannot be read ({one_line(self._manifest)})")
        elif self.is_another:
            yield Finding("another", MANIFEST_NAME, f"its SHA-256 is {self._identity}, {self._against} is wanted")
        else:
            yield from check_manifest(self._manifest, claims)
        if self.is_another:
            return
        named = self._has_manifest and bool(claims.named)
        present = [name for name in self._folder.files("data") if not name.split("/")[-1].startswith(".")]
        yield from _check_files(self._folder, claims)
        if named:
            yield from _check_unnamed(self._folder, present, claims)
            shards: list[tuple[str, ShardInfo | None]] = [(shard.name, shard) for shard in claims.shards]
            shards += [(name, None) for name in present if name in claims.named - {name for name, _ in shards}]
        else:
            shards = [(name, None) for name in present if name.endswith(".parquet")]
        yield from self._check_shards(shards, claims)

    def _check_shards(self, shards: list[tuple[str, ShardInfo | None]], claims: Claims) -> Iterator[Finding]:
        claimed = Claimed(claims.layout, {shard.sha256: shard for shard in reversed(claims.shards)})
        total = sum(shard.num_sequences for shard in claims.shards)
        progress = Progress("verifying", total or None, 0, "rows")
        with tempfile.TemporaryDirectory(prefix="logitcache-") as directory, space_needed(directory):
            ids = _RowIds(Path(directory) / "ids")

            def seen(row_ids: np.ndarray, first: int, num_positions: int) -> None:
                ids.add(row_ids, self.num_shards, first)
                self.num_rows += len(row_ids)
                self.num_positions += num_positions
                progress.advance(len(row_ids))

            try:
                with closing(shard_files(self._folder, [name for name, _ in shards], self._stored())) as files:
                    for (name, info), path in zip(shards, files, strict=True):
                        yield from check_shard(path, name, info, claimed, seen)
                        self.num_bytes += path.stat().st_size if isinstance(path, Path) and path.exists() else 0
                        self.num_shards += 1
            finally:
                progress.close()
            whole = len(shards) == len(claims.shards) and self.num_rows == total
            as_made = whole and claims.sequences_sha256 == ids.sha256
            if whole and claims.sequences_sha256 is not None and not as_made:
                what = "the rows are not those, in their order, that sequences_sha256 in its fingerprint was taken of"
                yield Finding("manifest", MANIFEST_NAME, what)
            if not as_made:  # otherwise the corpus held them twice
                yield from ids.repeated([name for name, _ in shards])


class _RowIds:
    """The ids of all rows: their SHA-256 in order, and those that come twice."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self._directory = directory
        self._waiting: list[tuple[np.ndarray, int, int]] = []
        self._num_waiting = 0
        self._digest = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """The SHA-256 of the ids so far, as hexadecimal digits one after the other."""
        return self._digest.hexdigest()

    def add(self, row_ids: np.ndarray, shard: int, first: int) -> None:
        """Takes in the ids, S16 [n], of consecutive rows of a shard."""
        self._digest.update(row_ids.tobytes().hex().encode())
        self._waiting.append((row_ids, shard, first))
        self._num_waiting += len(row_ids)
        if self._num_waiting >= WAITING_ROWS:
            self._deal()

    def _deal(self) -> None:
        if not self._num_waiting:
            return
        records = np.empty(self._num_waiting, RECORD)
        records["id"] = np.concatenate([row_ids for row_ids, _, _ in self._waiting])
        records["shard"] = np.concatenate([np.full(len(row_ids), shard) for row_ids, shard, _ in self._waiting])
        records["row"] = np.concatenate([np.arange(len(row_ids)) + first for row_ids, _, first in self._waiting])
        deal(
            self._directory, records, np.concatenate([row_ids.view(np.uint8)[::16] for row_ids, _, _ in self._waiting])
        )
        self._waiting, self._num_waiting = [], 0

    def repeated(self, names: list[str]) -> Iterator[Finding]:
        """Yields a finding for each row that was there before; `names` are the shards' in the order of their numbers."""
        self._deal()
        for bucket in sorted(self._directory.iterdir(), key=lambda path: int(path.name)):
            records = np.fromfile(bucket, RECORD)
            records = records[np.argsort(records["id"], kind="stable")]
            for i in np.flatnonzero(records["id"][1:] == records["id"][:-1]).tolist():
                former, again = records[i], records[i + 1]
                where = "it" if former["shard"] == again["shard"] else names[former["shard"]]
                what = f"the same tokens and loss mask as row {former['row']} of {where}"
                row_id = again["id"].ljust(16, b"\0").hex()
                yield Finding("repeated", names[again["shard"]], what, row=int(again["row"]), row_id=row_id)


def _check_files(folder: Folder, claims: Claims) -> Iterator[Finding]:
    for name, expected in claims.files.items():
        try:
            if not folder.exists(name):
                yield Finding("missing", name, "the manifest names it, it is not there")
            elif (digest := fetched_sha256(folder, name)) != expected:
                yield Finding("altered", name, f"its SHA-256 is {digest[:12]}…, the manifest says {expected[:12]}…")
        except Exception as error:
            yield Finding("damaged", name, f"cannot be read ({one_line(error)})")
    stored = [name for name in TAIL_FILES if folder.exists(name)]
    if claims.files:
        for name in [*folder.files(TOKENIZER_DIRECTORY), *stored]:
            if name not in claims.named:
                yield Finding("foreign", name, "a reader would trust it")
    if (layout := claims.layout) is None:
        return
    for name, (what, check) in _TAIL_FILES.items():
        if name not in layout.tail_parts.files:
            continue
        if name in stored:
            try:
                yield from check(BytesIO(folder.read(name)), layout)
            except Exception as error:  # Arrow has its own kinds
                yield Finding("damaged", name, f"cannot be read ({one_line(error)})")
        elif name not in claims.files:
            yield Finding("missing", name, f"the layout has {what}, their file is not there")


def _check_tail_groups(file: BinaryIO, layout: Layout) -> Iterator[Finding]:
    vocab_size, num_groups = layout.vocab_size, layout.tail_parts.groups
    groups = read_tail_groups(file)
    if len(groups) != vocab_size:
        yield Finding("layout", TAIL_GROUPS_NAME, f"{len(groups):,} ids, the vocabulary has {vocab_size:,}")
    outside = np.flatnonzero(~((groups >= 0) & (groups < num_groups)))
    if len(outside):
        what = f"id {outside[0]} is in group {groups[outside[0]]}, there are {num_groups} ({len(outside):,} such ids)"
        yield Finding("layout", TAIL_GROUPS_NAME, what)


def _check_tail_basis(file: BinaryIO, layout: Layout) -> Iterator[Finding]:
    basis = read_tail_basis(file)
    try:
        check_tail_basis(basis, layout)
    except ValueError as error:
        yield Finding("layout", TAIL_BASIS_NAME, one_line(error))


_TAIL_FILES: dict[str, tuple[str, Callable[[BinaryIO, Layout], Iterator[Finding]]]] = {
    TAIL_GROUPS_NAME: ("tail groups", _check_tail_groups),
    TAIL_BASIS_NAME: ("coefficients in a tail basis", _check_tail_basis),
}


def _check_unnamed(folder: Folder, present: list[str], claims: Claims) -> Iterator[Finding]:
    for name in present:
        if name in claims.named:
            continue
        try:
            num_bytes = folder.num_bytes(name)
            alike = {shard.sha256: shard.name for shard in claims.shards if shard.num_bytes == num_bytes}
            same = alike.get(fetched_sha256(folder, name)) if alike else None
        except Exception as error:
            yield Finding("foreign", name, f"cannot be read ({one_line(error)})")
            continue
        if same is not None and not folder.exists(same):
            yield Finding("swapped", name, f"this is what the manifest calls {same}")
        else:
            yield Finding("foreign", name, f"{num_bytes:,} bytes" + (f", the same as {same}" if same else ""))

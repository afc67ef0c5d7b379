"""Shard files: written whole or not at all, in row groups small enough to shuffle by, read with checksums checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, NoReturn, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from logitcache.errors import UserError
from logitcache.format.atomic import file_sha256
from logitcache.format.codec import DecodedRows, Layout, encode, read_layout
from logitcache.format.sequences import TokenSequence
from logitcache.format.storage import Folder
from logitcache.format.targets import SparseTargets

ROW_GROUP_BYTES = 4 << 20
"""Uncompressed; about 1.7 MiB on disk, 8 000 positions at k = 64."""


@dataclass(frozen=True)
class ShardInfo:
    """What the manifest records of a shard.

    name: relative to the cache, with forward slashes.  num_entries: over all positions.  longest: tokens of the longest
    sequence.  mean_tail_mass: mean over the positions of the teacher's probability outside the entries.
    row_group_sizes: rows of each row group, so that a reader shuffles without opening shards.
    """

    name: str
    num_sequences: int
    num_tokens: int
    num_positions: int
    num_entries: int
    longest: int
    mean_tail_mass: float
    row_group_sizes: tuple[int, ...]
    num_bytes: int
    sha256: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of `to_json`."""
        return cls(**{**data, "row_group_sizes": tuple(data["row_group_sizes"])})


def shard_name(index: int, count: int) -> str:
    """Name of shard `index` of `count`, relative to the cache: data/train-00000-of-00128.parquet."""
    return f"data/train-{index:05d}-of-{count:05d}.parquet"


class ShardWriter:
    """Context manager that writes one shard; the file appears when the block ends without an exception."""

    def __init__(self, folder: Folder, name: str, layout: Layout) -> None:
        self._folder = folder
        self._name = name
        self._layout = layout
        self._buffer: list[tuple[TokenSequence, SparseTargets]] = []
        self._buffered_bytes = 0
        self._bytes_per_position = 4 * sum(count for _, count in layout.values_per_position().values())
        self._counts = {"num_sequences": 0, "num_tokens": 0, "num_positions": 0, "num_entries": 0}
        self._longest = 0
        self._tail_mass = 0.0
        self._row_group_sizes: list[int] = []
        self._digest = ""
        self._num_bytes = 0

    def __enter__(self) -> Self:
        self._opened = self._open()
        self._parquet = self._opened.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.__exit__(kind, error, trace)

    @contextmanager
    def _open(self) -> Iterator[pq.ParquetWriter]:
        """The file is closed on every way out: an open one would go on holding its space on a full disk."""
        with self._folder.writing(self._name) as temporary:
            with (
                pa.OSFile(str(temporary), "wb") as file,
                pq.ParquetWriter(file, self._layout.schema(), **self._layout.parquet_options()) as parquet,
            ):
                yield parquet
                self._flush()
            self._digest = file_sha256(temporary)
            self._num_bytes = temporary.stat().st_size

    def write(self, sequence: TokenSequence, targets: SparseTargets) -> None:
        """Adds a row. `targets` holds the sequence's stored positions, in order."""
        self._buffer.append((sequence, targets))
        self._buffered_bytes += 5 * len(sequence.input_ids) + 8 * targets.token_ids.size
        self._buffered_bytes += self._bytes_per_position * len(targets)
        if self._buffered_bytes >= ROW_GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if not self._buffer:
            return
        sequences, targets = zip(*self._buffer, strict=True)
        table = encode(sequences, targets, self._layout)
        self._parquet.write_table(table, row_group_size=len(table))
        self._counts["num_sequences"] += len(table)
        self._counts["num_tokens"] += sum(len(s.input_ids) for s in sequences)
        self._counts["num_positions"] += sum(len(t) for t in targets)
        self._counts["num_entries"] += len(table["token_ids"].combine_chunks().values)
        self._tail_mass += sum(float(np.exp(t.tail_logprob, dtype=np.float64).sum()) for t in targets)
        self._row_group_sizes.append(len(table))
        self._longest = max(self._longest, *(len(s.input_ids) for s in sequences))
        self._buffer.clear()
        self._buffered_bytes = 0

    @property
    def info(self) -> ShardInfo:
        """What was written; valid after the block."""
        return ShardInfo(
            name=self._name,
            longest=self._longest,
            mean_tail_mass=self._tail_mass / max(self._counts["num_positions"], 1),
            row_group_sizes=tuple(self._row_group_sizes),
            num_bytes=self._num_bytes,
            sha256=self._digest,
            **self._counts,
        )


class ShardReader:
    """One shard; a local file is checked against its SHA-256 when first read, pages are checked against their CRC.

    Holds no file open: a cache may have thousands of shards.
    """

    def __init__(self, folder: Folder, info: ShardInfo) -> None:
        self._folder = folder
        self.path = folder.where(info.name)
        self._info = info
        self._verified = False

    def check_size(self) -> None:
        """Raises UserError when the file is missing or has not the manifest's size."""
        if not self._folder.exists(self._info.name):
            raise UserError(f"{self.path} is missing, though the manifest names it: fetch or build this shard again")
        size = self._folder.num_bytes(self._info.name)
        if size != self._info.num_bytes:
            self._refuse(f"truncated or altered: {size} bytes, the manifest says {self._info.num_bytes}")

    def read_row_group(self, index: int) -> DecodedRows:
        """Decodes a row group. Raises UserError where the file is not the one that the manifest names."""
        if not self._verified:
            self.check_size()
            if self._folder.local and file_sha256(self._folder.local / self._info.name) != self._info.sha256:
                self._refuse("altered: its SHA-256 is not the manifest's")
            self._verified = True
        try:
            with (
                self._folder.open(self._info.name) as source,
                pq.ParquetFile(source, page_checksum_verification=True, pre_buffer=True) as file,
            ):
                table = file.read_row_group(index, use_threads=False)
        except (OSError, pa.ArrowException) as error:
            self._refuse(f"altered: {error} (row group {index})")
        layout = read_layout(table.schema.metadata, self.path)
        if len(table) != self._info.row_group_sizes[index]:
            self._refuse(f"altered: {len(table)} rows in row group {index}")
        return DecodedRows(table, layout)

    def _refuse(self, what: str) -> NoReturn:
        raise UserError(f"{self.path} was {what}. Fetch or build this shard again")

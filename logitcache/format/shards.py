"""Shard files: written whole or not at all, in row groups small enough to shuffle by, read with checksums checked."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem

from logitcache.errors import UserError
from logitcache.format.atomic import atomic_path, file_sha256
from logitcache.format.codec import DecodedRows, Layout, encode, read_layout
from logitcache.format.sequences import TokenSequence
from logitcache.format.targets import SparseTargets

ROW_GROUP_BYTES = 4 << 20
"""Uncompressed; about 1.7 MiB on disk, 8 000 positions at k = 64."""


@dataclass(frozen=True)
class ShardInfo:
    """What the manifest records of a shard.

    name: relative to the cache, with forward slashes.  num_entries: over all positions.  mean_tail_mass: mean over the
    positions of the teacher's probability outside the entries.
    """

    name: str
    num_sequences: int
    num_tokens: int
    num_positions: int
    num_entries: int
    mean_tail_mass: float
    num_bytes: int
    sha256: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of `to_json`."""
        return cls(**data)


def shard_name(index: int, count: int, split: str = "train") -> str:
    """Name of shard `index` of `count`, relative to the cache: data/train-00000-of-00128.parquet."""
    return f"data/{split}-{index:05d}-of-{count:05d}.parquet"


class ShardWriter:
    """Context manager that writes one shard; the file appears when the block ends without an exception."""

    def __init__(self, root: Path, name: str, layout: Layout) -> None:
        self._final = root / name
        self._name = name
        self._layout = layout
        self._buffer: list[tuple[TokenSequence, SparseTargets]] = []
        self._buffered_bytes = 0
        self._counts = {"num_sequences": 0, "num_tokens": 0, "num_positions": 0, "num_entries": 0}
        self._tail_mass = 0.0
        self._digest = ""
        self._num_bytes = 0

    def __enter__(self) -> Self:
        self._final.parent.mkdir(parents=True, exist_ok=True)
        self._atomic = atomic_path(self._final)
        self._temporary = self._atomic.__enter__()
        self._parquet = pq.ParquetWriter(self._temporary, self._layout.schema(), **self._layout.parquet_options())
        return self

    def write(self, sequence: TokenSequence, targets: SparseTargets) -> None:
        """Adds a row. `targets` holds the sequence's stored positions, in order."""
        self._buffer.append((sequence, targets))
        self._buffered_bytes += 4 * len(sequence.input_ids) + 8 * targets.token_ids.size
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
        self._buffer.clear()
        self._buffered_bytes = 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._flush()
                self._parquet.close()
                self._digest = file_sha256(self._temporary)
                self._num_bytes = self._temporary.stat().st_size
        except BaseException as failure:
            self._atomic.__exit__(type(failure), failure, failure.__traceback__)
            raise
        self._atomic.__exit__(kind, error, trace)

    @property
    def info(self) -> ShardInfo:
        """What was written; valid after the block."""
        return ShardInfo(
            name=self._name,
            mean_tail_mass=self._tail_mass / max(self._counts["num_positions"], 1),
            num_bytes=self._num_bytes,
            sha256=self._digest,
            **self._counts,
        )


class ShardReader:
    """One shard; a local file is checked against its SHA-256 when first read, pages are checked against their CRC."""

    def __init__(self, filesystem: AbstractFileSystem, root: str, info: ShardInfo) -> None:
        self._filesystem = filesystem
        self.path = f"{root.rstrip('/')}/{info.name}"
        self._info = info
        self._lock = threading.Lock()
        self._file: pq.ParquetFile | None = None
        self._layout: Layout | None = None

    def _open(self) -> tuple[pq.ParquetFile, Layout]:
        with self._lock:
            if self._file is None or self._layout is None:
                self.check_size()
                if _is_local(self._filesystem) and file_sha256(Path(self.path)) != self._info.sha256:
                    raise UserError(
                        f"{self.path} was altered: its SHA-256 is not the manifest's. Fetch or build this shard again"
                    )
                source = self.path if _is_local(self._filesystem) else self._filesystem.open(self.path, "rb")
                self._file = pq.ParquetFile(source, page_checksum_verification=True, pre_buffer=True)
                self._layout = read_layout(self._file.schema_arrow.metadata, self.path)
            return self._file, self._layout

    def check_size(self) -> None:
        """Raises UserError when the file is missing or has not the manifest's size."""
        if not self._filesystem.exists(self.path):
            raise UserError(f"{self.path} is missing, though the manifest names it: fetch or build this shard again")
        size = self._filesystem.size(self.path)
        if size != self._info.num_bytes:
            raise UserError(
                f"{self.path} was truncated or altered: {size} bytes, the manifest says {self._info.num_bytes}. "
                "Fetch or build this shard again"
            )

    @property
    def row_group_sizes(self) -> list[int]:
        """Rows of each row group."""
        metadata = self._open()[0].metadata
        return [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]

    def read_row_group(self, index: int) -> DecodedRows:
        """Decodes a row group. Raises UserError when a page's checksum fails."""
        file, layout = self._open()
        try:
            with self._lock:
                table = file.read_row_group(index, use_threads=False)
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(
                f"{self.path}, row group {index}, was altered: {error}. Fetch or build this shard again"
            ) from error
        return DecodedRows(table, layout)


def check_shards(readers: Sequence[ShardReader]) -> None:
    """Raises UserError for the first shard that is missing or has a wrong size."""
    for reader in readers:
        reader.check_size()


def _is_local(filesystem: AbstractFileSystem) -> bool:
    return "file" in (filesystem.protocol if isinstance(filesystem.protocol, tuple) else (filesystem.protocol,))

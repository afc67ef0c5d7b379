"""Shard files are written whole or not at all, in row groups small enough to shuffle by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from logitcache.format.codebook import Codebook
from logitcache.format.codec import MOST_PADDED, encode
from logitcache.format.layout import Layout
from logitcache.format.sequences import TokenSequence
from logitcache.format.targets import SparseTargets, concatenate
from logitcache.storage.atomic import file_sha256
from logitcache.storage.folder import Folder

ROW_GROUP_BYTES = 4 << 20
"""Uncompressed; 8 000 positions at k = 64, on disk some 0.7 MiB, and 2 MiB where exact."""


@dataclass(frozen=True)
class ShardInfo:
    """The manifest's record of a shard.

    name: relative to the cache, with forward slashes.  num_entries: over all positions.  longest: tokens of the longest
    sequence.  mean_tail_mass: mean over the positions of the teacher's probability outside the entries.  row_group_sizes: rows
    of each row group, so that a reader shuffles without opening shards.
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
        """Returns the record as plain JSON types."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Returns the record of `to_json`."""
        return cls(**{**data, "row_group_sizes": tuple(data["row_group_sizes"])})


def shard_name(index: int, count: int) -> str:
    """Returns the name of shard `index` of `count`, relative to the cache: data/train-00000-of-00128.parquet."""
    return f"data/train-{index:05d}-of-{count:05d}.parquet"


class ShardWriter:
    """A context manager that writes one shard; the file appears when the block ends without an exception."""

    def __init__(self, folder: Folder, name: str, layout: Layout) -> None:
        self._folder = folder
        self._name = name
        self._layout = layout
        self._buffer: list[tuple[TokenSequence, SparseTargets]] = []
        self._buffered_bytes = self._num_buffered = self._width = 0
        self._codebook: Codebook | None = None
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
        """Closes the file on every way out: an open one would go on taking space on a full disk."""
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
        width = targets.token_ids.shape[1]
        if max(self._width, width) * (self._num_buffered + len(targets)) > MOST_PADDED // 4:
            self._flush()  # one wide position would make all of them wide
        self._width = max(self._width, width)
        self._num_buffered += len(targets)
        self._buffer.append((sequence, targets))
        self._buffered_bytes += 5 * len(sequence.input_ids) + 8 * targets.token_ids.size
        self._buffered_bytes += self._bytes_per_position * len(targets)
        if self._buffered_bytes >= ROW_GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if not self._buffer:
            return
        sequences, targets = zip(*self._buffer, strict=True)
        if self._codebook is None:
            self._codebook = Codebook.of(concatenate(targets), self._layout.quantization)
            self._parquet.add_key_value_metadata(self._codebook.to_metadata())
        table = encode(sequences, targets, self._layout, self._codebook)
        self._parquet.write_table(table, row_group_size=len(table))
        self._counts["num_sequences"] += len(table)
        self._counts["num_tokens"] += sum(len(s.input_ids) for s in sequences)
        self._counts["num_positions"] += sum(len(t) for t in targets)
        self._counts["num_entries"] += int(pc.sum(table["num_entries"].combine_chunks().values).as_py() or 0)
        self._tail_mass += sum(float(np.exp(t.tail_logprob, dtype=np.float64).sum()) for t in targets)
        self._row_group_sizes.append(len(table))
        self._longest = max(self._longest, *(len(s.input_ids) for s in sequences))
        self._buffer.clear()
        self._buffered_bytes = self._num_buffered = self._width = 0

    @property
    def info(self) -> ShardInfo:
        """The record of the shard; valid after the block."""
        return ShardInfo(
            name=self._name,
            longest=self._longest,
            mean_tail_mass=self._tail_mass / max(self._counts["num_positions"], 1),
            row_group_sizes=tuple(self._row_group_sizes),
            num_bytes=self._num_bytes,
            sha256=self._digest,
            **self._counts,
        )

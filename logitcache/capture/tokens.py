"""Token sequences on their way through a build, as Parquet files beside the cache."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from logitcache.format.codec import flat
from logitcache.format.sequences import TokenSequence, columns_text

TOKENS_SCHEMA = pa.schema(
    {"input_ids": pa.list_(pa.int32()), "loss_mask": pa.list_(pa.bool_()), "columns": pa.string(), "where": pa.string()}
)
ROWS_PER_GROUP = 1024


class TokensWriter:
    """Context manager: writes sequences to a file. Kept columns become JSON text, what JSON has not becomes a string."""

    def __init__(self, path: Path) -> None:
        self._parquet = pq.ParquetWriter(path, TOKENS_SCHEMA, compression="zstd")
        self._rows: list[dict[str, Any]] = []

    def write(self, sequence: TokenSequence) -> None:
        """Appends a sequence."""
        self._rows.append(
            {
                "input_ids": sequence.input_ids,
                "loss_mask": sequence.loss_mask,
                "columns": columns_text(sequence.columns),
                "where": sequence.where,
            }
        )
        if len(self._rows) == ROWS_PER_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._parquet.write_table(pa.Table.from_pylist(self._rows, TOKENS_SCHEMA))
            self._rows.clear()

    def __enter__(self) -> TokensWriter:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        with self._parquet:
            if kind is None:
                self._flush()


def read_tokens(source: BinaryIO) -> Iterator[TokenSequence]:
    """The sequences of such a file, in order."""
    with pq.ParquetFile(source) as file:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group)
            ids, offsets = flat(table["input_ids"])
            mask, _ = flat(table["loss_mask"])
            # A build that an earlier version began has no places.
            places = table["where"].to_pylist() if "where" in table.column_names else [""] * len(table)
            for row, columns in enumerate(table["columns"].to_pylist()):
                tokens = slice(offsets[row], offsets[row + 1])
                yield TokenSequence(ids[tokens], mask[tokens], json.loads(columns), places[row])

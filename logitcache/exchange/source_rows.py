"""Files to import → their rows, one at a time, from any row on."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from logitcache.errors import UserError, one_line
from logitcache.exchange.source_files import SourceFile
from logitcache.exchange.values import BadRow

ROWS_AT_A_TIME = 16
"""Of a Parquet file; a row of 32 000 tokens at k = 64 has some 6 MiB."""
BUFFER_BYTES = 1 << 20
"""Of a column's chunk that are read at a time: row groups may be larger than memory."""


@dataclass(frozen=True)
class SourceRow:
    """A row of a source.  where: file and row, for messages.  error: why there are no values."""

    values: Mapping[str, Any]
    where: str
    error: str | None = None

    def value(self, name: str) -> Any:
        """Returns a value as its file has it; None if the row has none. Raises BadRow for an unreadable row."""
        if self.error:
            raise BadRow(self.error)
        return self.values.get(name)

    def has(self, name: str) -> bool:
        """Tells whether the row has a value, other than null, of that name."""
        value = self.values.get(name)
        return value.is_valid if isinstance(value, pa.Scalar) else value is not None


def read_rows(file: SourceFile, columns: Sequence[str], first: int = 0) -> Iterator[SourceRow]:
    """Yields the rows of a file from number `first` on, with those of the columns that the file has.

    Raises UserError if the file is damaged.
    """
    return (_read_parquet if file.name.endswith(".parquet") else _read_json_lines)(file, columns, first)


def _read_parquet(file: SourceFile, columns: Sequence[str], first: int) -> Iterator[SourceRow]:
    row = first
    with file.opened() as source, _readable(file, lambda: f"row {row}"):
        parquet = pq.ParquetFile(source, buffer_size=BUFFER_BYTES, pre_buffer=False)
        present = [name for name in columns if name in parquet.schema_arrow.names]
        begins = 0
        for group in range(parquet.num_row_groups):
            count = parquet.metadata.row_group(group).num_rows
            if begins + count > first:
                skipped = max(first - begins, 0)
                for batch in parquet.iter_batches(ROWS_AT_A_TIME, [group], present, use_threads=False):
                    for index in range(min(skipped, len(batch)), len(batch)):
                        values = {name: batch.column(name)[index] for name in present}
                        yield SourceRow(values, f"{file.url}, row {row}")
                        row += 1
                    skipped = max(skipped - len(batch), 0)
            begins += count


def _read_json_lines(file: SourceFile, columns: Sequence[str], first: int) -> Iterator[SourceRow]:
    number = row = 0
    with file.opened() as source, _readable(file, lambda: f"line {number + 1}"):
        for number, line in enumerate(_uncompressed(source, file.name), start=1):
            if not line.strip():
                continue
            if row >= first:
                yield _parse(line, columns, f"{file.url}, line {number}")
            row += 1


def _uncompressed(source: BinaryIO, name: str) -> Iterator[bytes]:
    if name.endswith(".gz"):
        return iter(gzip.GzipFile(fileobj=source))
    if name.endswith(".zst"):
        return iter(io.BufferedReader(pa.CompressedInputStream(source, "zstd")))  # notices a frame that was cut off
    return iter(source)


def _parse(line: bytes, columns: Sequence[str], where: str) -> SourceRow:
    try:
        values = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return SourceRow({}, where, f"not JSON ({one_line(error)})")
    if not isinstance(values, dict):
        return SourceRow({}, where, f"a JSON object is wanted, this is {type(values).__name__}")
    found = {name: values[name] for name in columns if name in values}
    if b"\\ud" in line.lower():
        try:
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return SourceRow({}, where, "half a surrogate pair, which is no text")
    return SourceRow(found, where)


@contextmanager
def _readable(file: SourceFile, where: Callable[[], str]) -> Iterator[None]:
    """Raises UserError for what a damaged file, or a store that stops answering, makes its readers raise."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of Parquet, of the two kinds of compression, of every store
        why = "the file is damaged" if file.is_local else "the file is damaged, or the store does not answer"
        raise UserError(f"{file.url}, {where()}: not readable, {why} ({one_line(error)})") from error

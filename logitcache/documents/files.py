"""Files of documents → their rows, one at a time, in order."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from logitcache.documents.arrow import read_arrow
from logitcache.documents.document import Document
from logitcache.documents.json_text import parse_json
from logitcache.errors import UserError, one_line

MAX_TEXT_FILE_BYTES = 64 << 20
"""A .txt file is one document and is read whole."""

Reader = Callable[[Path], Iterator[Document]]


def find_reader(path: Path) -> Reader | None:
    """Returns the reader for a file, by the end of its name; None for a kind that is not read.

    A row that cannot be read has an error. The reader raises UserError if the rest of the file cannot be read.
    """
    return next((read for suffix, read in READERS.items() if path.name.endswith(suffix)), None)


def _read_jsonl(path: Path) -> Iterator[Document]:
    number = 0
    try:
        with io.BufferedReader(pa.input_stream(path, compression="detect")) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _parse_line(line, f"{path}, line {number}", number)
    except OSError as error:
        raise UserError(
            f"{path}, after line {number}: not readable, or its compressed data is damaged ({one_line(error)})"
        ) from error


def _parse_line(line: bytes, where: str, number: int) -> Document:
    try:
        values = parse_json(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return Document({}, where, f"not JSON ({error})", number)
    except ValueError as error:
        return Document({}, where, str(error), number)
    if not isinstance(values, dict):
        return Document({}, where, f"a JSON object is wanted, this is {type(values).__name__}", number)
    return Document(values, where, row=number)


def _read_parquet(path: Path) -> Iterator[Document]:
    row = 0
    try:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=256):
            for values, error in read_arrow(batch):
                yield Document(values, f"{path}, row {row}", error, row)
                row += 1
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}, after row {row}: not readable as Parquet ({one_line(error)})") from error


def _read_text(path: Path) -> Iterator[Document]:
    if path.stat().st_size > MAX_TEXT_FILE_BYTES:
        raise UserError(
            f"{path}: a .txt file is one document, and this one has more than {MAX_TEXT_FILE_BYTES >> 20} MiB; "
            'write its documents as lines of a .jsonl file, {"text": "…"}'
        )
    try:
        yield Document({"text": path.read_text(encoding="utf-8")}, str(path))
    except UnicodeDecodeError as error:
        yield Document({}, str(path), f"not UTF-8 ({error})")


READERS: dict[str, Reader] = {
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".jsonl.zst": _read_jsonl,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}

"""Sources → documents, one at a time: files, folders, globs, or anything that `datasets.load_dataset` takes."""

from __future__ import annotations

import glob
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from logitcache.documents.document import Document
from logitcache.errors import UserError

MAX_TEXT_FILE_BYTES = 64 << 20
"""A .txt file is one document and is read whole."""


@dataclass(frozen=True)
class Source:
    """Something that documents come from. identity: what the fingerprint records of it, without reading documents."""

    name: str
    identity: Callable[[], dict[str, Any]]
    documents: Callable[[], Iterator[Document]]


def find_sources(data: str | Sequence[str], split: str = "train", config_name: str | None = None) -> list[Source]:
    """Resolves `--data`, in a stable order.

    Each item is a file (.jsonl, .jsonl.gz, .jsonl.zst, .parquet, .txt), a folder or glob of such, or a dataset's name.
    Raises UserError for a path that does not exist and for a folder or glob without such files.
    """
    sources: list[Source] = []
    for item in [data] if isinstance(data, str) else data:
        path = Path(item).expanduser()
        if path.is_file():
            sources.append(_file_source(path, path.name))
        elif path.is_dir() and (found := sorted(p for p in path.rglob("*") if _reader(p) and p.is_file())):
            sources += [_file_source(p, p.relative_to(path).as_posix()) for p in found]
        elif glob.has_magic(item):
            matches = sorted(Path(p) for p in glob.iglob(str(path), recursive=True) if _reader(Path(p)))
            if not matches:
                raise UserError(f"--data {item}: no file matches (of {', '.join(_READERS)})")
            sources += [_file_source(p, p.name) for p in matches]
        elif path.is_dir() or (re.fullmatch(r"[\w.-]+(/[\w.-]+)?", item) and path.suffix not in _DATA_SUFFIXES):
            sources.append(_dataset_source(item, split, config_name))
        else:
            raise UserError(f"--data {item}: no such file or folder")
    return sources


def _file_source(path: Path, name: str) -> Source:
    read = _reader(path)
    if read is None:
        raise UserError(f"--data {path}: unknown kind of file, accepted are {', '.join(_READERS)}")

    def identity() -> dict[str, Any]:
        with path.open("rb") as file:
            return {
                "name": name,
                "num_bytes": path.stat().st_size,
                "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
            }

    return Source(str(path), identity, lambda: read(path))


def _dataset_source(name: str, split: str, config_name: str | None) -> Source:
    def documents() -> Iterator[Document]:
        from datasets import load_dataset

        row = 0
        try:
            for values in load_dataset(name, config_name, split=split, streaming=True):
                yield Document(values, f"{name} ({split}), row {row}")
                row += 1
        except Exception as error:  # whatever the hub client, a builder or the network raises
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            what = f"reading stops after row {row}" if row else "neither a file nor a dataset that loads"
            raise UserError(f"--data {name}: {what} ({reason})") from error

    return Source(name, lambda: {"name": name, "config_name": config_name, "split": split}, documents)


def _read_jsonl(path: Path) -> Iterator[Document]:
    number = 0
    try:
        with io.BufferedReader(pa.input_stream(path, compression="detect")) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _parse_line(line, f"{path}, line {number}")
    except OSError as error:
        raise UserError(
            f"{path}, after line {number}: not readable, or its compressed data is damaged ({error})"
        ) from error


def _parse_line(line: bytes, where: str) -> Document:
    try:
        text = line.decode("utf-8-sig")
        values = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(values, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        return Document({}, where, f"not JSON ({error})")
    if not isinstance(values, dict):
        return Document({}, where, f"a JSON object is wanted, this is {type(values).__name__}")
    return Document(values, where)


def _read_parquet(path: Path) -> Iterator[Document]:
    row = 0
    try:
        file = pq.ParquetFile(path)
        for batch in file.iter_batches(batch_size=256):
            for values in batch.to_pylist():
                yield Document(values, f"{path}, row {row}")
                row += 1
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}, after row {row}: not readable as Parquet ({error})") from error


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


_READERS: dict[str, Callable[[Path], Iterator[Document]]] = {
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".jsonl.zst": _read_jsonl,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}


_DATA_SUFFIXES = {".jsonl", ".json", ".gz", ".zst", ".parquet", ".txt", ".csv", ".tsv", ".arrow"}
"""A missing file of such a name is no dataset of the hub."""


def _reader(path: Path) -> Callable[[Path], Iterator[Document]] | None:
    return next((read for suffix, read in _READERS.items() if path.name.endswith(suffix)), None)

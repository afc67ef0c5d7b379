"""The documents of a corpus, one at a time: from files, folders, globs, or anything that `datasets.load_dataset` takes."""

from __future__ import annotations

import glob
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logitcache.documents.arrow import read_arrow
from logitcache.documents.document import Document
from logitcache.documents.files import READERS, find_reader
from logitcache.errors import UserError
from logitcache.ranges import one_or_more


@dataclass(frozen=True)
class Source:
    """A source of documents. identity: returns what the fingerprint records of it, without reading documents."""

    name: str
    identity: Callable[[], dict[str, Any]]
    documents: Callable[[], Iterator[Document]]


def find_sources(data: str | Sequence[str], split: str = "train", config_name: str | None = None) -> list[Source]:
    """Returns the sources that `--data` names, in a stable order: files, folders and globs of files, and names of datasets.

    Raises UserError if a path does not exist, or a folder or glob has no file that is read.
    """
    sources: list[Source] = []
    for item in map(str, one_or_more(data)):
        path = Path(item).expanduser()
        if path.is_file():
            sources.append(_file_source(path, path.name))
        elif path.is_dir() and (found := sorted(p for p in path.rglob("*") if find_reader(p) and p.is_file())):
            sources += [_file_source(p, p.relative_to(path).as_posix()) for p in found]
        elif glob.has_magic(item):
            matches = sorted(Path(p) for p in glob.iglob(str(path), recursive=True) if find_reader(Path(p)))
            if not matches:
                raise UserError(f"--data {item}: no file matches (of {', '.join(READERS)})")
            sources += [_file_source(p, p.name) for p in matches]
        elif path.is_dir() or (re.fullmatch(r"[\w.-]+(/[\w.-]+)?", item) and path.suffix not in _DATA_SUFFIXES):
            sources.append(_dataset_source(item, split, config_name))
        else:
            raise UserError(f"--data {item}: no such file or folder")
    return sources


def _file_source(path: Path, name: str) -> Source:
    read = find_reader(path)
    if read is None:
        raise UserError(f"--data {path}: unknown kind of file, accepted are {', '.join(READERS)}")

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
            # As tables: only their types say which nulls are absent keys, and text that is not UTF-8 spoils its row only.
            for table in load_dataset(name, config_name, split=split, streaming=True).with_format("arrow"):
                for values, error in read_arrow(table):
                    yield Document(values, f"{name} ({split}), row {row}", error, row)
                    row += 1
        except Exception as error:  # whatever the hub client, a builder or the network raises
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            what = f"reading stops after row {row}" if row else "neither a file nor a dataset that loads"
            raise UserError(f"--data {name}: {what} ({reason})") from error

    return Source(name, lambda: {"name": name, "config_name": config_name, "split": split}, documents)


_DATA_SUFFIXES = {".jsonl", ".json", ".gz", ".zst", ".parquet", ".txt", ".csv", ".tsv", ".arrow"}
"""A missing file of such a name is no dataset of the hub."""

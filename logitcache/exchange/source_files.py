"""SOURCE arguments → files, local or at any URL that fsspec reads, in a fixed order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

import fsspec
from fsspec.core import has_magic
from fsspec.implementations.local import LocalFileSystem

from logitcache.errors import UserError, one_line
from logitcache.urls import public_url, split_query

SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst")
_CHECKSUMS = ("ETag", "etag", "md5Hash", "blob_id", "sha256", "checksum")
"""What stores say of a file's content, by the names that their file systems use."""


@dataclass(frozen=True)
class SourceFile:
    """A file to import.  path: as its file system has it.  name: relative to the argument, without a query."""

    filesystem: fsspec.AbstractFileSystem = field(repr=False)
    path: str
    name: str

    @property
    def url(self) -> str:
        """Path, or URL with its protocol."""
        return self.path if self.is_local else public_url(str(self.filesystem.unstrip_protocol(self.path)))

    @property
    def is_local(self) -> bool:
        """Whether it lies on this machine."""
        return isinstance(self.filesystem, LocalFileSystem)

    @contextmanager
    def opened(self) -> Iterator[BinaryIO]:
        """Opens the file. Raises UserError if it cannot be opened; the end of the block closes it."""
        with _answering(self.url):
            file = cast(BinaryIO, self.filesystem.open(self.path, "rb"))
        with file:
            yield file

    def identity(self) -> dict[str, Any]:
        """Returns name, size and checksum of the content: SHA-256 of a local file, the store's own word for a remote one."""
        with _answering(self.url):
            about = self.filesystem.info(self.path)
            known = next((str(about[name]) for name in _CHECKSUMS if about.get(name)), None)
            if self.is_local:
                with self.opened() as file:
                    known = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
        return {"name": self.name, "bytes": int(about["size"] or 0), "checksum": known}


@dataclass(frozen=True)
class Source:
    """A SOURCE argument. root: folder of its files.  is_folder: whether it is one itself."""

    argument: str
    filesystem: fsspec.AbstractFileSystem = field(repr=False)
    root: str
    files: Sequence[SourceFile]
    is_folder: bool

    def identity(self) -> dict[str, Any]:
        """Returns path, name, number of files, bytes, and a SHA-256 over the identities of all files, for a fingerprint."""
        found = [file.identity() for file in self.files]
        digest = hashlib.sha256()
        for file in found:
            digest.update(f"{file['name']}\0{file['bytes']}\0{file['checksum']}\n".encode())
        local, shown = isinstance(self.filesystem, LocalFileSystem), public_url(self.argument)
        return {
            "path": str(Path(shown).expanduser().absolute()) if local else shown,
            "name": PurePosixPath(shown.rstrip("/")).name if local else shown,
            "num_files": len(found),
            "bytes": sum(file["bytes"] for file in found),
            "sha256": digest.hexdigest(),
        }


def find_sources(arguments: Sequence[str]) -> list[Source]:
    """Finds files, folders and patterns, in the order of the arguments; files of one argument in that of their names.

    Raises UserError for what is not there, holds no file of a kind in SUFFIXES, or lies in a store that does not answer.
    """
    if not arguments:
        raise UserError("SOURCE is missing: name the files, folders or URLs to import")
    return [_find(argument) for argument in arguments]


def read_beside(source: Source, name: str) -> Mapping[str, bytes]:
    """Returns the content, by URL, of every file `name` in the folders that hold files of a source, or else in its root."""
    folders = sorted({_folder_of(file.path) for file in source.files})
    for group in (folders, [source.root]):
        found = {}
        for folder in group:
            file = SourceFile(source.filesystem, f"{folder}/{name}", name)
            with _answering(file.url):
                if source.filesystem.isfile(file.path):
                    found[file.url] = cast(bytes, source.filesystem.cat_file(file.path))
        if found:
            return found
    return {}


def _find(argument: str) -> Source:
    try:
        filesystem, path = fsspec.url_to_fs(argument, **({"auto_mkdir": False} if "://" not in argument else {}))
    except (ImportError, ValueError) as error:
        raise UserError(f"{argument}: no file system for such a URL ({one_line(error)})") from error
    path = path.rstrip("/") or path
    with _answering(argument):
        filesystem.invalidate_cache()
        if filesystem.isfile(path):
            root, paths = _folder_of(path), [path]
        elif filesystem.isdir(path):
            root, paths = path, sorted(found for found in filesystem.find(path) if found.endswith(SUFFIXES))
        elif "**" in path and "http" in filesystem.protocol:
            raise UserError(f"{argument}: the listings of a web server may go in circles; write a pattern without **")
        elif has_magic(argument):
            paths = sorted(str(found) for found in filesystem.glob(path) if str(found).endswith(SUFFIXES))
            root = _folder_of(paths[0]) if paths else path
        else:
            raise UserError(f"{argument}: no such file or folder")
    if not paths:
        raise UserError(f"{argument}: no file of a kind that is read here ({', '.join(SUFFIXES)})")
    if not split_query(paths[0])[0].endswith(SUFFIXES):
        raise UserError(f"{argument}: unknown kind of file, accepted are {', '.join(SUFFIXES)}")
    names = [split_query(found)[0].removeprefix(f"{root.rstrip('/')}/") for found in paths]
    files = [SourceFile(filesystem, found, name) for found, name in zip(paths, names, strict=True)]
    return Source(argument, filesystem, root, files, is_folder=root == path)


def _folder_of(path: str) -> str:
    """Returns the folder that holds a file, as its file system has it: that of a web server is a URL."""
    return split_query(path)[0].rpartition("/")[0]


@contextmanager
def _answering(url: str) -> Iterator[None]:
    """Raises UserError for whatever a file system raises in the block."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # every store has its own kinds
        raise UserError(f"{url}: cannot be read ({one_line(error) or type(error).__name__})") from error

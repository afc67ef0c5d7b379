"""A folder, local or at any URL that fsspec reads and writes; what is written there appears when it is complete."""

from __future__ import annotations

import glob
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from logitcache.errors import UserError, one_line
from logitcache.format.atomic import TEMPORARY_SUFFIX, atomic_path


class Folder:
    """Files by their names relative to one folder. path: as given.  local: the same as a Path, None at a URL.

    Raises UserError where no installed file system reads such a URL, and from every method where a store does not answer.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self._connect()
        self.local = Path(self._root) if isinstance(self._connected, LocalFileSystem) else None

    def __repr__(self) -> str:
        return f"Folder({self.path!r})"

    def __str__(self) -> str:
        return self.path

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Folder) and self.path == other.path

    def __hash__(self) -> int:
        return hash(self.path)

    def where(self, name: str = "") -> str:
        """Path or URL of a file, for messages and for other libraries."""
        return f"{self.path.rstrip('/')}/{name}" if name else self.path

    @property
    def location(self) -> str:
        """The path, and the same for all ways to write that of a local folder."""
        return str(self.local.resolve()) if self.local else self.path

    def lies_in(self, other: Folder) -> bool:
        """Whether this folder is the other one or lies in it."""
        return self._place.is_relative_to(other._place)

    @property
    def _place(self) -> PurePosixPath:
        """The same for all ways to write a path or URL, in no two file systems the same."""
        return PurePosixPath(str(self._filesystem.protocol), self.local.resolve() if self.local else self._root)

    def exists(self, name: str = "") -> bool:
        """Whether there is such a file or folder, asked anew every time."""
        with self.answering():
            self._filesystem.invalidate_cache()
            return bool(self._filesystem.exists(self._full(name)))

    def names(self, name: str = "") -> list[str]:
        """Names of what a folder holds, sorted; empty where there is no such folder."""
        try:
            with self.answering():
                self._filesystem.invalidate_cache()
                found = self._filesystem.ls(self._full(name), detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        # An object store may list the folder itself.
        return sorted(PurePosixPath(path).name for path in found if path.rstrip("/") != self._full(name).rstrip("/"))

    def files(self, name: str) -> list[str]:
        """Names, relative to this folder, of all files below the folder `name`, sorted."""
        with self.answering():
            self._filesystem.invalidate_cache()
            found = self._filesystem.find(self._full(name))
        return sorted(path.removeprefix(f"{self._root.rstrip('/')}/") for path in found)

    def num_bytes(self, name: str) -> int:
        """Size of a file."""
        with self.answering():
            return int(self._filesystem.size(self._full(name)))

    def open(self, name: str, num_bytes: int | None = None) -> BinaryIO:
        """A file to read from anywhere in it.

        num_bytes: its size, where that is known: a store is then asked for what is read, and for no megabytes ahead.
        """
        options = {} if num_bytes is None else {"size": num_bytes, "cache_type": "none"}
        with self.answering():
            return cast(BinaryIO, self._filesystem.open(self._full(name), "rb", **options))

    def read(self, name: str) -> bytes:
        """A whole file. Raises FileNotFoundError."""
        with self.answering():
            return cast(bytes, self._filesystem.cat_file(self._full(name)))

    def fetch(self, name: str, path: Path) -> None:
        """Copies a file to a local path, which is overwritten. Raises FileNotFoundError."""
        with self.answering():
            self._filesystem.get_file(self._full(name), str(path))

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Yields a local path to write; on success the file appears as `name`, on any exception nothing does.

        Raises UserError when the disk is full or the URL does not take the file.
        """
        if self.local is not None:
            final = self.local / name
            final.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(final) as path:
                yield path
            return
        with tempfile.TemporaryDirectory(prefix="logitcache-") as directory:
            path = Path(directory) / PurePosixPath(name).name
            with atomic_path(path) as temporary:
                yield temporary
            try:
                self._filesystem.put_file(str(path), self._full(name))
            except Exception as error:  # every store has its own kinds
                raise UserError(f"{self.where(name)} cannot be written ({one_line(error)})") from error

    def write(self, name: str, content: bytes | str) -> None:
        """Writes a whole file; text becomes UTF-8."""
        with self.writing(name) as path:
            path.write_bytes(content.encode() if isinstance(content, str) else content)

    def remove(self, name: str) -> None:
        """Removes a file, or a folder with all that it holds; nothing where there is none."""
        if self.exists(name):
            full = self._full(name)  # a store would take `[1]` in it for a pattern, and remove other folders
            with self.answering():
                self._filesystem.rm(full if self.local else glob.escape(full), recursive=True)

    def remove_leftovers(self, name: str) -> None:
        """Removes what killed writers left in a folder."""
        for leftover in self.names(name):
            if leftover.endswith(TEMPORARY_SUFFIX):
                self.remove(f"{name}/{leftover}")

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Raises UserError for what a store raises in the block, of whatever kind, but for a file that is missing."""
        try:
            yield
        except Exception as error:
            if self.local is not None or isinstance(error, (UserError, FileNotFoundError, NotADirectoryError)):
                raise
            raise UserError(f"{self}: this URL does not answer ({one_line(error)})") from error

    def _connect(self) -> None:
        try:
            self._connected, self._root = fsspec.url_to_fs(self.path)
        except (ImportError, ValueError) as error:
            raise UserError(f"{self.path}: no file system for such a URL ({one_line(error)})") from error
        self._process = os.getpid()

    @property
    def _filesystem(self) -> fsspec.AbstractFileSystem:
        """Connected by this process: connections are not forked."""
        if self._process != os.getpid():
            self._connect()
        return self._connected

    def _full(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}" if name else self._root

    def __reduce__(self) -> Any:
        return Folder, (self.path,)

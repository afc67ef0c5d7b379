"""A folder, local or at any URL that fsspec reads and writes; what is written there appears when it is complete.

Of a local folder only regular files are read, see `regular_files`. Of a web server no listing is read: it is a page that may name
anything.
"""

from __future__ import annotations

import base64
import errno
import glob
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

import fsspec
from fsspec.callbacks import NoOpCallback
from fsspec.implementations.local import LocalFileSystem

from logitcache.errors import UserError, one_line
from logitcache.storage.atomic import TEMPORARY_SUFFIX, atomic_path, disk_is_full, space_needed, writable
from logitcache.storage.hub_errors import hub_refusal
from logitcache.storage.regular_files import regular_file
from logitcache.urls import public_url, without_secrets

_EXTRAS = {"hf": "hub", "s3": "s3", "gs": "gs"}
_SHA256_NOTE = "logitcache-sha256"
"""S3's own checksum, an ETag, is no checksum of the content where that came in parts or is encrypted with a key of KMS."""
_CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_ENDPOINT_URL, where it is not Amazon's), or `aws configure`",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or `gcloud auth application-default login`",
}


MAX_READ_BYTES = 1 << 28
"""Of a file that is read as a whole: a tokenizer of a million tokens has some 50 MB."""


class Unreachable(UserError):
    """A store that did not answer, or not to the end: the same may succeed when it is tried again."""


@dataclass(frozen=True)
class Stored:
    """A store's record of a file.  num_bytes: None if it does not tell.

    algorithm, digest: a checksum that it took of the content, if it tells one: "md5", "sha256" or "git" (SHA-1 of `blob
    <size>\\0` and the content), hexadecimal.
    """

    num_bytes: int | None
    algorithm: str | None = None
    digest: str = ""


class Folder:
    """Files by their names relative to one folder.  path: as given.  local: the same as a Path, None at a URL.

    As text it is the path without the secrets of a URL (`public_url`), for messages, logs and records. Raises UserError if no
    installed file system reads such a URL, and from every method if a store does not answer.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self._connect()
        self.local = Path(self._root) if isinstance(self._connected, LocalFileSystem) else None

    def __repr__(self) -> str:
        return f"Folder({str(self)!r})"

    def __str__(self) -> str:
        return public_url(self.path)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Folder) and self.path == other.path

    def __hash__(self) -> int:
        return hash(self.path)

    def where(self, name: str = "") -> str:
        """Returns the path or URL of a file, for messages."""
        return f"{str(self).rstrip('/')}/{name}" if name else str(self)

    @property
    def location(self) -> str:
        """The path as records have it: the same for all ways to write that of a local folder."""
        return str(self.local.resolve()) if self.local else str(self)

    def lies_in(self, other: Folder) -> bool:
        """Tells whether this folder is the other one or lies in it."""
        return self._place.is_relative_to(other._place)

    @property
    def _place(self) -> PurePosixPath:
        """Path or URL, the same for all ways to write it, in no two file systems the same."""
        return PurePosixPath(str(self._filesystem.protocol), self.local.resolve() if self.local else self._root)

    def exists(self, name: str = "") -> bool:
        """Tells whether there is such a file or folder; the store is asked anew every time."""
        with self.answering():
            self._filesystem.invalidate_cache()
            if self._filesystem.exists(self._full(name)):
                return True
            if self.local is None:
                with suppress(FileNotFoundError):  # what else `exists` may have taken for absence is raised
                    self._filesystem.info(self._full(name))
            return False

    def absence(self) -> str:
        """Says that there is no such folder, and why, if the store tells."""
        try:
            with self.answering():
                self._filesystem.info(self._root)
        except FileNotFoundError as error:
            if refusal := hub_refusal(error, str(self)):
                return refusal
        return f"{self} does not exist"

    def names(self, name: str = "") -> list[str]:
        """Lists the names in a folder, sorted; empty if there is no such folder, or a link."""
        if self._on_web or self._is_link(name):
            return []
        try:
            with self.answering():
                self._filesystem.invalidate_cache()
                found = self._filesystem.ls(self._full(name), detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        # An object store may list the folder itself.
        return sorted(PurePosixPath(path).name for path in found if path.rstrip("/") != self._full(name).rstrip("/"))

    def files(self, name: str) -> list[str]:
        """Lists all files below the folder `name`, relative to this one, sorted; a link is a file, wherever it leads."""
        if self._on_web:
            return []
        if self._is_link(name):
            return [name]
        with self.answering():
            self._filesystem.invalidate_cache()
            found = self._filesystem.find(self._full(name))
        return sorted(path.removeprefix(f"{self._root.rstrip('/')}/") for path in found)

    def stored(self) -> dict[str, Stored]:
        """Returns all files below this folder by their names, from one listing; none of a web server.

        Raises FileNotFoundError, for example of a bucket.
        """
        if self._on_web:
            return {}
        with self.answering():
            self._filesystem.invalidate_cache()
            found = self._filesystem.find(self._root, detail=True)
        root = f"{self._root.rstrip('/')}/"
        if self._root in found:
            raise UserError(f"{self} is a file, a folder is wanted")
        return {
            path.removeprefix(root): _stored(info, self._on_s3)
            for path, info in found.items()
            if not path.endswith("/")
        }

    def look_up(self, name: str) -> Stored | None:
        """Returns a store's record of one file; None if it is missing."""
        try:
            with self.answering():
                self._filesystem.invalidate_cache()
                return _stored(self._filesystem.info(self._full(name)), self._on_s3)
        except FileNotFoundError:
            return None

    def num_bytes(self, name: str) -> int:
        """Returns the size of a file."""
        with self.answering():
            self._check_regular(name)
            return int(self._filesystem.size(self._full(name)))

    def open(self, name: str, num_bytes: int | None = None) -> BinaryIO:
        """Opens a file to read from anywhere in it.

        num_bytes: its size, if that is known: a store is then asked for what is read, and for no megabytes ahead.
        """
        options = {} if num_bytes is None else {"size": num_bytes, "cache_type": "none"}
        with self.answering():
            self._check_regular(name)
            return cast(BinaryIO, self._filesystem.open(self._full(name), "rb", **options))

    def read(self, name: str, at_most: int = MAX_READ_BYTES) -> bytes:
        """Reads a whole file. Raises FileNotFoundError, and UserError for more bytes than `at_most`."""
        if self.local is not None:
            with self.answering(), regular_file(self.local, name).open("rb") as file:
                content = file.read(at_most + 1)
            _check_bound(len(content), at_most, self.where(name))
            return content
        with tempfile.TemporaryDirectory(prefix="logitcache-") as directory, space_needed(directory):
            path = Path(directory) / "content"
            self._copy(name, path, _Bound(at_most, self.where(name)))
            return path.read_bytes()

    def fetch(self, name: str, path: Path, at_most: int | None = None) -> None:
        """Copies a file to a local path, which is overwritten.  at_most: bytes, of which little more is taken from a store.

        Raises FileNotFoundError, UserError for more bytes than `at_most`, and OSError if the disk is full.
        """
        self._copy(name, path, NoOpCallback() if at_most is None else _Bound(at_most, self.where(name)))

    def _copy(self, name: str, path: Path, told: NoOpCallback) -> None:
        with self.answering():
            self._check_regular(name)
            self._filesystem.get_file(self._full(name), str(path), callback=told)

    def on_disk(self, name: str) -> Path:
        """Returns the path of a file of a local folder. Raises FileNotFoundError, and UserError if it is no regular file."""
        assert self.local is not None
        with self.answering():
            return regular_file(self.local, name)

    def check_writable(self, name: str = "") -> None:
        """Raises UserError for a place that takes no files, or not under such a name, before any work is done for it."""
        if self._on_web:
            raise UserError(
                f"{self}: a web server takes no files; choose hf://, s3://, gs://, another store or a folder"
            )
        if self.local is None:
            return
        try:
            there = self.local
            while not there.exists():
                there = there.parent
            if not there.is_dir():
                raise OSError(errno.ENOTDIR, "")
            if not os.access(there, os.W_OK | os.X_OK):
                raise OSError(errno.EROFS if os.statvfs(there).f_flag & os.ST_RDONLY else errno.EACCES, "")
            with suppress(FileNotFoundError):
                os.lstat(self.local / (name + TEMPORARY_SUFFIX))
        except OSError as error:
            why = os.strerror(error.errno or errno.EIO)
            raise UserError(f"{self.where(name)}: a folder that can be written is wanted ({why})") from error

    def put(self, path: Path, name: str, sha256: str = "") -> None:
        """Copies a local file here; it appears under its name when it is whole.

        sha256: of its content, for `sha256` to give back if a store keeps such notes. Raises UserError if the disk is full or
        the URL does not take the file, Unreachable if another try may help.
        """
        if self.local is not None:
            with self.writing(name) as temporary:
                shutil.copyfile(path, temporary)
            return
        try:
            self.check_writable()
            notes = {"Metadata": {_SHA256_NOTE: sha256}} if sha256 and self._on_s3 else {}
            self._filesystem.put_file(str(path), self._full(name), **notes)
        except Exception as error:  # every store has its own kinds
            if isinstance(error, UserError):
                raise
            raise self._refusal(error, f"{self.where(name)} cannot be written") from _shown_cause(error)

    def sha256(self, name: str) -> str | None:
        """Returns the SHA-256 of a file's content that was noted when it was put there; None if there is no such note."""
        if not self._on_s3:
            return None
        with self.answering():
            return cast("str | None", self._filesystem.metadata(self._full(name), refresh=True).get(_SHA256_NOTE))

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Yields a local path to write; on success the file appears as `name`, on any exception nothing does.

        Raises UserError if the disk is full or cannot be written, the URL does not take the file, or its folder is a link to
        another place.
        """
        if self.local is not None:
            self._refuse_links(name)
            final = self.local / name
            with writable(final):
                final.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(final) as path:
                yield path
            return
        with tempfile.TemporaryDirectory(prefix="logitcache-") as directory:
            path = Path(directory) / PurePosixPath(name).name
            with atomic_path(path) as temporary:
                yield temporary
            self.put(path, name)

    def write(self, name: str, content: bytes | str) -> None:
        """Writes a whole file; text becomes UTF-8."""
        with self.writing(name) as path:
            path.write_bytes(content.encode() if isinstance(content, str) else content)

    def remove(self, name: str) -> None:
        """Removes a file, or a folder with all that it holds, if it is there. Raises UserError as `writing` does."""
        self._refuse_links(name)
        if self.exists(name):
            full = self._full(name)  # a store would take `[1]` in it for a pattern, and remove other folders
            with self.answering(), writable(full) if self.local else nullcontext():
                self._filesystem.rm(full if self.local else glob.escape(full), recursive=True)

    def _check_regular(self, name: str) -> None:
        if self.local is not None:
            regular_file(self.local, name)

    def _is_link(self, name: str) -> bool:
        return self.local is not None and name != "" and (self.local / name).is_symlink()

    def _refuse_links(self, name: str) -> None:
        for parent in PurePosixPath(name).parents:
            if self.local is not None and parent.name and (self.local / parent).is_symlink():
                raise UserError(
                    f"{self.where(str(parent))} is a link to another place, where nothing is changed: remove the link first"
                )

    def remove_leftovers(self, name: str) -> None:
        """Removes the files that killed writers left in a folder."""
        for leftover in self.names(name):
            if leftover.endswith(TEMPORARY_SUFFIX):
                self.remove(f"{name}/{leftover}")

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Raises UserError for whatever a store or the disk raises in the block, except for a file that is missing.

        Lack of memory, or of space on this machine's disk, is raised as it is; Unreachable, if another try may help.
        """
        try:
            yield
        except Exception as error:
            ours = isinstance(error, (UserError, MemoryError)) or disk_is_full(error)
            if ours or isinstance(error, (FileNotFoundError, NotADirectoryError)):
                raise
            if self.local is None:
                raise self._refusal(error, f"{self}: this URL does not answer") from _shown_cause(error)
            if isinstance(error, OSError) and error.errno:
                raise UserError(f"{error.filename or self} cannot be read ({os.strerror(error.errno)})") from error
            raise

    def _refusal(self, error: Exception, what: str) -> UserError:
        if refusal := hub_refusal(error, str(self)):
            return UserError(refusal)
        message = f"{what} ({one_line(error) or type(error).__name__})"
        if isinstance(error, PermissionError) or "Credential" in type(error).__name__:
            hints = [_CREDENTIALS[name] for name in _protocols(self._filesystem) if name in _CREDENTIALS]
            return UserError(f"{message}: {hints[0]}" if hints else message)
        hopeless = isinstance(error, (FileNotFoundError, NotImplementedError, ValueError))
        return UserError(message) if hopeless else Unreachable(message)

    def _connect(self) -> None:
        try:
            self._connected, self._root = fsspec.url_to_fs(self.path)
        except (ImportError, ValueError) as error:
            extra = _EXTRAS.get(self.path.partition("://")[0]) if isinstance(error, ImportError) else None
            what = f"pip install 'logitcache[{extra}]'" if extra else one_line(error)
            raise UserError(f"{self}: no file system for such a URL ({what})") from _shown_cause(error)
        self._process = os.getpid()

    @property
    def _filesystem(self) -> fsspec.AbstractFileSystem:
        """Connected by this process: connections are not forked."""
        if self._process != os.getpid():
            self._connect()
        return self._connected

    @property
    def _on_web(self) -> bool:
        return re.match(r"(.*::)?https?://", self.path) is not None

    @property
    def _on_s3(self) -> bool:
        return "s3" in _protocols(self._filesystem)

    def _full(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}" if name else self._root

    def __reduce__(self) -> Any:
        return Folder, (self.path,)


def refuse_overlap(place: str, target: Folder, source: Folder, read: str = "the cache that is read") -> None:
    """Raises UserError, about `place`, if one of two folders is the other or lies in it: writing to one could damage both."""
    if target.lies_in(source) or source.lies_in(target):
        raise UserError(f"{place}: choose a place outside {read}, {source}, and not around it")


class _Bound(NoOpCallback):  # type: ignore[misc]  # fsspec has no types
    """The callback that ends a transfer by a UserError as soon as a store announces, or has sent, more than it may."""

    def __init__(self, most_bytes: int, where: str) -> None:
        super().__init__()
        self._most_bytes, self._where = most_bytes, where

    def call(self, *_: Any, **__: Any) -> None:
        _check_bound(max(self.size or 0, self.value), self._most_bytes, self._where)


def _check_bound(num_bytes: int, most_bytes: int, where: str) -> None:
    if num_bytes > most_bytes:
        raise UserError(f"{where} is refused: it has more than the {most_bytes} bytes that it may have")


def _shown_cause(error: Exception) -> Exception | None:
    """Returns what an error is raised from: None if a traceback would show the secrets of a URL."""
    return error if without_secrets(str(error)) == str(error) else None


def _protocols(filesystem: fsspec.AbstractFileSystem) -> tuple[str, ...]:
    protocol = filesystem.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)


def _stored(info: Mapping[str, Any], s3: bool) -> Stored:
    """Reads an entry of a listing: S3 has an MD5 as ETag, but for uploads in parts; Google's store an md5Hash; the Hub both."""
    num_bytes, etag, lfs = info["size"], str(info.get("ETag", "")).strip('"'), info.get("lfs")
    if s3 and re.fullmatch("[0-9a-f]{32}", etag):
        return Stored(num_bytes, "md5", etag)
    if info.get("md5Hash"):
        return Stored(num_bytes, "md5", base64.b64decode(info["md5Hash"]).hex())
    if lfs:
        return Stored(num_bytes, "sha256", lfs["sha256"])
    return Stored(num_bytes, "git", info["blob_id"]) if info.get("blob_id") else Stored(num_bytes)

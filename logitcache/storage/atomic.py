"""Files that appear under their final name only when they are complete and on disk."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from logitcache.errors import UserError

TEMPORARY_SUFFIX = ".tmp"


def disk_is_full(error: BaseException) -> bool:
    """Returns whether this machine's disk, or a limit on it, refused a write."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return full or "os error 28" in str(error)  # as Rust libraries say it, in a bare Exception


@contextmanager
def space_needed(final: str | Path) -> Iterator[None]:
    """Turns the failures of a full disk into a UserError that names `final`."""
    try:
        yield
    except Exception as error:
        if disk_is_full(error):
            message = f"no space left for {final}: free some and run the same command again to continue"
            raise UserError(message) from error
        raise


_UNWRITABLE = (
    *(errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG),
    *(errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY, errno.EEXIST, errno.ELOOP, errno.EIO),
)


@contextmanager
def writable(final: str | Path) -> Iterator[None]:
    """Turns the failures of a place that takes no file, or not under this name, into a UserError that names `final`."""
    try:
        with space_needed(final):
            yield
    except OSError as error:
        if error.errno in _UNWRITABLE:
            raise UserError(f"{final} cannot be written ({os.strerror(error.errno)}): choose another place") from error
        raise


@contextmanager
def atomic_path(final: Path) -> Iterator[Path]:
    """Yields a temporary path beside `final`; on success fsyncs and renames it, on any exception removes it.

    What a killed writer left there, or a link that somebody laid, is removed first: nothing is written through it. Raises
    UserError when the disk is full or takes no such file, after removing the temporary file.
    """
    temporary = final.with_name(final.name + TEMPORARY_SUFFIX)
    try:
        with writable(final):
            temporary.unlink(missing_ok=True)
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(final)
            _sync_directory(final.parent)
    except BaseException:
        with suppress(OSError):  # of a file system that has become read-only: the first error is the one to tell
            temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, data: Any) -> None:
    """Writes JSON atomically."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file's content in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""One command at a time writes to a folder."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from logitcache.errors import UserError
from logitcache.storage.folder import Folder

logger = logging.getLogger("logitcache")


@contextmanager
def locked_folder(folder: Folder, *, shared: bool = False) -> Iterator[None]:
    """Locks a folder against other commands while the block runs; makes the folder, and leaves no empty one behind.

    shared: together with other processes of one build, each of which scores a range of its shards. A URL cannot be locked.
    Raises UserError for a place that takes no files, and for a folder that another command has locked.
    """
    folder.check_writable()
    if folder.local is None:
        yield
        return
    try:
        folder.local.mkdir(parents=True, exist_ok=True)
        directory = os.open(folder.local, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{folder}: a folder that can be written is wanted ({error.strerror})") from error
    try:
        lock_directory(
            directory, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, folder, "another command is writing there"
        )
        try:
            yield
        finally:
            with suppress(OSError):  # it holds something, or is a link or the root of a file system
                folder.local.rmdir()
    finally:
        os.close(directory)


def lock_directory(directory: int, operation: int, folder: Folder, otherwise: str) -> None:
    """Locks an open directory until it is closed. Raises UserError, with `otherwise`, where another process has locked it."""
    try:
        fcntl.flock(directory, operation | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"{folder}: {otherwise}") from error
    except OSError as error:
        logger.warning(
            "warning: %s cannot be held against other commands (%s): start none there", folder, error.strerror
        )

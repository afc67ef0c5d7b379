"""The folder that a cache is written to belongs to one command: nobody else writes there, and nothing else lies there."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

from logitcache.errors import UserError
from logitcache.format.manifest import BUILD_DIRECTORY, CARD_NAME, MANIFEST_NAME, SIGNATURE_NAME, TOKENIZER_DIRECTORY
from logitcache.format.tail_parts import TAIL_FILES
from logitcache.storage.atomic import TEMPORARY_SUFFIX
from logitcache.storage.folder import Folder
from logitcache.storage.lock import lock_directory, locked_folder

MARK_NAME = f"{BUILD_DIRECTORY}/logitcache"
"""The file by which a later command knows that the folder is one of ours."""
ANSWERS_NAME = f"{BUILD_DIRECTORY}/answers"
"""The completions of a build with --generate, hours of work: they stay when a plan that was cut off is removed."""
PROMPTS_NAME = f"{ANSWERS_NAME}/prompts.json"
"""The settings of a build whose teacher answers prompts, and the counts of them; there before plan.json."""


@contextmanager
def workspace(folder: Folder, *, shared: bool = False) -> Iterator[None]:
    """Locks `folder` while the block runs, see `locked_folder`.

    Raises UserError if it contains anything but a cache, finished or not.
    """
    with locked_folder(folder, shared=shared):
        if folder.names() and not is_ours(folder):
            raise UserError(f"--out {folder}: the folder is not empty and holds no cache; choose another")
        yield


@contextmanager
def lock_range(folder: Folder, shard_range: tuple[int, int] | None) -> Iterator[None]:
    """Locks a shard range of a build against another process of the same range while the block runs.

    The first range locks the build directory, which it makes; the others lock a directory of their own in it and need a plan.
    A URL cannot be locked. Raises UserError if another process has locked the range.
    """
    if folder.local is None or shard_range is None:
        yield
        return
    index, count = shard_range
    path = folder.local / BUILD_DIRECTORY / (f"ranges/{index}-of-{count}" if index else "")
    path.mkdir(parents=True, exist_ok=True)
    directory = os.open(path, os.O_RDONLY)
    try:
        lock_directory(directory, fcntl.LOCK_EX, folder, f"another process is at work on --shard-range {index}/{count}")
        yield
    finally:
        os.close(directory)


def is_ours(folder: Folder) -> bool:
    """Tells whether a folder contains a cache of ours, finished or begun."""
    if folder.exists(MANIFEST_NAME) or folder.exists(MARK_NAME):
        return True
    killed_before_its_mark = all(name.endswith(TEMPORARY_SUFFIX) for name in folder.names(BUILD_DIRECTORY))
    return BUILD_DIRECTORY in folder.names() and killed_before_its_mark


def begin(folder: Folder, keep: str | None = None) -> None:
    """Empties the build directory except `keep` and our mark, which is written first; a cache beside it stays as it is."""
    folder.write(MARK_NAME, "Work in progress of `logitcache`: the same command continues it.\n")
    for name in folder.names(BUILD_DIRECTORY):
        if f"{BUILD_DIRECTORY}/{name}" not in (MARK_NAME, keep):
            folder.remove(f"{BUILD_DIRECTORY}/{name}")


def abandon(folder: Folder, keep: str | None = None) -> None:
    """Removes the build directory except `keep`; the mark stays if the folder would be nobody's without it."""
    begin(folder, keep)
    if keep is None and (folder.exists(MANIFEST_NAME) or not folder.exists("data")):
        folder.remove(BUILD_DIRECTORY)


def remove_former(folder: Folder) -> None:
    """Removes a cache except its build directory. The manifest goes first: without it the rest is no cache."""
    for name in (MANIFEST_NAME, SIGNATURE_NAME, CARD_NAME, *TAIL_FILES, TOKENIZER_DIRECTORY, "data"):
        folder.remove(name)

"""The folder that a build writes to: whose it is, and that nobody else writes there."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from logitcache.errors import UserError
from logitcache.format.manifest import BUILD_DIRECTORY, MANIFEST_NAME, TOKENIZER_DIRECTORY
from logitcache.format.tail_groups import TAIL_GROUPS_NAME
from logitcache.sharing.card import CARD_NAME

MARK_NAME = "logitcache"
"""File in the build directory by which a later build knows that the folder is one of ours."""


@contextmanager
def workspace(root: Path) -> Iterator[None]:
    """Holds `root` against other builds while the block runs; leaves no empty folder behind.

    Raises UserError for a file, a folder that cannot be made or holds anything but a cache or a build, and one that
    another build holds.
    """
    try:
        present = {path.name for path in root.iterdir()} if root.exists() else set()
        root.mkdir(parents=True, exist_ok=True)
        directory = os.open(root, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"--out {root}: a folder that can be written is wanted ({error.strerror})") from error
    try:
        if present and not is_ours(root):
            raise UserError(f"--out {root}: the folder is not empty and holds no cache; choose another")
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"--out {root}: another build is writing there") from error
        try:
            yield
        finally:
            if not any(root.iterdir()):
                root.rmdir()
    finally:
        os.close(directory)


def is_ours(root: Path) -> bool:
    """Whether a folder holds a finished cache or a build that was begun here."""
    build = root / BUILD_DIRECTORY
    return (
        (root / MANIFEST_NAME).exists() or (build / MARK_NAME).exists() or (build.is_dir() and not any(build.iterdir()))
    )


def begin(root: Path) -> None:
    """Makes an empty build directory with our mark; a cache beside it stays as it is."""
    build = root / BUILD_DIRECTORY
    build.mkdir(exist_ok=True)
    (build / MARK_NAME).write_text("Work in progress of `logitcache build`: the same command continues it.\n")
    for path in build.iterdir():
        if path.name != MARK_NAME:
            _remove(path)


def abandon(root: Path) -> None:
    """Removes the build directory; keeps its mark where shards of an earlier build would be nobody's without it."""
    if (root / MANIFEST_NAME).exists() or not (root / "data").exists():
        _remove(root / BUILD_DIRECTORY)
    else:
        begin(root)


def remove_former(root: Path) -> None:
    """Removes a cache but for its build directory. The manifest goes first: without it the rest is no cache."""
    for name in (MANIFEST_NAME, CARD_NAME, TAIL_GROUPS_NAME, TOKENIZER_DIRECTORY, "data"):
        _remove(root / name)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

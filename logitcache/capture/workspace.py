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

OWN_NAMES = (MANIFEST_NAME, CARD_NAME, TAIL_GROUPS_NAME, TOKENIZER_DIRECTORY, "data", BUILD_DIRECTORY)
"""Everything that a build writes. The manifest comes first: without it the rest is no cache."""


@contextmanager
def workspace(root: Path, overwrite: bool) -> Iterator[None]:
    """Holds `root` against other builds while the block runs; empties it first under `overwrite`.

    Raises UserError for a file, a folder that holds anything but a cache or a build, and one that another build holds.
    """
    if root.exists() and not root.is_dir():
        raise UserError(f"--out {root}: is a file, a folder is wanted")
    present = {path.name for path in root.iterdir()} if root.exists() else set()
    if present and not present & {BUILD_DIRECTORY, MANIFEST_NAME}:
        raise UserError(f"--out {root}: the folder is not empty and holds no cache; choose another")
    root.mkdir(parents=True, exist_ok=True)
    directory = os.open(root, os.O_RDONLY)
    try:
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"--out {root}: another build is writing there") from error
        try:
            for name in OWN_NAMES if overwrite else ():
                _remove(root / name)
            yield
        finally:
            if not any(root.iterdir()):
                root.rmdir()
    finally:
        os.close(directory)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

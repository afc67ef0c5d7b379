"""The folder that a run writes to: its own while it runs, and without files that a full disk cut off."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from accelerate.utils import broadcast_object_list

from logitcache import UserError
from logitcache.errors import is_out_of_memory, one_line
from logitcache.storage.atomic import disk_is_full
from logitcache.storage.folder import Folder
from logitcache.storage.lock import locked_folder
from trainer.config.config import DistillConfig


@contextmanager
def output_held(config: DistillConfig) -> Iterator[None]:
    """Holds a run's folder against other commands while the block runs: of several ranks, the first holds it.

    Raises UserError on every rank if another command holds the folder or nothing can be written in it.
    """
    with ExitStack() as stack:
        refusal: list[str | None] = [None]
        if config.process_index == 0:
            try:
                stack.enter_context(folder_held(Path(str(config.output_dir)), "--output_dir"))
            except UserError as error:
                refusal = [str(error)]
        if config.world_size > 1:
            broadcast_object_list(refusal)
        if refusal[0] is not None:
            raise UserError(refusal[0])
        yield


@contextmanager
def folder_held(folder: Path, option: str) -> Iterator[None]:
    """Holds a folder against other commands while the block runs; makes it, and leaves no empty one behind.

    Raises UserError, beginning with the option that names the folder, if that cannot be.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(locked_folder(Folder(folder.absolute())))
        except UserError as error:
            raise UserError(f"{option} {error}") from error
        if not os.access(folder, os.W_OK):
            raise UserError(f"{option} {folder}: nothing can be written in this folder; name another")
        yield


@contextmanager
def whole_or_removed(
    folder: Path, names: Sequence[str], otherwise: str, whole: Callable[[], bool] = lambda: False
) -> Iterator[None]:
    """Removes the files and folders of these names, or patterns, if the block did not write them to their end.

    Raises UserError for the cause, with advice as in `otherwise`. whole: tells that they are written to their end, and
    that something else failed after them.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of whatever kind; torch and libraries in Rust do not raise OSError
        if whole():
            raise
        for path in [path for name in names for path in folder.glob(name)]:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        if is_out_of_memory(error):
            raise
        why = "no space left" if disk_is_full(error) else one_line(error)
        raise UserError(
            f"{folder / names[0]} cannot be written ({why}), and its parts are removed: {otherwise}"
        ) from error

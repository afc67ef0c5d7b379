"""A cache consists of regular files: this is the rule, as it is kept on this machine.

Below its folder, which may itself be reached by a link, a cache has folders and regular files. Who makes a cache may lay a link
to a file of whoever reads or publishes it, or a pipe that nobody ever writes to: symbolic links, pipes, devices and sockets are
refused wherever a file of a cache is looked at, before it is opened.

One kind of link stands for the file that it points to, the links that huggingface_hub lays in its own cache:
snapshots/REVISION/NAME → blobs/DIGEST, beside `snapshots`. Such a link leads to a regular file of that one folder or is
refused: it reaches nothing but what was fetched from the same repository.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path, PurePosixPath

from logitcache.errors import UserError

_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def regular_file(root: Path, name: str) -> Path:
    """Returns the path of a file of the cache at `root`, which nothing but folders leads to.

    Raises UserError if it, or a folder on the way to it, is anything else, and OSError if it is missing.
    """
    path = root
    parts = PurePosixPath(name).parts
    for number, part in enumerate(parts, start=1):
        path = path / part
        kind = stat.S_IFMT(path.lstat().st_mode)
        is_last = number == len(parts)
        if kind == stat.S_IFLNK and is_last and _is_hub_blob(root, path):
            continue
        if kind != stat.S_IFREG and not (kind == stat.S_IFDIR and not is_last):
            what = _KINDS.get(kind, "of another kind")
            raise UserError(
                f"{path} is {what}: a cache consists of regular files. Put the file itself there, or remove this"
            )
    return path


def _is_hub_blob(root: Path, link: Path) -> bool:
    """Tells whether huggingface_hub lays such links: from a snapshot to a regular file among the blobs of its repository."""
    folder = root.resolve()
    target = Path(os.path.normpath(folder / link.relative_to(root).parent / link.readlink()))
    for snapshots in (parent for parent in folder.parents if parent.name == "snapshots"):
        blobs = snapshots.parent / "blobs"
        if target.parent == blobs and re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", target.name):
            return not blobs.is_symlink() and target.exists() and stat.S_ISREG(target.lstat().st_mode)
    return False

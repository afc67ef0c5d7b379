"""Shards of remote caches copied to this machine: a bounded folder that its processes share.

    LOGITCACHE_HOME/lock            locked for the moment in which something appears, is removed, or gets its room; holds the
                                    bytes that all copies take, or more, so that not every copy has to look through the folder
    LOGITCACHE_HOME/shards/SHA256   a shard, by the SHA-256 of its content
    …/shards/SHA256.tmp             one under way, as large as it will be; locked by who copies it
    LOGITCACHE_HOME/users/…         the shards of one cache, a SHA-256 a line; locked by all processes that stream it

LOGITCACHE_HOME is ~/.cache/logitcache where it is not set. LOGITCACHE_LOCAL_GB (10⁹ bytes) limits what all copies take; 0
turns them off. By default it is 64, and no more than half of what the disk would have free without them.

Copies of a cache that some process streams stay; of the others those that were not used for longest make room. A stream
whose cache is larger than the limit so reads the first shards from disk in every epoch, and the rest from the store.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

from logitcache.errors import UserError
from logitcache.format.shards import ShardInfo
from logitcache.storage.atomic import TEMPORARY_SUFFIX, file_sha256

LIMIT_BYTES = 64 * 10**9
"""Of all copies, unless LOGITCACHE_LOCAL_GB says otherwise."""
SHARE_OF_DISK = 0.5
"""The most that copies take, by default, of the space that would be free without them."""
SHARE_TO_SPARE = 1 / 16
"""Of the limit, made free beyond what a copy needs where others have to go for it: the next ones then need no search."""
FULL_FOR_S = 10.0
"""Seconds for which a folder in which no room could be made is taken to be full."""

logger = logging.getLogger("logitcache")


class LocalCopies:
    """Copies of one cache's shards. Raises UserError for a LOGITCACHE_LOCAL_GB that is no number."""

    def __init__(self, shards: Sequence[ShardInfo]) -> None:
        self._home = Path(os.environ.get("LOGITCACHE_HOME") or "~/.cache/logitcache").expanduser()
        self._limit_bytes = _limit_bytes()
        self._digests = [shard.sha256 for shard in shards if re.fullmatch("[0-9a-f]{64}", shard.sha256)]
        self._off = self._limit_bytes == 0
        self._without_room = {shard.sha256 for shard in shards} - set(self._digests)  # of no digest comes a file's name
        self._full_for_bytes, self._full_until_s = math.inf, -math.inf
        self._verified: set[str] = set()
        self._claim: BinaryIO | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the claim out: another process makes its own."""
        return self.__dict__ | {"_claim": None}

    def path(self, shard: ShardInfo, fill: Callable[[BinaryIO], None]) -> Path | None:
        """Returns the copy of a shard, made now if there is none; None if there is no room for it, now or when asked before.

        fill: writes the shard's content to a file, whole and checked; if it raises, there is no copy. Processes and threads
        that want the same shard wait for the one that copies it. If the folder cannot be written, or its disk is full, one
        warning is logged and there are no copies from then on.
        """
        if self._off or shard.sha256 in self._without_room:
            return None
        with _turn(os.getpid(), shard.sha256):
            try:
                self._claim_all()
                return self._obtained(shard, fill)
            except OSError as error:
                if not self._off:
                    self._off = True
                    logger.warning(
                        "warning: no shards are copied to %s (%s), all are read over the network: set LOGITCACHE_HOME to a "
                        "folder with space, or LOGITCACHE_LOCAL_GB to a lower limit (0: no copies)",
                        self._home,
                        error.strerror or error,
                    )
                return None

    def _obtained(self, shard: ShardInfo, fill: Callable[[BinaryIO], None]) -> Path | None:
        path = self._home / "shards" / shard.sha256
        while not self._is_usable(path, shard):
            with self._locked() as lock:
                if path.exists():
                    continue
                descriptor = _open_locked(_temporary(path))
                if descriptor is not None:
                    if not self._take_room(shard.num_bytes, _temporary(path), lock):
                        _temporary(path).unlink()
                        _close(descriptor)
                        self._without_room.add(shard.sha256)
                        return None
                    os.ftruncate(descriptor, 0)
                    os.ftruncate(descriptor, shard.num_bytes)  # taken, for whoever counts
            if descriptor is None:
                _wait_for(_temporary(path))
            else:
                self._copy(path, descriptor, fill)
                self._verified.add(shard.sha256)
        return path

    def _copy(self, path: Path, descriptor: int, fill: Callable[[BinaryIO], None]) -> None:
        """Fills the temporary file that `descriptor` locks. A crash may tear it after it is renamed: its hash will tell."""
        try:
            with os.fdopen(descriptor, "wb", closefd=False) as file:
                fill(file)
            with self._locked():
                _temporary(path).replace(path)
        except BaseException:
            with self._locked():
                _temporary(path).unlink(missing_ok=True)
            raise
        finally:
            _close(descriptor)

    def _is_usable(self, path: Path, shard: ShardInfo) -> bool:
        """Tells whether the copy is there and, looked at once by every process, whole. It counts as used now."""
        try:
            os.utime(path)
            if shard.sha256 in self._verified:
                return True
            hashed = path.stat()
            if file_sha256(path) == shard.sha256:  # whatever size a manifest says it has
                self._verified.add(shard.sha256)
                return True
            with self._locked():
                if os.path.samestat(hashed, path.stat()):  # not one that another process made meanwhile
                    path.unlink()
        except FileNotFoundError:
            pass
        return False

    def _claim_all(self) -> None:
        """Keeps all copies of this cache from being removed as long as this object lives, here or in a forked process."""
        with _turn(os.getpid(), "claim"):
            if self._claim is not None:
                return
            for name in ("shards", "users"):
                (self._home / name).mkdir(parents=True, exist_ok=True)
            content = "".join(f"{digest}\n" for digest in self._digests).encode()
            path = self._home / "users" / hashlib.sha256(content).hexdigest()
            with self._locked() as lock:
                _write_count(lock, self._make_room(0, None))  # the limit may be lower than it was
                claim = path.open("ab")
                fcntl.flock(claim, fcntl.LOCK_SH)
                path.write_bytes(content)
                self._claim = claim

    def _take_room(self, num_bytes: int, own: Path, lock: int) -> bool:
        """Counts the bytes of a copy in, if there is room for them or can be made."""
        counted = _read_count(lock)
        if counted is None or counted + num_bytes > self._limit(counted):
            if num_bytes >= self._full_for_bytes and time.monotonic() < self._full_until_s:
                return False
            counted = self._make_room(num_bytes, own)
            if counted + num_bytes > self._limit(counted):
                _write_count(lock, counted)
                self._full_for_bytes, self._full_until_s = num_bytes, time.monotonic() + FULL_FOR_S
                return False
        _write_count(lock, counted + num_bytes)
        return True

    def _make_room(self, num_bytes: int, own: Path | None) -> int:
        """Removes leftovers and, if that makes room, the longest unused copies. Returns the bytes of all copies but `own`."""
        sizes = 0
        unused: list[tuple[float, int, Path]] = []
        in_use = self._in_use()
        for path in (self._home / "shards").iterdir():
            if path == own or (path.suffix == TEMPORARY_SUFFIX and _removed_as_leftover(path)):
                continue
            status = path.stat()
            sizes += status.st_size
            if path.suffix != TEMPORARY_SUFFIX and path.name not in in_use:
                unused.append((status.st_mtime, status.st_size, path))
        limit = self._limit(sizes)
        excess = sizes + num_bytes - limit
        if excess <= 0 or (num_bytes and excess > sum(size for _, size, _ in unused)):
            return sizes
        for _, size, path in sorted(unused):
            if excess + limit * SHARE_TO_SPARE <= 0:
                break
            path.unlink()
            sizes -= size
            excess -= size
        return sizes

    def _limit(self, copied_bytes: int) -> float:
        if self._limit_bytes is not None:
            return self._limit_bytes
        disk = os.statvfs(self._home)
        return min(LIMIT_BYTES, SHARE_OF_DISK * (disk.f_bavail * disk.f_frsize + copied_bytes))

    def _in_use(self) -> set[str]:
        """Returns the SHA-256 of the shards of all caches that are streamed now."""
        digests: set[str] = set()
        for path in (self._home / "users").iterdir():
            with path.open("rb") as file:
                if _try_lock(file.fileno()):
                    path.unlink()
                else:
                    digests |= set(file.read().decode().split())
        return digests

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """Locks the folder against all other processes, for moments only. Yields the descriptor of the lock."""
        descriptor = _open(self._home / "lock")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            _close(descriptor)


def _limit_bytes() -> float | None:
    text = os.environ.get("LOGITCACHE_LOCAL_GB")
    if not text:
        return None
    try:
        limit = float(text) * 10**9
    except ValueError:
        limit = -1
    if limit < 0 or math.isnan(limit):
        raise UserError(f"LOGITCACHE_LOCAL_GB={text}: gigabytes are wanted, such as 20, or 0 for no local copies")
    return limit


def _read_count(lock: int) -> int | None:
    """Returns an upper bound of the bytes that all copies take; None if nobody counted them."""
    text = os.pread(lock, 32, 0)
    return int(text) if re.fullmatch(rb"\d+\n", text) else None


def _write_count(lock: int, num_bytes: int) -> None:
    os.ftruncate(lock, 0)
    os.pwrite(lock, b"%d\n" % num_bytes, 0)


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + TEMPORARY_SUFFIX)


def _open_locked(path: Path) -> int | None:
    """Locks a file, which is made if need be, and returns its descriptor; None if another process has locked it."""
    descriptor = _open(path)
    if _try_lock(descriptor):
        return descriptor
    _close(descriptor)
    return None


def _removed_as_leftover(path: Path) -> bool:
    """Removes the temporary file of a process that died."""
    descriptor = _open_locked(path)
    if descriptor is None:
        return False
    path.unlink()
    _close(descriptor)
    return True


def _wait_for(path: Path) -> None:
    """Waits until no process has locked the file."""
    with suppress(FileNotFoundError):
        descriptor = _open(path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        finally:
            _close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


_open_descriptors: set[int] = set()


def _open(path: Path, flags: int = os.O_RDWR | os.O_CREAT) -> int:
    descriptor = os.open(path, flags, 0o644)
    _open_descriptors.add(descriptor)
    return descriptor


def _close(descriptor: int) -> None:
    _open_descriptors.discard(descriptor)
    os.close(descriptor)


def _close_in_child() -> None:
    """Closes the locks of the parent's threads: a forked process does not have these threads and would hold them for ever."""
    for descriptor in _open_descriptors:
        os.close(descriptor)
    _open_descriptors.clear()


os.register_at_fork(after_in_child=_close_in_child)


@cache
def _turn(process: int, what: str) -> Lock:
    """Returns the lock of a process's threads. A forked process has its own: it must not wait for threads of its parent."""
    return Lock()

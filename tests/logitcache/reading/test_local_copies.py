"""Copies of remote shards on this machine: one of each, whole, bounded, shared, and none where there can be none."""

from __future__ import annotations

import errno
import hashlib
import logging
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import pytest

from logitcache import UserError
from logitcache.format.shards import ShardInfo
from logitcache.reading import local_copies
from logitcache.reading.local_copies import LocalCopies

SIZE = 1000
PATIENCE_S = 60


def content(number: int, size: int = SIZE) -> bytes:
    return bytes([number % 256]) * size


def shard(number: int, size: int = SIZE) -> ShardInfo:
    digest = hashlib.sha256(content(number, size)).hexdigest()
    return ShardInfo(f"data/{number}", 1, 1, 1, 1, 1, 0.0, (1,), size, digest)


class Store:
    """Gives the content of shards, and counts how often."""

    def __init__(self) -> None:
        self.given: list[int] = []

    def fill(self, number: int, size: int = SIZE) -> Callable[[BinaryIO], None]:
        def fill(file: BinaryIO) -> None:
            self.given.append(number)
            file.write(content(number, size))

        return fill


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where copies go; there is room for three."""
    monkeypatch.setenv("LOGITCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LOGITCACHE_LOCAL_GB", str(3.5 * SIZE / 1e9))
    return tmp_path / "home"


def held(home: Path) -> set[str]:
    return {path.name for path in (home / "shards").iterdir()}


def names(*numbers: int) -> set[str]:
    return {shard(number).sha256 for number in numbers}


def copy_all(store: Store, *numbers: int) -> LocalCopies:
    """Copies the shards of a cache; they are in use as long as the result lives."""
    copies = LocalCopies([shard(number) for number in numbers])
    for number in numbers:
        copies.path(shard(number), store.fill(number))
    return copies


def test_a_shard_is_copied_once_and_serves_the_next_run(home: Path, store: Store) -> None:
    first = LocalCopies([shard(1)])
    path = first.path(shard(1), store.fill(1))
    assert path is not None
    assert path.read_bytes() == content(1)
    assert first.path(shard(1), store.fill(1)) == path
    assert LocalCopies([shard(1)]).path(shard(1), store.fill(1)) == path
    assert store.given == [1]
    assert held(home) == names(1)


def test_threads_that_want_one_shard_copy_it_once(home: Path) -> None:
    filled: list[int] = []

    def slow(file: BinaryIO) -> None:
        filled.append(1)
        time.sleep(0.1)
        file.write(content(1))

    copies = LocalCopies([shard(1)])
    with ThreadPoolExecutor(8) as threads:
        paths = list(threads.map(lambda _: copies.path(shard(1), slow), range(8)))
    assert len(set(paths)) == 1
    assert filled == [1]


@pytest.mark.slow
def test_processes_that_want_one_shard_copy_it_once(home: Path, tmp_path: Path) -> None:
    def work() -> None:
        def slow(file: BinaryIO) -> None:
            with (tmp_path / "filled").open("a") as log:
                log.write("1\n")
            time.sleep(0.1)
            file.write(content(1))

        path = LocalCopies([shard(1)]).path(shard(1), slow)
        assert path is not None
        assert path.read_bytes() == content(1)

    assert exit_codes([work] * 6) == [0] * 6
    assert (tmp_path / "filled").read_text() == "1\n"


def exit_codes(works: list[Callable[[], None]]) -> list[int | None]:
    """Of the works, done at the same time by forked processes."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work) for work in works]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE_S)
    return [process.exitcode for process in processes]


def test_what_was_not_used_for_longest_makes_room(home: Path, store: Store) -> None:
    for number, used_at in ((1, 300), (2, 100), (3, 200)):
        copy_all(store, number)
        os.utime(home / "shards" / shard(number).sha256, (used_at, used_at))
    copy_all(store, 4)
    assert held(home) == names(1, 3, 4)
    copy_all(store, 3)  # read again: now 1 was not used for longest
    copy_all(store, 5)
    assert held(home) == names(3, 4, 5)
    assert store.given == [1, 2, 3, 4, 5]


def test_copies_of_a_cache_that_is_streamed_now_stay(home: Path, store: Store) -> None:
    copy_all(store, 1)
    in_use = copy_all(store, 2, 3, 4)
    assert held(home) == names(2, 3, 4)
    assert LocalCopies([shard(5)]).path(shard(5), store.fill(5)) is None
    assert held(home) == names(2, 3, 4)
    del in_use
    assert LocalCopies([shard(5)]).path(shard(5), store.fill(5)) is not None
    assert len(held(home)) == 3


def test_a_cache_larger_than_the_limit_keeps_the_copies_that_it_has(home: Path, store: Store) -> None:
    copies = LocalCopies([shard(number) for number in range(6)])
    for _ in range(3):
        for number in range(6):
            path = copies.path(shard(number), store.fill(number))
            assert (path is not None) == (number < 3)
    assert store.given == [0, 1, 2]
    assert copy_all(store, *range(5, -1, -1)) is not None  # and so does the next run, whatever its order
    assert store.given == [0, 1, 2]


def test_a_shard_larger_than_the_limit_drives_no_other_out(home: Path, store: Store) -> None:
    copy_all(store, 1)
    large = shard(2, 4 * SIZE)
    assert LocalCopies([large]).path(large, store.fill(2, 4 * SIZE)) is None
    assert held(home) == names(1)


def test_copies_in_use_in_a_forked_process_stay_when_its_parent_is_done(home: Path, store: Store) -> None:
    context = multiprocessing.get_context("fork")
    may_end = context.Event()
    copies = copy_all(store, 1, 2, 3)
    child = context.Process(target=lambda: may_end.wait(PATIENCE_S))
    child.start()
    del copies
    assert LocalCopies([shard(4)]).path(shard(4), store.fill(4)) is None
    may_end.set()
    child.join(PATIENCE_S)
    assert LocalCopies([shard(4)]).path(shard(4), store.fill(4)) is not None


@pytest.mark.slow
def test_several_processes_never_hold_more_than_the_limit(home: Path, tmp_path: Path) -> None:
    def size() -> int:
        total = 0
        for path in (home / "shards").iterdir():
            try:
                total += path.stat().st_size
            except FileNotFoundError:
                continue
        return total

    def worker(first: int) -> Callable[[], None]:
        def work() -> None:
            for number in range(first, first + 20):

                def fill(file: BinaryIO, number: int = number) -> None:
                    file.write(content(number)[: SIZE // 2])
                    with (tmp_path / f"sizes{first}").open("a") as log:
                        log.write(f"{size()}\n")
                    file.write(content(number)[SIZE // 2 :])

                path = LocalCopies([shard(number)]).path(shard(number), fill)
                assert path is None or path.name == shard(number).sha256

        return work

    assert exit_codes([worker(first) for first in (0, 20, 40, 60)]) == [0] * 4
    seen = [int(line) for path in tmp_path.glob("sizes*") for line in path.read_text().split()]
    assert len(seen) > 20
    assert max(seen) <= 3.5 * SIZE
    assert size() <= 3.5 * SIZE


@pytest.fixture
def searches(home: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """An entry for every time that all copies are looked through."""
    made: list[Path] = []
    iterdir = Path.iterdir

    def watched(path: Path) -> Iterator[Path]:
        if path == home / "shards":
            made.append(path)
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", watched)
    return made


def test_not_every_copy_looks_through_the_folder(
    store: Store, searches: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGITCACHE_LOCAL_GB", str(100.5 * SIZE / 1e9))
    first = copy_all(store, *range(80))
    assert len(searches) == 1
    del first
    second = copy_all(store, *range(100, 200))  # for which the others go
    assert len(store.given) == 180
    assert len(searches) <= 20
    searches.clear()
    third = LocalCopies([shard(number) for number in range(200, 250)])
    assert [third.path(shard(number), store.fill(number)) for number in range(200, 250)] == [
        None
    ] * 50  # all are in use
    assert len(searches) <= 2
    del second


def test_copies_that_others_made_meanwhile_count(home: Path, store: Store) -> None:
    ours, theirs = LocalCopies([shard(1), shard(2), shard(5)]), LocalCopies([shard(3), shard(4)])
    kept = []
    for copies, number in ((ours, 1), (theirs, 3), (ours, 2), (theirs, 4), (ours, 5)):
        kept.append(copies.path(shard(number), store.fill(number)) is not None)
    assert kept == [True, True, True, False, False]
    assert held(home) == names(1, 2, 3)


def test_room_that_somebody_made_by_hand_is_found(home: Path, store: Store) -> None:
    copies = copy_all(store, 1, 2, 3)
    for path in (home / "shards").iterdir():
        path.unlink()
    more = LocalCopies([shard(4)])
    assert more.path(shard(4), store.fill(4)) is not None
    assert copies.path(shard(1), store.fill(1)) is not None


@pytest.mark.parametrize("num_bytes", [SIZE - 1, SIZE + 1, 0])
def test_a_manifest_that_lies_about_a_size_removes_no_copy(home: Path, store: Store, num_bytes: int) -> None:
    in_use = copy_all(store, 1)
    inode = (home / "shards" / shard(1).sha256).stat().st_ino
    crafted = replace(shard(1), num_bytes=num_bytes)
    LocalCopies([crafted]).path(crafted, store.fill(2))
    assert (home / "shards" / shard(1).sha256).stat().st_ino == inode
    assert in_use.path(shard(1), store.fill(1)) is not None
    assert store.given == [1]


def descriptors(inode: int) -> list[int]:
    """Those of this process that are of a file."""
    found = []
    for descriptor in range(3, 1024):
        with suppress(OSError):
            if os.fstat(descriptor).st_ino == inode:
                found.append(descriptor)
    return found


def copying_slowly(context: Any) -> tuple[Any, Any]:
    """A process that is at a copy of shard 1 until the event is set."""
    begun, may_end = context.Event(), context.Event()

    def work() -> None:
        def slow(file: BinaryIO) -> None:
            begun.set()
            may_end.wait(PATIENCE_S)
            file.write(content(1))

        LocalCopies([shard(1)]).path(shard(1), slow)

    process = context.Process(target=work)
    process.start()
    assert begun.wait(PATIENCE_S)
    return process, may_end


def test_a_process_forked_while_a_thread_waits_holds_nothing_that_it_waits_for(home: Path, store: Store) -> None:
    context = multiprocessing.get_context("fork")
    copier, may_end = copying_slowly(context)
    inode = (home / "shards" / f"{shard(1).sha256}.tmp").stat().st_ino
    copies = LocalCopies([shard(1)])
    waiting = threading.Thread(target=copies.path, args=(shard(1), store.fill(1)))
    waiting.start()
    until = time.monotonic() + PATIENCE_S
    while not descriptors(inode) and time.monotonic() < until:
        time.sleep(0.01)
    assert descriptors(inode)
    time.sleep(0.1)  # it waits
    code = exit_codes([lambda: sys.exit(len(descriptors(inode)))])
    may_end.set()
    copier.join(PATIENCE_S)
    waiting.join(PATIENCE_S)
    assert code == [0]


def test_what_a_killed_process_left_is_removed(home: Path, store: Store) -> None:
    def die(file: BinaryIO) -> None:
        file.write(b"half of it")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    def work() -> None:
        LocalCopies([shard(1)]).path(shard(1), die)

    assert exit_codes([work]) == [-signal.SIGKILL]
    assert held(home) == {f"{shard(1).sha256}.tmp"}
    copy_all(store, 2)
    assert held(home) == names(2)
    assert len(list((home / "users").iterdir())) <= 1
    assert exit_codes([work]) == [-signal.SIGKILL]
    path = LocalCopies([shard(1)]).path(shard(1), store.fill(1))
    assert path is not None
    assert path.read_bytes() == content(1)


@pytest.mark.slow
def test_a_forked_process_waits_for_no_thread_that_it_has_not(home: Path) -> None:
    script = """
import os, sys, threading, time
sys.path.insert(0, "tests/logitcache/reading")
from test_local_copies import LocalCopies, Store, shard
begun = threading.Event()
def endless(file):
    begun.set()
    time.sleep(600)
copies = LocalCopies([shard(1)])
threading.Thread(target=copies.path, args=(shard(1), endless), daemon=True).start()
begun.wait()
if os.fork():
    time.sleep(0.3)
    os.kill(os.getpid(), 9)
print(copies.path(shard(1), Store().fill(1)).read_bytes()[:1])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.stdout, done.stderr) == ("b'\\x01'\n", "")


def test_what_filling_raises_is_raised_and_leaves_no_copy(home: Path, store: Store) -> None:
    def altered(file: BinaryIO) -> None:
        file.write(b"something else")
        raise UserError("it was altered")

    copies = LocalCopies([shard(1)])
    for _ in range(2):
        with pytest.raises(UserError, match="it was altered"):
            copies.path(shard(1), altered)
    assert held(home) == set()
    assert copies.path(shard(1), store.fill(1)) is not None


@pytest.mark.parametrize("damaged", [content(2), content(1)[:-1], b""], ids=["altered", "cut", "empty"])
def test_a_damaged_copy_is_made_again(home: Path, store: Store, damaged: bytes) -> None:
    copy_all(store, 1)
    (home / "shards" / shard(1).sha256).write_bytes(damaged)
    path = LocalCopies([shard(1)]).path(shard(1), store.fill(1))
    assert path is not None
    assert path.read_bytes() == content(1)
    assert store.given == [1, 1]


def test_a_copy_that_somebody_removed_is_made_again(home: Path, store: Store) -> None:
    copies = copy_all(store, 1)
    (home / "shards" / shard(1).sha256).unlink()
    assert copies.path(shard(1), store.fill(1)) is not None
    assert store.given == [1, 1]


def test_a_lower_limit_holds_from_the_next_run_on(home: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (1, 2, 3):
        copy_all(store, number)
    monkeypatch.setenv("LOGITCACHE_LOCAL_GB", str(1.5 * SIZE / 1e9))
    copy_all(store, 3)
    assert held(home) == names(3)


def test_a_lower_limit_holds_for_the_copies_of_one_cache(
    home: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_all(store, 1, 2, 3)
    monkeypatch.setenv("LOGITCACHE_LOCAL_GB", str(2.5 * SIZE / 1e9))
    copies = LocalCopies([shard(number) for number in (1, 2, 3)])
    kept = [copies.path(shard(number), store.fill(number)) is not None for number in (3, 2, 1)]
    assert kept == [True, True, False]
    assert held(home) == names(2, 3)


def test_a_limit_of_zero_touches_no_disk(home: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGITCACHE_LOCAL_GB", "0")
    assert LocalCopies([shard(1)]).path(shard(1), store.fill(1)) is None
    assert not home.exists()


@pytest.mark.parametrize("text", ["much", "-1", "nan", "10GB"])
def test_a_limit_that_is_no_number_is_refused(home: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGITCACHE_LOCAL_GB", text)
    with pytest.raises(UserError, match=rf"^LOGITCACHE_LOCAL_GB={text}: gigabytes are wanted, such as 20, or 0 for"):
        LocalCopies([])


def test_by_default_half_of_the_disk_is_left_free(home: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOGITCACHE_LOCAL_GB")

    def disk(path: Path) -> SimpleNamespace:
        """Ten shards large, four of them taken by others."""
        return SimpleNamespace(f_frsize=SIZE, f_bavail=6 - sum(name.isalnum() for name in held(home)))

    monkeypatch.setattr(os, "statvfs", disk)
    copies = LocalCopies([shard(number) for number in range(9)])
    kept = [copies.path(shard(number), store.fill(number)) is not None for number in range(9)]
    assert kept == [True] * 3 + [False] * 6

    monkeypatch.setattr(local_copies, "LIMIT_BYTES", 1.5 * SIZE)
    del copies
    copy_all(store, 0)
    assert held(home) == names(0)


@pytest.mark.parametrize("place", ["file", "below a file"])
def test_a_folder_that_cannot_be_made_is_one_warning(
    tmp_path: Path, store: Store, place: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LOGITCACHE_HOME", str(tmp_path / "file" / ("" if place == "file" else "home")))
    copies = LocalCopies([shard(1), shard(2)])
    with caplog.at_level(logging.WARNING, "logitcache"), ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda n: copies.path(shard(n), store.fill(n)), [1, 2] * 4)) == [None] * 8
    (record,) = caplog.records
    assert "warning: no shards are copied to" in record.message
    assert "set LOGITCACHE_HOME to a folder with space" in record.message
    assert store.given == []


def test_a_disk_that_is_full_is_one_warning_and_leaves_its_space_free(
    home: Path, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    def full(file: BinaryIO) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    copies = LocalCopies([shard(1), shard(2)])
    with caplog.at_level(logging.WARNING, "logitcache"):
        assert copies.path(shard(1), full) is None
        assert copies.path(shard(2), store.fill(2)) is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "No space left on device" in caplog.text
    assert held(home) == set()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    root = tmp_path / "disk"
    root.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", root], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"a full disk needs a small file system, and this user may mount none ({mount.stderr.strip()})")
    yield root
    subprocess.run(["umount", "--lazy", root], check=True)


def test_a_real_disk_runs_full(
    small_disk: Path, store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LOGITCACHE_HOME", str(small_disk))
    monkeypatch.setenv("LOGITCACHE_LOCAL_GB", "1")
    large = shard(1, 2 << 20)
    with caplog.at_level(logging.WARNING, "logitcache"):
        assert LocalCopies([large]).path(large, store.fill(1, 2 << 20)) is None
    assert "No space left on device" in caplog.text
    assert held(small_disk) == set()


def test_a_read_only_disk_is_one_warning_and_its_copies_are_not_used(
    small_disk: Path, store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LOGITCACHE_HOME", str(small_disk))
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with caplog.at_level(logging.WARNING, "logitcache"):
        assert LocalCopies([shard(1)]).path(shard(1), store.fill(1)) is None
    assert "Read-only file system" in caplog.text


def test_a_name_that_is_no_digest_makes_no_file(home: Path, store: Store) -> None:
    evil = ShardInfo("data/1", 1, 1, 1, 1, 1, 0.0, (1,), SIZE, "../../../evil")
    assert LocalCopies([evil]).path(evil, store.fill(1)) is None
    assert store.given == []


def test_copies_travel_to_a_process_that_is_not_forked(home: Path, store: Store) -> None:
    copies = pickle.loads(pickle.dumps(copy_all(store, 1)))
    assert copies.path(shard(1), store.fill(1)) is not None
    assert store.given == [1]


def test_a_thread_that_waits_for_another_process_gets_its_copy(home: Path, store: Store) -> None:
    child, may_end = copying_slowly(multiprocessing.get_context("fork"))
    threading.Timer(0.1, may_end.set).start()
    assert LocalCopies([shard(1)]).path(shard(1), store.fill(1)) is not None
    assert store.given == []
    child.join(PATIENCE_S)

"""Folders on disk, in memory and in an object store: whole files or none."""

from __future__ import annotations

import multiprocessing
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from errno import EDQUOT, EFBIG, ENOSPC
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

import logitcache
from logitcache import UserError
from logitcache.storage.folder import Folder
from tests.helpers.objectstore import bucket, s3_endpoint  # noqa: F401


@pytest.fixture(params=["disk", "memory", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    if request.param == "s3":
        return Folder(f"{request.getfixturevalue('bucket')}/some/cache")
    return Folder(tmp_path / "cache" if request.param == "disk" else f"memory://{tmp_path}/cache")


def test_what_is_written_is_read_back_and_listed(folder: Folder) -> None:
    assert not folder.exists()
    assert folder.names() == []
    folder.write("data/b.bin", b"0123456789")
    folder.write("data/a.txt", "ü")
    folder.write("top.txt", "")
    assert folder.exists("data")
    assert folder.names() == ["data", "top.txt"]
    assert folder.names("data") == ["a.txt", "b.bin"]
    assert folder.names("nowhere") == []
    assert folder.read("data/a.txt") == "ü".encode()
    assert folder.num_bytes("data/b.bin") == 10
    with folder.open("data/b.bin") as file:
        file.seek(4)
        assert file.read(3) == b"456"


def test_files_are_listed_with_those_of_folders_below(folder: Folder) -> None:
    for name in ("a/x", "a/b/c/y", "ab/z"):
        folder.write(name, name)
    assert folder.files("a") == ["a/b/c/y", "a/x"]
    assert folder.files("nowhere") == []


def test_what_has_the_name_of_the_folder_is_listed(folder: Folder) -> None:
    folder.write("cache", "precious")
    assert folder.names() == ["cache"]


def test_a_file_is_replaced_as_a_whole(folder: Folder) -> None:
    folder.write("name", "before")
    folder.write("name", "after")
    assert folder.read("name") == b"after"


def test_a_file_that_was_not_finished_does_not_appear(folder: Folder) -> None:
    folder.write("name", "before")
    with pytest.raises(KeyboardInterrupt), folder.writing("name") as path:
        path.write_text("half of it")
        raise KeyboardInterrupt
    assert folder.names() == ["name"]
    assert folder.read("name") == b"before"


def test_removing_takes_a_folder_with_all_that_it_holds_and_minds_no_absence(folder: Folder) -> None:
    for name in ("a/b/c", "a/d", "e"):
        folder.write(name, name)
    folder.remove("a")
    folder.remove("never there")
    assert folder.names() == ["e"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "other"), [("run[1]", "run1"), ("run*", "run2"), ("run?", "run3")])
def test_a_name_is_no_pattern_for_others(folder: Folder, name: str, other: str) -> None:
    ours, theirs = Folder(folder.where(name)), Folder(folder.where(other))
    for each in (ours, theirs):
        each.write("data/file", "value")
    ours.remove("data")
    assert ours.files("") == []
    assert theirs.files("") == ["data/file"]


@pytest.mark.parametrize(
    ("inner", "outer", "lies_in"),
    [
        ("s3://bucket/a", "s3://bucket/a/", True),
        ("s3a://bucket/a/b", "s3://bucket/a", True),
        ("memory://bucket/a/b", "s3://bucket/a", False),
        ("s3://bucket/ab", "s3://bucket/a", False),
        ("file:///tmp/a/../a/b", "/tmp/a", True),
    ],
)
def test_a_folder_lies_in_another_however_both_are_written(inner: str, outer: str, lies_in: bool) -> None:
    assert Folder(inner).lies_in(Folder(outer)) == lies_in


def test_a_store_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object) -> bool:
        raise RuntimeError("no route\nto host")

    monkeypatch.setattr(MemoryFileSystem, "exists", unreachable)
    with pytest.raises(UserError, match=r"^memory://silent/cache: this URL does not answer \(no route to host\)$"):
        logitcache.open("memory://silent/cache")


def test_leftovers_of_killed_writers_are_removed(folder: Folder) -> None:
    for name in ("data/shard.parquet", "data/other.parquet.tmp"):
        folder.write(name, name)
    folder.remove_leftovers("data")
    assert folder.names("data") == ["shard.parquet"]


def test_a_folder_travels_to_another_process(folder: Folder) -> None:
    folder.write("name", "value")
    copy = pickle.loads(pickle.dumps(folder))
    assert copy == folder
    assert copy.read("name") == b"value"


@pytest.mark.slow
def test_a_folder_reads_in_a_forked_process(folder: Folder) -> None:
    folder.write("name", "value")
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    child = context.Process(target=lambda: answers.put(folder.read("name")))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert answers.get() == b"value"


@pytest.mark.parametrize("num_bytes", [None, 10])
def test_any_part_of_a_file_is_read(folder: Folder, num_bytes: int | None) -> None:
    folder.write("name", b"0123456789")
    with folder.open("name", num_bytes) as file:
        file.seek(6)
        assert file.read(2) == b"67"
        file.seek(1)
        assert file.read() == b"123456789"


def test_a_url_that_nothing_reads_is_refused() -> None:
    with pytest.raises(UserError, match=r"gopher://x: no file system for such a URL"):
        Folder("gopher://x")


def test_a_store_that_refuses_a_file_is_named(bucket: str) -> None:  # noqa: F811
    missing: Any = Folder("s3://no-such-bucket-anywhere/cache")
    with pytest.raises(UserError, match=r"s3://no-such-bucket-anywhere/cache/name cannot be written"):
        missing.write("name", "value")


class TestLinks:
    def test_a_link_in_the_place_of_the_temporary_file_is_not_written_through(self, tmp_path: Path) -> None:
        (tmp_path / "victim").write_text("precious")
        (tmp_path / "name.tmp").symlink_to(tmp_path / "victim")
        Folder(tmp_path).write("name", "content")
        assert (tmp_path / "victim").read_text() == "precious"
        assert (tmp_path / "name").read_text() == "content"
        assert not (tmp_path / "name").is_symlink()

    @pytest.mark.parametrize("directory", ["data", "tokenizer"])
    def test_nothing_is_written_or_removed_in_a_folder_that_is_a_link(self, tmp_path: Path, directory: str) -> None:
        (tmp_path / "victim").mkdir()
        (tmp_path / "victim/file").write_text("precious")
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache" / directory).symlink_to(tmp_path / "victim")
        folder, source = Folder(tmp_path / "cache"), tmp_path / "victim/file"
        changes: tuple[Callable[[], object], ...] = (
            lambda: folder.write(f"{directory}/file", "other"),
            lambda: folder.put(source, f"{directory}/new"),
            lambda: folder.remove(f"{directory}/file"),
        )
        for change in changes:
            with pytest.raises(UserError, match=rf"cache/{directory} is a link to another place"):
                change()
        assert [path.name for path in (tmp_path / "victim").iterdir()] == ["file"]
        assert source.read_text() == "precious"

    def test_the_folder_itself_may_be_one(self, tmp_path: Path) -> None:
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "real")
        Folder(tmp_path / "link").write("data/file", "content")
        assert (tmp_path / "real/data/file").read_text() == "content"


MOST_BYTES = 20 << 20


class Endless(BaseHTTPRequestHandler):
    """Sends more than anybody wants, and does not say how much; /small and /announced have a length."""

    sent_bytes = 0

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.send_response(200)
        length = {"/small": 4, "/announced": 10 * MOST_BYTES}.get(self.path)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        with suppress(OSError):
            for _ in range(1 if length == 4 else 10 * MOST_BYTES >> 20):
                self.wfile.write(b"text" if length == 4 else bytes(1 << 20))
                type(self).sent_bytes += 1 << 20

    def log_message(self, format: str, *arguments: Any) -> None:
        """Silent."""


@pytest.fixture
def endless() -> Iterator[Folder]:
    Endless.sent_bytes = 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endless)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Folder(f"http://127.0.0.1:{server.server_port}")
    server.shutdown()
    server.server_close()


class TestBounds:
    @pytest.mark.parametrize("name", ["unknown", "announced"])
    def test_a_server_that_sends_without_end_is_left(self, endless: Folder, tmp_path: Path, name: str) -> None:
        message = rf"^http://127\.0\.0\.1:\d+/{name} is refused: it has more than the {MOST_BYTES} bytes"
        with pytest.raises(UserError, match=message):
            endless.read(name, MOST_BYTES)
        with pytest.raises(UserError, match=message):
            endless.fetch(name, tmp_path / "file", MOST_BYTES)
        assert (tmp_path / "file").stat().st_size < 2 * MOST_BYTES if name == "unknown" else True
        assert Endless.sent_bytes < 2 * 5 * MOST_BYTES

    def test_a_file_that_is_as_long_as_it_may_be_is_read(self, endless: Folder, folder: Folder, tmp_path: Path) -> None:
        assert endless.read("small", 4) == b"text"
        folder.write("name", b"0123456789")
        assert folder.read("name", 10) == b"0123456789"
        folder.fetch("name", tmp_path / "file", 10)
        assert (tmp_path / "file").read_bytes() == b"0123456789"

    @pytest.mark.parametrize("folder", ["memory", "s3"], indirect=True)
    def test_one_that_is_longer_is_refused(self, folder: Folder, tmp_path: Path) -> None:
        folder.write("name", b"0123456789")
        with pytest.raises(UserError, match="name is refused: it has more than the 9 bytes"):
            folder.read("name", 9)
        with pytest.raises(UserError, match="name is refused: it has more than the 9 bytes"):
            folder.fetch("name", tmp_path / "file", 9)

    @pytest.mark.parametrize("error", [MemoryError(), *(OSError(number, "x") for number in (ENOSPC, EDQUOT, EFBIG))])
    def test_what_this_machine_lacks_is_not_the_stores_fault(self, error: Exception, tmp_path: Path) -> None:
        folder = Folder(f"memory://{tmp_path}")
        with pytest.raises(type(error)) as raised, folder.answering():
            raise error
        assert raised.value is error


def test_s3_notes_the_checksum_of_what_it_is_told_one_of(bucket: str, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "file").write_text("content")
    folder = Folder(bucket)
    folder.put(tmp_path / "file", "noted", "ab" * 32)
    folder.put(tmp_path / "file", "other")
    assert (folder.sha256("noted"), folder.sha256("other")) == ("ab" * 32, None)
    folder.put(tmp_path / "file", "noted")
    assert folder.sha256("noted") is None

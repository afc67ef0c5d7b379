"""Folders on disk, in memory and in an object store: whole files or none."""

from __future__ import annotations

import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from objectstore import bucket, s3_endpoint  # noqa: F401

import logitcache
from logitcache import UserError
from logitcache.format.storage import Folder


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

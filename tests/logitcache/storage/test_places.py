"""Where a command may write and what a place may say of itself: refused in one line, before any work is done."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import logitcache
from logitcache import UserError
from logitcache.cli import main
from logitcache.exchange.source_files import find_sources
from logitcache.maintenance.verify.verification import Verification
from logitcache.reading.cache import LogitCache
from logitcache.storage.folder import Folder
from tests.helpers.exchanging import random_rows as topk_rows
from tests.helpers.exchanging import write_rows, write_tokenizer
from tests.helpers.maintained import contents, make_cache
from tests.helpers.smallcaches import EVERYTHING, random_rows
from tests.helpers.webserver import Website, website

OUTPUTS = {
    "slice": ["slice", "cache", "--rows", "0:9", "--out", "{}"],
    "recode": ["recode", "cache", "--top-k", "2", "--out", "{}"],
    "merge": ["merge", "cache", "cache", "--out", "{}"],
    "pull": ["pull", "cache", "--out", "{}"],
    "push": ["push", "cache", "{}"],
    "bundle": ["push", "cache", "{}/it.tar.zst"],
    "import": ["import", "rows.parquet", "--from", "topk", "--teacher", "t", "--tokenizer", "tokenizer", "--out", "{}"],
    "export": ["export", "cache", "--to", "topk", "--out", "{}/rows.parquet"],
    "view": ["view", "cache", "--out", "{}/page.html"],
}
commands = pytest.mark.parametrize("command", OUTPUTS.values(), ids=OUTPUTS.keys())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    make_cache(root / "cache", random_rows(12, EVERYTHING), EVERYTHING)
    write_rows(root / "rows.parquet", topk_rows(4))
    write_tokenizer(root / "tokenizer")
    return root


@pytest.fixture
def nothing_is_read(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a command reads of a cache before it refuses fails."""

    def read(*_: object) -> None:
        raise AssertionError("rows are read before the place is looked at")

    monkeypatch.chdir(made)
    for method in ("read_row_group", "iter_columns"):
        monkeypatch.setattr(LogitCache, method, read)


def refusal(command: list[str], place: Path | str, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main([argument.format(place) for argument in command]) == 2
    error = capsys.readouterr().err
    assert error.count("logitcache: error: ") == 1
    return error


@commands
@pytest.mark.usefixtures("nothing_is_read")
def test_a_web_server_takes_no_files(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if command[0] in ("pull", "view"):
        return  # which take folders and files of this machine only
    with website(tmp_path) as site:
        for url in (site.url("out"), f"simplecache::{site.url('out')}"):
            assert "a web server takes no files; choose hf://" in refusal(command, url, capsys)
        assert site.posted == 0


@commands
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("file/below", "Not a directory"),
        ("file", "Not a directory|a file is wanted"),
        ("n" * 300, "File name too long"),
    ],
    ids=["below a file", "a file", "a name that is too long"],
)
@pytest.mark.usefixtures("nothing_is_read")
def test_a_place_that_cannot_be_is_refused(
    command: list[str], name: str, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("precious")
    if command[0] == "import":
        return  # which reads its sources first
    error = refusal(command, tmp_path / name, capsys)
    assert any(reason in error for reason in (*why.split("|"), "is a file", "cannot be written"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "precious"


@pytest.fixture(params=[True, False], ids=["a new folder", "a folder that is there"])
def read_only(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the kernel presents it on a file system that is mounted read-only."""
    root = tmp_path / "mounted"
    root.mkdir()
    access, statvfs = os.access, os.statvfs

    class ReadOnly:
        f_flag = os.ST_RDONLY

    def inside(path: str | Path) -> bool:
        return Path(path) == root or root in Path(path).parents

    monkeypatch.setattr(os, "access", lambda path, mode: not (inside(path) and mode & os.W_OK) and access(path, mode))
    monkeypatch.setattr(os, "statvfs", lambda path: ReadOnly() if inside(path) else statvfs(path))
    return root / "out" if request.param else root


@commands
@pytest.mark.usefixtures("nothing_is_read")
def test_a_read_only_file_system_is_refused(
    command: list[str], read_only: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if command[0] != "view":
        assert "a folder that can be written is wanted (Read-only file system)" in refusal(command, read_only, capsys)
    assert not list((read_only if read_only.name == "mounted" else read_only.parent).iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENAMETOOLONG])
@commands
def test_a_file_system_that_fails_meanwhile_is_one_line_and_leaves_nothing_half(
    command: list[str],
    code: int,
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(made)
    replace = Path.replace

    def fails(path: Path, target: Path) -> Path:
        if tmp_path in path.parents and path.suffix == ".tmp" and ".build" not in path.parts:
            raise OSError(code, os.strerror(code), str(path))
        return replace(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", fails)
        error = refusal(command, tmp_path / "out", capsys)
    assert "no space left" in error or os.strerror(code) in error
    left = contents(tmp_path)
    assert not [
        name for name in left if name.endswith(("logitcache.json", ".tmp", ".tar.zst", "rows.parquet", ".html"))
    ]
    assert main([argument.format(tmp_path / "out") for argument in command]) == 0


class TestWhatCannotBeRead:
    @pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ESTALE])
    def test_is_one_line(
        self, made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: int
    ) -> None:
        monkeypatch.chdir(made)
        lstat = Path.lstat

        def fails(path: Path) -> os.stat_result:
            if path.name == "logitcache.json":
                raise OSError(code, os.strerror(code), str(path))
            return lstat(path)

        monkeypatch.setattr(Path, "lstat", fails)
        for command in (
            ["info", "cache"],
            ["push", "cache", "elsewhere"],
            ["slice", "cache", "--rows", "0:1", "--out", "o"],
        ):
            error = refusal(command, "", capsys)
            assert f"cache/logitcache.json cannot be read ({os.strerror(code)})" in error


LISTINGS = {
    "climbing": "../secret ../../secret ../../../etc/passwd x/../../secret",
    "absolute": "/etc/passwd /secret http://elsewhere.invalid/x //elsewhere.invalid/x",
    "in circles": "./ . / ../cache/ data/ data/../ %2e/ %2e%2e/",
    "strange": "?x #x javascript:x data:x C:\\x \\\\x file:///etc/passwd \x00 %00 " + "n" * 5000,
}


class TestListingsOfAWebServer:
    @pytest.fixture(params=list(LISTINGS.values()), ids=list(LISTINGS))
    def site(
        self, request: pytest.FixtureRequest, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[Website]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("LOGITCACHE_HOME", str(tmp_path / "home"))
        with website(made) as served:
            served.listing = "".join(f'<a href="{link}">{link}</a>' for link in request.param.split(" "))
            yield served

    @pytest.mark.slow
    def test_are_not_read_of_a_cache(self, site: Website, tmp_path: Path) -> None:
        url = site.url("cache")
        assert len(list(logitcache.open(url))) == 12
        assert not list(Verification(url))
        for command in (
            ["pull", url, "--out", "pulled"],
            ["pull", url, "--shards", "0:1", "--out", "shard"],
            ["slice", url, "--rows", "0:3", "--out", "part"],
            ["view", url],
            ["info", url],
        ):
            assert main(command) == 0
        folder = Folder(url)
        assert (folder.names(), folder.files("data"), folder.stored()) == ([], [], {})
        assert not [path for path in site.requests if path.rstrip("/") == "/cache/data"]
        assert contents(tmp_path / "pulled").keys() == contents(site.root / "cache").keys()

    def test_are_not_followed_without_end_by_an_import(self, site: Website) -> None:
        site.listing = f'{site.listing}<a href="rows.parquet">rows</a>'
        assert [file.name for file in find_sources([site.url("*.parquet")])[0].files] == ["rows.parquet"]
        with pytest.raises(
            UserError, match=r"listings of a web server may go in circles; write a pattern without \*\*"
        ):
            find_sources([site.url("**/*.parquet")])
        assert len(site.requests) < 50

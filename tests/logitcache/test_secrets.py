"""The secrets of a URL stay with whoever typed it: no record, card, log line or message has them."""

from __future__ import annotations

import contextlib
import json
import pickle
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import logitcache
from logitcache import LogitCache, UserError
from logitcache.assembly.finalize import finalize_cache
from logitcache.assembly.plan import Plan
from logitcache.cli import main
from logitcache.format.manifest import BUILD_DIRECTORY, Manifest
from logitcache.format.shards import ShardInfo
from logitcache.maintenance.slice import slice_cache
from logitcache.storage.folder import Folder
from tests.helpers.exchanging import random_rows as topk_rows
from tests.helpers.exchanging import write_rows, write_tokenizer
from tests.helpers.maintained import make_cache
from tests.helpers.smallcaches import EVERYTHING, random_rows
from tests.helpers.webserver import SECRET, USER, Website, website
from tests.helpers.written import written_to

NUM_ROWS = 12


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Website]:
    """One cache, another, a bundle, and rows to import, for those who know the password."""
    root = tmp_path_factory.mktemp("site")
    for seed, name in enumerate(("cache", "other")):
        make_cache(root / name, random_rows(NUM_ROWS, EVERYTHING, seed), EVERYTHING)
    assert main(["push", str(root / "cache"), str(root / "cache.tar.zst")]) == 0
    write_rows(root / "rows.parquet", topk_rows(4))
    with website(root) as site:
        yield site


@pytest.fixture
def site(served: Website, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Website:
    """The same, with the password and local copies of each test."""
    monkeypatch.setenv("LOGITCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    served.password = SECRET
    return served


COMMANDS = {
    "slice": ["slice", "{cache}", "--rows", "2:9", "--out", "out"],
    "recode": ["recode", "{cache}", "--top-k", "2", "--out", "out"],
    "merge": ["merge", "{cache}", "{other}", "--out", "out"],
    "pull": ["pull", "{cache}", "--out", "out"],
    "pull shards": ["pull", "{cache}", "--shards", "0:1", "--out", "out"],
    "pull rows": ["pull", "{cache}", "--rows", "2:9", "--out", "out"],
    "pull a bundle": ["pull", "{bundle}", "--out", "out"],
    "import": [
        "import",
        "{rows}",
        "--from",
        "topk",
        "--teacher",
        "{cache}",
        "--tokenizer",
        "tokenizer",
        "--out",
        "out",
    ],
    "export": ["export", "{cache}", "--to", "topk", "--out", "out/rows.jsonl"],
    "view": ["view", "{cache}", "--out", "out/page.html"],
    "info": ["info", "{cache}"],
    "verify": ["verify", "{cache}"],
    "chained": ["slice", "simplecache::{cache}", "--rows", "2:9", "--out", "out"],
}


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS.keys())
def test_what_reads_from_a_url_records_and_prints_it_without_the_password(
    site: Website, tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    write_tokenizer(tmp_path / "tokenizer")
    names = {
        "cache": "cache",
        "other": "other",
        "bundle": "cache.tar.zst?sig=" + SECRET,
        "rows": "rows.parquet?s=" + SECRET,
    }
    urls = {name: site.url(path) for name, path in names.items()}
    assert main([argument.format(**urls) for argument in command]) == 0
    printed = "".join(capsys.readouterr())
    for held in (printed, written_to(tmp_path / "out").decode(errors="replace")):
        assert SECRET not in held
        assert f"{USER}:" not in held
    if (tmp_path / "out/logitcache.json").exists():
        assert main(["info", "out"]) == 0
        changed = command[0] not in ("pull", "import") or "--shards" in command or "--rows" in command
        assert (site.host in capsys.readouterr().out) == (changed or command[0] == "import")


FAILURES: dict[str, Callable[[Website], str]] = {
    "another password": lambda site: site.url("cache", "Wrong" + SECRET),
    "no such cache": lambda site: site.url("nowhere") + f"?token={SECRET}",
    "nobody answers": lambda site: f"http://{USER}:{SECRET}@127.0.0.1:9/cache?token={SECRET}#{SECRET}",
    "no such host": lambda site: f"http://{USER}:{SECRET}@no.such.host.invalid/cache",
    "a password that is no part of a URL": lambda site: f"http://{USER}:a/{SECRET}@{site.host}/cache",
    "no such kind of URL": lambda site: f"gopher://{USER}:{SECRET}@{site.host}/cache?{SECRET}=1",
    "chained": lambda site: f"simplecache::http://{USER}:{SECRET}@127.0.0.1:9/cache",
}


@pytest.mark.slow
@pytest.mark.parametrize("url", FAILURES.values(), ids=FAILURES.keys())
@pytest.mark.parametrize(
    "command",
    [
        ["info", "{}"],
        ["verify", "{}"],
        ["pull", "{}", "--out", "out"],
        ["pull", "{}/cache.tar.zst", "--out", "out"],
        ["import", "{}/rows.parquet", "--from", "topk", "--teacher", "t", "--tokenizer", "tokenizer", "--out", "out"],
        ["slice", "cache", "--rows", "0:2", "--out", "{}"],
        ["push", "cache", "{}"],
        ["export", "cache", "--to", "topk", "--out", "{}/rows.jsonl"],
    ],
    ids=lambda command: f"{command[0]}{' a bundle' if 'zst' in command[1] else ''}",
)
def test_no_error_message_has_them(
    site: Website,
    url: Callable[[Website], str],
    command: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("logitcache.sharing.transfer.FIRST_PAUSE_S", 0.0)
    monkeypatch.chdir(site.root)
    capsys.readouterr()
    assert main([argument.format(url(site)) for argument in command]) == 2
    error = capsys.readouterr().err
    assert error.count("logitcache: error: ") == 1
    assert SECRET not in error
    assert USER not in error


def test_no_traceback_of_a_call_from_python_has_them_either(site: Website) -> None:
    with pytest.raises(UserError) as raised:
        logitcache.open(site.url("cache", "Wrong" + SECRET))
    assert SECRET not in "".join(traceback.format_exception_only(raised.value))
    shown = raised.value.__cause__ or (None if raised.value.__suppress_context__ else raised.value.__context__)
    assert SECRET not in str(shown)


def test_a_cache_and_a_folder_are_printed_without_them_and_travel_with_them(site: Website) -> None:
    cache = logitcache.open(site.url("cache"))
    for each in (cache, cache.folder):
        assert SECRET not in f"{each} {each!r}"
        assert site.host in f"{each} {each!r}"
    assert cache.path == f"http://{site.host}/cache"
    assert pickle.loads(pickle.dumps(cache.folder)).read("logitcache.json")
    assert pickle.loads(pickle.dumps(cache))[3].row_id == cache[3].row_id


class TestAnotherPassword:
    """It may have changed since yesterday: what a command was asked for is the same."""

    @pytest.mark.slow
    def test_the_same_command_finds_its_cache_complete(
        self, site: Website, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
    ) -> None:
        assert main(["slice", site.url("cache"), "--rows", "2:9", "--out", "out"]) == 0
        site.password = "another"
        capsys.readouterr()
        assert main(["slice", site.url("cache"), "--rows", "2:9", "--out", "out"]) == 0
        assert "is already complete" in capsys.readouterr().err

    @pytest.mark.slow
    def test_and_continues_what_was_interrupted(
        self, site: Website, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        whole = slice_cache(site.url("cache"), tmp_path / "whole", rows="0:9", shard_positions=8)
        record = Plan.record
        done: list[int] = []

        def killed(plan: Plan, index: int, info: ShardInfo) -> None:
            record(plan, index, info)
            done.append(index)
            if len(done) == 2:
                raise KeyboardInterrupt

        with monkeypatch.context() as patched, contextlib.suppress(KeyboardInterrupt):
            patched.setattr(Plan, "record", killed)
            slice_cache(site.url("cache"), tmp_path / "out", rows="0:9", shard_positions=8)
        assert (tmp_path / "out" / BUILD_DIRECTORY / "plan.json").exists()
        assert SECRET.encode() not in written_to(tmp_path / "out")
        site.password = "another"
        continued = slice_cache(site.url("cache"), tmp_path / "out", rows="0:9", shard_positions=8)
        assert continued.identity == whole.identity


class TestWhatAnEarlierVersionRecorded:
    @pytest.fixture
    def old(self, tmp_path: Path) -> LogitCache:
        """A cache whose manifest says where rows came from with the password of it."""
        cache = make_cache(tmp_path / "old", random_rows(NUM_ROWS, EVERYTHING), EVERYTHING)
        url = f"http://{USER}:{SECRET}@host/cache?token={SECRET}"
        step = {
            "command": "slice",
            "where": f"url = '{url}'",
            "from": [{"path": url, "history": [{"from": [{"path": url}]}]}],
        }
        corpus = {**cache.manifest.fingerprint["corpus"], "sources": [{"name": url}]}
        fingerprint = {**cache.manifest.fingerprint, "corpus": corpus}
        replace(cache.manifest, history=(step,), fingerprint=fingerprint).write(Folder(cache.path))
        return LogitCache(cache.path)

    def test_is_not_published(self, old: LogitCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for place in ("pushed", "pushed.tar.zst"):
            assert main(["push", old.path, str(tmp_path / place)]) == 2
            assert "with a user name, a password or a query of the URL" in capsys.readouterr().err
            assert not (tmp_path / place).exists()

    def test_is_left_out_of_what_is_made_of_it(self, old: LogitCache, tmp_path: Path) -> None:
        made = slice_cache(old.path, tmp_path / "out", rows=f"0:{len(old)}")
        assert made.manifest.history[0]["from"][0] == {
            "path": "http://host/cache",
            "history": [{"from": [{"path": "http://host/cache"}]}],
        }
        assert made.manifest.fingerprint["corpus"]["sources"] == [{"name": "http://host/cache"}]
        assert made.manifest.history[0]["where"] == old.manifest.history[0]["where"]  # a condition, not a place
        assert main(["push", made.path, str(tmp_path / "pushed")]) == 0

    def test_is_not_shown(self, old: LogitCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["info", old.path]) == 0
        assert main(["view", old.path, "--out", str(tmp_path / "page.html")]) == 0
        assert f"{USER}:" not in capsys.readouterr().out
        page = (tmp_path / "page.html").read_text()
        assert "http://host/cache" in page

    def test_a_history_without_end_is_one_line(
        self, old: LogitCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        step: dict[str, Any] = {}
        for _ in range(900):
            step = {"from": step}
        content = json.loads(old.folder.read("logitcache.json"))
        content["history"] = [{"command": "merge", **step}]
        old.folder.write("logitcache.json", json.dumps(content))
        out = tmp_path / "out"
        for command in (["push", old.path, str(out)], ["slice", old.path, "--rows", "0:2", "--out", str(out)]):
            assert main(command) == 2
            assert "nested too deep" in capsys.readouterr().err
            assert not out.exists()

    def test_a_manifest_that_is_finalized_now_has_none(self, old: LogitCache, tmp_path: Path) -> None:
        finalize_cache(old.folder, old.manifest)
        sealed = json.loads((tmp_path / "old/logitcache.json").read_bytes())
        assert SECRET not in json.dumps([step["from"] for step in sealed["history"]])
        assert isinstance(LogitCache(old.path).manifest, Manifest)

"""A cache pulled from wherever it is: every byte checked, resumed wherever it stopped, whole or in part."""

# ruff: noqa: F401, F811  (fixtures are imported)
from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import patch

import pytest

import logitcache
from logitcache import UserError
from logitcache.assembly import workspace
from logitcache.cli import main
from logitcache.format import manifest as manifests
from logitcache.format.manifest import CARD_NAME, MANIFEST_NAME, read_manifest
from logitcache.maintenance.verify.verification import Verification
from logitcache.sharing import fetch as fetching
from logitcache.sharing import transfer
from logitcache.sharing.pull import pull
from logitcache.sharing.push import push
from logitcache.storage.folder import Folder
from tests.helpers.cuttingproxy import CuttingProxy, proxy
from tests.helpers.maintained import contents, make_cache
from tests.helpers.objectstore import bucket, s3_endpoint
from tests.helpers.processes import FORKED
from tests.helpers.smallcaches import EVERYTHING, random_rows

ROWS = random_rows(60, EVERYTHING)
SHARD = "data/train-00004-of-00009.parquet"
KILLS = 3


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a cache of 9 shards, as a build leaves it, and what a push makes of it."""
    root = tmp_path_factory.mktemp("made")
    make_cache(root / "cache", ROWS, EVERYTHING)
    manifest = read_manifest(Folder(root / "cache"))
    ids = "".join(row.row_id for row in logitcache.open(root / "cache"))
    corpus = {"sources": [{"name": "random"}], "sequences_sha256": sha256(ids.encode())}
    replace(manifest, fingerprint={**manifest.fingerprint, "corpus": corpus}).write(Folder(root / "cache"))
    push(root / "cache", root / "there", license="apache-2.0")
    return root


@pytest.fixture
def cache(made: Path, tmp_path: Path) -> Path:
    """The cache that was built and pushed."""
    return Path(shutil.copytree(made / "cache", tmp_path / "cache"))


@pytest.fixture(params=["disk", "memory", "s3"])
def url(request: pytest.FixtureRequest, made: Path, tmp_path: Path) -> str:
    """Where the cache was pushed to."""
    if request.param == "s3":
        url = f"{request.getfixturevalue('bucket')}/team/cache"
    else:
        url = str(tmp_path / "there") if request.param == "disk" else f"memory://{tmp_path}/there"
    for name, content in contents(made / "there").items():
        Folder(url).write(name, content)
    return url


@pytest.fixture
def there(made: Path, tmp_path: Path) -> str:
    """The same in a folder."""
    return str(shutil.copytree(made / "there", tmp_path / "there"))


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Stopped(Exception):
    """A process that ends."""


@contextmanager
def stopped_after(num_files: int) -> Iterator[list[str]]:
    """Fetching ends as if the process had, in the middle of the file after so many; yields their names."""
    fetched: list[str] = []
    original = Folder.fetch

    def fetch(self: Folder, name: str, path: Path, at_most: int | None = None) -> None:
        original(self, name, path, at_most)
        if len(fetched) == num_files:
            path.write_bytes(path.read_bytes()[:-1])
            raise Stopped
        fetched.append(name)

    with patch.object(Folder, "fetch", fetch), patch.object(transfer, "NUM_TRANSFERS", 1):
        yield fetched


@pytest.mark.slow
def test_every_file_comes_and_the_identity_is_the_same(cache: Path, url: str, tmp_path: Path) -> None:
    pulled = pull(url, tmp_path / "out", against=logitcache.open(cache).identity)
    assert contents(tmp_path / "out") == contents(cache)
    assert pulled.identity == logitcache.open(cache).identity
    assert list(Verification(tmp_path / "out")) == []


@pytest.mark.slow
def test_what_is_here_and_right_is_not_fetched_again(there: str, tmp_path: Path) -> None:
    pull(there, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/data").iterdir()}
    with stopped_after(0):
        pull(there, tmp_path / "out")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out/data").iterdir()} == before


@pytest.mark.slow
@pytest.mark.parametrize("num_files", range(11))
def test_a_pull_that_stopped_anywhere_is_continued(cache: Path, there: str, tmp_path: Path, num_files: int) -> None:
    with stopped_after(num_files) as fetched, pytest.raises(Stopped):
        pull(there, tmp_path / "out")
    left = contents(tmp_path / "out")
    assert all(left[name] == contents(cache)[name] for name in fetched)
    assert not any(name.endswith(".tmp") for name in left)
    with pytest.raises(UserError, match="unfinished build: run the same `logitcache` command again"):
        logitcache.open(tmp_path / "out")
    with stopped_after(20) as again:
        pull(there, tmp_path / "out")
    assert set(again).isdisjoint(fetched)
    assert contents(tmp_path / "out") == contents(cache)


@pytest.mark.slow
def test_what_a_killed_pull_left_of_a_file_is_not_taken(cache: Path, there: str, tmp_path: Path) -> None:
    with stopped_after(2), pytest.raises(Stopped):
        pull(there, tmp_path / "out")
    (tmp_path / "out/data").mkdir(exist_ok=True)
    (tmp_path / "out" / SHARD).with_suffix(".parquet.tmp").write_bytes(contents(cache)[SHARD][:100])
    (tmp_path / "out" / SHARD).write_bytes(bytes(len(contents(cache)[SHARD])))
    pull(there, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(cache)


@pytest.mark.slow
def test_a_damaged_copy_is_mended(cache: Path, there: str, tmp_path: Path) -> None:
    pull(there, tmp_path / "out")
    (tmp_path / "out" / SHARD).write_bytes(b"damaged")
    (tmp_path / "out/tail_groups.parquet").unlink()
    (tmp_path / "out/data/left-over.parquet").write_bytes(b"of a former cache")
    with stopped_after(20) as fetched:
        pull(there, tmp_path / "out")
    assert sorted(fetched) == [SHARD, "tail_groups.parquet"]
    assert contents(tmp_path / "out") == contents(cache)


def run_pull(url: str, out: Path, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    pull(url, out)


@pytest.mark.slow
def test_kills_at_any_moment_and_then_the_same_bytes(cache: Path, bucket: str, tmp_path: Path) -> None:
    push(cache, f"{bucket}/cache")
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    out, moments = tmp_path / "out", random.Random(0)

    def complete() -> set[str]:
        return {path.name for path in out.glob("data/*.parquet")}

    for _ in range(KILLS):
        before = complete()
        process = FORKED.Process(target=run_pull, args=(f"{bucket}/cache", out, environment))
        process.start()
        wanted = len(before) + moments.randint(0, 3)
        while process.is_alive() and len(complete()) < wanted:
            time.sleep(0.0005)
        time.sleep(moments.uniform(0, 0.01))
        process.kill()  # SIGKILL
        process.join()
        assert before <= complete()
        for path in out.glob("data/*.parquet"):
            assert path.read_bytes() == (cache / "data" / path.name).read_bytes()
        if (out / MANIFEST_NAME).exists():
            pull(f"{bucket}/cache", out)
            assert contents(out) == contents(cache)
            shutil.rmtree(out)  # a fast machine: begin another one
    pull(f"{bucket}/cache", out)
    assert contents(out) == contents(cache)


class TestConnections:
    @pytest.mark.slow
    @pytest.mark.parametrize("after_bytes", [2_000, 20_000, 60_000, 100_000])
    def test_one_that_is_cut_is_made_again(
        self, cache: Path, bucket: str, proxy: CuttingProxy, tmp_path: Path, after_bytes: int
    ) -> None:
        push(cache, f"{bucket}/cache")
        proxy.cut(after_bytes, num_cuts=2)
        pull(f"{bucket}/cache", tmp_path / "out")
        assert proxy.num_cuts < 2
        assert contents(tmp_path / "out") == contents(cache)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["cache", "cache.tar.zst"])
    def test_one_that_breaks_every_time_is_one_line_and_the_same_command_continues(
        self,
        cache: Path,
        bucket: str,
        proxy: CuttingProxy,
        tmp_path: Path,
        name: str,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        push(cache, f"{bucket}/{name}")
        proxy.cut(8_000, num_cuts=10**6)
        assert main(["pull", f"{bucket}/{name}", "--out", str(tmp_path / "out")]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert "Tried 4 times; the same command continues where it was" in line
        assert not (tmp_path / "out" / MANIFEST_NAME).exists()
        proxy.cut(0, num_cuts=0)
        pull(f"{bucket}/{name}", tmp_path / "out")
        assert contents(tmp_path / "out") == contents(cache)


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """Any web server of files, here Python's own."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["there", "there.tar.zst"])
def test_a_cache_comes_from_a_web_server(cache: Path, web: str, tmp_path: Path, name: str) -> None:
    push(cache, tmp_path / name)
    pull(f"{web}/{name}", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(cache)


@pytest.mark.slow
def test_a_web_server_takes_none(cache: Path, web: str) -> None:
    with pytest.raises(UserError, match=r"/there: a web server takes no files"):
        push(cache, f"{web}/there")


class TestAltered:
    @pytest.mark.slow
    def test_a_shard_that_was_altered_is_named_and_does_not_come(self, url: str, tmp_path: Path) -> None:
        Folder(url).write(SHARD, bytes(Folder(url).num_bytes(SHARD)))
        with pytest.raises(
            UserError, match=r"there/data/train-00004.*|cache/data/train-00004.* was altered: its SHA-256 is"
        ):
            pull(url, tmp_path / "out")
        assert not (tmp_path / "out" / SHARD).exists()
        assert not (tmp_path / "out" / MANIFEST_NAME).exists()

    @pytest.mark.slow
    def test_a_shard_of_another_size_is_not_even_fetched(self, url: str, tmp_path: Path) -> None:
        Folder(url).write(SHARD, bytes(100_000))
        with (
            stopped_after(0) as fetched,
            pytest.raises(
                UserError, match=r"train-00004-of-00009\.parquet was altered: 100000 bytes, the manifest says"
            ),
        ):
            pull(url, tmp_path / "out")
        assert fetched == []

    @pytest.mark.slow
    def test_a_shard_may_be_larger_as_the_manifest_says_its_size(
        self, there: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        others = [*Path(there).glob("tokenizer/*"), *Path(there).glob("tail_*.parquet")]
        largest = max(path.stat().st_size for path in others)
        monkeypatch.setattr(fetching, "MAX_FILE_BYTES", largest)
        assert any(path.stat().st_size > largest for path in Path(there).glob("data/*"))
        pull(there, tmp_path / "out")

    @pytest.mark.slow
    @pytest.mark.parametrize("name", [CARD_NAME, SHARD])
    def test_a_folder_where_a_file_should_be_is_one_line(self, there: str, tmp_path: Path, name: str) -> None:
        pull(there, tmp_path / "out")
        (tmp_path / "out" / name).unlink()
        (tmp_path / "out" / name).mkdir()
        with pytest.raises(UserError, match=r".* cannot be written"):
            pull(there, tmp_path / "out")

    @pytest.mark.slow
    @pytest.mark.parametrize("name", [SHARD, "tokenizer/tokenizer.json", "tail_groups.parquet", "tail_basis.parquet"])
    def test_a_file_that_is_missing_is_named(self, url: str, tmp_path: Path, name: str) -> None:
        Folder(url).remove(name)
        with pytest.raises(UserError, match=f"{name} is missing, though the manifest names it"):
            pull(url, tmp_path / "out")

    @pytest.mark.slow
    def test_files_without_bounds_are_not_fetched(
        self, there: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(fetching, "MAX_FILE_BYTES", 5)
        with pytest.raises(UserError, match="bytes are refused, a file of its kind has at most 5"):
            pull(there, tmp_path / "out")
        monkeypatch.undo()
        push(there, "memory://bounds/cache")
        monkeypatch.setattr(manifests, "MAX_MANIFEST_BYTES", 5)
        with pytest.raises(UserError, match=r"logitcache\.json is refused: it has more than the 5 bytes"):
            pull("memory://bounds/cache", tmp_path / "other")

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("content", "message"),
        [(b"\xff\xfe", r"README\.md is not text in UTF-8"), (bytes(5 << 20), r"README\.md: 5242880 bytes are refused")],
    )
    def test_a_card_that_is_no_text_is_refused(self, there: str, tmp_path: Path, content: bytes, message: str) -> None:
        Folder(there).write(CARD_NAME, content)
        with pytest.raises(UserError, match=message):
            pull(there, tmp_path / "out")

    @pytest.mark.slow
    def test_a_card_that_anyone_may_have_written_comes_with_a_word_of_warning(
        self, there: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        Folder(there).write(CARD_NAME, "# Trust me\n")
        with caplog.at_level("INFO"):
            pull(there, tmp_path / "out")
        assert "README.md is what its author says: no checksum covers it" in caplog.text

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "name", ["../x", "/tmp/x", ".build/plan.json", MANIFEST_NAME, "data//x", "data/./x", "data/\nx"]
    )
    def test_a_manifest_that_names_files_of_no_cache_is_refused(self, there: str, tmp_path: Path, name: str) -> None:
        manifest = read_manifest(Folder(there))
        replace(manifest, files={**manifest.files, name: "0" * 64}).write(Folder(there))
        with pytest.raises(UserError, match="names a file that no cache has"):
            pull(there, tmp_path / "out")

    def test_one_name_for_two_files_is_refused(self, there: str, tmp_path: Path) -> None:
        manifest = read_manifest(Folder(there))
        replace(manifest, shards=(*manifest.shards, manifest.shards[0])).write(Folder(there))
        with pytest.raises(UserError, match="was altered: it names a shard twice"):
            pull(there, tmp_path / "out")


class TestIdentity:
    @pytest.mark.slow
    def test_another_cache_than_the_trusted_one_is_refused_before_anything_else(self, url: str, tmp_path: Path) -> None:
        Folder(url).write(MANIFEST_NAME, "not even JSON")
        message = f"is not the cache that --against names: its identity is {sha256(b'not even JSON')}"
        with pytest.raises(UserError, match=message):
            pull(url, tmp_path / "out", against="a" * 64)
        assert not (tmp_path / "out").exists()

    @pytest.mark.slow
    def test_it_may_be_written_in_capitals(self, cache: Path, there: str, tmp_path: Path) -> None:
        pull(there, tmp_path / "out", against=logitcache.open(cache).identity.upper())

    @pytest.mark.slow
    @pytest.mark.parametrize("against", ["", "abc", "g" * 64, "a" * 63])
    def test_what_is_no_identity_is_said_to_be_none(self, there: str, tmp_path: Path, against: str) -> None:
        with pytest.raises(UserError, match="the 64 hexadecimal digits of a cache's identity are wanted"):
            pull(there, tmp_path / "out", against=against)


class TestShards:
    @pytest.mark.slow
    def test_some_come_byte_for_byte_with_a_manifest_and_a_card_of_them(
        self, cache: Path, url: str, tmp_path: Path
    ) -> None:
        whole = logitcache.open(cache)
        with stopped_after(20) as fetched:
            part = pull(url, tmp_path / "part", shards="2:5")
        assert part.manifest.shards == whole.manifest.shards[2:5]
        assert sorted(name for name in fetched if name.startswith("data/")) == [
            shard.name for shard in part.manifest.shards
        ]
        for shard in part.manifest.shards:
            assert (tmp_path / "part" / shard.name).read_bytes() == (cache / shard.name).read_bytes()
        assert [row.row_id for row in part] == [row.row_id for row in whole][14:35]
        assert list(Verification(tmp_path / "part")) == []
        (step,) = part.manifest.history
        assert (step["command"], step["shards"], step["sequences"], step["left_out"]) == ("pull", "2:5", 21, 39)
        (origin,) = step["from"]
        assert (origin["manifest_sha256"], origin["sequences"]) == (whole.identity, 60)
        card = (tmp_path / "part" / CARD_NAME).read_text()
        assert "license: apache-2.0" in card
        assert part.identity in card

    @pytest.mark.slow
    @pytest.mark.parametrize(("shards", "count"), [(":", 9), (":2", 2), ("8:", 1)])
    def test_either_end_may_be_left_out(self, there: str, tmp_path: Path, shards: str, count: int) -> None:
        assert len(pull(there, tmp_path / "part", shards=shards).manifest.shards) == count

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("shards", "message"),
        [
            ("3", "write A:B"),
            ("a:b", "write A:B"),
            ("3:3", "the cache has shards 0…8, so 0 ≤ A < B ≤ 9 is needed"),
            ("0:10", "the cache has shards 0…8"),
            ("-1:3", "write A:B"),
        ],
    )
    def test_ranges_that_are_none_are_refused(self, there: str, tmp_path: Path, shards: str, message: str) -> None:
        with pytest.raises(UserError, match=f"--shards {shards}: {message}"):
            pull(there, tmp_path / "part", shards=shards)
        assert not (tmp_path / "part").exists()

    @pytest.mark.slow
    def test_the_same_command_continues_and_then_has_nothing_to_do(self, there: str, tmp_path: Path) -> None:
        with stopped_after(3) as fetched, pytest.raises(Stopped):
            pull(there, tmp_path / "part", shards="2:5")
        with stopped_after(20) as again:
            pull(there, tmp_path / "part", shards="2:5")
        assert set(again).isdisjoint(fetched)
        before = contents(tmp_path / "part")
        with stopped_after(0):
            pull(there, tmp_path / "part", shards="2:5")
        assert contents(tmp_path / "part") == before

    @pytest.mark.slow
    def test_others_than_those_that_are_here_are_refused_unless_they_replace_them(
        self, there: str, tmp_path: Path
    ) -> None:
        with stopped_after(3), pytest.raises(Stopped):
            pull(there, tmp_path / "part", shards="2:5")
        with pytest.raises(UserError, match=r"an unfinished cache made otherwise: shards was 2:5, now 2:6"):
            pull(there, tmp_path / "part", shards="2:6")
        pull(there, tmp_path / "part", shards="2:5")
        with pytest.raises(UserError, match="holds another cache"):
            pull(there, tmp_path / "part", shards="2:6")
        with stopped_after(20) as fetched:
            pull(there, tmp_path / "part", shards="4:6", overwrite=True)
        assert fetched == ["data/train-00005-of-00009.parquet"]
        assert len(list((tmp_path / "part/data").iterdir())) == 2


class TestRows:
    @pytest.mark.slow
    def test_some_come_as_a_slice(self, cache: Path, url: str, tmp_path: Path) -> None:
        identity = logitcache.open(cache).identity
        assert main(["pull", url, "--out", str(tmp_path / "rows"), "--rows", "20:25", "--against", identity]) == 0
        ids = [row.row_id for row in logitcache.open(tmp_path / "rows")]
        assert ids == [row.row_id for row in logitcache.open(cache)][20:25]

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("more", "message"),
        [
            (["--against", "a" * 64], "is not the cache that --against names"),
            (["--shards", "0:1"], "not allowed with argument"),
        ],
    )
    def test_contradictions_are_one_line(
        self, there: str, tmp_path: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["pull", there, "--out", str(tmp_path / "rows"), "--rows", "0:5", *more]) == 2
        assert message in capsys.readouterr().err

    @pytest.mark.slow
    def test_a_bundle_has_no_rows_to_fetch(
        self, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        push(cache, tmp_path / "b.tar.zst")
        assert main(["pull", str(tmp_path / "b.tar.zst"), "--out", str(tmp_path / "rows"), "--rows", "0:5"]) == 2
        assert "is one file, read as a whole; pull it, then `logitcache slice --rows 0:5`" in capsys.readouterr().err


class TestPlaces:
    @pytest.mark.parametrize(
        ("url", "message"),
        [
            ("gopher://x/cache", "no file system for such a URL"),
            ("s3://no-such-bucket-anywhere/cache", "no-such-bucket-anywhere/cache does not exist"),
            ("memory://nowhere/cache", "memory://nowhere/cache does not exist"),
        ],
    )
    def test_that_do_not_exist_are_one_line(
        self, bucket: str, tmp_path: Path, url: str, message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["pull", url, "--out", str(tmp_path / "out")]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert message in line
        assert not (tmp_path / "out").exists()

    def test_that_are_no_cache_or_not_yet(self, cache: Path, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        with pytest.raises(UserError, match="empty is not a cache"):
            pull(tmp_path / "empty", tmp_path / "out")
        (tmp_path / "begun/.build").mkdir(parents=True)
        with pytest.raises(UserError, match="begun is an unfinished build"):
            pull(tmp_path / "begun", tmp_path / "out")
        (tmp_path / "half").mkdir()
        (tmp_path / "half/logitcache.json.unfinished").write_text("{}")
        with pytest.raises(UserError, match="half is not whole: `logitcache push` did not get to its end"):
            pull(tmp_path / "half", tmp_path / "out")

    @pytest.mark.slow
    def test_only_a_local_folder_beside_the_cache_is_written(self, there: str, tmp_path: Path) -> None:
        with pytest.raises(
            UserError, match="--out memory://out: a local folder is wanted; `logitcache push` copies to a URL"
        ):
            pull(there, "memory://out")
        for out in (there, f"{there}/data", tmp_path):
            with pytest.raises(UserError, match="choose a place outside the cache that is read"):
                pull(there, out)

    @pytest.mark.slow
    def test_a_folder_of_others_is_refused(self, there: str, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out/thesis.tex").write_text("precious")
        with pytest.raises(UserError, match="the folder is not empty and holds no cache"):
            pull(there, tmp_path / "out", overwrite=True)
        assert contents(tmp_path / "out") == {"thesis.tex": b"precious"}

    @pytest.mark.slow
    def test_a_folder_in_which_another_command_writes_is_refused(self, there: str, tmp_path: Path) -> None:
        with (
            workspace.workspace(Folder(tmp_path / "out")),
            pytest.raises(UserError, match="another command is writing there"),
        ):
            pull(there, tmp_path / "out")

    @pytest.mark.slow
    def test_another_cache_is_kept_unless_it_is_to_be_replaced(self, cache: Path, there: str, tmp_path: Path) -> None:
        make_cache(tmp_path / "out", ROWS[:20], EVERYTHING)
        before = contents(tmp_path / "out")
        with pytest.raises(UserError, match=rf"holds another cache \(identity {sha256(before[MANIFEST_NAME])}\)"):
            pull(there, tmp_path / "out")
        assert contents(tmp_path / "out") == before
        pull(there, tmp_path / "out", overwrite=True)
        assert contents(tmp_path / "out") == contents(cache)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("left", "message"),
        [
            (
                {"plan.json": {"request": {"teacher": "x"}}},
                "an unfinished cache made otherwise: command was build, now pull",
            ),
            ({"plan.json": {"request": {"command": "slice"}}}, "command was slice, now pull"),
            ({"answers/prompts.json": {"request": {}}}, "command was build, now pull"),
        ],
    )
    def test_nor_is_an_unfinished_one_lost(
        self, cache: Path, there: str, tmp_path: Path, left: dict[str, object], message: str
    ) -> None:
        (name,) = left
        for path, content in ((name, left[name]), ("logitcache", "mark")):
            Folder(tmp_path / "out").write(f".build/{path}", json.dumps(content))
        before = contents(tmp_path / "out")
        with pytest.raises(UserError, match=message):
            pull(there, tmp_path / "out")
        assert contents(tmp_path / "out") == before
        pull(there, tmp_path / "out", overwrite=True)
        assert contents(tmp_path / "out") == contents(cache)

    @pytest.mark.slow
    def test_a_cache_that_was_pushed_anew_meanwhile_is_another_one(self, there: str, tmp_path: Path) -> None:
        with stopped_after(3), pytest.raises(Stopped):
            pull(there, tmp_path / "out")
        replace(read_manifest(Folder(there)), created_by="another").write(Folder(there))
        with pytest.raises(UserError, match="an unfinished cache made otherwise: manifest_sha256 was "):
            pull(there, tmp_path / "out")


@pytest.mark.slow
def test_a_copy_that_does_not_open_is_not_said_to_be_unwritable(
    there: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: str) -> None:
        raise OSError("it does not open")

    monkeypatch.setattr("logitcache.assembly.finalize.open_cache", fail)
    with pytest.raises(OSError, match="it does not open"):
        pull(there, tmp_path / "copy")


@pytest.mark.slow
def test_the_command_prints_the_cache(there: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pull", there, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert f"identity   {logitcache.open(there).identity}" in printed
    assert "sequences  60" in printed


@pytest.mark.slow
def test_a_signature_comes_with_its_manifest(cache: Path, tmp_path: Path) -> None:
    (cache / "logitcache.json.sig").write_text("-----BEGIN SSH SIGNATURE-----")
    push(cache, tmp_path / "there")
    pull(tmp_path / "there", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(cache)
    pull(tmp_path / "there", tmp_path / "part", shards="0:1")
    assert not (tmp_path / "part/logitcache.json.sig").exists()


def test_an_old_format_travels_whole_and_in_part(tmp_path: Path) -> None:
    old = Path(__file__).parents[2] / "data/format1"
    copy: Callable[..., object] = shutil.copytree
    copy(next(path.parent for path in old.rglob(MANIFEST_NAME)), tmp_path / "old")
    assert pull(tmp_path / "old", tmp_path / "out").identity == logitcache.open(tmp_path / "old").identity
    part = pull(tmp_path / "old", tmp_path / "part", shards=":1")
    assert list(Verification(part.path)) == []

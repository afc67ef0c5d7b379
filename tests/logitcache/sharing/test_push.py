"""A cache pushed to a folder, to memory, to an object store: whole or not there, sent once, resumed wherever it stopped."""

# ruff: noqa: F401, F811  (fixtures are imported)
from __future__ import annotations

import multiprocessing
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

import logitcache
from logitcache import UserError
from logitcache.cli import main
from logitcache.format.layout import Layout
from logitcache.format.manifest import MANIFEST_NAME, UNFINISHED_NAME
from logitcache.sharing import transfer
from logitcache.sharing.pull import pull
from logitcache.sharing.push import Pushed, push
from logitcache.storage import folder as storage
from logitcache.storage.folder import Folder
from tests.helpers.cuttingproxy import CuttingProxy, connected_anew, objects, proxy
from tests.helpers.hubserver import HubServer, hub_server
from tests.helpers.maintained import contents, make_cache
from tests.helpers.objectstore import bucket, s3_endpoint
from tests.helpers.processes import FORKED
from tests.helpers.smallcaches import EVERYTHING, VOCAB, random_rows

ROWS = random_rows(60, EVERYTHING)
NUM_FILES = 14
"""9 shards, tokenizer, tail groups, card, manifest."""
KILLS = 3


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache of 9 shards, of one row group each."""
    make_cache(tmp_path / "cache", ROWS, EVERYTHING, row_group_bytes=1 << 20)
    return tmp_path / "cache"


@pytest.fixture(params=["disk", "memory", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place."""
    if request.param == "s3":
        return f"{request.getfixturevalue('bucket')}/team/cache"
    return str(tmp_path / "there") if request.param == "disk" else f"memory://{tmp_path}/there"


def there(url: str) -> dict[str, bytes]:
    """Every file at a place."""
    folder = Folder(url)
    return {name: folder.read(name) for name in folder.stored()}


class Stopped(Exception):
    """A process that ends."""


@contextmanager
def stopped_after(num_files: int) -> Iterator[list[str]]:
    """Sending ends as if the process had, after so many files; yields their names. One file goes at a time."""
    sent: list[str] = []
    original = Folder.put

    def put(self: Folder, path: Path, name: str, sha256: str = "") -> None:
        if len(sent) == num_files:
            raise Stopped
        original(self, path, name, sha256)
        sent.append(name)

    with patch.object(Folder, "put", put), patch.object(transfer, "NUM_TRANSFERS", 1):
        yield sent


@pytest.mark.slow
def test_every_file_arrives_and_the_cache_opens_there(cache: Path, url: str) -> None:
    pushed = push(cache, url)
    assert there(url) == contents(cache)
    assert len(contents(cache)) == NUM_FILES
    identity = logitcache.open(cache).identity
    num_bytes = sum(map(len, contents(cache).values()))
    assert pushed == Pushed(url, identity, num_sent=NUM_FILES, sent_bytes=num_bytes, num_kept=0)
    assert logitcache.open(url).identity == identity


@pytest.mark.slow
def test_what_is_unchanged_is_not_sent_again(cache: Path, url: str) -> None:
    push(cache, url)
    with stopped_after(0):
        assert push(cache, url) == Pushed(url, logitcache.open(cache).identity, 0, 0, NUM_FILES)


@pytest.mark.slow
def test_another_licence_sends_the_card_alone(cache: Path, url: str) -> None:
    push(cache, url)
    with stopped_after(1) as sent:
        assert push(cache, url, license="apache-2.0", data_license="CC BY 4.0").num_sent == 1
    assert sent == ["README.md"]
    assert "license: apache-2.0" in there(url)["README.md"].decode()


@pytest.mark.slow
@pytest.mark.parametrize("num_files", range(NUM_FILES + 1))
def test_half_a_cache_is_never_taken_for_a_whole_one_and_the_rest_follows(
    cache: Path, tmp_path: Path, num_files: int
) -> None:
    url = str(tmp_path / "there")
    with stopped_after(num_files) as sent, pytest.raises(Stopped):
        push(cache, url)
    if sent:
        message = "there is not whole: `logitcache push` did not get to its end, the same push continues it"
        with pytest.raises(UserError, match=message):
            logitcache.open(url)
    pushed = push(cache, url)
    assert pushed.num_kept == max(0, len(sent) - 1)  # the first is the mark
    assert pushed.num_sent == NUM_FILES - pushed.num_kept
    assert there(url) == contents(cache)


@pytest.mark.slow
@pytest.mark.parametrize("num_files", [0, 1, 5, NUM_FILES])
def test_an_object_store_is_continued_as_a_folder_is(cache: Path, bucket: str, num_files: int) -> None:
    url = f"{bucket}/cache"
    with stopped_after(num_files) as sent, pytest.raises(Stopped):
        push(cache, url)
    assert push(cache, url).num_kept == max(0, len(sent) - 1)
    assert there(url) == contents(cache)


@pytest.mark.slow
def test_a_store_without_checksums_is_believed_by_its_whole_manifest_only(cache: Path, tmp_path: Path) -> None:
    url = f"memory://{tmp_path}/there"
    with stopped_after(5), pytest.raises(Stopped):
        push(cache, url)
    shard = next(name for name in there(url) if name.startswith("data/"))
    Folder(url).write(shard, bytes(len(there(url)[shard])))
    assert push(cache, url).num_kept <= 3  # tokenizer, tail groups and tail basis, which are read
    assert there(url) == contents(cache)


def run_push(path: str, url: str, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    push(path, url)


@pytest.mark.slow
def test_kills_at_any_moment_and_then_the_rest_is_sent(cache: Path, bucket: str, s3_endpoint: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    moments, kept = random.Random(0), 0
    for _ in range(KILLS):
        before = objects(bucket, s3_endpoint)
        process = FORKED.Process(target=run_push, args=(str(cache), f"{bucket}/cache", environment))
        process.start()
        wanted = len(before) + moments.randint(0, 3)
        while process.is_alive() and len(objects(bucket, s3_endpoint)) < wanted:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.02))
        process.kill()  # SIGKILL
        process.join()
        found = objects(bucket, s3_endpoint)
        assert before <= found | {f"cache/{UNFINISHED_NAME}"}
        if "cache/logitcache.json" not in found:
            with pytest.raises(UserError, match=r"is not whole|does not exist"):
                logitcache.open(f"{bucket}/cache")
            kept = len(found - {f"cache/{UNFINISHED_NAME}"})
        else:
            break  # a fast machine
    pushed = push(cache, f"{bucket}/cache")
    assert pushed.num_kept >= kept
    assert there(f"{bucket}/cache") == contents(cache)


class TestConnections:
    @pytest.mark.slow
    @pytest.mark.parametrize("after_bytes", [200, 30_000, 60_000, 100_000])
    def test_one_that_is_cut_is_made_again(
        self, cache: Path, bucket: str, proxy: CuttingProxy, after_bytes: int
    ) -> None:
        proxy.cut(after_bytes, num_cuts=2)
        push(cache, f"{bucket}/cache")
        assert proxy.num_cuts < 2
        proxy.cut(0, num_cuts=0)
        assert there(f"{bucket}/cache") == contents(cache)

    @pytest.mark.slow
    def test_one_that_breaks_every_time_is_one_line_and_the_same_command_continues(
        self, cache: Path, bucket: str, proxy: CuttingProxy, capsys: pytest.CaptureFixture[str]
    ) -> None:
        proxy.cut(60_000, num_cuts=0)
        with patch.object(transfer, "NUM_TRANSFERS", 1), stopped_after(6), pytest.raises(Stopped):
            push(cache, f"{bucket}/cache")
        proxy.cut(1_000, num_cuts=10**6)
        assert main(["push", str(cache), f"{bucket}/cache"]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert "Tried 4 times; the same command continues where it was" in line
        proxy.cut(0, num_cuts=0)
        assert push(cache, f"{bucket}/cache").num_kept == 5
        assert there(f"{bucket}/cache") == contents(cache)


class TestOverAnother:
    @pytest.mark.slow
    def test_a_cache_of_another_fingerprint_is_kept(self, cache: Path, tmp_path: Path, url: str) -> None:
        push(cache, url)
        before = there(url)
        make_cache(tmp_path / "other", ROWS[:20], EVERYTHING, capture={"top_k": 9, "top_p": 1.0, "min_k": 9})
        with pytest.raises(
            UserError, match=r"holds another cache: fingerprint\.capture\.top_k was 8, now 9; .*--overwrite"
        ):
            push(tmp_path / "other", url)
        assert there(url) == before

    @pytest.mark.slow
    def test_nor_does_a_slice_replace_what_it_was_cut_from(self, cache: Path, tmp_path: Path, url: str) -> None:
        push(cache, url)
        manifest = logitcache.open(cache).manifest
        step = {"command": "slice", "rows": "0:9"}
        replace(manifest, history=(step,)).write(Folder(cache))
        before = there(url)
        with pytest.raises(UserError, match=r"holds another cache: history was 0 items, now 1 items\. Choose"):
            push(cache, url)
        assert there(url) == before

    @pytest.mark.slow
    def test_overwriting_leaves_nothing_of_it(self, cache: Path, tmp_path: Path, url: str) -> None:
        push(cache, url)
        Folder(url).write(".gitattributes", "not of a cache")
        Folder(url).write("logitcache.json.sig", "of the former manifest")
        make_cache(
            tmp_path / "other", random_rows(20, Layout(VOCAB)), Layout(VOCAB), corpus={"sources": [{"name": "b"}]}
        )
        pushed = push(tmp_path / "other", url, overwrite=True)
        assert there(url) == contents(tmp_path / "other") | {".gitattributes": b"not of a cache"}
        assert pushed.num_kept == 1  # the tokenizer is the same

    @pytest.mark.slow
    def test_while_a_named_file_changes_no_manifest_is_there(self, cache: Path, tmp_path: Path, url: str) -> None:
        push(cache, url)
        make_cache(tmp_path / "rebuilt", ROWS[:59], EVERYTHING, row_group_bytes=1 << 20)
        original, present = Folder.put, {}

        def put(self: Folder, path: Path, name: str, sha256: str = "") -> None:
            present[name] = self.exists(MANIFEST_NAME)
            original(self, path, name, sha256)

        with patch.object(Folder, "put", put):
            assert push(tmp_path / "rebuilt", url).num_kept == NUM_FILES - 3
        last = "data/train-00008-of-00009.parquet"
        assert present == {UNFINISHED_NAME: True, last: False, "README.md": False, MANIFEST_NAME: False}
        assert there(url) == contents(tmp_path / "rebuilt")

    @pytest.mark.slow
    def test_a_cache_that_grew_is_there_in_its_former_state_until_it_is_whole(
        self, cache: Path, tmp_path: Path, url: str
    ) -> None:
        make_cache(tmp_path / "smaller", ROWS[:20], EVERYTHING)
        push(tmp_path / "smaller", url)
        with stopped_after(5), pytest.raises(Stopped):
            push(cache, url)
        assert len(logitcache.open(url)) == 20
        push(cache, url)
        assert there(url) == contents(cache)

    @pytest.mark.slow
    def test_a_shard_that_was_altered_there_is_sent_again(self, cache: Path, bucket: str) -> None:
        push(cache, f"{bucket}/cache")
        shard = "data/train-00004-of-00009.parquet"
        Folder(f"{bucket}/cache").write(shard, bytes(len(there(f"{bucket}/cache")[shard])))
        assert push(cache, f"{bucket}/cache").num_sent == 2  # with the manifest, which was away meanwhile
        assert there(f"{bucket}/cache") == contents(cache)

    @pytest.mark.slow
    def test_files_of_others_are_not_touched(self, cache: Path, url: str) -> None:
        Folder(url).write("thesis.tex", "precious")
        with pytest.raises(
            UserError, match=r"holds no cache but other files \(thesis\.tex, …\): choose an empty place"
        ):
            push(cache, url, overwrite=True)
        assert there(url) == {"thesis.tex": b"precious"}

    @pytest.mark.slow
    def test_nor_is_an_unfinished_build(self, cache: Path, url: str) -> None:
        Folder(url).write(".build/plan.json", "{}")
        with pytest.raises(UserError, match="is an unfinished build"):
            push(cache, url)

    @pytest.mark.slow
    def test_a_manifest_that_nobody_can_read_is_kept_unless_it_is_to_be_replaced(self, cache: Path, url: str) -> None:
        Folder(url).write(MANIFEST_NAME, "{")
        with pytest.raises(
            UserError, match=r"logitcache\.json, line 1: not JSON .*; --overwrite replaces the cache there"
        ):
            push(cache, url)
        push(cache, url, overwrite=True)
        assert there(url) == contents(cache)

    @pytest.mark.slow
    def test_one_that_a_newer_version_wrote_is_away_while_its_files_are_replaced(self, cache: Path, url: str) -> None:
        push(cache, url)
        Folder(url).write(MANIFEST_NAME, '{"format": 99}')
        Folder(url).write("data/train-00004-of-00009.parquet", "other")
        with stopped_after(2), pytest.raises(Stopped):
            push(cache, url, overwrite=True)
        assert MANIFEST_NAME not in there(url)
        push(cache, url)
        assert there(url) == contents(cache)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["logitcache.json.unfinished.tmp", "logitcache.json.tmp", "README.md.tmp"])
    def test_what_a_push_that_was_killed_in_its_first_write_left_is_ours(
        self, cache: Path, tmp_path: Path, name: str
    ) -> None:
        (tmp_path / "there").mkdir()
        (tmp_path / "there" / name).write_text("{")
        push(cache, tmp_path / "there")
        assert contents(tmp_path / "there") == contents(cache)


class TestAtOnce:
    @pytest.mark.slow
    @pytest.mark.parametrize("moment", [UNFINISHED_NAME, "data/train-00008-of-00009.parquet"])
    @pytest.mark.parametrize("finished", [False, True])
    def test_another_push_to_a_store_is_noticed_before_the_manifest_goes(
        self, cache: Path, tmp_path: Path, bucket: str, moment: str, finished: bool
    ) -> None:
        original = Folder.put

        def put(self: Folder, path: Path, name: str, sha256: str = "") -> None:
            original(self, path, name, sha256)
            if name == moment:
                self.remove(UNFINISHED_NAME) if finished else original(self, cache / "README.md", UNFINISHED_NAME)

        with (
            patch.object(Folder, "put", put),
            pytest.raises(UserError, match="cache: another push is under way there; when it has ended"),
        ):
            push(cache, f"{bucket}/cache")
        assert MANIFEST_NAME not in there(f"{bucket}/cache")

    def test_a_folder_is_held(self, cache: Path, tmp_path: Path) -> None:
        original = Folder.put
        refused: list[str] = []

        def put(self: Folder, path: Path, name: str, sha256: str = "") -> None:
            if not refused:
                with pytest.raises(UserError) as raised:
                    push(cache, tmp_path / "there")
                refused.append(str(raised.value))
            original(self, path, name, sha256)

        with patch.object(Folder, "put", put):
            push(cache, tmp_path / "there")
        assert refused == [f"{tmp_path}/there: another command is writing there"]
        assert contents(tmp_path / "there") == contents(cache)


class TestNotedChecksums:
    @pytest.fixture
    def no_plain_etags(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As of uploads in parts."""
        original = storage._stored
        monkeypatch.setattr(
            storage, "_stored", lambda info, s3: original({**info, "ETag": f'"{"0" * 32}-2"'} if s3 else info, s3)
        )

    @pytest.fixture
    def etags_of_encrypted_content(self, monkeypatch: pytest.MonkeyPatch) -> None:
        original = storage._stored
        monkeypatch.setattr(
            storage, "_stored", lambda info, s3: original({**info, "ETag": f'"{"0" * 32}"'} if s3 else info, s3)
        )

    @pytest.mark.slow
    @pytest.mark.parametrize("etags", ["no_plain_etags", "etags_of_encrypted_content"])
    def test_what_s3_has_no_checksum_of_is_not_sent_twice(
        self, cache: Path, bucket: str, etags: str, request: pytest.FixtureRequest
    ) -> None:
        request.getfixturevalue(etags)
        with stopped_after(8), pytest.raises(Stopped):
            push(cache, f"{bucket}/cache")
        assert push(cache, f"{bucket}/cache").num_kept == 7
        assert there(f"{bucket}/cache") == contents(cache)

    @pytest.mark.slow
    def test_nor_is_another_file_of_that_size_taken_for_it(
        self, cache: Path, bucket: str, no_plain_etags: None
    ) -> None:
        with stopped_after(8), pytest.raises(Stopped):
            push(cache, f"{bucket}/cache")
        shard = next(name for name in there(f"{bucket}/cache") if name.startswith("data/"))
        Folder(f"{bucket}/cache").write(shard, bytes(len(there(f"{bucket}/cache")[shard])))
        assert push(cache, f"{bucket}/cache").num_kept == 6
        assert there(f"{bucket}/cache") == contents(cache)


class TestSource:
    @pytest.mark.slow
    def test_a_damaged_shard_is_refused_before_anything_is_sent(self, cache: Path, url: str) -> None:
        shard = cache / "data/train-00003-of-00009.parquet"
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
        with pytest.raises(UserError, match=r"data/train-00003-of-00009\.parquet was altered: its SHA-256 is not"):
            push(cache, url)
        assert there(url) == {}

    @pytest.mark.slow
    def test_so_is_a_missing_tokenizer(self, cache: Path, url: str) -> None:
        (cache / "tokenizer/tokenizer.json").unlink()
        with pytest.raises(UserError, match=r"tokenizer/tokenizer\.json cannot be read \(No such file"):
            push(cache, url)
        assert there(url) == {}

    @pytest.mark.slow
    def test_so_is_a_card_that_was_edited_where_it_is_written_anew(self, cache: Path, url: str) -> None:
        push(cache, url)
        before = there(url)
        card = cache / "README.md"
        card.write_text(card.read_text().replace("tiny", "huge"))
        with pytest.raises(UserError, match=r"README\.md was edited where logitcache writes it"):
            push(cache, url)
        assert there(url) == before

    @pytest.mark.slow
    def test_a_signature_travels_and_leaves_with_its_manifest(self, cache: Path, url: str) -> None:
        (cache / "logitcache.json.sig").write_text("-----BEGIN SSH SIGNATURE-----")
        assert push(cache, url).num_sent == NUM_FILES + 1
        assert there(url) == contents(cache)
        (cache / "logitcache.json.sig").unlink()
        assert push(cache, url).num_sent == 0
        assert there(url) == contents(cache)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("name", "message"),
        [
            (".build/plan.json", "names a file that no cache has: '.build/plan.json'"),
            ("../precious", "names a file that no cache has: '../precious'"),
            ("tokenizer/../../precious", "names a file that no cache has"),
            ("/etc/passwd", "names a file that no cache has"),
        ],
    )
    def test_files_that_no_cache_has_do_not_travel(self, cache: Path, url: str, name: str, message: str) -> None:
        manifest = logitcache.open(cache).manifest
        replace(manifest, files={**manifest.files, name: "0" * 64}).write(Folder(cache))
        with pytest.raises(UserError, match=message):
            push(cache, url)

    @pytest.mark.slow
    def test_what_is_no_whole_local_cache_is_refused(self, cache: Path, tmp_path: Path, url: str) -> None:
        (tmp_path / "empty").mkdir()
        with pytest.raises(UserError, match="empty is not a cache"):
            push(tmp_path / "empty", url)
        with pytest.raises(UserError, match="nowhere does not exist"):
            push(tmp_path / "nowhere", url)
        (tmp_path / "begun/.build").mkdir(parents=True)
        with pytest.raises(UserError, match="begun is an unfinished build"):
            push(tmp_path / "begun", url)
        with pytest.raises(
            UserError, match="memory://cache is a URL, a local cache is pushed: `logitcache pull` it first"
        ):
            push("memory://cache", url)


class TestPlaces:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("url", "message"),
        [
            ("gopher://x/cache", "gopher://x/cache: no file system for such a URL"),
            (
                "s3://no-such-bucket-anywhere/cache",
                "no-such-bucket-anywhere/cache cannot be written: there is no such bucket",
            ),
            ("s3://", "s3://: "),
        ],
    )
    def test_that_do_not_exist_are_one_line(
        self, cache: Path, bucket: str, url: str, message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["push", str(cache), url]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert message in line

    def test_that_want_credentials_say_which(
        self, cache: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
        with (
            connected_anew(),
            pytest.raises(UserError, match=r"redentials.*: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        ):
            push(cache, f"{bucket}/cache")

    def test_in_the_cache_or_around_it_are_refused(self, cache: Path) -> None:
        for place in (cache, cache / "copy", cache.parent):
            with pytest.raises(UserError, match="choose a place outside the cache that is pushed"):
                push(cache, place)

    def test_that_are_files_are_refused(self, cache: Path, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("precious")
        with pytest.raises(UserError, match=r"file: a folder that can be written is wanted \(Not a directory\)"):
            push(cache, tmp_path / "file")

    def test_a_bundle_is_not_put_into_its_cache(self, cache: Path) -> None:
        before = contents(cache)
        with pytest.raises(UserError, match="choose a place outside the cache that is pushed"):
            push(cache, cache / "data/x.tar.zst")
        assert contents(cache) == before

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_a_folder_is_no_bundle(self, cache: Path, tmp_path: Path, overwrite: bool) -> None:
        (tmp_path / "b.tar.zst").mkdir()
        with pytest.raises(UserError, match=r"b\.tar\.zst is a folder, a name for a file is wanted"):
            push(cache, tmp_path / "b.tar.zst", overwrite=overwrite)
        assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["b.tar.zst"]

    @pytest.mark.parametrize("name", ["x" * 300, "x" * 300 + ".tar.zst", "x" * 250 + ".tar.zst"])
    def test_a_name_that_is_too_long_is_one_line(self, cache: Path, tmp_path: Path, name: str) -> None:
        with pytest.raises(UserError, match="File name too long"):
            push(cache, tmp_path / name)

    def test_no_place_at_all_says_what_is_wanted(self, cache: Path) -> None:
        with pytest.raises(
            UserError, match=r"nothing says where to push to: hf://.*a folder or a FILE\.tar\.zst is wanted"
        ):
            push(cache, "")

    def test_a_store_that_takes_nothing_is_named(
        self, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: Any) -> None:
            raise PermissionError("Access Denied")

        url = f"memory://{tmp_path}/there"
        monkeypatch.setattr(type(Folder(url)._filesystem), "put_file", refuse)
        with pytest.raises(UserError, match=r"logitcache\.json\.unfinished cannot be written \(Access Denied\)"):
            push(cache, url)

    @pytest.mark.slow
    def test_public_is_of_the_hub(self, cache: Path, url: str) -> None:
        with pytest.raises(UserError, match="--public is of repositories on the Hub"):
            push(cache, url, public=True)


class TestHub:
    @pytest.mark.slow
    def test_a_repository_gets_what_it_lacks_in_one_commit(self, cache: Path, tmp_path: Path, hub: HubServer) -> None:
        url = "hf://datasets/team-a/cache"
        pushed = push(cache, url)
        repository = hub.repositories["team-a/cache"]
        assert (pushed.num_sent, pushed.revision) == (NUM_FILES, repository.at("main").oid)
        assert repository.private
        again = push(cache, url)
        assert (again.num_sent, again.num_kept, again.revision) == (0, NUM_FILES, pushed.revision)
        licensed = push(cache, url, license="apache-2.0")
        assert (licensed.num_sent, licensed.num_kept) == (1, NUM_FILES - 1)
        assert len(repository.branches["main"]) == 3
        pull(url, tmp_path / "out", against=pushed.identity)
        assert contents(tmp_path / "out") == contents(cache)

    @pytest.mark.slow
    def test_another_cache_there_is_kept_unless_it_is_to_be_replaced(
        self, cache: Path, tmp_path: Path, hub: HubServer
    ) -> None:
        url = "hf://datasets/team-a/cache"
        push(cache, url, public=True)
        assert not hub.repositories["team-a/cache"].private
        make_cache(tmp_path / "other", ROWS[:9], EVERYTHING, corpus={"sources": [{"name": "other"}]})
        with pytest.raises(UserError, match="holds another cache: fingerprint"):
            push(tmp_path / "other", url)
        push(tmp_path / "other", url, overwrite=True)
        assert hub.files("team-a/cache").keys() - contents(tmp_path / "other").keys() == {".gitattributes"}


@pytest.mark.slow
def test_the_command_prints_what_it_did(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["push", str(cache), str(tmp_path / "there"), "--license", "apache-2.0", "--teacher-license", "MIT"]) == 0
    )
    printed = capsys.readouterr()
    num_bytes = sum(map(len, contents(cache).values()))
    assert printed.out.splitlines() == [
        f"url        {tmp_path}/there",
        f"identity   {logitcache.open(cache).identity}",
        f"sent       {NUM_FILES} files ({num_bytes:,} bytes)",
        "kept       0 files",
    ]
    assert "where no licence is stated: --data-license" in printed.err

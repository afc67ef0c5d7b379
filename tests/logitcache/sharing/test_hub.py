"""Caches on the Hugging Face Hub: pushed in one commit, continued, read in place; against a stand-in for its endpoints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import logitcache
from logitcache import LogitCache, UserError
from logitcache.format.manifest import MANIFEST_NAME
from logitcache.sharing import hub as pushing
from logitcache.sharing.hub import parse_dataset_url, push_to_hub
from logitcache.sharing.pull import pull
from logitcache.sharing.push import push as push_cache
from logitcache.storage.folder import Folder
from tests.helpers.hubserver import GIT_ATTRIBUTES, Blob, HubServer, Repository, hub_server  # noqa: F401
from tests.helpers.maintained import assert_same_row, contents, make_cache
from tests.helpers.smallcaches import EVERYTHING, random_rows

pytestmark = pytest.mark.programs

REPO = "team-a/cache"
URL = f"hf://datasets/{REPO}"
CARD = """\
---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*.parquet
---
A cache.
"""


@pytest.fixture
def cache(tmp_path: Path) -> LogitCache:
    cache = make_cache(tmp_path / "cache", random_rows(30, EVERYTHING), EVERYTHING)
    (tmp_path / "cache/README.md").write_text(CARD)
    return cache


def push(cache: LogitCache, url: str = URL, private: bool = True, remove: tuple[str, ...] = ()) -> str:
    names = sorted(contents(Path(cache.path)), key=lambda name: name == MANIFEST_NAME)
    return push_to_hub(Path(cache.path), names, remove, url, private=private, message="Add a cache")


def blob_sizes(cache: LogitCache) -> list[int]:
    return sorted(path.stat().st_size for path in Path(cache.path).rglob("*.parquet"))


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "logitcache", *arguments], capture_output=True, text=True, timeout=120)


# Pushing


def test_a_push_makes_a_private_repository_and_shows_all_its_files_in_one_commit(
    cache: LogitCache, hub: HubServer
) -> None:
    revision = push(cache)
    repository = hub.repositories[REPO]
    assert repository.private
    assert [commit.title for commit in repository.branches["main"]] == ["initial commit", "Add a cache"]
    assert repository.at("main").oid == revision
    assert hub.files(REPO) == {**contents(Path(cache.path)), ".gitattributes": GIT_ATTRIBUTES}
    assert sorted(hub.uploaded) == blob_sizes(cache)


def test_a_repository_is_public_where_that_is_asked_for_and_stays_so(
    cache: LogitCache, hub: HubServer, caplog: pytest.LogCaptureFixture
) -> None:
    push(cache, private=False)
    assert not hub.repositories[REPO].private
    with caplog.at_level("INFO", "logitcache"):
        push(cache, private=True)
    assert f"{REPO} is public already and stays so" in caplog.text
    assert not hub.repositories[REPO].private


def test_blobs_that_the_hub_has_are_not_sent_again_and_removals_are_of_the_same_commit(
    cache: LogitCache, hub: HubServer, tmp_path: Path
) -> None:
    push(cache)
    hub.uploaded.clear()
    *others, last = (shard.name for shard in cache.manifest.shards)
    (tmp_path / "cache" / last).unlink()
    (tmp_path / "cache/data/new.parquet").write_bytes(b"new")
    push(cache, remove=(last,))
    assert hub.uploaded == [3]
    assert len(hub.repositories[REPO].branches["main"]) == 3
    files = hub.files(REPO)
    assert last not in files and files["data/new.parquet"] == b"new" and set(others) < set(files)


def test_a_push_of_nothing_makes_no_commit(cache: LogitCache, hub: HubServer) -> None:
    revision = push(cache)
    assert push_to_hub(Path(cache.path), [], [], URL, private=True, message="nothing") == revision
    assert len(hub.repositories[REPO].branches["main"]) == 2


def test_a_push_of_files_that_are_all_there_sends_no_blob_and_makes_no_commit(
    cache: LogitCache, hub: HubServer
) -> None:
    revision = push(cache)
    hub.uploaded.clear()
    assert push(cache) == revision
    assert hub.uploaded == []


def test_a_broken_connection_shows_nothing_and_the_same_push_continues(cache: LogitCache, hub: HubServer) -> None:
    hub.whole_uploads = 2
    with pytest.raises(UserError, match=rf"^{URL}: the push broke off \(.+\); the same command continues"):
        push(cache)
    assert list(hub.files(REPO)) == [".gitattributes"]
    sent, hub.whole_uploads = list(hub.uploaded), None
    assert len(sent) == 2
    push(cache)
    assert sorted(hub.uploaded) == blob_sizes(cache)
    assert hub.files(REPO).keys() > contents(Path(cache.path)).keys()


def test_a_killed_push_shows_nothing_and_the_same_push_continues(cache: LogitCache, hub: HubServer) -> None:
    hub.whole_uploads = 3
    program = "import sys, test_hub; test_hub.push(test_hub.logitcache.open(sys.argv[1]))"
    paths = os.pathsep.join(str(path) for path in (Path(__file__).parent, Path(__file__).parents[3]))
    process = subprocess.Popen([sys.executable, "-c", program, cache.path], env={**os.environ, "PYTHONPATH": paths})
    assert hub.was_cut.wait(60)
    process.kill()
    process.wait()
    hub.whole_uploads = None
    assert list(hub.files(REPO)) == [".gitattributes"]
    kept = sorted(len(blob) for blob in hub.repositories[REPO].blobs.values())
    assert len(kept) == 3
    hub.uploaded.clear()
    push(cache)
    assert sorted([*kept, *hub.uploaded]) == blob_sizes(cache)


def test_uploads_are_finished_in_batches_of_bytes(
    cache: LogitCache, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pushing, "UPLOAD_BYTES", blob_sizes(cache)[0] + 1)
    push(cache)
    assert sum("/preupload/" in request for request in hub.requests) > 1
    assert hub.files(REPO).keys() > contents(Path(cache.path)).keys()


def test_a_push_to_a_branch_leaves_the_main_one(cache: LogitCache, hub: HubServer) -> None:
    push(cache)
    before = hub.repositories[REPO].at("main")
    hub.repositories[REPO].branches["half/k"] = [before]
    (Path(cache.path) / "README.md").write_text(CARD + "Of a branch.")
    revision = push(cache, f"{URL}@half%2Fk")
    assert hub.repositories[REPO].at("main") == before
    assert hub.repositories[REPO].at("half/k").oid == revision != before.oid
    assert len(logitcache.open(f"{URL}@half%2Fk")) == len(cache)


def test_a_push_over_a_commit_made_meanwhile_is_refused(
    cache: LogitCache, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import HfApi

    push(cache)
    upload = HfApi.preupload_lfs_files

    def others_push(*arguments: object, **settings: object) -> None:
        hub.repositories[REPO].commit("main", "theirs", {"theirs": Blob(b"", None)})
        upload(*arguments, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(HfApi, "preupload_lfs_files", others_push)
    (Path(cache.path) / "README.md").write_text(CARD + "Ours.")
    with pytest.raises(UserError, match="somebody else pushed to it meanwhile; the same command compares again"):
        push(cache)
    assert list(hub.files(REPO)) == ["theirs"]


# What is refused


@pytest.mark.parametrize(
    "url",
    [
        "hf://team-a/cache",
        "hf://buckets/team-a/cache",
        "hf://datasets/cache",
        "hf://datasets/team-a/cache/data",
        "hf://datasets/team-a/cache@",
        "hf://spaces/team-a/cache",
    ],
)
def test_what_is_no_datasets_url_is_refused_with_its_form(cache: LogitCache, url: str) -> None:
    with pytest.raises(UserError, match=rf"^{url}: a cache is pushed to .* hf://datasets/ORG/NAME or …/NAME@BRANCH$"):
        push(cache, url)


def test_a_datasets_url_names_repository_and_branch() -> None:
    assert parse_dataset_url("hf://datasets/org/name") == ("org/name", None)
    assert parse_dataset_url("hf://datasets/org/name/") == ("org/name", None)
    assert parse_dataset_url("hf://datasets/org/name@refs%2Fpr%2F1") == ("org/name", "refs/pr/1")


@pytest.mark.parametrize(
    ("token", "url", "message"),
    [
        ("", URL, "nobody is logged in to the Hub; log in with `hf auth login` or set HF_TOKEN$"),
        ("hf_unknown", URL, "the Hub does not know this token; log in with `hf auth login` or set HF_TOKEN anew$"),
        ("hf_team_b", URL, "this token has no permission .*namespace team-a.*; log in with `hf auth login`"),
        ("hf_team_a", "hf://datasets/team-b/cache", "this token has no permission .*namespace team-b"),
        ("hf_team_a", "hf://datasets/team-a/-no!", "no such name on the Hub; a dataset is hf://datasets/ORG/NAME"),
        ("hf_team_a", "hf://datasets/team-a/new@v2", "does not exist, or is private: log in"),
        ("hf_team_a", "hf://datasets/team-a/other@v2", "the repository has no such revision"),
    ],
)
def test_a_push_that_may_not_be_is_one_line(
    cache: LogitCache, hub: HubServer, monkeypatch: pytest.MonkeyPatch, token: str, url: str, message: str
) -> None:
    hub.repositories["team-a/other"] = other = Repository(private=False)
    other.commit("main", "initial commit", {})
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError, match=f"^{url}: {message}|^{url} {message}") as caught:
        push(cache, url)
    assert "\n" not in str(caught.value)
    assert list(hub.repositories) == ["team-a/other"]
    assert hub.uploaded == []


def test_a_reader_may_not_push_to_what_exists(
    cache: LogitCache, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(cache)
    monkeypatch.setenv("HF_TOKEN", "hf_team_b")
    with pytest.raises(UserError, match="this token has no permission"):
        push(cache)


def test_a_card_that_the_hub_does_not_parse_is_refused(cache: LogitCache, hub: HubServer) -> None:
    (Path(cache.path) / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(UserError, match=rf"^{URL}: the Hub refuses this \(.*flow node"):
        push(cache)
    assert list(hub.files(REPO)) == [".gitattributes"]


def test_without_the_client_the_extra_is_named(cache: LogitCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"huggingface_hub is not installed: pip install 'logitcache\[hub\]'"):
        push(cache)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "hf", raising=False)  # the class, where it was loaded
    with pytest.raises(UserError, match=rf"^{URL}: no file system for such a URL \(pip install 'logitcache\[hub\]'\)"):
        logitcache.open(URL)


# Reading in place


def test_a_pushed_cache_is_read_in_place_row_by_row_and_as_a_stream(cache: LogitCache, hub: HubServer) -> None:
    push(cache)
    remote = logitcache.open(URL)
    assert remote.identity == cache.identity
    for read, expected in zip(remote.iter_sequences(shuffle=True), cache.iter_sequences(shuffle=True), strict=True):
        assert_same_row(read, expected)
    assert_same_row(remote[17], cache[17])


def test_one_row_is_read_with_one_request_for_its_row_group(cache: LogitCache, hub: HubServer) -> None:
    push(cache)
    remote = logitcache.open(URL)
    remote[0]  # the footer is read with the first one
    second = len(remote._read(0))
    with hub.counting() as requests:
        remote[second]
    name, sha256 = cache.manifest.shards[0].name, cache.manifest.shards[0].sha256
    assert requests == [f"GET /datasets/{REPO}/resolve/main/{name}", f"GET /lfs-blobs/{REPO}/{sha256}"]


def test_a_revision_stays_what_it_was(cache: LogitCache, hub: HubServer, tmp_path: Path) -> None:
    first = push(cache)
    other = make_cache(tmp_path / "other", random_rows(9, EVERYTHING, seed=1), EVERYTHING)
    push(other, remove=tuple(shard.name for shard in cache.manifest.shards))
    assert logitcache.open(URL).identity == other.identity
    pinned = logitcache.open(f"{URL}@{first}")
    assert pinned.identity == cache.identity
    assert_same_row(pinned[29], cache[29])


def test_a_folder_on_the_hub_lists_sizes_and_fetches(cache: LogitCache, hub: HubServer, tmp_path: Path) -> None:
    push(cache)
    folder, shard = Folder(URL), cache.manifest.shards[0]
    assert folder.files("") == sorted([*contents(Path(cache.path)), ".gitattributes"])
    assert folder.names("tokenizer") == ["tokenizer.json"]
    assert not folder.exists("data/none.parquet")
    assert folder.num_bytes(shard.name) == shard.num_bytes
    folder.fetch(shard.name, tmp_path / "fetched")
    assert (tmp_path / "fetched").read_bytes() == (Path(cache.path) / shard.name).read_bytes()
    stored = folder.stored()
    assert (stored[shard.name].algorithm, stored[shard.name].digest) == ("sha256", shard.sha256)
    assert stored["README.md"].algorithm == "git"


@pytest.mark.parametrize(
    ("token", "url", "message"),
    [
        ("", URL, r"does not exist, or is private: log in with `hf auth login` or set HF_TOKEN"),
        ("hf_stranger", URL, r"does not exist, or is private: log in"),
        ("hf_unknown", URL, r"the Hub does not know this token; log in"),
        ("hf_team_b", f"{URL}@v9", r"the repository has no such revision"),
        ("hf_team_b", f"hf://{REPO}", r"does not exist \(a dataset is hf://datasets/ORG/NAME\)"),
        ("hf_team_b", "hf://datasets/cache", r"no such name on the Hub"),
        ("hf_team_b", f"{URL}/elsewhere", "does not exist$"),
        ("hf_stranger", "hf://datasets/team-a/gated", "is gated: ask for access on its page, then log in"),
    ],
)
def test_what_may_not_be_read_is_one_line(
    cache: LogitCache, hub: HubServer, monkeypatch: pytest.MonkeyPatch, token: str, url: str, message: str
) -> None:
    push(cache)
    hub.repositories["team-a/gated"] = gated = Repository(private=False, gated=True)
    gated.commit("main", "initial commit", {})
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError, match=f"^{url}:? ?{message}") as caught:
        logitcache.open(url)
    assert "\n" not in str(caught.value)


def test_a_hub_that_is_not_there_is_one_line(hub: HubServer) -> None:
    hub.close()
    with pytest.raises(UserError, match=rf"^{URL}: this URL does not answer \(.*refused"):
        logitcache.open(URL)


def test_offline_is_said(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=rf"^{URL} cannot be reached: HF_HUB_OFFLINE is set"):
        logitcache.open(URL)


# As people use it: other processes that know the URL


def test_one_team_pushes_and_another_describes_checks_slices_and_pulls_it_by_its_url(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = make_cache(tmp_path / "cache", random_rows(30, EVERYTHING), EVERYTHING)
    pushed = command("push", cache.path, URL, "--license", "mit")
    assert pushed.returncode == 0, pushed.stderr
    assert pushed.stdout.endswith(f"revision   {hub.repositories[REPO].at('main').oid}\n")
    monkeypatch.setenv("HF_TOKEN", "hf_team_b")
    refused = command("push", cache.path, URL, "--license", "apache-2.0")
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith(f"logitcache: error: {URL}: this token has no permission")
    described = command("info", URL)
    assert described.returncode == 0, described.stderr
    assert cache.identity in described.stdout
    checked = command("verify", URL)
    assert checked.returncode == 0, checked.stderr + checked.stdout
    sliced = command("slice", URL, "--out", str(tmp_path / "part"), "--rows", "3:11")
    assert sliced.returncode == 0, sliced.stderr
    part = logitcache.open(tmp_path / "part")
    for row, expected in enumerate(range(3, 11)):
        assert part[row].row_id == cache[expected].row_id
    pulled = command("pull", f"{URL}@main", "--out", str(tmp_path / "pulled"), "--against", cache.identity)
    assert pulled.returncode == 0, pulled.stderr
    assert contents(tmp_path / "pulled").keys() == contents(Path(cache.path)).keys()


def test_what_is_pushed_is_pulled_to_the_byte_and_pushed_again_sends_nothing(
    tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = make_cache(tmp_path / "cache", random_rows(30, EVERYTHING), EVERYTHING)
    first = push_cache(cache.path, URL, license="mit", teacher_license="apache-2.0", data_license="cc0-1.0")
    assert (first.identity, first.revision) == (cache.identity, hub.repositories[REPO].at("main").oid)
    hub.uploaded.clear()
    with hub.counting() as requests:
        again = push_cache(cache.path, URL)
    assert (again.num_sent, again.sent_bytes, again.num_kept) == (0, 0, first.num_sent)
    assert again.revision == first.revision
    assert not [request for request in requests if request.startswith(("PUT", "POST"))]
    monkeypatch.setenv("HF_TOKEN", "hf_team_b")
    pulled = pull(f"{URL}@{first.revision}", tmp_path / "pulled", against=first.identity)
    assert contents(Path(pulled.path)) == contents(Path(cache.path))


def test_a_cache_that_grew_is_pushed_over_itself_in_one_commit(tmp_path: Path, hub: HubServer) -> None:
    rows = random_rows(21, EVERYTHING)
    push_cache(make_cache(tmp_path / "part", rows[:14], EVERYTHING).path, URL)
    whole = make_cache(tmp_path / "whole", rows, EVERYTHING)
    push_cache(whole.path, URL)
    assert len(hub.repositories[REPO].branches["main"]) == 3
    files = hub.files(REPO)
    assert files.pop(".gitattributes") == GIT_ATTRIBUTES
    assert files == contents(Path(whole.path))


def alter_a_blob(hub: HubServer, name: str) -> None:
    """Changes a byte of what LFS keeps; the commit still names it by the SHA-256 that it had."""
    blob = hub.repositories[REPO].at("main").files[name]
    content = bytearray(blob.content)
    content[len(content) // 2] ^= 1
    assert blob.sha256 is not None
    hub.repositories[REPO].blobs[blob.sha256] = bytes(content)


def test_an_altered_blob_is_not_pulled(cache: LogitCache, hub: HubServer, tmp_path: Path) -> None:
    push(cache)
    name = cache.manifest.shards[1].name
    alter_a_blob(hub, name)
    with pytest.raises(UserError, match=f"{URL}/{name}"):
        pull(URL, tmp_path / "pulled")
    assert not (tmp_path / "pulled/logitcache.json").exists()


def test_an_altered_blob_is_found_by_verify(cache: LogitCache, hub: HubServer) -> None:
    push(cache)
    name = cache.manifest.shards[1].name
    alter_a_blob(hub, name)
    checked = command("verify", URL)
    assert checked.returncode == 1
    assert name in checked.stdout


def test_datasets_loads_a_pushed_cache_by_its_card(cache: LogitCache, hub: HubServer, tmp_path: Path) -> None:
    push(cache)
    program = (
        "import sys, datasets; rows = datasets.load_dataset(sys.argv[1], split='train');"
        "print(len(rows), rows[0]['row_id'], rows[-1]['row_id'])"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", program, REPO],
        env={**os.environ, "HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert loaded.returncode == 0, loaded.stderr[-2000:]
    assert loaded.stdout.split() == [str(len(cache)), str(cache[0].row_id), str(cache[-1].row_id)]

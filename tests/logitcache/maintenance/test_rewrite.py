"""Caches made of caches: whatever interrupts a command, the same command ends in the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

import logitcache
from logitcache import LogitCache, UserError
from logitcache.assembly import workspace
from logitcache.capture.finish import finish
from logitcache.cli import main
from logitcache.format.layout import Layout
from logitcache.format.sequences import TokenSequence
from logitcache.format.shards import ShardWriter
from logitcache.format.tail_parts import TailParts
from logitcache.maintenance.row_scan import scan
from logitcache.storage.folder import Folder
from tests.helpers.maintained import assert_same_row, contents, history, make_cache
from tests.helpers.objectstore import bucket, s3_endpoint  # noqa: F401  (fixtures)
from tests.helpers.processes import FORKED
from tests.helpers.smallcaches import EVERYTHING, VOCAB, random_rows
from tests.helpers.underway import num_finished_shards

LAYOUT = Layout(VOCAB)
ROWS = random_rows(110, EVERYTHING)
SHARD_POSITIONS = 40
KILLS = 4

Command = Callable[[Path, Path], LogitCache]


def recode(root: Path, out: Path, **settings: Any) -> LogitCache:
    cache: LogitCache = logitcache.recode(
        root / "a", out, **{"top_k": 4, "shard_positions": SHARD_POSITIONS, **settings}
    )
    return cache


def merge(root: Path, out: Path, **settings: Any) -> LogitCache:
    cache: LogitCache = logitcache.merge([root / "a", root / "b"], out, shard_positions=SHARD_POSITIONS, **settings)
    return cache


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two caches, of 60 and of 80 rows, 30 of them in both."""
    make_cache(tmp_path / "a", ROWS[:60], EVERYTHING)
    make_cache(tmp_path / "b", ROWS[30:], EVERYTHING)
    return tmp_path


class Stopped(Exception):
    """A process that ends."""


def stopped_after(num_shards: int) -> Any:
    """Writing ends as if the process had, in the middle of the shard after so many."""
    opened = 0
    original = ShardWriter.write

    def write(self: ShardWriter, *row: Any) -> None:
        nonlocal opened
        original(self, *row)
        if len(self._buffer) == 2:
            opened += 1
        if opened > num_shards:
            raise Stopped

    return patch.object(ShardWriter, "write", write)


@pytest.mark.slow
@pytest.mark.parametrize("command", [recode, merge])
def test_kills_at_any_moment_and_then_the_same_bytes(root: Path, command: Command) -> None:
    command(root, root / "whole")
    whole = contents(root / "whole")
    out, moments = root / "killed", random.Random(0)
    kills = 0
    while kills < KILLS:
        process = FORKED.Process(target=command, args=(root, out))
        process.start()
        wanted = num_finished_shards(out) + moments.randint(0, 2)
        while process.is_alive() and num_finished_shards(out) < wanted:
            time.sleep(0.0005)
        time.sleep(moments.uniform(0, 0.01))
        before = num_finished_shards(out)
        process.kill()  # SIGKILL
        process.join()
        assert num_finished_shards(out) >= before or (out / "logitcache.json").exists()
        kills += 1
        if (out / "logitcache.json").exists():
            command(root, out)
            assert contents(out) == whole
            subprocess.run(["rm", "-r", out], check=True)  # a fast machine: begin another one
    command(root, out)
    assert contents(out) == whole


@pytest.mark.slow
@pytest.mark.parametrize("command", [recode, merge])
@pytest.mark.parametrize("num_shards", [0, 1, 3])
def test_shards_that_are_complete_are_not_written_again(root: Path, command: Command, num_shards: int) -> None:
    command(root, root / "whole")
    with stopped_after(num_shards), pytest.raises(Stopped):
        command(root, root / "out")
    assert num_finished_shards(root / "out") == num_shards
    written = {path: path.stat().st_mtime_ns for path in (root / "out/data").iterdir()}
    assert len(written) == num_shards
    command(root, root / "out")
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in written.items())
    assert contents(root / "out") == contents(root / "whole")


@pytest.mark.slow
def test_an_unfinished_cache_does_not_open(root: Path) -> None:
    with stopped_after(1), pytest.raises(Stopped):
        recode(root, root / "out")
    with pytest.raises(UserError, match="unfinished build: run the same `logitcache` command again"):
        logitcache.open(root / "out")
    missing = r"6 of 7 shards are not complete \(1, 2, 3, 4, 5, 6\): run the same `logitcache recode` again"
    with pytest.raises(UserError, match=missing):
        finish(root / "out")


@pytest.mark.slow
def test_another_request_in_the_same_folder_is_refused_naming_what_differs(root: Path) -> None:
    with stopped_after(1), pytest.raises(Stopped):
        recode(root, root / "out")
    left = contents(root / "out")
    calls: list[tuple[Callable[[], object], str]] = [
        (lambda: recode(root, root / "out", top_k=3), r"an unfinished cache made otherwise: top_k was 4, now 3; min_k"),
        (lambda: recode(root, root / "out", shard_positions=41), "shard_positions was 40, now 41"),
        (lambda: recode(root / ".", root / "out", drop=["url"]), "drop was 0 items, now 1 items"),
        (lambda: merge(root, root / "out"), "command was recode, now merge"),
        (lambda: logitcache.recode(root / "b", root / "out", top_k=4, shard_positions=40), r"from\[0\]\.path was "),
    ]
    for call, message in calls:
        with pytest.raises(UserError, match=message):
            call()
    assert contents(root / "out") == left
    assert recode(root, root / "out", top_k=3, overwrite=True).manifest.fingerprint["capture"]["top_k"] == 3


@pytest.mark.slow
def test_a_source_that_changed_meanwhile_is_refused(root: Path) -> None:
    with stopped_after(1), pytest.raises(Stopped):
        recode(root, root / "out")
    manifest = logitcache.open(root / "a").manifest
    replace(manifest, created_by="another").write(Folder(root / "a"))
    with pytest.raises(UserError, match=r"from\[0\]\.manifest_sha256 was "):
        recode(root, root / "out")


@pytest.mark.slow
@pytest.mark.parametrize("name", [".build/plan.json", ".build/answers/prompts.json"])
def test_an_unfinished_build_is_not_overwritten(root: Path, name: str) -> None:
    workspace.begin(Folder(root / "out"))
    Folder(root / "out").write(name, json.dumps({"request": {"teacher": {"name": "tiny"}}}))
    left = contents(root / "out")
    with pytest.raises(UserError, match="unfinished cache made otherwise: command was build, now recode"):
        recode(root, root / "out")
    assert contents(root / "out") == left
    assert len(recode(root, root / "out", overwrite=True)) == 60


@pytest.mark.slow
@pytest.mark.parametrize("command", [recode, merge])
def test_a_finished_cache_is_left_alone_by_the_command_that_made_it(
    root: Path, command: Command, caplog: pytest.LogCaptureFixture
) -> None:
    command(root, root / "out")
    times = {path: path.stat().st_mtime_ns for path in (root / "out").rglob("*")}
    with caplog.at_level("INFO", "logitcache"):
        command(root, root / "out")
    assert "out is already complete" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in (root / "out").rglob("*")} == times


@pytest.mark.slow
def test_a_finished_cache_is_refused_to_any_other_command(root: Path) -> None:
    recode(root, root / "out")
    with pytest.raises(UserError, match=r"a finished cache made otherwise: top_k was 4, now 2; min_k"):
        recode(root, root / "out", top_k=2)
    with pytest.raises(UserError, match=r"a finished cache made otherwise: command was recode, now merge"):
        merge(root, root / "out")
    make_cache(root / "built", random_rows(3, LAYOUT), LAYOUT)
    with pytest.raises(UserError, match=r"a finished cache made otherwise: command was build, now recode"):
        recode(root, root / "built")


@pytest.mark.slow
def test_overwriting_replaces_a_cache_once_the_rows_are_chosen(root: Path) -> None:
    make_cache(root / "out", random_rows(3, LAYOUT), LAYOUT, rows_per_shard=1)
    before = contents(root / "out")
    with pytest.raises(UserError, match="no row with a stored position"):
        logitcache.slice(root / "a", root / "out", where="false", overwrite=True)
    assert contents(root / "out") == before
    recode(root, root / "whole")
    recode(root, root / "out", overwrite=True)
    assert contents(root / "out") == contents(root / "whole")


@pytest.mark.slow
def test_overwriting_continues_where_it_was_interrupted(root: Path) -> None:
    recode(root, root / "whole")
    make_cache(root / "out", random_rows(3, LAYOUT), LAYOUT)
    with stopped_after(2), pytest.raises(Stopped):
        recode(root, root / "out", overwrite=True)
    written = {path: path.stat().st_mtime_ns for path in (root / "out/data").iterdir()}
    recode(root, root / "out", overwrite=True)
    assert len(written) == 2
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in written.items())
    assert contents(root / "out") == contents(root / "whole")


class TestDamagedSources:
    def damage(self, path: Path) -> Callable[[], None]:
        """Flips a byte in the middle; returns what mends it."""
        content = path.read_bytes()
        broken = bytearray(content)
        broken[len(broken) // 2] ^= 1
        path.write_bytes(broken)
        return lambda: (path.write_bytes(content), None)[1]

    def test_are_found_before_anything_is_written(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.damage(root / "a/data/train-00004-of-00009.parquet")
        assert main(["recode", str(root / "a"), "--out", str(root / "out"), "--top-k", "2"]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert len(lines) == 1
        assert "train-00004-of-00009.parquet was altered: its SHA-256 is not the manifest's" in lines[0]
        assert not (root / "out").exists()

    @pytest.mark.slow
    def test_leave_what_is_complete_when_they_are_found_later(self, root: Path) -> None:
        recode(root, root / "whole")
        with stopped_after(2), pytest.raises(Stopped):
            recode(root, root / "out")
        mend = self.damage(root / "a/data/train-00006-of-00009.parquet")
        with pytest.raises(UserError, match=r"train-00006-of-00009\.parquet was altered"):
            recode(root, root / "out")
        complete = contents(root / "out/data")
        assert len(complete) > 2
        mend()
        recode(root, root / "out")
        assert contents(root / "out") == contents(root / "whole")
        assert complete.items() <= contents(root / "out/data").items()

    def test_tokenizers_are_checked(self, root: Path) -> None:
        mend = self.damage(root / "a/tokenizer/tokenizer.json")
        with pytest.raises(UserError, match=r"tokenizer\.json was altered: its SHA-256 is not the manifest's"):
            recode(root, root / "out")
        mend()
        (root / "a/tail_groups.parquet").unlink()
        with pytest.raises(UserError, match=r"tail_groups\.parquet is missing"):
            recode(root, root / "out")

    def test_names_that_lead_out_of_the_cache_are_refused(self, root: Path) -> None:
        manifest = logitcache.open(root / "a").manifest
        (root / "precious").write_text("mine")
        files = {**manifest.files, "../precious": hashlib.sha256(b"mine").hexdigest()}
        replace(manifest, files=files).write(Folder(root / "a"))
        with pytest.raises(UserError, match=r"a file that no cache has: '\.\./precious'"):
            recode(root, root / "elsewhere/out")
        assert not (root / "elsewhere/precious").exists()

    @pytest.mark.slow
    @pytest.mark.parametrize("part", ["teacher", "corpus", "capture"])
    def test_fingerprints_of_no_build_are_refused(self, root: Path, part: str) -> None:
        manifest = logitcache.open(root / "a").manifest
        left = {name: value for name, value in manifest.fingerprint.items() if name != part}
        replace(manifest, fingerprint=left).write(Folder(root / "a"))
        for command in (recode, merge):
            with pytest.raises(UserError, match=rf"its fingerprint is of no build \(KeyError\('{part}'\)\)"):
                command(root, root / "out")

    def test_shards_of_a_cache_of_another_layout_are_refused(self, root: Path) -> None:
        manifest = logitcache.open(root / "a").manifest
        replace(manifest, layout=replace(manifest.layout, tail_parts=TailParts(temperatures=(3.0,)))).write(
            Folder(root / "a")
        )
        with pytest.raises(UserError, match=r"parquet was made with another layout than the manifest says"):
            recode(root, root / "out")

    def test_rows_whose_id_is_not_theirs_are_refused(self, tmp_path: Path) -> None:
        with patch.object(TokenSequence, "row_id", "0" * 32):
            make_cache(tmp_path / "a", random_rows(1, LAYOUT), LAYOUT, corpus={"sources": [{"name": "unsound"}]})
        with pytest.raises(UserError, match=f"row {'0' * 32} was altered: the hash of its tokens is "):
            logitcache.slice(tmp_path / "a", tmp_path / "out", rows="0:1")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"a full disk needs a small file system, and this user may mount none ({mount.stderr.strip()})")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("command", [recode, merge])
@pytest.mark.parametrize("room_bytes", [0, 12_000, 100_000])
def test_a_full_disk_loses_nothing_that_is_complete(
    root: Path, small_disk: Path, command: Command, room_bytes: int
) -> None:
    command(root, root / "whole")
    out = small_disk / "out"
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(os.statvfs(small_disk).f_bavail * 4096 - room_bytes))
    with pytest.raises(UserError, match=r"no space left for .*free some and run the same command again to continue"):
        command(root, out)
    complete = contents(out / "data") if out.exists() else {}
    assert not any(name.endswith(".tmp") for name in complete)
    assert not (out / "logitcache.json").exists()
    ballast.unlink()
    command(root, out)
    assert contents(out) == contents(root / "whole")
    assert complete.items() <= contents(out / "data").items()
    assert bool(complete) == (room_bytes == 100_000)


class TestPlaces:
    @pytest.mark.slow
    @pytest.mark.parametrize("place", ["a", "a/", "./b/../a", "link"])
    def test_a_cache_is_not_written_onto_itself(self, root: Path, place: str) -> None:
        (root / "link").symlink_to(root / "a")
        before = contents(root / "a")
        with pytest.raises(UserError, match="choose a place outside the cache that is read, "):
            recode(root, Path(f"{root}/{place}"), overwrite=True)
        assert contents(root / "a") == before

    @pytest.mark.slow
    @pytest.mark.parametrize("place", ["a/data", "a/out", "link/data/x", "."])
    def test_nor_into_itself_nor_around_itself(self, root: Path, place: str) -> None:
        (root / "link").symlink_to(root / "a")
        before = contents(root)
        with pytest.raises(UserError, match=r"choose a place outside the cache that is read, .*, and not around it"):
            recode(root, root / place, overwrite=True)
        assert contents(root) == before

    def test_a_folder_that_holds_something_else_is_refused(self, root: Path) -> None:
        (root / "out").mkdir()
        (root / "out/thesis.tex").write_text("precious")
        with pytest.raises(UserError, match="the folder is not empty and holds no cache"):
            recode(root, root / "out", overwrite=True)

    @pytest.mark.slow
    def test_a_folder_in_which_another_command_writes_is_refused(self, root: Path) -> None:
        with (
            workspace.workspace(Folder(root / "out")),
            pytest.raises(UserError, match="another command is writing there"),
        ):
            recode(root, root / "out")

    @pytest.mark.slow
    def test_a_bucket_takes_and_gives_caches_as_a_folder_does(self, root: Path, bucket: str) -> None:  # noqa: F811
        local = recode(root, root / "local")
        with stopped_after(2), pytest.raises(Stopped):
            logitcache.recode(root / "a", f"{bucket}/c", top_k=4, shard_positions=SHARD_POSITIONS)
        remote = logitcache.recode(root / "a", f"{bucket}/c", top_k=4, shard_positions=SHARD_POSITIONS)
        assert [shard.sha256 for shard in remote.manifest.shards] == [shard.sha256 for shard in local.manifest.shards]
        assert not any(name.startswith(".build") for name in Folder(f"{bucket}/c").names())
        b = logitcache.recode(root / "b", f"{bucket}/b", top_k=4)
        both = logitcache.merge([remote.path, b.path], f"{bucket}/both")
        assert len(both) == 110
        for ours, theirs in zip(both, local, strict=False):
            assert_same_row(ours, theirs)
        with pytest.raises(UserError, match="outside the cache that is read"):
            logitcache.slice(f"{bucket}/c", f"{bucket}/c/", rows="0:1", overwrite=True)


class TestBuildsInTheSameFolder:
    def settings(self, teacher: Path, corpus: Path, out: Path) -> dict[str, Any]:
        return {
            "teacher": str(teacher),
            "data": str(corpus),
            "out": out,
            "backend": "transformers",
            "top_k": 4,
            "tail_rank": 0,
        }

    @pytest.mark.slow
    def test_an_unfinished_recode_is_not_continued(self, root: Path, teacher: Path, corpus: Path) -> None:
        with stopped_after(1), pytest.raises(Stopped):
            recode(root, root / "out")
        left = contents(root / "out")
        with pytest.raises(UserError, match="made otherwise: command was recode, now build"):
            logitcache.build(**self.settings(teacher, corpus, root / "out"))
        assert contents(root / "out") == left

    @pytest.mark.slow
    def test_a_slice_is_not_what_was_asked_for(self, root: Path, teacher: Path, corpus: Path) -> None:
        settings = self.settings(teacher, corpus, root / "built")
        built = logitcache.build(**settings)
        assert len(logitcache.build(**settings)) == len(built)
        logitcache.slice(built.path, root / "slice", rows="0:3")
        with pytest.raises(UserError, match="holds what `logitcache slice` made of a cache like this one"):
            logitcache.build(**{**settings, "out": root / "slice"})
        whole = logitcache.slice(built.path, root / "whole", rows=":")
        assert {**whole.manifest.fingerprint} == built.manifest.fingerprint
        assert whole.manifest.files == built.manifest.files


@pytest.mark.slow
def test_the_manifest_says_what_the_cache_now_holds(root: Path) -> None:
    source = logitcache.open(root / "a")
    cache = recode(root, root / "out")
    manifest = cache.manifest
    ids = "".join(row.row_id for row in source)
    assert manifest.fingerprint["corpus"]["sequences_sha256"] == hashlib.sha256(ids.encode()).hexdigest()
    assert manifest.fingerprint["capture"]["shard_positions"] == SHARD_POSITIONS
    assert manifest.fingerprint["teacher"] == source.manifest.fingerprint["teacher"]
    assert manifest.skipped == source.manifest.skipped
    assert manifest.files == source.manifest.files
    assert all(shard.num_positions >= SHARD_POSITIONS for shard in manifest.shards[:-1])
    assert max(shard.num_positions for shard in manifest.shards) < SHARD_POSITIONS + 12
    (step,) = history(cache)
    (origin,) = step["from"]
    assert origin["path"] == str(root / "a")
    assert origin["manifest_sha256"] == hashlib.sha256((root / "a/logitcache.json").read_bytes()).hexdigest()
    assert (origin["sequences"], origin["positions"], origin["bytes"]) == (
        60,
        source.num_positions,
        source.manifest.num_bytes,
    )
    assert "`logitcache" in contents(root / "out")["README.md"].decode()


@pytest.mark.slow
def test_rows_are_read_a_row_group_at_a_time(root: Path) -> None:
    source = logitcache.open(root / "a")
    sizes = [len(rows) for rows, _ in scan([source, source])]
    assert sizes == 2 * [rows for shard in source.manifest.shards for rows in shard.row_group_sizes]
    assert len(sizes) > 20

"""Rewrites by several processes, as shard ranges or actors on Ray: the bytes of a single one."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

import logitcache
from logitcache import LogitCache, UserError
from logitcache.assembly.workspace import lock_range
from logitcache.capture.finish import finish
from logitcache.cli import main
from logitcache.storage.folder import Folder
from tests.helpers.exchanging import random_rows as random_source_rows
from tests.helpers.exchanging import write_rows, write_tokenizer
from tests.helpers.maintained import contents, make_cache
from tests.helpers.processes import FORKED
from tests.helpers.smallcaches import EVERYTHING, random_rows
from tests.helpers.underway import num_finished_shards
from tests.helpers.webserver import SECRET, website

ROWS = random_rows(110, EVERYTHING)

Command = Callable[..., LogitCache | None]


def recode(root: Path, out: Path | str, **settings: Any) -> LogitCache | None:
    result: LogitCache | None = logitcache.recode(root / "a", out, **{"top_k": 4, "shard_positions": 40, **settings})
    return result


def slice_cache(root: Path, out: Path | str, **settings: Any) -> LogitCache | None:
    result: LogitCache | None = logitcache.slice(root / "b", out, sample=50, shard_positions=30, **settings)
    return result


def merge(root: Path, out: Path | str, **settings: Any) -> LogitCache | None:
    result: LogitCache | None = logitcache.merge([root / "a", root / "b"], out, shard_positions=40, **settings)
    return result


def import_rows(root: Path, out: Path | str, **settings: Any) -> LogitCache | None:
    options: dict[str, Any] = {"source_format": "topk", "teacher": "big", "shard_positions": 60, "skip_bad": True}
    result: LogitCache | None = logitcache.import_logits(
        [str(root / "rows")], out, tokenizer=str(root / "words"), **options, **settings
    )
    return result


COMMANDS: list[Command] = [recode, slice_cache, merge, import_rows]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two caches, of 60 and of 80 rows, 30 of them in both; and rows to import, two of them bad."""
    path = tmp_path_factory.mktemp("sources")
    make_cache(path / "a", ROWS[:60], EVERYTHING)
    make_cache(path / "b", ROWS[30:], EVERYTHING)
    rows = random_source_rows(70)
    rows[3]["topk_ids"][0][0] = rows[66]["topk_ids"][0][0] = 10**6
    write_rows(path / "rows/one.parquet", rows[:40], row_group_size=9)
    write_rows(path / "rows/two.jsonl", rows[40:])
    write_tokenizer(path / "words")
    return path


def whole(command: Command, root: Path) -> dict[str, bytes]:
    """What one process makes, once per command."""
    out = root / f"whole-{command.__name__}"
    if not (out / "logitcache.json").exists():
        command(root, out)
    return contents(out)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_ranges_in_any_order_and_finish_make_the_bytes_of_one_process(
    root: Path, tmp_path: Path, command: Command
) -> None:
    later = [1, 2, 3]
    random.Random(command.__name__).shuffle(later)
    for index in (0, *later):
        if index == later[-1]:
            missing = r"shards are not complete \(.*\): run the same `logitcache (recode|slice|merge|import)` again"
            with pytest.raises(UserError, match=missing):
                finish(tmp_path / "out")
        assert command(root, tmp_path / "out", shard_range=(index, 4)) is None
    finished = finish(tmp_path / "out")
    assert contents(tmp_path / "out") == whole(command, root)
    again = command(root, tmp_path / "out", shard_range=(1, 4))
    assert again is not None and again.identity == finished.identity


@pytest.mark.slow
def test_a_later_range_waits_for_the_first_one(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("logitcache.assembly.placement.LOOK_AGAIN_S", 0.01)
    caplog.set_level("INFO", "logitcache")
    later = threading.Thread(target=recode, args=(root, tmp_path / "out"), kwargs={"shard_range": (1, 2)})
    later.start()
    while "waiting until --shard-range 0/… has dealt the rows to shards" not in caplog.text:
        time.sleep(0.01)
        assert later.is_alive()
    recode(root, tmp_path / "out", shard_range=(0, 2))
    later.join()
    finish(tmp_path / "out")
    assert contents(tmp_path / "out") == whole(recode, root)


@pytest.mark.slow
@pytest.mark.parametrize("command", [recode, import_rows])
def test_killed_ranges_continue(root: Path, tmp_path: Path, command: Command) -> None:
    out, moments = tmp_path / "out", random.Random(1)
    for index in (0, 1, 0, 1):
        process = FORKED.Process(target=command, args=(root, out), kwargs={"shard_range": (index, 2)})
        process.start()
        wanted = num_finished_shards(out) + moments.randint(0, 1)
        while process.is_alive() and num_finished_shards(out) < wanted:
            time.sleep(0.0005)
        time.sleep(moments.uniform(0, 0.01) if (out / ".build/plan.json").exists() else 0.05)
        process.kill()  # SIGKILL
        process.join()
    for index in (0, 1):
        command(root, out, shard_range=(index, 2))
    finish(out)
    assert contents(out) == whole(command, root)


@pytest.mark.slow
def test_ranges_of_another_plan_or_beside_themselves_are_refused(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    recode(root, out, shard_range=(0, 2))
    left = contents(out)
    calls: list[tuple[Callable[[], object], str]] = [
        (
            lambda: recode(root, out, top_k=3, shard_range=(1, 2)),
            "an unfinished cache made otherwise: top_k was 4, now 3",
        ),
        (lambda: merge(root, out, shard_range=(1, 2)), "command was recode, now merge"),
    ]
    for call, message in calls:
        with pytest.raises(UserError, match=message):
            call()
    with (
        lock_range(Folder(out), (1, 2)),
        pytest.raises(UserError, match="another process is at work on --shard-range 1/2"),
    ):
        recode(root, out, shard_range=(1, 2))
    assert {name: content for name, content in contents(out).items() if name in left} == left


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workers", "2"], "--workers needs --executor ray"),
        (["--ray-address", "h:1"], "--ray-address needs --executor ray"),
        (["--executor", "ray", "--workers", "0"], "--workers 0: at least 1 is needed"),
        (["--shard-range", "2/2"], "--shard-range 2/2: write i/n with i from 0 to n - 1"),
        (["--shard-range", "0/2", "--overwrite"], "--overwrite contradicts --shard-range"),
    ],
)
@pytest.mark.parametrize(
    "command",
    [
        ["recode", "nowhere", "--top-k", "2"],
        ["slice", "nowhere", "--rows", "0:1"],
        ["merge", "nowhere", "nowhere"],
        ["import", "nowhere", "--from", "topk", "--teacher", "t", "--tokenizer", "nowhere"],
    ],
    ids=lambda command: command[0],
)
def test_options_that_contradict_are_refused_before_anything_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str], options: list[str], message: str
) -> None:
    assert main([*command, "--out", str(tmp_path / "out"), *options]) == 2
    assert capsys.readouterr().err.startswith(f"logitcache: error: {message}")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_rewrite_of_an_earlier_version_is_finished_by_its_command_only(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    recode(root, out, shard_range=(0, 1))
    plan = out / ".build/plan.json"
    text = plan.read_text()
    plan.write_text(text[: text.index(',\n  "draft"')] + text[text.index(',\n  "request"') :])
    with pytest.raises(UserError, match="was begun by an earlier version: run the same command again"):
        finish(out)
    recode(root, out)
    assert contents(out) == whole(recode, root)


def workers() -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::ShardsOnRay"):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.engine
@pytest.mark.parametrize("command", [recode, merge, import_rows])
def test_workers_on_ray_make_the_bytes_of_one_process(
    cluster: None, root: Path, tmp_path: Path, command: Command
) -> None:
    pytest.importorskip("ray")
    command(root, tmp_path / "out", executor="ray", workers=2)
    assert contents(tmp_path / "out") == whole(command, root)


@pytest.mark.engine
def test_the_shards_of_a_killed_worker_are_handed_on(
    cluster: None, root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("ray")
    out = tmp_path / "out"

    def kill_one() -> None:
        while not num_finished_shards(out):
            time.sleep(0.001)
        workers()[0].kill()

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    logitcache.recode(root / "a", out, top_k=4, shard_positions=3, executor="ray", workers=2)
    killer.join()
    assert "a worker was lost" in caplog.text
    logitcache.recode(root / "a", tmp_path / "whole", top_k=4, shard_positions=3)
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.engine
def test_a_source_at_a_url_is_opened_by_each_worker_with_its_password(
    cluster: None, root: Path, tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    with website(root, password=SECRET) as site:
        logitcache.recode(site.url("a"), tmp_path / "out", top_k=4, shard_positions=40, executor="ray", workers=2)
        logitcache.recode(site.url("a"), tmp_path / "here", top_k=4, shard_positions=40)
    assert contents(tmp_path / "out") == contents(tmp_path / "here")


@pytest.mark.engine
def test_what_a_worker_cannot_read_is_one_line_and_more_workers_than_cores_are_refused(
    cluster: None, root: Path, tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    with pytest.raises(UserError, match=r"--workers 3: the Ray cluster has 2 core\(s\); choose at most 2"):
        recode(root, tmp_path / "out", executor="ray", workers=3)
    shard = root / "a/data/train-00004-of-00009.parquet"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    try:
        with pytest.raises(UserError, match=r"train-00004-of-00009\.parquet"):
            recode(root, tmp_path / "out", executor="ray", workers=1)
    finally:
        shard.write_bytes(content)
    recode(root, tmp_path / "out")
    assert contents(tmp_path / "out") == whole(recode, root)

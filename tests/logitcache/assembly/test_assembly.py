"""The plan of a cache: which shards are complete, what earlier versions wrote, and who may continue it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from logitcache import UserError
from logitcache.assembly.plan import PLAN_NAME, Plan, PlannedShard, new_plan
from logitcache.assembly.resume import begun_plan, continues
from logitcache.assembly.workspace import PROMPTS_NAME
from logitcache.assembly.write import StoredRow, complete_shards, write_missing
from logitcache.storage.folder import Folder
from tests.helpers.smallcaches import EVERYTHING, random_rows

SPEC = {"command": "slice", "rows": "0:6"}
ROWS = random_rows(6, EVERYTHING)


def planned(folder: Folder) -> Plan:
    counts = [sum(len(sequence.positions) for sequence, _ in ROWS[first : first + 2]) for first in (0, 2, 4)]
    shards = tuple(PlannedShard(count, 2) for count in counts)
    return new_plan(folder, lambda: Plan(folder=folder, spec=SPEC, shards=shards, sequences_sha256="ab"))


def rows_of(shard: int) -> Iterator[StoredRow]:
    yield from ROWS[2 * shard : 2 * shard + 2]


@pytest.mark.slow
def test_a_plan_read_back_is_the_plan_that_was_made(tmp_path: Path) -> None:
    plan = planned(Folder(tmp_path))
    assert Plan.read(Folder(tmp_path)) == plan == begun_plan(Plan, Folder(tmp_path), SPEC, overwrite=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "shards"),
    [
        ({"num_positions": [7, 3], "sequences_sha256": "ab"}, (PlannedShard(7), PlannedShard(3))),
        (
            {"shards": [{"file": 1, "row": 5, "num_rows": 4, "num_positions": 9}], "column_types": {"id": "int64"}},
            (PlannedShard(9, 4, file=1, row=5),),
        ),
        (
            {"shards": [{"num_sequences": 2, "num_positions": 9, "num_tokens": 11}], "column_types": {}},
            (PlannedShard(9, 2, 11),),
        ),
    ],
    ids=["rewrite", "import", "build"],
)
def test_a_plan_of_an_earlier_version_is_read(
    tmp_path: Path, data: dict[str, Any], shards: tuple[PlannedShard, ...]
) -> None:
    Folder(tmp_path).write(PLAN_NAME, json.dumps({"request": SPEC, **data}))
    plan = Plan.read(Folder(tmp_path))
    assert plan.spec == SPEC
    assert plan.shards == shards
    assert plan.column_types == data.get("column_types", {})
    assert plan.sequences_sha256 == data.get("sequences_sha256", "")


def test_a_shard_is_finished_when_it_was_recorded_and_is_there(tmp_path: Path) -> None:
    plan = planned(Folder(tmp_path))
    assert plan.finished(0) is None
    infos = write_missing(plan, EVERYTHING, lambda plan: rows_of, "writing")
    assert {index: plan.finished(index) for index in range(3)} == infos
    (tmp_path / f".build/shards/{1:05d}.json").unlink()
    assert plan.finished(1) is None
    shard = tmp_path / plan.shard_name(0)
    shard.write_bytes(shard.read_bytes()[:-1])
    assert plan.finished(0) is None
    shard.unlink()
    assert plan.finished(0) is None
    assert complete_shards(plan, range(3)) == {2: infos[2]}


def test_only_the_missing_shards_are_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plan, asked = planned(Folder(tmp_path)), []

    def rows(shard: int) -> Iterator[StoredRow]:
        asked.append(shard)
        yield from rows_of(shard)
        if asked == [0, 1]:
            raise KeyboardInterrupt

    caplog.set_level("INFO", "logitcache")
    with pytest.raises(KeyboardInterrupt):
        write_missing(plan, EVERYTHING, lambda plan: rows, "writing")
    first = plan.finished(0)
    infos = write_missing(plan, EVERYTHING, lambda plan: rows, "writing")
    assert asked == [0, 1, 1, 2]
    assert infos[0] == first
    assert [info.num_sequences for info in infos.values()] == [2, 2, 2]
    assert "continuing: 1 of 3 shards are complete" in caplog.text


@pytest.mark.parametrize("name", [PLAN_NAME, PROMPTS_NAME])
def test_another_command_does_not_continue_it_unless_it_may_overwrite(tmp_path: Path, name: str) -> None:
    folder = Folder(tmp_path)
    folder.write(name, json.dumps({"request": {"teacher": "x"}}))
    with pytest.raises(UserError, match=r"an unfinished cache made otherwise: command was build, now slice\. Repeat"):
        continues(folder, SPEC, overwrite=False)
    with pytest.raises(UserError, match="teacher was x, now y"):
        continues(folder, {"teacher": "y"}, overwrite=False)
    assert continues(folder, {"teacher": "x"}, overwrite=False) == (name == PLAN_NAME)
    assert not continues(folder, SPEC, overwrite=True)
    assert folder.exists(name)
    assert begun_plan(Plan, folder, SPEC, overwrite=True) is None
    assert folder.exists(name) == (name == PLAN_NAME)


def test_planning_that_fails_leaves_the_finished_cache_and_nothing_else(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.write("logitcache.json", "{}")

    def cut() -> Plan:
        folder.write(".build/rows/00000", "…")
        raise UserError("no row")

    with pytest.raises(UserError, match="no row"):
        new_plan(folder, cut)
    assert [path.name for path in tmp_path.iterdir()] == ["logitcache.json"]

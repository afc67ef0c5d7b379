"""Rows for which the teacher gives NaN: named by file and row, left out with --skip-bad, and counted."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import logitcache
from logitcache import UserError
from logitcache.capture.estimate.estimate import plan
from logitcache.format.shards import ShardWriter
from tests.helpers.exchanging import findings

BROKEN = 300
"""A token whose embedding is NaN: every position from it on is."""
ROWS = [[5, 6, 7, 8], [9, 10, BROKEN, 11], [12, 13, 14], [BROKEN, 15], [16, 17, 18], [19, 20, 21, 22]]
BAD = [1, 3]


@pytest.fixture(scope="module")
def broken(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from transformers import AutoModelForCausalLM

    path = tmp_path_factory.mktemp("broken") / "teacher"
    shutil.copytree(teacher, path)
    model: Any = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        model.get_input_embeddings().weight[BROKEN] = float("nan")
    model.save_pretrained(path)
    return path


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in ROWS))
    return path


def build(teacher: Path, data: Path, out: Path, **settings: Any) -> logitcache.LogitCache:
    defaults: dict[str, Any] = {"backend": "transformers", "top_k": 8, "tail_rank": 0, "shard_positions": 5}
    cache: logitcache.LogitCache = logitcache.build(str(teacher), str(data), out, **{**defaults, **settings})
    return cache


def test_a_row_without_numbers_is_named_by_file_and_row(broken: Path, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        build(broken, rows, tmp_path / "out")
    said = str(error.value)
    assert said.startswith(f"{rows}, line 2 (row ")
    assert "the teacher gave log-probabilities that are not numbers at position " in said
    assert "--dtype float32 helps" in said
    assert "leave such rows out with --skip-bad" in said
    assert "\n" not in said


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{}, {"tail_groups": 4, "tail_rank": 2}, {"top_p": 0.5}, {"tail_samples": 2, "tail_entropy": True}]
)
def test_skip_bad_leaves_it_out_and_counts_it(
    broken: Path, teacher: Path, rows: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, settings: dict[str, Any]
) -> None:
    with caplog.at_level(logging.WARNING, "logitcache"):
        cache = build(broken, rows, tmp_path / "out", skip_bad=True, **settings)
    good = [ids for number, ids in enumerate(ROWS) if number not in BAD]
    assert [row.input_ids.tolist() for row in cache] == good
    assert cache.manifest.skipped == {"not scored": 2}
    assert f"left out: 2 not scored; the first: {rows}, line 2 (row " in caplog.text
    assert findings(cache) == []
    digest = hashlib.sha256("".join(row.row_id for row in cache).encode()).hexdigest()
    assert cache.manifest.fingerprint["corpus"]["sequences_sha256"] == digest
    assert len(cache.manifest.shards) > 1
    assert not (tmp_path / "out/.build").exists()
    again = build(broken, rows, tmp_path / "out", skip_bad=True, **settings)
    assert again.identity == cache.identity
    if not settings:
        whole = build(teacher, rows, tmp_path / "whole")
        for row, other in zip(cache, [whole[i] for i in range(len(ROWS)) if i not in BAD], strict=True):
            assert row.row_id == other.row_id
            np.testing.assert_allclose(row.targets.logprobs, other.targets.logprobs, atol=1e-3)


@pytest.mark.slow
def test_an_interrupted_build_continues_to_the_same_cache(
    broken: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build(broken, rows, tmp_path / "whole", skip_bad=True)
    for number in range(len(whole.manifest.shards)):
        out = tmp_path / f"cut{number}"
        begun: list[str] = []

        def writer(folder: Any, name: str, layout: Any, begun: list[str] = begun, number: int = number) -> ShardWriter:
            if len(begun) == number:
                raise KeyboardInterrupt
            begun.append(name)
            return ShardWriter(folder, name, layout)

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr("logitcache.assembly.write.ShardWriter", writer)
            build(broken, rows, out, skip_bad=True)
        continued = build(broken, rows, out, skip_bad=True)
        assert continued.manifest.shards == whole.manifest.shards
        assert continued.manifest.skipped == whole.manifest.skipped
        assert continued.manifest.fingerprint == whole.manifest.fingerprint


def test_rows_that_are_copied_stay_where_others_are_left_out(broken: Path, rows: Path, tmp_path: Path) -> None:
    first = build(broken, rows, tmp_path / "first", skip_bad=True)
    reused = build(broken, rows, tmp_path / "reused", skip_bad=True, reuse=str(tmp_path / "first"))
    assert [row.row_id for row in reused] == [row.row_id for row in first]
    assert reused.manifest.skipped == first.manifest.skipped
    assert findings(reused) == []


def test_a_shard_of_which_nothing_can_be_scored_is_refused(broken: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"input_ids": [BROKEN, 5, 6]}) + "\n")
    for settings in ({}, {"tail_groups": 4}, {"tail_rank": 1, "tail_groups": 0}):
        with pytest.raises(
            UserError, match=r"no row of it could be scored; .*line 1|gives no log-probabilities that are"
        ):
            build(broken, data, tmp_path / f"out{len(settings)}", skip_bad=True, **settings)


def test_a_plan_names_it_or_leaves_it_out(broken: Path, rows: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UserError, match=r"line [24] \(row .*not numbers at position"):
        plan(str(broken), str(rows), backend="transformers", top_k=8)
    with caplog.at_level(logging.WARNING, "logitcache"):
        found = plan(str(broken), str(rows), backend="transformers", top_k=8, skip_bad=True)
    assert "2 of them cannot be scored" in caplog.text
    assert all(np.isfinite([*choice.gradient_error.values(), choice.mass_covered]).all() for choice in found.choices)

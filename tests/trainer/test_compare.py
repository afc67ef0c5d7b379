"""Runs side by side: seeds of one run make one row, what differs makes its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from logitcache import UserError
from trainer.cli import main
from trainer.comparison.finished import compare

METRICS = {"ce": 2.0, "perplexity": 7.4, "fkl": 0.5, "rkl": 0.6, "agreement": 0.7, "ece": 0.1, "positions": 100}


def finished_run(folder: Path, name: str, *, fkl: float = 0.5, heldout: str = "heldout", **settings: Any) -> Path:
    run = folder / name
    run.mkdir()
    defaults = {"loss": "todi", "kd_weight": 0.5, "seed": 0, "output_dir": str(run), "learning_rate": 1e-3}
    evaluation = {"cache": heldout, "cache_sha256": f"digest of {heldout}", "metrics": METRICS | {"fkl": fkl}}
    history = [{"step": step, "eval_fkl": fkl + 1 / step, "eval_ce": 3 / step} for step in (1, 2, 3)]
    (run / "run.json").write_text(json.dumps({"settings": defaults | settings, "tail": "bucket"}))
    (run / "eval.json").write_text(json.dumps(evaluation))
    (run / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": 1, "loss": 3.0}, *history]}))
    return run


def test_runs_that_differ_in_their_seed_are_one_row_with_its_spread(tmp_path: Path) -> None:
    runs = [finished_run(tmp_path, f"r{seed}", seed=seed, fkl=0.4 + 0.1 * seed) for seed in range(3)]
    header, row, footer = compare(runs, None).splitlines()
    assert header.split() == ["seeds", "CE", "perplexity", "FKL", "RKL", "top-1", "agreement", "ECE"]
    assert row.split()[:2] == ["ToDi", "3"]
    assert "0.5 ± 0.1" in row
    assert "standard deviation" in footer


def test_a_row_is_named_after_its_loss_and_what_differs(tmp_path: Path) -> None:
    runs = [
        finished_run(tmp_path, "a", kd_weight=0.0),
        finished_run(tmp_path, "b", loss="fkl"),
        finished_run(tmp_path, "c", loss="rkl", temperature=2.0),
        finished_run(tmp_path, "d", loss="rkl", temperature=1.0),
    ]
    names = [line.split("  ")[0] for line in compare(runs, None).splitlines()[1:]]
    assert names[0] == "hard labels"
    assert names[1].startswith("FKL")
    assert names[2:] == ["RKL temperature=2.0", "RKL temperature=1.0"]


def test_the_loss_and_its_settings_do_not_tell_hard_labels_apart(tmp_path: Path) -> None:
    hard = [
        finished_run(tmp_path, "a", kd_weight=0.0, loss="fkl", temperature=2.0, seed=0),
        finished_run(tmp_path, "b", kd_weight=0.0, loss="todi", temperature=1.0, seed=1),
        finished_run(tmp_path, "c", kd_weight=0.0, loss="todi", learning_rate=1e-4),
    ]
    rows = [line.split("  ")[0:2] for line in compare([*hard, finished_run(tmp_path, "d")], None).splitlines()[1:4]]
    assert [row[0] for row in rows] == ["hard labels learning_rate=0.001", "hard labels learning_rate=0.0001", "ToDi"]


def test_an_out_that_cannot_be_written_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(finished_run(tmp_path, "a"))
    for out in (tmp_path / "missing" / "x.png", tmp_path):
        assert main(["compare", run, "--out", str(out)]) == 2
        assert f"--out {out}: " in capsys.readouterr().err


def test_the_command_prints_the_table_and_draws_the_curves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(finished_run(tmp_path, f"{loss}{s}", loss=loss, seed=s)) for loss in ("fkl", "akl") for s in (0, 1)]
    picture = tmp_path / "curves.png"
    assert main(["compare", *runs, "--out", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 10_000
    out = capsys.readouterr().out
    assert "FKL" in out
    assert "AKL" in out
    assert str(picture) in out


def test_a_run_without_an_evaluation_is_refused(tmp_path: Path) -> None:
    run = finished_run(tmp_path, "a")
    (run / "eval.json").unlink()
    with pytest.raises(UserError, match=r"has no eval\.json"):
        compare([run], None)


def test_runs_evaluated_on_different_data_are_refused(tmp_path: Path) -> None:
    runs = [finished_run(tmp_path, "a"), finished_run(tmp_path, "b", heldout="other")]
    with pytest.raises(UserError, match=r"/b was evaluated on the cache other, .*/a on another one, heldout:"):
        compare(runs, None)

"""--report_to: the numbers of a run where the chosen tracker keeps them."""

from __future__ import annotations

from pathlib import Path

import pytest

from logitcache import LogitCache
from trainer.cli import main


def train(cache: LogitCache, heldout: LogitCache, student: str, out: Path, reporter: str) -> None:
    arguments = ["--cache", cache.path, "--eval_cache", heldout.path, "--student", student, "--output_dir", str(out)]
    options = ["--use_cpu", "--max_steps", "2", "--logging_steps", "1", "--disable_tqdm", "true"]
    assert main(["fit", *arguments, *options, "--report_to", reporter]) == 0


@pytest.mark.slow
def test_tensorboard_gets_the_losses_and_the_held_out_metrics(
    tmp_path: Path, cache: LogitCache, heldout: LogitCache, student_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    train(cache, heldout, student_folder, tmp_path / "out", "tensorboard")
    kept = EventAccumulator(str(tmp_path / "runs")).Reload()
    assert {"train/loss", "train/fkl", "train/data_wait", "eval/fkl"} <= set(kept.Tags()["scalars"])
    assert [point.step for point in kept.Scalars("train/loss")] == [1, 2]


@pytest.mark.slow
def test_wandb_keeps_a_run_offline(
    tmp_path: Path, cache: LogitCache, heldout: LogitCache, student_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_DIR", str(tmp_path)), ("WANDB_SILENT", "true")):
        monkeypatch.setenv(name, value)
    train(cache, heldout, student_folder, tmp_path / "out", "wandb")
    assert wandb.run is not None
    assert wandb.run.summary["eval/fkl"] > 0
    assert wandb.run.config["kd_weight"] == 0.5
    wandb.finish()
    assert list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))

"""An interrupted run goes on with the exact next batch: its losses are those of a run that was never interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from logitcache import LogitCache
from tests.helpers.cachemaking import llama, random_sequences, write_cache
from trainer.config.config import DistillConfig
from trainer.data.training_data import open_training_data
from trainer.run.distill_trainer import DistillTrainer


def losses(trainer: DistillTrainer, checkpoint: str | None = None) -> dict[int, float]:
    trainer.train(resume_from_checkpoint=checkpoint)
    return {int(entry["step"]): entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_accumulation_steps": 2, "dataloader_num_workers": 1},
        {"train_sampling_strategy": "group_by_length"},
        {"tokens_per_batch": 60},
        {"packing": True, "packed_length": 40, "per_device_train_batch_size": 2},
        {"loss_schedule": "fkl@0,rkl@0.5", "kd_weight_schedule": "1@0,0.3@1"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_the_losses_after_a_resume_are_those_of_an_uninterrupted_run(
    settings: dict[str, Any], tmp_path: Path, cache: LogitCache
) -> None:
    second = write_cache(tmp_path / "second", random_sequences(10, seed=6))
    data = open_training_data([f"{cache.path}:2", f"{second.path}:1"])
    common: dict[str, Any] = {"per_device_train_batch_size": 4, "num_train_epochs": 3, "logging_steps": 1}
    common |= {"save_strategy": "steps", "save_steps": 5, "learning_rate": 1e-2, "tail": "bucket"}

    def trainer(weights: int) -> DistillTrainer:
        config = DistillConfig(output_dir=str(tmp_path), use_cpu=True, disable_tqdm=True, **(common | settings))
        return DistillTrainer(llama(seed=weights), data, config)

    through = losses(trainer(7))
    assert max(through) > 10, "more than an epoch follows the checkpoint"
    resumed = losses(trainer(8), str(tmp_path / "checkpoint-5"))
    assert resumed == pytest.approx(through, rel=1e-6)

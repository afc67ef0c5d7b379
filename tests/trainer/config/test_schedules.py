"""Loss, temperature and λ that change over a run, as fractions of its steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from logitcache import LogitCache, UserError
from tests.helpers.cachemaking import VOCAB, llama, random_sequences, write_cache
from trainer.config.config import DistillConfig
from trainer.run.distill_trainer import DistillTrainer


def config(folder: Path, **settings: Any) -> DistillConfig:
    return DistillConfig(output_dir=str(folder), use_cpu=True, save_strategy="no", disable_tqdm=True, **settings)


def test_losses_follow_each_other_and_weights_lie_on_straight_lines(tmp_path: Path) -> None:
    settings = config(
        tmp_path, loss_schedule="fkl@0, rkl@0.2", kd_weight_schedule="1@0.5,0.2@1", temperature_schedule="4@0,1@0.6"
    )
    assert [settings.value_at("loss", at) for at in (0, 0.19, 0.2, 1)] == ["fkl", "fkl", "rkl", "rkl"]
    assert [settings.value_at("temperature", at) for at in (0, 0.59, 0.6, 1)] == [4, 4, 1, 1]
    assert [settings.value_at("kd_weight", at) for at in (0, 0.5, 0.75, 1)] == pytest.approx([1, 1, 0.6, 0.2])


def test_plain_settings_are_where_schedules_end(tmp_path: Path) -> None:
    settings = config(tmp_path, loss_schedule="fkl@0,rkl@0.5", kd_weight_schedule="1@0,0.3@1")
    assert (settings.loss, settings.kd_weight, settings.temperature) == ("rkl", 0.3, 1.0)
    assert settings.losses == ("fkl", "rkl")


def loss_args(settings: DistillConfig, progress: float) -> Mapping[str, Any]:
    return settings.settings_at(progress, tail="bucket")[0].loss_args


def test_each_loss_of_a_schedule_takes_the_options_it_has(tmp_path: Path) -> None:
    settings = config(tmp_path, loss_schedule="jsd@0,akl@0.5", loss_args="beta=0.3,akl_split=todi")
    assert loss_args(settings, 0) == {"beta": 0.3}
    assert loss_args(settings, 1) == {"akl_split": "todi"}
    # An option at the default of one loss is not at that of another.
    switched = config(tmp_path, loss_schedule="jsd@0,ab@0.5", loss_args="beta=0.5")
    assert [loss_args(switched, at) for at in (0, 1)] == [{"beta": 0.5}] * 2
    with pytest.raises(UserError, match="beta"):
        config(tmp_path, loss_schedule="todi@0,jsd@0.5", loss_args="beta=1")
    with pytest.raises(UserError, match="gamma"):
        config(tmp_path, loss_schedule="jsd@0,akl@0.5", loss_args="gamma=1")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"loss_schedule": "fkl@0.1"}, "the first fraction must be 0"),
        ({"loss_schedule": "rkl@0,fkl@1"}, "at 1 the run is over: no step has fkl"),
        ({"loss_schedule": "fkl"}, "'fkl' is not value@fraction, such as fkl@0"),
        ({"loss_schedule": "fkl@0,klf@0.5"}, "--loss_schedule klf: accepted are fkl"),
        ({"kd_weight_schedule": "1@0,0.5@2"}, "ascending from 0 to 1"),
        ({"kd_weight_schedule": "1@0.5,0.5@0.5"}, "ascending from 0 to 1"),
        ({"kd_weight_schedule": "1@0,1.5@1"}, "--kd_weight_schedule 1.5: it must lie between 0"),
        ({"temperature_schedule": "x@0"}, "'x@0' is not value@fraction, such as 1@0"),
        ({"temperature_schedule": "0@0"}, "--temperature_schedule 0: it must be a positive number"),
        ({"temperature_schedule": "2@0,1@0.5", "tail": "groups"}, "--tail groups --temperature_schedule 2"),
        ({"loss": "akl", "loss_schedule": "fkl@0,rkl@.2"}, "ends at rkl. Leave --loss out"),
    ],
)
def test_schedules_that_cannot_be_meant_are_refused(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        config(tmp_path, **settings)


def logged(folder: Path, cache: LogitCache, steps: int = 4, **settings: Any) -> list[float]:
    """Loss of each step of a run whose weights stay as they are, over the same batch."""
    common = {"max_steps": steps, "logging_steps": 1, "learning_rate": 0.0, "per_device_train_batch_size": len(cache)}
    trainer = DistillTrainer(llama(seed=7), cache, config(folder, **common, **settings))
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.slow
def test_a_run_trains_on_what_the_schedule_says(tmp_path: Path) -> None:
    tempered = write_cache(tmp_path / "cache", random_sequences(6, seed=3), k=VOCAB, temperatures=(2.0, 4.0))
    fkl, rkl = (logged(tmp_path, tempered, 1, loss=loss, kd_weight=1.0)[0] for loss in ("fkl", "rkl"))
    switched = logged(tmp_path, tempered, loss_schedule="fkl@0,rkl@0.5", kd_weight=1.0)
    assert switched == pytest.approx([fkl, fkl, rkl, rkl], rel=1e-5)

    hot, warm = (logged(tmp_path, tempered, 1, temperature=T, kd_weight=1.0)[0] for T in (4.0, 2.0))
    cooled = logged(tmp_path, tempered, temperature_schedule="4@0,2@0.5", kd_weight=1.0)
    assert cooled == pytest.approx([hot, hot, warm, warm], rel=1e-5)

    hard, taught = (logged(tmp_path, tempered, 1, kd_weight=weight)[0] for weight in (0.0, 1.0))
    faded = logged(tmp_path, tempered, kd_weight_schedule="1@0,0@1")
    assert faded == pytest.approx(
        [taught, *(taught + (hard - taught) * share for share in (0.25, 0.5, 0.75))], rel=1e-5
    )


def test_every_temperature_of_a_schedule_must_be_in_the_cache(tmp_path: Path, cache: LogitCache) -> None:
    with pytest.raises(UserError, match=r"--temperature 3: .* holds the teacher's tail at T = 1, 2 only"):
        DistillTrainer(llama(seed=7), cache, config(tmp_path, temperature_schedule="2@0,3@0.5"))

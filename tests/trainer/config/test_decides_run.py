"""One statement per setting of whether it decides a run: a checkpoint and a comparison both go by it."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any, cast

from transformers import HfArgumentParser, TrainingArguments

from trainer.comparison.settings import matters
from trainer.config.config import DistillConfig, decides_run
from trainer.config.fields import OF_TRANSFORMERS, DecidesRun, setting

SETTINGS = {
    *("loss", "kd_weight", "temperature", "t_squared", "loss_args", "loss_schedule", "kd_weight_schedule"),
    *("temperature_schedule", "train_sampling_strategy", "packing", "packed_length", "tokens_per_batch"),
    *("dataloader_drop_last", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_dora"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "seed", "data_seed"),
}
LENGTH = {"num_train_epochs", "max_steps"}
JUDGED = {
    *("early_stopping_patience", "early_stopping_threshold", "metric_for_best_model", "eval_strategy", "eval_steps")
}
INCIDENTAL = {
    *("output_dir", "run_name", "project", "resume_from_checkpoint", "report_to", "debug", "disable_tqdm"),
    *("push_to_hub", "skip_memory_metrics", "local_rank", "ddp_timeout", "use_cpu", "do_train", "do_eval"),
    "do_predict",
}
INCIDENTAL_PREFIXES = ("hub_", "log_", "logging_", "save_", "trackio_", "dataloader_")
FIELDS = {field.name: field for field in dataclasses.fields(DistillConfig)}


def named(*which: DecidesRun) -> set[str]:
    return {name for name in FIELDS if decides_run(name) in which}


def test_a_checkpoint_continues_with_the_same_values_of_the_settings_that_it_always_compared() -> None:
    assert named(DecidesRun.ALWAYS) == SETTINGS
    assert named(DecidesRun.IF_PLANNED) == LENGTH
    assert named(DecidesRun.IF_JUDGED) == JUDGED


def test_a_comparison_tells_runs_apart_by_every_setting_but_those_of_where_and_how() -> None:
    for name in FIELDS:
        incidental = name in INCIDENTAL or name.startswith(INCIDENTAL_PREFIXES)
        assert matters(name) == (not incidental or name == "dataloader_drop_last"), name
    assert matters("of_another_version") and not matters("logging_of_another_version")


def test_what_a_checkpoint_refuses_a_comparison_tells_apart() -> None:
    for name in named(DecidesRun.ALWAYS, DecidesRun.IF_PLANNED, DecidesRun.IF_JUDGED):
        assert matters(name), name


def test_a_setting_of_our_own_decides_unless_it_says_otherwise_and_the_table_is_of_the_others() -> None:
    assert setting(0, "new").metadata["help"].decides_run is DecidesRun.ALWAYS
    own = {name for name, field in FIELDS.items() if hasattr(field.metadata.get("help"), "decides_run")}
    assert own >= FIELDS.keys() - TrainingArguments.__dataclass_fields__.keys()
    assert not own & OF_TRANSFORMERS.keys()


def test_scripts_read_the_settings_with_transformers_own_parser() -> None:
    given = ["--cache", "c", "--student", "s", "--output_dir", "o", "--loss", "fkl"]
    [config] = HfArgumentParser(cast(Any, DistillConfig)).parse_args_into_dataclasses(given)
    assert (config.student, config.loss) == ("s", "fkl")


def test_training_args_of_earlier_checkpoints_name_the_settings_class_where_it_was() -> None:
    assert pickle.loads(b"ctrainer.config\nDistillConfig\n.") is DistillConfig

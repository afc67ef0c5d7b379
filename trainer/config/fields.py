"""Fields of settings: default, help text and whether a field decides a run, as transformers' HfArgumentParser reads them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from enum import Enum
from typing import Any

from transformers import TrainingArguments


class DecidesRun(Enum):
    """Whether runs that differ in a setting are different runs, to a checkpoint and to a comparison."""

    ALWAYS = "a checkpoint continues with the same value only, and a comparison tells the runs apart"
    IF_PLANNED = "likewise, a checkpoint only where the batches of all epochs are planned together"
    IF_JUDGED = "likewise, a checkpoint only where evaluations judge the run"
    COMPARED = "a checkpoint may continue with another value, or compares what the setting names; a comparison as ever"
    NEVER = "where and how a run was done"


class _Help(str):
    """A help text with what the field decides: HfArgumentParser takes every entry of the metadata to argparse."""

    decides_run: DecidesRun


def setting(
    default: Any, help: str, choices: Sequence[str] | None = None, *, decides_run: DecidesRun = DecidesRun.ALWAYS
) -> Any:
    """Makes a field of our own. choices: the accepted values; None for any."""
    text = _Help(help)
    text.decides_run = decides_run
    chosen = {"choices": list(choices)} if choices else {}
    return dataclasses.field(default=default, metadata={"help": text} | chosen)


def redefault(name: str, default: Any) -> Any:
    """Makes a field of TrainingArguments again, with its help and another default."""
    return dataclasses.field(default=default, metadata=TrainingArguments.__dataclass_fields__[name].metadata)


_NAMES = {
    DecidesRun.ALWAYS: "train_sampling_strategy dataloader_drop_last per_device_train_batch_size "
    "gradient_accumulation_steps seed data_seed",
    DecidesRun.IF_PLANNED: "num_train_epochs max_steps",
    DecidesRun.IF_JUDGED: "metric_for_best_model eval_steps",
    DecidesRun.NEVER: "output_dir run_name project resume_from_checkpoint report_to debug disable_tqdm push_to_hub "
    "skip_memory_metrics local_rank ddp_timeout use_cpu do_train do_eval do_predict",
}
OF_TRANSFORMERS = {name: decided for decided, names in _NAMES.items() for name in names.split()}
"""Fields of TrainingArguments. The others are COMPARED, but for names with one of NEVER_PREFIXES."""
NEVER_PREFIXES = ("hub_", "log_", "logging_", "save_", "trackio_", "dataloader_")

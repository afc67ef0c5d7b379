"""Where a run continues from, and whether that is the same run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from logitcache import UserError
from trainer.config import DistillConfig
from trainer.data.training_data import TrainingData
from trainer.files import RUN_NAME, STATE_NAME

SETTINGS = (
    "loss",
    "kd_weight",
    "temperature",
    "t_squared",
    "loss_args",
    "loss_schedule",
    "kd_weight_schedule",
    "temperature_schedule",
    "train_sampling_strategy",
    "packing",
    "packed_length",
    "tokens_per_batch",
    "dataloader_drop_last",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "use_dora",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "seed",
    "data_seed",
)
PLANNED = ("packing", "tokens_per_batch")  # and grouping by length: how many batches an epoch has depends on all epochs
LENGTH = ("num_train_epochs", "max_steps")


def last_checkpoint(folder: Path) -> str | None:
    """The latest complete checkpoint in a run's folder: its state is what is written last."""
    found = [path.parent for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{STATE_NAME}")]
    steps = {int(path.name.rpartition("-")[2]): str(path) for path in found if path.name.rpartition("-")[2].isdecimal()}
    return steps[max(steps)] if steps else None


def find_checkpoint(config: DistillConfig) -> str | None:
    """The checkpoint that --resume_from_checkpoint means. Raises UserError where there is none."""
    wanted = config.resume_from_checkpoint
    if wanted is None:
        return None
    if wanted.lower() == "true":
        last = last_checkpoint(Path(str(config.output_dir)))
        if last is None:
            raise UserError(f"--resume_from_checkpoint true: {config.output_dir} holds no checkpoint to continue from")
        return last
    if not (Path(wanted) / STATE_NAME).is_file():
        raise UserError(f"--resume_from_checkpoint {wanted}: not a checkpoint of a run (it has no {STATE_NAME})")
    return wanted


def data_record(data: TrainingData) -> dict[str, Any]:
    """What run.json says of what a run learns from."""
    caches = [
        {"path": cache.path, "identity": cache.identity, "fingerprint": dict(cache.manifest.fingerprint)}
        for cache in (*data.caches, *data.averaged_with)
    ]
    return {"path": data.path, "num_positions": data.num_positions, "caches": caches}


def check_same_run(checkpoint: str, config: DistillConfig, data: TrainingData, tail: str) -> list[str]:
    """Compares a run with the run.json beside the checkpoint it continues from; returns warnings.

    Raises UserError that names the settings that differ.
    """
    path = Path(checkpoint).parent / RUN_NAME
    if not path.is_file():
        return [f"{path.parent} has no {RUN_NAME}: nothing checks that {checkpoint} is of a run with these settings"]
    try:
        former = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from error
    planned = config.train_sampling_strategy == "group_by_length" or any(getattr(config, name) for name in PLANNED)
    compared = SETTINGS + (LENGTH if planned else ())
    pairs = [(name, former["settings"].get(name, getattr(config, name)), getattr(config, name)) for name in compared]
    pairs.append(("tail", former["tail"], tail))
    differing = [f"--{name} was {was}, is {now}" for name, was, now in pairs if was != now]
    was, now = former["cache"], data_record(data)
    if _content(was) != _content(now):
        differing.append(f"the cache was {was['path']}, and {now['path']} is another one")
    if differing:
        raise UserError(
            f"--resume_from_checkpoint {checkpoint}: {path} is of another run: {'; '.join(differing)}. Continue with "
            "the former settings, or start a run of its own without --resume_from_checkpoint, in another --output_dir"
        )
    return []


def _content(record: dict[str, Any]) -> tuple[int, list[Any]]:
    """Positions and fingerprints: the same cache may lie elsewhere, and may have been recoded. Earlier versions had one."""
    return record["num_positions"], [cache["fingerprint"] for cache in record.get("caches", [record])]

"""Adapters on a student: new ones, and those that a folder holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

from logitcache import UserError
from logitcache.errors import one_line
from trainer.config import DistillConfig

ALL_LINEAR = "all-linear"  # in PEFT: every linear layer but the output projection
EXTENSION = "PEFT is not installed, which adapters need: pip install 'logitcache[trainer]'"


def base_model(name: str) -> str | None:
    """The model that an adapter's folder or name on the Hub was trained on; None where `name` is no adapter."""
    try:
        path = find_adapter_config_file(name)
    except (OSError, ValueError):  # no such model: who loads it says so
        return None
    if path is None:
        return None
    try:
        base = json.loads(Path(path).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path}: not the JSON of an adapter ({one_line(error)})") from error
    if not base:
        raise UserError(f"{path}: it names no model in base_model_name_or_path; write the one that was adapted there")
    return str(base)


def check_adapter_student(config: DistillConfig) -> None:
    """Raises UserError for settings that suit no adapter where --student is one, and adapters on random weights."""
    student = str(config.student)
    if config.from_scratch and config.lora_r:
        raise UserError("--from_scratch --lora_r: adapters change weights that were trained. Take one of the two")
    base = base_model(student)
    if base is None:
        return
    if config.from_scratch:
        raise UserError(f"--from_scratch --student {student}: this is an adapter. Name the model it is of: {base}")
    if config.lora_r:
        raise UserError(
            f"--lora_r {config.lora_r} --student {student}: this is an adapter already. Leave --lora_r out to go on "
            f"training it, or name the model it is of: {base}"
        )


def weights_dtype(config: DistillConfig) -> torch.dtype:
    """dtype of the student's own weights in training: those that no optimizer changes need no more than bf16's."""
    frozen = config.lora_r is not None or base_model(str(config.student)) is not None
    return torch.bfloat16 if frozen and config.bf16 else torch.float32


def add_adapters(model: PreTrainedModel, config: DistillConfig) -> PreTrainedModel:
    """The model with LoRA or DoRA adapters of the settings, which alone are trained; float32, at first without effect.

    LoRA: Hu et al. 2021, arXiv 2106.09685. DoRA: Liu et al. 2024, arXiv 2402.09353. Raises UserError where the model has
    no layer of the names in lora_target_modules.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UserError(EXTENSION) from error
    assert config.lora_r is not None
    if model.name_or_path and Path(model.name_or_path).is_dir():
        model.name_or_path = str(Path(model.name_or_path).resolve())  # what the adapter's files call the base model
    settings = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=config.lora_alpha or 2 * config.lora_r,
        lora_dropout=config.lora_dropout,
        target_modules=config.lora_target_modules or ALL_LINEAR,
        use_dora=config.use_dora,
    )
    try:
        adapted: Any = get_peft_model(model, settings)
    except ValueError as error:
        named = "" if config.lora_target_modules is None else f" {' '.join(config.lora_target_modules)}"
        raise UserError(f"--lora_target_modules{named}: {one_line(error)}") from error
    return adapted


def load_adapter(base: PreTrainedModel, name: str) -> PreTrainedModel:
    """A model with the adapter of a folder or name, whose weights are trained when it is. Raises UserError."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise UserError(EXTENSION) from error
    try:
        adapted: Any = PeftModel.from_pretrained(base, name, is_trainable=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{name}: the adapter does not load on {base.name_or_path}: {one_line(error)}") from error
    return adapted


def describe_adapters(model: Any) -> str:
    """The adapters of a model, in words."""
    settings = model.active_peft_config
    trained, total = model.get_nb_trainable_parameters()
    kind = settings.peft_type.value
    if kind == "LORA":
        kind = f"{'DoRA' if settings.use_dora else 'LoRA'} of rank {settings.r}, alpha {settings.lora_alpha}"
    return f"{kind}: {trained:,} of {total:,} parameters are trained"

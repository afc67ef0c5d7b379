"""Adapters on a student: new ones, and adapters from a folder."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils.peft_utils import find_adapter_config_file

from logitcache import UserError
from logitcache.errors import one_line
from trainer.config.config import DistillConfig

EXTENSION = "PEFT is not installed, which adapters need: pip install 'logitcache[trainer]'"


def base_model(name: str) -> str | None:
    """Return the base model of an adapter, given by folder or Hub name; None if `name` is no adapter."""
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
    """Raises UserError for settings that do not suit a --student that is an adapter, and for adapters on random weights."""
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
    """Return the dtype of the student's own weights in training: under --bf16, weights that are not trained are bfloat16."""
    frozen = config.lora_r is not None or base_model(str(config.student)) is not None
    return torch.bfloat16 if frozen and config.bf16 else torch.float32


def add_adapters(model: PreTrainedModel, config: DistillConfig) -> PreTrainedModel:
    """Add LoRA or DoRA adapters to a model; only they are trained. They are float32 and at first without effect.

    LoRA: Hu et al. 2021, arXiv 2106.09685. DoRA: Liu et al. 2024, arXiv 2402.09353.

    Raises:
        UserError: the model has no layer of a name in lora_target_modules, or an adapter on such a layer has no use.
    """
    try:
        from peft import LoraConfig, get_peft_model
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError as error:
        raise UserError(EXTENSION) from error
    assert config.lora_r is not None
    if model.name_or_path and Path(model.name_or_path).is_dir():
        model.name_or_path = str(Path(model.name_or_path).resolve())  # what the adapter's files call the base model
    useless = _useless_adapters(model)
    layers = [name for name in _linear_layers(model) if name not in useless]
    if not (config.lora_target_modules or layers):
        raise UserError(
            f"--lora_r {config.lora_r}: {type(model).__name__} has no linear layer that an adapter changes. Leave it "
            "out, or name layers with --lora_target_modules"
        )
    settings = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=config.lora_alpha or 2 * config.lora_r,
        lora_dropout=config.lora_dropout,
        target_modules=config.lora_target_modules or layers,
        use_dora=config.use_dora,
    )
    try:
        adapted = cast(PreTrainedModel, get_peft_model(model, settings))
    except ValueError as error:
        raise UserError(f"{_option(config)}: {one_line(error)}") from error
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and name in useless:
            raise UserError(f"{_option(config)}: an adapter on {name} is of no use: {useless[name]}. Leave it out")
    return adapted


def _option(config: DistillConfig) -> str:
    if config.lora_target_modules is None:
        return f"--lora_r {config.lora_r}"
    return f"--lora_target_modules {' '.join(config.lora_target_modules)}"


def _linear_layers(model: PreTrainedModel) -> list[str]:
    """Lists the names of a model's linear layers but the output projection."""
    head = model.get_output_embeddings()
    return [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]


def _useless_adapters(model: PreTrainedModel) -> dict[str, str]:
    """Finds linear layers to which an adapter adds nothing, or something that does not fit, each with the reason."""
    found = {}
    for name in _linear_layers(model):
        module = model.get_submodule(name)
        parent, _, child = name.rpartition(".")
        if _reads_weight(model.get_submodule(parent), child):
            found[name] = "the layer around it takes its weight, past any adapter"
        elif type(module).forward not in (nn.Linear.forward, Conv1D.forward) and not _gives_one_tensor(module):
            found[name] = "it gives something else than a linear map does"
    return found


def _reads_weight(parent: nn.Module, child: str) -> bool:
    """Tells whether a module computes with a child's weight, as Mamba's mixers do, rather than call the child."""
    try:
        source = inspect.getsource(type(parent))
    except (OSError, TypeError):
        return False
    # Bloom's slices of a weight imitate how it was pretrained on several devices, only where its config says so.
    return re.search(rf"\bself\.{re.escape(child)}\.weight\b(?!\.(?:dtype|device|shape)|\[)", source) is not None


@torch.no_grad()
def _gives_one_tensor(module: Any) -> bool:
    """Tells whether a linear layer of another class gives one vector for each input; a router also gives choices."""
    dtype = module.weight.dtype if module.weight.is_floating_point() else torch.float32
    inputs = torch.zeros(1, 2, module.in_features, dtype=dtype, device=module.weight.device)
    try:
        output = module(inputs)
    except Exception:  # whatever a class does with them
        return False
    return isinstance(output, Tensor) and output.shape == (1, 2, module.out_features)


def load_adapter(base: PreTrainedModel, name: str) -> PreTrainedModel:
    """Put the adapter of a folder or Hub name on its base model, to be trained. Raises UserError if it does not load."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise UserError(EXTENSION) from error
    try:
        adapted = PeftModel.from_pretrained(base, name, is_trainable=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{name}: the adapter does not load on {base.name_or_path}: {one_line(error)}") from error
    return cast(PreTrainedModel, adapted)


def describe_adapters(model: Any) -> str:
    """Describe the adapters of a model in words."""
    settings = model.active_peft_config
    trained, total = model.get_nb_trainable_parameters()
    kind = settings.peft_type.value
    if kind == "LORA":
        kind = f"{'DoRA' if settings.use_dora else 'LoRA'} of rank {settings.r}, alpha {settings.lora_alpha}"
    return f"{kind}: {trained:,} of {total:,} parameters are trained"

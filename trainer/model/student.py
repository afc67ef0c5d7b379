"""The student: loading it, and calling it for logits where the cache has targets."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from logitcache import LogitCache, UserError
from logitcache.attention import choose_attention
from logitcache.errors import one_line
from trainer.model.adapters import base_model, load_adapter

logger = logging.getLogger(__name__)

NO_CODE: dict[str, Any] = {"trust_remote_code": False}
"""For every `from_pretrained`: code that lies beside a model never runs, and nobody is asked whether it may."""


def why_not_loaded(error: Exception) -> str:
    """Say why `from_pretrained` failed, without advice of its own that does not help here."""
    if "trust_remote_code" in str(error):
        return "it needs code of its own, which is never run here: take one of a kind that transformers knows"
    return one_line(error) or type(error).__name__


def student_config(name: str) -> PretrainedConfig:
    """Load the configuration of a model, given by folder or Hub name. For an adapter: that of its base model.

    If the attention that transformers chooses would leave out a part of the configuration, another one is set in it.

    Raises:
        UserError: there is no model of this name, or it is no causal language model.
    """
    base = base_model(name)
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(base or name, **NO_CODE)
    except Exception as error:  # of whatever kind the file leads to
        hint = "" if Path(base or name).exists() else " (no such folder here)"
        of = f" is an adapter of {base}, and" if base else ":"
        raise UserError(f"{name}{of} no model can be loaded from this{hint}: {why_not_loaded(error)}") from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{name}: a {config.model_type} is no causal language model that transformers knows")
    if attention := choose_attention(config, None, "--attn_implementation"):
        config._attn_implementation = attention
    return config


def check_student(config: PretrainedConfig, cache: LogitCache, name: str) -> None:
    """Raises UserError for a student that cannot learn from a cache.

    Such a student has fewer logits than the teacher has tokens, cannot take the cache's longest sequence, or has an
    attention that leaves out a part of its configuration.
    """
    choose_attention(config, getattr(config, "_attn_implementation", None), "--attn_implementation")
    text_config = config.get_text_config()
    columns, max_length = text_config.vocab_size, getattr(text_config, "max_position_embeddings", None)
    if columns < cache.vocab_size:
        raise UserError(
            f"{name}: its output has {columns} columns, the teacher of the cache {cache.path} has {cache.vocab_size} "
            "tokens. Take a student with at least as many (more are masked)"
        )
    if max_length is not None and cache.manifest.longest > max_length:
        raise UserError(
            f"{name}: the longest sequence of {cache.path} has {cache.manifest.longest} tokens, the student takes "
            f"{max_length} (max_position_embeddings). Build the cache with `logitcache build --max-length {max_length}`"
        )


def lengths_of_one_rotation(config: PretrainedConfig) -> int | None:
    """Return the length up to which a sequence's rotary embedding is the same in any batch; None if there is no limit.

    Beyond it, longrope and dynamic NTK choose the frequencies of all sequences of a batch by the longest sequence.
    """
    text: Any = config.get_text_config()
    rotations = getattr(text, "rope_parameters", None) or {}
    limits = []
    for rotation in [rotations, *rotations.values()]:  # one for all layers, or one for each type of layer
        kind = rotation.get("rope_type") if isinstance(rotation, dict) else None
        if kind == "longrope":
            limits.append(rotation["original_max_position_embeddings"])
        elif kind == "dynamic":
            limits.append(text.max_position_embeddings)
    return min(limits, default=None)


def warn_of_rotation(model: PreTrainedModel, longest: int, what_is_done: str, remedy: str) -> None:
    """Warn if a batch rotates its shorter sequences like its longest one, of `longest` tokens.

    The warning says `what_is_done` to the sequences ("trained" or "measured") and names the option that is the remedy.
    """
    rotated = lengths_of_one_rotation(model.config)
    if rotated is not None and longest > rotated:
        logger.warning(
            "%s rotates all sequences of a batch otherwise where one of them has more than %d tokens (the longest has "
            "%d): shorter ones are not %s as they are alone. %s avoids that",
            type(model).__name__,
            rotated,
            longest,
            what_is_done,
            remedy,
        )


def load_student(
    name: str, config: PretrainedConfig, *, from_scratch: bool, dtype: torch.dtype | str
) -> PreTrainedModel:
    """Load the student's weights, with the adapter if `name` is one, or draw them from torch's generator.

    Args:
        name: a folder or a Hub name, of a model or of an adapter.
        config: the configuration, see `student_config`.
        from_scratch: draw the weights.
        dtype: of the weights, or "auto"; the weights of an adapter are float32 above half precision.

    Raises:
        UserError: the weights do not load.
    """
    base = base_model(name)
    try:
        if from_scratch:
            drawn: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, **NO_CODE)
            return drawn
        model = AutoModelForCausalLM.from_pretrained(base or name, config=config, dtype=dtype, **NO_CODE)
    except Exception as error:  # of whatever kind the files lead to
        attention = getattr(config, "_attn_implementation", None)
        if attention and ("attn_implementation" in str(error) or "flash" in str(error).lower()):
            raise UserError(
                f"--attn_implementation {attention}: {one_line(error)}. Take sdpa, or install what it needs "
                "(flash_attention_2: `pip install flash-attn`)"
            ) from error
        hint = "" if from_scratch else " (--from_scratch draws them at random)"
        raise UserError(f"{base or name}: the weights do not load: {one_line(error)}{hint}") from error
    return load_adapter(model, name) if base else model


def num_parameters(model: nn.Module) -> int:
    """Count the parameters of the whole model, also under DeepSpeed ZeRO-3."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())


def takes_logits_to_keep(model: PreTrainedModel) -> bool:
    """Tell whether a model that nothing wraps yet can compute the logits of chosen columns only, so never those of prompts."""
    return "logits_to_keep" in inspect.signature(type(unwrapped(model)).forward).parameters


def unwrapped(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model inside PEFT's wrapper, or the model itself."""
    wrapped: Any = model
    inner: PreTrainedModel = wrapped.get_base_model() if hasattr(wrapped, "get_base_model") else wrapped
    return inner

"""A model's output projection: its linear maps, and the model's transform of the logits, measured by a probe."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from trainer.losses.fused import Projection
from trainer.losses.transform import LogitTransform
from trainer.model.student import takes_logits_to_keep

# The probe's values in place of logits: so small that a tanh is straight, between, and so large that it is flat.
RAMP = (2.0**-10, 1.0, 8.0, 64.0, 2.0**15)
TOLERANCE, HALF_TOLERANCE = 1e-3, 2e-2  # relative to the largest logit


class NoProjectionError(Exception):
    """The logits of a model are not known to be those of a linear projection; the message says why."""


@dataclass(frozen=True)
class Head:
    """The module that makes a model's logits, and their transform. keeps: whether the model takes `logits_to_keep`."""

    module: nn.Module
    transform: LogitTransform
    keeps: bool


def find_head(model: PreTrainedModel) -> Head:
    """Find the output projection of a model that nothing wraps, and verify it by two forward passes over three tokens.

    Modes, gradients and random numbers are as before. Raises NoProjectionError if the logits may be other than those of a
    linear projection.
    """
    if is_deepspeed_zero3_enabled():
        raise NoProjectionError("DeepSpeed ZeRO-3 shards its output projection")
    module = model.get_output_embeddings()
    if module is None:
        raise NoProjectionError("it names no output projection (get_output_embeddings)")
    keeps = takes_logits_to_keep(model)
    with as_in_evaluation(model):
        raw, logits = _look(model, module, keeps)
        transform = _measure(model, module, keeps)
    half = any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in module.parameters())
    half |= torch.is_autocast_enabled(raw.device.type)
    difference = (transform.apply(raw) - logits.flatten(0, 1)).abs().max()
    if difference > (HALF_TOLERANCE if half else TOLERANCE) * logits.abs().max():
        raise NoProjectionError("its logits are no linear projection of hidden states, scaled and capped")
    return Head(module, transform, keeps)


def project(module: nn.Module, hidden: Tensor, transform: LogitTransform) -> Projection:
    """Return a head's logits of hidden states [N, D] as a Projection, with the parameters as they are now.

    module: an nn.Linear, alone, in PEFT's ModulesToSaveWrapper or in a LoRA layer, which adds the map (scaled A·h, B).
    Raises NoProjectionError if it is anything else.
    """
    linear, adapted = _parts(module, hidden)
    known = type(linear).forward is nn.Linear.forward and linear.weight.is_floating_point()
    if not known or hasattr(module, "_hf_hook") or hasattr(linear, "_hf_hook"):
        hooked = " placed by a device map" if known else ""
        raise NoProjectionError(f"its output projection is a {type(linear).__name__}{hooked}, no plain nn.Linear")
    return Projection([(hidden, linear.weight), *adapted], linear.bias, transform)


def _parts(module: Any, hidden: Tensor) -> tuple[Any, list[tuple[Tensor, Tensor]]]:
    """Find the linear layer behind PEFT's wrappers, and the maps that active LoRA adapters add to it."""
    if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
        active = [] if module.disable_adapters else module.active_adapters
        return (module.modules_to_save[active[0]] if active else module.original_module), []
    if not (hasattr(module, "lora_A") and hasattr(module, "base_layer")):
        return module, []
    if module.merged or module.lora_variant or any(layer.bias is not None for layer in module.lora_B.values()):
        raise NoProjectionError(
            "its output projection has a LoRA adapter that is merged, has a bias or is of a variant"
        )
    adapted = []
    for name in [] if module.disable_adapters else module.active_adapters:
        if name in module.lora_A:
            inner = module.lora_A[name](module.lora_dropout[name](hidden.to(module.lora_A[name].weight.dtype)))
            adapted.append((inner * module.scaling[name], module.lora_B[name].weight))
    return module.base_layer, adapted


@torch.no_grad()
def _look(model: PreTrainedModel, module: nn.Module, keeps: bool) -> tuple[Tensor, Tensor]:
    """Compute the projection [C, V] of the hidden states that reach the head, and the model's logits [1, C, V]."""
    original = module.forward
    raw_logits: list[Tensor] = []

    def forward(hidden: Tensor) -> Tensor:
        raw_logits.append(_raw_logits(project(module, hidden.flatten(0, -2), LogitTransform())))
        output: Tensor = original(hidden)
        return output

    with replaced_attribute(module, "forward", forward):
        logits = _probe(model, keeps)
    if len(raw_logits) != 1 or raw_logits[0].shape != logits.shape[1:]:
        raise NoProjectionError("its output projection is not called once, with the hidden states of the positions")
    return raw_logits[0], logits


def _measure(model: PreTrainedModel, module: nn.Module, keeps: bool) -> LogitTransform:
    """Measure the model's transform of its logits by a ramp that the head returns."""
    ramp = torch.tensor(RAMP, device=next(module.parameters()).device)
    with torch.enable_grad(), replaced_attribute(module, "forward", lambda hidden: ramp.reshape(1, 1, -1)):
        found = _probe(model, keeps)
    if found.requires_grad:
        raise NoProjectionError("parameters act on its logits after the output projection")
    if found.shape != (1, 1, len(RAMP)):
        raise NoProjectionError("it changes the shape of its logits after the output projection")
    values = found.flatten().double()
    scale = float(values[0]) / RAMP[0]
    scale = 1.0 if abs(scale - 1) < 1e-6 else scale
    transform = LogitTransform(scale, float(values[-1]) if values[-1] < scale * RAMP[-1] / 2 else None)
    if not (scale > 0 and torch.allclose(transform.apply(ramp.double()), values, rtol=1e-4, atol=0)):
        raise NoProjectionError("what it does to its logits after the output projection is no scale and no tanh cap")
    return transform


def _probe(model: PreTrainedModel, keeps: bool) -> Tensor:
    """Compute the logits of three tokens, or of the first and the last of them if the model keeps columns."""
    tokens = torch.arange(3, device=model.device)
    inputs = {"input_ids": tokens[None], "attention_mask": torch.ones_like(tokens)[None]}
    try:
        logits: Tensor = model(**inputs, **({"logits_to_keep": tokens[::2]} if keeps else {})).logits
        return logits
    except NoProjectionError:
        raise
    except Exception as error:  # whatever an architecture does
        raise NoProjectionError(f"a forward pass over three tokens fails ({type(error).__name__}: {error})") from error


def _raw_logits(projection: Projection) -> Tensor:
    parts = []
    for hidden, weight in projection.maps:
        dtype = torch.promote_types(hidden.dtype, weight.dtype)
        parts.append(nn.functional.linear(hidden.to(dtype), weight.to(dtype)))
    raw = torch.stack(parts).sum(0)
    return raw if projection.bias is None else raw + projection.bias


@contextmanager
def replaced_attribute(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Give a module another attribute, such as a forward inside whatever hooks it has, while the block runs."""
    attributes = vars(module)
    before = attributes.get(name)
    attributes[name] = value
    try:
        yield
    finally:
        if before is None:
            del attributes[name]
        else:
            attributes[name] = before


@contextmanager
def as_in_evaluation(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode while the block runs; modes and random numbers are as before afterwards."""
    training = [module for module in model.modules() if module.training]
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True

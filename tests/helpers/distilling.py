"""Runs of DistillTrainer in tests, and the gradients that they take."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, TrainerCallback

from tests.helpers.cachemaking import llama
from trainer.config.config import DistillConfig

Gradient = dict[str, Tensor]


def config(folder: Path, **settings: Any) -> DistillConfig:
    defaults: dict[str, Any] = {"use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "max_grad_norm": 0.0}
    return DistillConfig(output_dir=str(folder), **(defaults | settings))


class CatchGradient(TrainerCallback):
    """Keeps the gradient of the first optimizer step."""

    def __init__(self) -> None:
        self.gradient: Gradient = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.gradient = self.gradient or {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def relative_difference(left: Gradient, right: Gradient) -> float:
    assert left.keys() == right.keys()
    difference = math.sqrt(sum(float((left[n] - right[n]).double().square().sum()) for n in left))
    return difference / math.sqrt(sum(float(g.double().square().sum()) for g in left.values()))


@torch.no_grad()
def near_teacher(scale: float = 0.1) -> LlamaForCausalLM:
    """The teacher of `cachemaking.write_cache` with noise in its weights."""
    student = llama()
    torch.manual_seed(9)
    for parameter in student.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=scale)
    return student


class NotUnderstood(LlamaForCausalLM):
    """Its logits are of no architecture that is known, and those of `llama`."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits.expm1().log1p()
        return output


def not_understood() -> LlamaForCausalLM:
    student: LlamaForCausalLM = NotUnderstood(llama().config)
    student.eval()
    student.load_state_dict(llama(seed=7).state_dict())
    return student

"""Students of architectures whose output projections differ, and their loss."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.helpers.cachemaking import TINY, VOCAB
from trainer.data.collator import Batch
from trainer.losses.fused import Mixture
from trainer.losses.settings import LossSettings
from trainer.losses.terms import DistillationTerms
from trainer.model.head import find_head
from trainer.model.objective import FusedObjective, Objective

SIZES = TINY | {"max_position_embeddings": 64}


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": SIZES,
    "Qwen2": SIZES | {"tie_word_embeddings": True},
    "Qwen3": SIZES | {"head_dim": 16},
    "Gemma2": SIZES | {"head_dim": 16, "final_logit_softcapping": 2.0},
    "Cohere": SIZES | {"logit_scale": 0.3},
    "Granite": SIZES | {"logits_scaling": 7.0},
    "HyperCLOVAX": SIZES | {"logits_scaling": 3.0},
    "Phi": SIZES,  # a bias
    "GPT2": {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    | {"bos_token_id": None, "eos_token_id": 0, "initializer_range": 0.3},
    "GPTNeoX": SIZES,
}


def model_of(name: str, **settings: Any) -> PreTrainedModel:
    torch.manual_seed(7)
    config = getattr(transformers, f"{name}Config")(**(ARCHITECTURES[name] | settings))
    model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.eval()
    head: Any = model.get_output_embeddings()
    if head.bias is not None:
        nn.init.normal_(head.bias)
    return model


def call(
    objective: Objective, model: nn.Module, batch: Batch, temperature: float = 1.0, loss: str = "todi"
) -> tuple[Tensor, DistillationTerms]:
    return objective(
        model,
        batch,
        batch.targets_at(temperature),
        mixture=Mixture(0.7, 0.3),
        settings=LossSettings(loss, temperature=temperature),
        vocab_size=VOCAB,
        validate=True,
    )


def fused(model: PreTrainedModel) -> FusedObjective:
    return FusedObjective(model, find_head(model))

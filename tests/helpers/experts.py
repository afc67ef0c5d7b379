"""Students that are mixtures of experts."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from logitcache import CachedSequence
from tests.helpers.cachemaking import TINY, VOCAB

SIZES: dict[str, Any] = TINY | {
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "head_dim": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "use_cache": False,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.5,
}


LINEAR: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}


MAMBA: dict[str, Any] = {"mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1}


JAMBA: dict[str, Any] = {
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "mamba_d_state": 8,
    "mamba_dt_rank": 4,
}


DBRX: dict[str, Any] = {
    "d_model": 32,
    "n_heads": 2,
    "n_layers": 2,
    "max_seq_len": 256,
    "ffn_config": {"ffn_hidden_size": 24, "hidden_size": 32, "moe_num_experts": 4, "moe_loss_weight": 0.5},
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
}


EXPERTS: dict[str, dict[str, Any]] = {
    "Mixtral": SIZES,
    "Qwen2Moe": SIZES,
    "Qwen3Moe": SIZES,
    "Olmoe": SIZES,
    "GptOss": SIZES,
    "Phimoe": SIZES | {"router_jitter_noise": 0.0, "input_jitter_noise": 0.0},
    "GraniteMoe": SIZES,
    "JetMoe": SIZES | {"kv_channels": 16, "aux_loss_coef": 0.5},
    "Ernie4_5_Moe": SIZES | {"moe_num_experts": 4, "moe_k": 2},
    "Jamba": SIZES | JAMBA,
    "Qwen3Next": SIZES | LINEAR | {"layer_types": ["linear_attention", "full_attention"]},
    "GraniteMoeHybrid": SIZES | MAMBA | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 32},
    "Dbrx": {"vocab_size": VOCAB, "use_cache": False, "output_router_logits": True} | DBRX,
}


def model_of(name: str, settings: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(3)
    model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, f"{name}Config")(**settings)
    )
    model.float()
    return model


def labelled(sequences: list[CachedSequence]) -> dict[str, Tensor]:
    """The batch of hard labels that a user of transformers makes of sequences and their masks."""
    longest = max(len(sequence.input_ids) for sequence in sequences)
    ids, mask, labels = (np.full((len(sequences), longest), fill, dtype=np.int64) for fill in (0, 0, -100))
    for row, sequence in enumerate(sequences):
        length = len(sequence.input_ids)
        ids[row, :length], mask[row, :length] = sequence.input_ids, 1
        labels[row, sequence.positions + 1] = sequence.input_ids[sequence.positions + 1]
    return {
        name: torch.from_numpy(array)
        for name, array in (("input_ids", ids), ("attention_mask", mask), ("labels", labels))
    }

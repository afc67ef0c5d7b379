"""Does a model keep packed sequences apart?"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from logitcache import CachedSequence, SparseTargets, UserError
from logitcache.errors import one_line
from trainer.data.collator import Collator
from trainer.student import model_inputs

PROBE = (np.array([5, 3, 4]), np.array([0, 0, 1]))
"""Lengths of the probe's sequences and their packed rows: two neighbours, and one beside padding."""
TOLERANCE, HALF_TOLERANCE = 1e-2, 0.1
"""Of the largest logit: what kernels and layers in half precision add up to. Mixed sequences differ by about all of it."""
KEEP_APART = ("eager", "sdpa", "flex_attention")
"""Attention implementations for which transformers masks packed sequences from position ids alone."""


def check_packing(model: PreTrainedModel, flat: bool) -> None:
    """Packs three short sequences and compares their logits with those of each alone.

    model: before anything wraps it; its modes are as before.  flat: as in Collator.  Raises UserError where the logits
    differ, in evaluation mode and without a cache of keys and values, as in training.
    """
    if is_deepspeed_zero3_enabled():
        raise UserError(
            "--packing under DeepSpeed ZeRO-3: the weights lie in pieces, so nothing shows that the student keeps "
            "packed sequences apart. Take ZeRO-2 or FSDP, or leave --packing out"
        )
    training = [module for module in model.modules() if module.training]
    use_cache = getattr(model.config, "use_cache", None)
    model.config.use_cache = False
    model.eval()
    try:
        seen = _difference(model, flat)
    finally:
        model.config.use_cache = use_cache
        for module in training:
            module.training = True
    if seen:
        raise UserError(f"--packing: {type(model).__name__} with {_attention(model)} {seen}. {_advice(model)}")


@torch.no_grad()
def _difference(model: PreTrainedModel, flat: bool) -> str:
    """What is wrong with the logits of packed sequences; nothing if they are those of each alone."""
    lengths, packed_rows = PROBE
    ids = np.linspace(0, model.config.get_text_config().vocab_size - 1, lengths.sum()).astype(np.int32)
    sequences = [_without_targets(part) for part in np.split(ids, np.cumsum(lengths)[:-1])]
    try:
        alone = torch.cat([_logits(model, Collator(), [sequence]) for sequence in sequences])
        packed = _logits(model, Collator(flat=flat), sequences, packed_rows)[: len(alone)]
    except Exception as error:  # whatever an architecture does
        return f"fails on packed sequences ({one_line(error)})"
    half = alone.dtype in (torch.float16, torch.bfloat16)
    difference, largest = (float(values.abs().max()) for values in (packed.float() - alone.float(), alone))
    if difference <= (HALF_TOLERANCE if half else TOLERANCE) * largest:
        return ""
    return (
        "does not keep packed sequences apart: packed behind another one, a sequence's logits differ by up to "
        f"{difference:.2g} from those it has alone (the largest is {largest:.2g})"
    )


def _logits(
    model: PreTrainedModel, collator: Collator, sequences: list[CachedSequence], packed_rows: np.ndarray | None = None
) -> Tensor:
    """Logits of all tokens and padding, row after row, [B·T, V]."""
    batch = {name: tensor.to(model.device) for name, tensor in collator(sequences, packed_rows).items()}
    logits: Tensor = model(**model_inputs(batch, keeps=False)).logits
    return logits.flatten(0, 1)


def _without_targets(input_ids: np.ndarray) -> CachedSequence:
    none = np.empty(0, dtype=np.float32)
    targets = SparseTargets(np.empty((0, 1), dtype=np.int32), none[:, None], none)
    return CachedSequence("", input_ids, np.zeros(len(input_ids), dtype=bool), none.astype(np.int32), targets)


def _attention(model: PreTrainedModel) -> str:
    implementation = getattr(model.config, "_attn_implementation", None)
    return f"the attention implementation {implementation}" if implementation else "no attention implementation"


def _advice(model: PreTrainedModel) -> str:
    if getattr(model.config, "_attn_implementation", None) in KEEP_APART:
        return "Leave --packing out: --train_sampling_strategy group_by_length saves padding for any student"
    return (
        "Take --attn_implementation sdpa, or flash_attention_2 (`pip install flash-attn`), or leave --packing out: "
        "--train_sampling_strategy group_by_length saves padding for any student"
    )

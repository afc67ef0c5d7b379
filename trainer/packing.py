"""Does a model keep packed sequences apart?"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from logitcache import CachedSequence, SparseTargets, UserError
from logitcache.errors import one_line
from trainer.data.collator import Collator
from trainer.student import model_inputs

PROBE = (np.array([5, 3, 4]), np.array([0, 0, 1]))
"""Lengths of the probe's sequences and their packed rows: two neighbours, and one beside padding."""
TOLERANCE, HALF_TOLERANCE = 1e-2, 0.1
"""Of the largest logit: what kernels and layers in half precision add up to. Wrong positions differ by more."""
KEEP_APART = ("eager", "sdpa", "flex_attention")
"""Attention implementations for which transformers masks packed sequences from position ids alone."""


def check_packing(model: PreTrainedModel, flat: bool) -> None:
    """Packs three short sequences: no logit may depend on another sequence's tokens, and all must be those of each alone.

    model: before anything wraps it; its modes are as before.  flat: as in Collator.  Raises UserError where it mixes
    sequences or counts their positions otherwise, in evaluation mode and without a cache of keys and values, as in
    training.
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
        with _precision(model, flat):
            seen = _defect(model, flat)
    finally:
        model.config.use_cache = use_cache
        for module in training:
            module.training = True
    if seen:
        raise UserError(f"--packing: {type(model).__name__} with {_attention(model)} {seen}. {_advice(model)}")


def _precision(model: PreTrainedModel, flat: bool) -> AbstractContextManager[Any]:
    """Single precision where the weights have it, for a close comparison. Flash attention knows half precision only."""
    if flat or any(weight.dtype != torch.float32 for weight in model.parameters() if weight.is_floating_point()):
        return nullcontext()
    return torch.autocast(model.device.type, enabled=False)


def _defect(model: PreTrainedModel, flat: bool) -> str:
    """What is wrong with the logits of packed sequences; nothing if they are those of each alone."""
    lengths, packed_rows = PROBE
    ids = np.linspace(0, model.config.get_text_config().vocab_size - 1, lengths.sum()).astype(np.int32)
    sequences = [_without_targets(part) for part in np.split(ids, np.cumsum(lengths)[:-1])]
    collator = Collator(flat=flat)
    try:
        if _mixes(model, collator, sequences, packed_rows):
            return "does not keep packed sequences apart: a sequence's logits depend on the tokens packed before it"
        with torch.no_grad():
            alone = torch.cat([_logits(model, Collator(), [sequence]) for sequence in sequences])
            packed = _logits(model, collator, sequences, packed_rows)[: len(alone)]
    except Exception as error:  # whatever an architecture does
        return f"fails on packed sequences ({one_line(error)})"
    half = alone.dtype in (torch.float16, torch.bfloat16)
    difference, largest = (float(values.abs().max()) for values in (packed.float() - alone.float(), alone))
    if difference <= (HALF_TOLERANCE if half else TOLERANCE) * largest:
        return ""
    return (
        "does not count the positions of packed sequences anew: packed behind another one, a sequence's logits differ "
        f"by up to {difference:.2g} from those it has alone (the largest is {largest:.2g})"
    )


def _mixes(
    model: PreTrainedModel, collator: Collator, sequences: list[CachedSequence], packed_rows: np.ndarray
) -> bool:
    """Whether the logits of later sequences have a gradient in the first one's embeddings.

    Where sequences are kept apart it is 0 to the bit in any precision, since a masked position has probability 0. Their
    values would tell less: with other tokens before them, those of a mixture of experts change by rounding, as each
    expert gets other numbers of tokens, and those of a freshly initialised convolution hardly change by more.
    """
    embedded: list[Tensor] = []

    def watch(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    first = len(sequences[0].input_ids)
    hook = model.get_input_embeddings().register_forward_hook(watch)
    try:
        with torch.enable_grad():
            logits = _logits(model, collator, sequences, packed_rows)
            later = logits[first : sum(len(sequence.input_ids) for sequence in sequences)]
            (gradient,) = torch.autograd.grad(later.float().square().sum(), embedded[:1])
    finally:
        hook.remove()
    return bool((gradient.flatten(0, 1)[:first] != 0).any())  # NaN is not 0 either


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

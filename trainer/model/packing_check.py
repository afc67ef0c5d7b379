"""Checks whether a model keeps packed sequences apart."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from logitcache import CachedSequence, SparseTargets, UserError
from logitcache.errors import one_line
from trainer.data.collator import Collator
from trainer.model.head import as_in_evaluation
from trainer.model.student import lengths_of_one_rotation, takes_logits_to_keep

logger = logging.getLogger(__name__)

PROBE = (np.array([5, 3, 4]), np.array([0, 0, 1]))
"""Lengths of the short probe's sequences and their bins: two neighbours, and one beside padding."""
FIRST_LENGTH = 3
"""Of the long probe's first sequence, which moves the others away from the columns that they have alone."""
COMPARED_LOGITS = 2**26
"""Logits of the long probe that exist at once, 256 MiB."""
TOLERANCE, HALF_TOLERANCE = 1e-2, 0.1
"""Of the largest logit: the rounding of kernels and layers in half precision. Wrong positions differ by more."""
KEEP_APART = ("eager", "sdpa", "flex_attention")
"""Attention implementations for which transformers masks packed sequences from position ids alone."""
SAVE_PADDING = "--train_sampling_strategy group_by_length saves padding for any student"


def check_packing(
    model: PreTrainedModel, flat: bool, *, row_length: int, longest: int, device: torch.device | None = None
) -> None:
    """Pack sequences and compare: no logit may depend on another sequence's tokens, and all must be as for each alone.

    First three short sequences, then a row as long as those of the run. The effect of a token's column far from the first
    is looked up in the configuration as well, since half precision could hide it from a comparison.

    Args:
        model: before anything wraps it; its modes are as before.
        flat: as in Collator.
        row_length: tokens of the longest packed row.
        longest: tokens of the longest sequence.
        device: of the training; if the model does not lie there yet, the long row is left out.

    Raises:
        UserError: the model mixes sequences or counts their positions otherwise, without a cache of keys and values.
    """
    if is_deepspeed_zero3_enabled():
        raise UserError(
            "--packing under DeepSpeed ZeRO-3: the weights lie in pieces, so nothing shows that the student keeps "
            "packed sequences apart. Take ZeRO-2 or FSDP, or leave --packing out"
        )
    _check_lengths(model, row_length, longest)
    use_cache = getattr(model.config, "use_cache", None)
    model.config.use_cache = False
    try:
        with as_in_evaluation(model), _precision(model, flat):
            seen = _defect(model, flat)
            if not seen and device is not None and device.type != model.device.type:
                logger.warning("--packing: only short rows were checked, as the student does not lie on its GPU yet")
            elif not seen and row_length > PROBE[0].sum():
                seen = _long_defect(model, flat, row_length, longest)
    finally:
        model.config.use_cache = use_cache
    if seen:
        attention = getattr(model.config, "_attn_implementation", None)
        which = f"the attention implementation {attention}" if attention else "no attention implementation"
        other = "Take --attn_implementation sdpa, or flash_attention_2 (`pip install flash-attn`), or leave"
        leave = "Leave" if attention in KEEP_APART else other
        raise UserError(f"--packing: {type(model).__name__} with {which} {seen}. {leave} --packing out: {SAVE_PADDING}")


def _check_lengths(model: PreTrainedModel, row_length: int, longest: int) -> None:
    """Raises UserError if the configuration treats tokens far into a row otherwise than those of a sequence alone."""
    rotated = lengths_of_one_rotation(model.config)
    if rotated is not None and longest > rotated:
        raise UserError(
            f"--packing: {type(model).__name__} rotates all sequences of a batch otherwise where one of them has more than "
            f"{rotated} tokens (longrope), and the longest has {longest}. Leave --packing out and take "
            f"--per_device_train_batch_size 1, or build the cache with `logitcache build --max-length {rotated}`"
        )
    for limit, what in _column_limits(model.config):
        if row_length > limit:
            take = f"Take --packed_length {limit}, or leave" if longest <= limit else "Leave"
            raise UserError(
                f"--packing: {type(model).__name__} {what}, counted from the begin of a packed row and not of a sequence, "
                f"and a row has up to {row_length} tokens. {take} --packing out: {SAVE_PADDING}"
            )


def _column_limits(config: PretrainedConfig) -> list[tuple[int, str]]:
    """Lists the lengths of rows from which on the column of a token makes a difference, and that difference."""
    text: Any = config.get_text_config()
    limits = []
    chunk = getattr(text, "attention_chunk_size", None)
    if chunk and "chunked_attention" in (getattr(text, "layer_types", None) or ["chunked_attention"]):
        limits.append((chunk, f"cuts its attention every {chunk} tokens (attention_chunk_size)"))
    floor_scale = getattr(text, "floor_scale", None)
    if floor_scale and getattr(text, "attn_temperature_tuning", False):
        limits.append((int(floor_scale) - 1, f"scales its attention anew every {floor_scale} tokens (floor_scale)"))
    return limits


def _precision(model: PreTrainedModel, flat: bool) -> AbstractContextManager[Any]:
    """Turns autocast off for weights in single precision, for a close comparison, but not under flash attention."""
    if flat or any(weight.dtype != torch.float32 for weight in model.parameters() if weight.is_floating_point()):
        return nullcontext()
    return torch.autocast(model.device.type, enabled=False)


def _defect(model: PreTrainedModel, flat: bool) -> str:
    """Says how the logits of packed sequences differ from those of each alone; "" if they do not."""
    lengths, bins = PROBE
    ids = np.linspace(0, model.config.get_text_config().vocab_size - 1, lengths.sum()).astype(np.int32)
    sequences = [_without_targets(part) for part in np.split(ids, np.cumsum(lengths)[:-1])]
    collator = Collator(flat=flat)
    try:
        if _mixes(model, collator, sequences, bins):
            return "does not keep packed sequences apart: a sequence's logits depend on the tokens packed before it"
        with torch.no_grad():
            alone = torch.cat([_logits(model, Collator(), [sequence]) for sequence in sequences])
            packed = _logits(model, collator, sequences, bins)[: len(alone)]
    except Exception as error:  # whatever an architecture does
        return f"fails on packed sequences ({one_line(error)})"
    differs = _difference(packed, alone)
    return differs and f"does not count the positions of packed sequences anew: packed behind another one, {differs}"


@torch.no_grad()
def _long_defect(model: PreTrainedModel, flat: bool, row_length: int, longest: int) -> str:
    """Says how the logits of a whole row of longest sequences differ from those of each alone; "" if they do not.

    It compares some tokens of the first sequences, of one amid the row and of the last ones, in bounded memory.
    """
    vocabulary = model.config.get_text_config().vocab_size
    ends = np.unique([*range(FIRST_LENGTH, row_length, longest), row_length])
    ids = np.random.default_rng(0).integers(0, vocabulary, row_length).astype(np.int32)
    sequences = [_without_targets(part) for part in np.split(ids, ends[:-1])]
    chosen = sorted({i % len(sequences) for i in (0, 1, len(sequences) // 2, -2, -1) if abs(i) <= len(sequences)})
    each = max(COMPARED_LOGITS // (vocabulary * len(chosen)), 2)
    begins = [0, *ends[:-1].tolist()]
    lengths = [len(sequence.input_ids) for sequence in sequences]
    places = {i: np.unique(np.linspace(0, lengths[i] - 1, min(each, lengths[i])).astype(np.int64)) for i in chosen}
    columns = np.concatenate([begins[i] + places[i] for i in chosen])
    try:
        packed = _logits(model, Collator(flat=flat), sequences, np.zeros(len(sequences), dtype=np.int64), columns)
        alone = torch.cat([_logits(model, Collator(), [sequences[i]], columns=places[i]) for i in chosen])
    except Exception as error:  # whatever an architecture does
        return f"fails on a packed row of {row_length} tokens ({one_line(error)})"
    differs = _difference(packed, alone)
    return differs and f"does not treat the tokens of a long row as it does those of a sequence alone: {differs}"


def _difference(packed: Tensor, alone: Tensor) -> str:
    """Says by how much logits differ from those of sequences alone; "" if rounding explains it."""
    half = alone.dtype in (torch.float16, torch.bfloat16)
    difference, largest = (float(values.abs().max()) for values in (packed.float() - alone.float(), alone))
    if difference <= (HALF_TOLERANCE if half else TOLERANCE) * largest:
        return ""
    return (
        f"a sequence's logits differ by up to {difference:.2g} from those it has alone (the largest is {largest:.2g})"
    )


def _mixes(model: PreTrainedModel, collator: Collator, sequences: list[CachedSequence], bins: np.ndarray) -> bool:
    """Tells whether the logits of later sequences have a gradient in the first one's embeddings.

    It is 0 to the bit in any precision if sequences are kept apart, since a masked position has probability 0. Values of
    logits would tell less: with other tokens before them, those of a mixture of experts change by rounding, as each
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
            logits = _logits(model, collator, sequences, bins)
            later = logits[first : sum(len(sequence.input_ids) for sequence in sequences)]
            (gradient,) = torch.autograd.grad(later.float().square().sum(), embedded[:1])
    finally:
        hook.remove()
    return bool((gradient.flatten(0, 1)[:first] != 0).any())  # NaN is not 0 either


def _logits(
    model: PreTrainedModel,
    collator: Collator,
    sequences: list[CachedSequence],
    bins: np.ndarray | None = None,
    columns: np.ndarray | None = None,
) -> Tensor:
    """Computes the logits of all tokens and padding, [B·T, V], or of some columns of one bin."""
    batch = collator(sequences, bins).to(model.device)
    keeps = columns is not None and takes_logits_to_keep(model)
    if columns is not None:
        batch = replace(batch, logits_to_keep=torch.from_numpy(columns).to(model.device))
    logits: Tensor = model(**batch.model_inputs(keep_logits=keeps)).logits
    return (logits if keeps or columns is None else logits[:, batch.logits_to_keep]).flatten(0, 1)


def _without_targets(input_ids: np.ndarray) -> CachedSequence:
    none = np.empty(0, dtype=np.float32)
    targets = SparseTargets(np.empty((0, 1), dtype=np.int32), none[:, None], none)
    return CachedSequence("", input_ids, np.zeros(len(input_ids), dtype=bool), none.astype(np.int32), targets)

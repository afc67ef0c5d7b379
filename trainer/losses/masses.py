"""The student's side: rows of logits → one log mass per outcome, and a gradient of those → one of the logits.

Both directions work in place on a chunk of rows, so that no second [N, V] tensor ever exists. A log mass of an entry
is its logit z_j, that of a part of the tail is the logsumexp a of the logits in it. Hence ∂a/∂z_j = exp(z_j − a), and
with D = ∂L/∂(log masses)

    ∂L/∂z_j = D_j for an entry,   D_a · exp(z_j − a) for a token of the tail.

For a divergence with slope u over q = softmax(log masses), D = u − q·Σu. Nothing here divides by a student mass, so
a tail that the student leaves all but empty is as exact as any other.
"""

from math import inf

import torch
from torch import Tensor

# Chunks of 4 MB stay in a CPU's cache; on an accelerator 64 MB make the kernels long enough to hide their launches.
CHUNK_ELEMENTS_CPU = 2**20
CHUNK_ELEMENTS_ACCELERATOR = 2**24


def row_chunks(logits: Tensor) -> list[slice]:
    """Cut the rows of logits [N, V] into chunks of bounded size."""
    elements = CHUNK_ELEMENTS_CPU if logits.device.type == "cpu" else CHUNK_ELEMENTS_ACCELERATOR
    rows = max(1, elements // max(1, logits.shape[1]))
    return [slice(start, min(start + rows, len(logits))) for start in range(0, len(logits), rows)]


def log_masses_(
    chunk: Tensor, token_ids: Tensor, stored: Tensor, tail_groups: Tensor | None, num_groups: int
) -> tuple[Tensor, Tensor]:
    """Log mass of every outcome, up to the row's normaliser, [n, k + G], and the largest tail logit [n].

    chunk [n, V] floating, overwritten. token_ids [n, k] int64, stored [n, k] bool. tail_groups [V] int64, or None for
    a single group. A group without a token outside the entries has −inf.
    """
    entries = chunk.gather(1, token_ids.clamp_min(0)).masked_fill_(~stored, -inf)
    _hide_entries_(chunk, token_ids, stored)
    if tail_groups is None:
        largest = chunk.amax(1, keepdim=True)
        shift = _finite(largest)
        tail = chunk.sub_(shift).exp_().sum(1, keepdim=True).log_().add_(shift)
    else:
        index = tail_groups.expand_as(chunk)
        largest = chunk.new_full((len(chunk), num_groups), -inf).scatter_reduce_(1, index, chunk, "amax")
        shift = _finite(largest)
        chunk.sub_(shift.index_select(1, tail_groups)).exp_()
        tail = torch.zeros_like(largest).scatter_add_(1, index, chunk).log_().add_(shift)
    return torch.cat([entries, tail], dim=1), largest.amax(1)


def spread_gradient_(
    chunk: Tensor,
    token_ids: Tensor,
    stored: Tensor,
    tail_groups: Tensor | None,
    tail_log_masses: Tensor,
    outcome_grad: Tensor,
) -> None:
    """Overwrite a chunk of logits [n, V] with the gradient in them, given D = `outcome_grad` [n, k + G].

    tail_log_masses [n, G] as `log_masses_` returned them; D is exactly 0 where an entry is padding.
    """
    k = token_ids.shape[1]
    shift, weight = _finite(tail_log_masses), outcome_grad[:, k:]
    if tail_groups is not None:
        shift, weight = shift.index_select(1, tail_groups), weight.index_select(1, tail_groups)
    _hide_entries_(chunk, token_ids, stored)
    chunk.sub_(shift).exp_().mul_(weight)
    chunk.scatter_add_(1, token_ids.clamp_min(0), outcome_grad[:, :k])


def _hide_entries_(chunk: Tensor, token_ids: Tensor, stored: Tensor) -> None:
    """Set the logits of the entries to −inf. Padding adds 0 to token 0, which may itself be an entry."""
    minus_inf = torch.zeros_like(stored, dtype=chunk.dtype).masked_fill_(stored, -inf)
    chunk.scatter_add_(1, token_ids.clamp_min(0), minus_inf)


def _finite(log_mass: Tensor) -> Tensor:
    """Replace the −inf of an empty group, whose tokens all are −inf too, so that −inf − (−inf) never arises."""
    return log_mass.masked_fill(log_mass == -inf, 0.0)

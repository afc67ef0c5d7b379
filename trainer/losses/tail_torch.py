"""The tail of a block of logits: its log masses, and then its gradient in the same memory. See blocks.py for the rest.

With a = the logsumexp of the logits in a part of the tail, ∂a/∂z_j = exp(z_j − a), so a weight w on a gives the token
j the gradient w·exp(z_j − a). The exponentials of the first step are kept in place for the second, and nothing divides
by a student mass: a tail that the student leaves all but empty is as exact as any other.
"""

from collections.abc import Sequence
from math import inf

import torch
from torch import Tensor

from trainer.losses.transform import LogitTransform

UNDERFLOW = 1e-30  # share of the tail below which float32 exponentials, taken at one shift per row, lose a group


class TorchTail:
    """A TailBackend in plain torch, for any device. `tail_triton.TritonTail` is the same for CUDA."""

    def __init__(
        self,
        block: Tensor,
        transform: LogitTransform,
        temperatures: tuple[float, ...],
        tail_groups: Tensor | None,
        num_groups: int,
    ) -> None:
        """Take the log masses, as blocks.TailFactory says."""
        self._block, self._transform, self._tail_groups = block, transform, tail_groups
        logits = transform.apply(block.to(torch.promote_types(block.dtype, torch.float32)))
        self._slope = transform.slope(logits)
        if transform.softcap is not None:
            logits = logits.masked_fill(block == -inf, -inf)
        self.largest = logits.amax(1)
        self.log_masses: list[Tensor] = []
        self._exponentials: list[Tensor] = []
        self._shifts: list[Tensor] = []
        for index, temperature in enumerate(temperatures):
            last = index == len(temperatures) - 1
            tempered = logits if temperature == 1.0 else logits / temperature
            scratch = tempered if last and tail_groups is None else torch.empty_like(tempered)
            if tail_groups is None:
                self._single(tempered, scratch)
            else:
                self._grouped(tempered, scratch, tail_groups, num_groups)

    def _single(self, logits: Tensor, scratch: Tensor) -> None:
        """Take one logsumexp per row: torch's fused softmax, and the maximum before and after it."""
        largest = logits.amax(1, keepdim=True)
        torch.softmax(logits, 1, out=scratch)
        log_mass = largest - scratch.amax(1, keepdim=True).log()
        empty = largest == -inf
        if bool(empty.any()):
            scratch.masked_fill_(empty, 0.0)
            log_mass = log_mass.masked_fill(empty, -inf)
        self._keep(log_mass, scratch, log_mass)

    def _grouped(self, logits: Tensor, scratch: Tensor, tail_groups: Tensor, num_groups: int) -> None:
        """Sum the softmax group by group; a block with a group far below its row is shifted group by group."""
        largest = logits.amax(1, keepdim=True)
        torch.softmax(logits, 1, out=scratch)
        log_tail = largest - scratch.amax(1, keepdim=True).log()
        index = tail_groups.expand_as(logits)
        shares = logits.new_zeros(len(logits), num_groups).scatter_add_(1, index, scratch)
        doubtful = ~(shares > UNDERFLOW)
        if bool((largest > -inf).all()) and _are_empty(doubtful, logits, tail_groups):
            self._keep(shares.log() + log_tail, scratch, log_tail)
            return
        shift = logits.new_full(shares.shape, -inf).scatter_reduce_(1, index, logits, "amax")
        shift = shift.masked_fill(shift == -inf, 0.0)  # so that −inf − (−inf) never arises in an empty group
        torch.sub(logits, shift.index_select(1, tail_groups), out=scratch).exp_()
        sums = torch.zeros_like(shift).scatter_add_(1, index, scratch)
        self._keep(sums.log() + shift, scratch, shift)

    def _keep(self, log_masses: Tensor, exponentials: Tensor, shift: Tensor) -> None:
        """Keep the results of a temperature; exponentials [n, V] = exp(z − shift), shift [n, 1] or [n, G]."""
        self.log_masses.append(log_masses)
        self._exponentials.append(exponentials)
        self._shifts.append(shift)

    def write_gradient_(
        self, weights: Sequence[Tensor | None], labels: Tensor | None, label_weights: Tensor | None
    ) -> None:
        """See TailBackend."""
        total = None
        for weight, log_mass, exponentials, shift in zip(
            weights, self.log_masses, self._exponentials, self._shifts, strict=True
        ):
            if weight is None:
                continue
            factor = weight * (shift - log_mass).masked_fill(log_mass == -inf, -inf).exp()
            if self._tail_groups is not None:
                factor = factor.index_select(1, self._tail_groups)
            exponentials.mul_(factor)
            total = exponentials if total is None else total.add_(exponentials)
        if total is None:
            total = torch.zeros_like(self._exponentials[0])
        if labels is not None and label_weights is not None:
            subtracted = -label_weights.masked_fill(labels < 0, 0.0).to(total.dtype)
            total.scatter_add_(1, labels.clamp_min(0)[:, None], subtracted[:, None])
        if isinstance(self._slope, Tensor) or self._slope != 1.0:
            total.mul_(self._slope)
        if total is not self._block:
            self._block.copy_(total)


def _are_empty(groups: Tensor, logits: Tensor, tail_groups: Tensor) -> bool:
    """Tell whether no group of `groups` [n, G] bool, each row's own, has a token left. As a rule few tokens are in them."""
    columns = groups.any(0)[tail_groups].nonzero()[:, 0]
    others = ~groups[:, tail_groups[columns]]
    return bool(((logits[:, columns] == -inf) | others).all())

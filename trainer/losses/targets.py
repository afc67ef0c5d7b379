"""The known part of the teacher, as tensors."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from math import inf
from typing import Any

import torch
from torch import Tensor

OF_THE_CACHE = ("tail_groups", "tail_basis")
"""The fields of TeacherTargets that belong to no position."""
MULTIPLIED_TOKENS = 2**14
"""Tokens of a vocabulary that a product of weights is formed of at a time."""


def mask_tokens_(logits: Tensor, token_ids: Tensor) -> None:
    """Set the logits [n, V] of some tokens to −inf. token_ids: [n, K] int64, −1 pads."""
    # Padding adds 0 to token 0, which may itself be one of them.
    minus_inf = torch.zeros_like(token_ids, dtype=logits.dtype).masked_fill_(token_ids >= 0, -inf)
    logits.scatter_add_(1, token_ids.clamp_min(0), minus_inf)


@dataclass(frozen=True, eq=False)
class TailBasis:
    """The basis of the low-rank tail, on which the teacher's logits are about offset + directions · coefficients.

    The logits are those of the softmax, after a scale or a cap; they matter up to a shift.

    Attributes:
        offset: m, [V] floating.
        directions: U, [V, R] floating, Uᵀ diag(w) U = I and wᵀU = 0.
        weights: w, [V] floating, not below 0, Σ w = 1.
    """

    offset: Tensor
    directions: Tensor
    weights: Tensor

    def _weighted_rows(self, rows: slice) -> Tensor:
        """diag(w) (U, 1) of some tokens."""
        ones = torch.ones_like(self.offset[rows, None])
        return torch.cat([self.directions[rows], ones], 1).mul_(self.weights[rows, None])

    @cached_property
    def _weighted(self) -> tuple[Tensor, Tensor]:
        """diag(w) (U, 1), and what it makes of the offset."""
        weighted = self._weighted_rows(slice(None))
        return weighted, self.offset @ weighted

    def moments(self, logits: Tensor) -> Tensor:
        """Return of logits [n, V] less m the coefficients Uᵀ diag(w) (logits − m) and the mean under w, [n, R + 1]."""
        weighted, of_offset = self._weighted
        return logits @ weighted - of_offset

    def moments_of_maps(self, hiddens: Sequence[Tensor], weights: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        """Return the moments of the logits Σ h_i W_iᵀ + b without these: [n, R + 1] for hidden states [n, D_i].

        The moments are linear in the logits, and so in the hidden states, by a factor [D_i, R + 1].
        """
        dtype = self.offset.dtype
        factors = [self.offset.new_zeros(weight.shape[1], self.directions.shape[1] + 1) for weight in weights]
        constant = factors[0].new_zeros(factors[0].shape[1])
        for start in range(0, len(self.offset), MULTIPLIED_TOKENS):
            rows = slice(start, start + MULTIPLIED_TOKENS)
            weighted = self._weighted_rows(rows)
            constant += ((0 if bias is None else bias[rows].to(dtype)) - self.offset[rows]) @ weighted
            for factor, weight in zip(factors, weights, strict=True):
                factor.addmm_(weight[rows].t().to(dtype), weighted)
        return constant + sum(hidden.to(dtype) @ factor for hidden, factor in zip(hiddens, factors, strict=True))

    def project(self, logits: Tensor) -> Tensor:
        """Return the coefficients Uᵀ diag(w) (logits − m), [n, R], of logits [n, V]."""
        return self.moments(logits)[:, :-1]

    def to(self, dtype: torch.dtype) -> "TailBasis":
        """Convert every tensor; a basis of that dtype stays, with what it has computed."""
        tensors = self.offset, self.directions, self.weights
        return self if {t.dtype for t in tensors} == {dtype} else TailBasis(*(tensor.to(dtype) for tensor in tensors))


@dataclass(frozen=True)
class TeacherTargets:
    """The teacher at N positions; log masses in nats, T = 1, over its whole vocabulary.

    Attributes:
        token_ids: [N, k] integer, −1 pads.
        logprobs: [N, k] floating, −inf pads.
        tail_logprob: [N] floating, log(1 − Σ p).
        tempered_tail: [N] floating, s(1/T) = log Σ p^(1/T) over the tail, for the temperature in use.
        tail_groups: [V] integer, the group of each token id.
        group_logprobs: [N, G] floating, the log mass of each group outside the entries, may be −inf.
        tail_entropy: [N] floating, Σ p log p over the tail / its mass.
        sample_ids: [N, s] integer, drawn from the tail with replacement, −1 pads.
        sample_logprobs: [N, s] floating, their log p.
        tail_coefficients: [N, R] floating, z = Uᵀ diag(w) (logits − m).
        tail_basis: the basis of the coefficients.
        probe_ids: [N, P] integer, tokens drawn uniformly from the vocabulary, −1 pads.
        probe_residuals: [N, P] floating, what the basis leaves of the teacher's logits there, centred under w.
    """

    token_ids: Tensor
    logprobs: Tensor
    tail_logprob: Tensor
    tempered_tail: Tensor | None = None
    tail_groups: Tensor | None = None
    group_logprobs: Tensor | None = None
    tail_entropy: Tensor | None = None
    sample_ids: Tensor | None = None
    sample_logprobs: Tensor | None = None
    tail_coefficients: Tensor | None = None
    tail_basis: TailBasis | None = None
    probe_ids: Tensor | None = None
    probe_residuals: Tensor | None = None

    @classmethod
    def of_call(cls, targets: "TeacherTargets | None", arguments: Mapping[str, Any]) -> "TeacherTargets":
        """Return `targets`, or those that a call of a loss gave as single arguments; None stands for none.

        Raises TypeError if the call gave both, or too little for either.
        """
        given = {field.name: arguments[field.name] for field in fields(cls) if arguments[field.name] is not None}
        if targets is not None:
            if given:
                raise TypeError(
                    f"{next(iter(given))} is given beside targets, which hold all of the teacher: leave it out"
                )
            return targets
        missing = [name for name in ("token_ids", "logprobs", "tail_logprob") if name not in given]
        if missing:
            raise TypeError(f"{missing[0]} is missing: give token_ids, logprobs and tail_logprob, or targets")
        return cls(**given)

    @property
    def stored(self) -> Tensor:
        """The entries that hold a token, [N, k] bool; a token of probability 0 is left to the tail."""
        return (self.token_ids >= 0) & (self.logprobs != -inf)

    def __getitem__(self, rows: slice | Tensor) -> "TeacherTargets":
        """Return the targets of some positions; what belongs to the whole cache stays."""
        return self.each(lambda name, tensor: tensor if name in OF_THE_CACHE else tensor[rows])

    def for_arithmetic(self, dtype: torch.dtype) -> "TeacherTargets":
        """Convert log-probabilities to `dtype` and indices to int64, with the id −1 wherever nothing is stored."""
        converted = self.each(lambda name, tensor: tensor.to(dtype if tensor.is_floating_point() else torch.long))
        basis = None if self.tail_basis is None else self.tail_basis.to(dtype)
        ids = converted.token_ids.masked_fill(~converted.stored, -1)
        return replace(converted, token_ids=ids, tail_basis=basis)

    def each(self, change: Callable[[str, Tensor], Tensor]) -> "TeacherTargets":
        """Change every tensor, by its name and itself; not the basis."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {
            name: change(name, value) for name, value in values.items() if isinstance(value, Tensor)
        }
        return replace(self, **changed)

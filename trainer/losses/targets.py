"""What is known of the teacher, as tensors."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from math import inf

import torch
from torch import Tensor


def hide_(logits: Tensor, token_ids: Tensor) -> None:
    """Set the logits [n, V] of tokens [n, K] to −inf; the id −1 pads."""
    # Padding adds 0 to token 0, which may itself be one of them.
    minus_inf = torch.zeros_like(token_ids, dtype=logits.dtype).masked_fill_(token_ids >= 0, -inf)
    logits.scatter_add_(1, token_ids.clamp_min(0), minus_inf)


@dataclass(frozen=True)
class TeacherTargets:
    """The teacher at N positions; log masses in nats, T = 1, over its whole vocabulary."""

    token_ids: Tensor  # [N, k] integer, −1 pads
    logprobs: Tensor  # [N, k], −inf pads
    tail_logprob: Tensor  # [N] log(1 − Σ p)
    tempered_tail: Tensor | None = None  # [N] s(1/T) = log Σ p^(1/T) over the tail, for the temperature in use
    tail_groups: Tensor | None = None  # [V] integer, the group of each token id
    group_logprobs: Tensor | None = None  # [N, G] log mass of each group outside the entries, may be −inf
    tail_entropy: Tensor | None = None  # [N] Σ p log p over the tail / its mass
    sample_ids: Tensor | None = None  # [N, s] integer, drawn from the tail with replacement, −1 pads
    sample_logprobs: Tensor | None = None  # [N, s] their log p

    @property
    def stored(self) -> Tensor:
        """Which entries hold a token, [N, k] bool; a token of probability 0 is left to the tail."""
        return (self.token_ids >= 0) & (self.logprobs != -inf)

    def __getitem__(self, rows: slice | Tensor) -> "TeacherTargets":
        """The targets of some positions; the partition into groups belongs to none and stays."""
        return self._each(lambda name, tensor: tensor if name == "tail_groups" else tensor[rows])

    def for_arithmetic(self, dtype: torch.dtype) -> "TeacherTargets":
        """Masses in `dtype`, indices in int64, and the id −1 wherever nothing is stored."""
        converted = self._each(lambda name, tensor: tensor.to(dtype if tensor.is_floating_point() else torch.long))
        return replace(converted, token_ids=converted.token_ids.masked_fill(~converted.stored, -1))

    def _each(self, change: Callable[[str, Tensor], Tensor]) -> "TeacherTargets":
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: change(name, tensor) for name, tensor in held.items() if tensor is not None})

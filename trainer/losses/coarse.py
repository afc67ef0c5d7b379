"""Two coarse distributions: one outcome per stored token (an entry), and then one per part of the tail."""

from dataclasses import dataclass
from functools import cached_property
from math import inf

import torch
from torch import Tensor


def dot(left: Tensor, right: Tensor) -> Tensor:
    """Return Σ left·right of each row of [N, C], without the products."""
    result: Tensor = torch.linalg.vecdot(left, right)
    return result


@dataclass(frozen=True)
class Coarse:
    """Teacher p and student q over the same C outcomes: `num_entries` stored tokens, then the tail.

    A divergence is best written with `p`, `q` and `log_ratio`, which are exactly 0 where an outcome does not count,
    with a gradient of exactly 0 there; so q/p is `log_ratio.exp()`, never a quotient.
    """

    log_p: Tensor  # [N, C] nats
    log_q: Tensor  # [N, C] nats
    counted: Tensor  # [N, C] bool; outcomes outside it (padding, an empty tail) contribute exactly 0
    num_entries: int
    estimated_p: Tensor | None = None  # [N, C] unbiased estimate that stands in for p (sampled tails)

    @cached_property
    def p(self) -> Tensor:
        """The teacher's mass of each counted outcome, [N, C], or its estimate if there is one."""
        if self.estimated_p is not None:
            return self.estimated_p.masked_fill(~self.counted, 0.0)
        return self._of_counted(self.log_p, -inf).exp()

    @cached_property
    def q(self) -> Tensor:
        """The student's mass of each counted outcome, [N, C]."""
        return self._of_counted(self.log_q, -inf).exp()

    @cached_property
    def log_ratio(self) -> Tensor:
        """r = log(q/p) of each counted outcome, [N, C] nats."""
        return self._of_counted(self.log_q, 0.0) - self._of_counted(self.log_p, 0.0)

    @cached_property
    def fkl(self) -> Tensor:
        """Σ p log(p/q) over the counted outcomes, [N]."""
        return -dot(self.p, self.log_ratio)

    @cached_property
    def rkl(self) -> Tensor:
        """Σ q log(q/p) over the counted outcomes, [N]."""
        return dot(self.q, self.log_ratio)

    def _of_counted(self, values: Tensor, otherwise: float) -> Tensor:
        return values.masked_fill(~self.counted, otherwise)


class EveryToken(Coarse):
    """Teacher and student over all V tokens, of which p, q and log(q/p) are known already; every one counts."""

    logits: Tensor  # [N, V] the student's
    largest: Tensor  # [N] of them
    log_normaliser: Tensor  # [N] by which they exceed log q

    def __init__(
        self, p: Tensor, q: Tensor, log_ratio: Tensor, logits: Tensor, largest: Tensor, log_normaliser: Tensor
    ) -> None:
        """Take tensors [N, V], then [N]."""
        self.__dict__.update(p=p, q=q, log_ratio=log_ratio, num_entries=p.shape[1], estimated_p=None)
        self.__dict__.update(logits=logits, largest=largest, log_normaliser=log_normaliser)

    @cached_property
    def log_q(self) -> Tensor:
        """The log of the student's mass of each token, [N, V] nats."""
        return self.logits - self.log_normaliser[:, None]

    @cached_property
    def log_p(self) -> Tensor:
        """The log of the teacher's mass of each token, [N, V] nats."""
        return self.log_q - self.log_ratio

    @cached_property
    def counted(self) -> Tensor:
        """True throughout, [N, V]."""
        return torch.ones(1, 1, dtype=torch.bool, device=self.p.device).expand_as(self.p)

"""Two coarse distributions: one outcome per stored token (an entry), and then one per part of the tail."""

from dataclasses import dataclass
from functools import cached_property
from math import inf

from torch import Tensor


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
    whole: tuple[Tensor, Tensor] | None = None  # p and q [N, C] that are known already, where every outcome counts

    @cached_property
    def p(self) -> Tensor:
        """The teacher's mass of each counted outcome, [N, C], or its estimate if there is one."""
        if self.whole is not None:
            return self.whole[0]
        if self.estimated_p is not None:
            return self.estimated_p.masked_fill(~self.counted, 0.0)
        return self._of_counted(self.log_p, -inf).exp()

    @cached_property
    def q(self) -> Tensor:
        """The student's mass of each counted outcome, [N, C]."""
        if self.whole is not None:
            return self.whole[1]
        return self._of_counted(self.log_q, -inf).exp()

    @cached_property
    def log_ratio(self) -> Tensor:
        """r = log(q/p) of each counted outcome, [N, C] nats."""
        return self._of_counted(self.log_q, 0.0) - self._of_counted(self.log_p, 0.0)

    @cached_property
    def fkl(self) -> Tensor:
        """Σ p log(p/q) over the counted outcomes, [N]."""
        return -(self.p * self.log_ratio).sum(1)

    @cached_property
    def rkl(self) -> Tensor:
        """Σ q log(q/p) over the counted outcomes, [N]."""
        return (self.q * self.log_ratio).sum(1)

    def _of_counted(self, values: Tensor, otherwise: float) -> Tensor:
        return values if self.whole is not None else values.masked_fill(~self.counted, otherwise)

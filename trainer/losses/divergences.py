"""Divergences between two coarse distributions, each with its gradient in closed form.

A coarse distribution has one outcome per stored token (an entry) and then one per part of the tail. A divergence
is a function of the two coarse distributions that returns

    value [N]      the divergence of each position, in nats
    slope [N, C]   u = ∂ value / ∂ log q of each outcome, as if the outcomes' log q were independent

and an entry in DIVERGENCES. The gradient with respect to the logits follows from the slope alone, see student.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

HEAD_MASS = 0.5  # μ of AKL: the share of the teacher's mass that makes up the head


@dataclass(frozen=True)
class Coarse:
    """Teacher p and student q over the same C outcomes: `num_entries` stored tokens, then the tail."""

    log_p: Tensor  # [N, C]
    log_q: Tensor  # [N, C]
    counted: Tensor  # [N, C] bool; outcomes outside it (padding, an empty tail) contribute exactly 0
    num_entries: int

    @cached_property
    def p(self) -> Tensor:
        """Teacher mass of each counted outcome, [N, C]."""
        return self.log_p.exp().masked_fill(~self.counted, 0.0)

    @cached_property
    def q(self) -> Tensor:
        """Student mass of each counted outcome, [N, C]."""
        return self.log_q.exp().masked_fill(~self.counted, 0.0)

    @cached_property
    def log_ratio(self) -> Tensor:
        """r = log(q/p) of each counted outcome, [N, C]."""
        return (self.log_q - self.log_p).masked_fill(~self.counted, 0.0)


@dataclass(frozen=True)
class DivergenceOptions:
    """What some divergences need besides the two distributions."""

    akl_split: str = "official"  # AKL: where the token that crosses HEAD_MASS goes, see AKL_SPLITS
    beta: float = 1.0  # ToDi: steepness of its weight


def forward_kl(coarse: Coarse, options: DivergenceOptions) -> tuple[Tensor, Tensor]:
    """FKL, Σ p log(p/q). Hinton et al. 2015, arXiv 1503.02531."""
    return -(coarse.p * coarse.log_ratio).sum(1), -coarse.p


def reverse_kl(coarse: Coarse, options: DivergenceOptions) -> tuple[Tensor, Tensor]:
    """RKL, Σ q log(q/p). Gu et al. 2024 (MiniLLM), arXiv 2306.08543."""
    q, r = coarse.q, coarse.log_ratio
    return (q * r).sum(1), q * (1 + r)


def adaptive_kl(coarse: Coarse, options: DivergenceOptions) -> tuple[Tensor, Tensor]:
    """AKL, w·FKL + (1−w)·RKL with w = g_head/(g_head+g_tail), no gradient through w. Wu et al., arXiv 2404.02657.

    The gap g is Σ|p−q| over the teacher's most probable tokens (the head) and over the rest. Only entries can be in
    the head: the parts of the tail are no tokens. It is exact where the entries hold HEAD_MASS or more.
    """
    k = coarse.num_entries
    gap = (coarse.p - coarse.q).abs()  # [N, C]
    entry_p, order = coarse.p[:, :k].sort(dim=1, descending=True, stable=True)
    entry_gap = gap[:, :k].gather(1, order)
    head = AKL_SPLITS[options.akl_split](entry_p.cumsum(1))
    head[:, :1] = True
    head_gap = (entry_gap * head).sum(1)
    rest_gap = (entry_gap * ~head).sum(1) + gap[:, k:].sum(1)
    w = head_gap / (head_gap + rest_gap).clamp_min(torch.finfo(gap.dtype).tiny)

    forward, forward_slope = forward_kl(coarse, options)
    reverse, reverse_slope = reverse_kl(coarse, options)
    return w * forward + (1 - w) * reverse, w[:, None] * forward_slope + (1 - w[:, None]) * reverse_slope


def token_wise_kl(coarse: Coarse, options: DivergenceOptions) -> tuple[Tensor, Tensor]:
    """ToDi, Σ α p log(p/q) + (1−α) q log(q/p) with α = σ(β log(p/q)), no gradient through α.

    Jung et al. 2025, arXiv 2505.16297. At β = 1 the value is FKL + RKL; only the gradient differs.
    """
    p, q, r = coarse.p, coarse.q, coarse.log_ratio
    forward_weight, reverse_weight = torch.sigmoid(-options.beta * r), torch.sigmoid(options.beta * r)
    value = (reverse_weight * q * r - forward_weight * p * r).sum(1)
    return value, reverse_weight * q * (1 + r) - forward_weight * p


def _crossing_token_in_rest(cumulative_mass: Tensor) -> Tensor:
    return cumulative_mass <= HEAD_MASS


def _crossing_token_in_head(cumulative_mass: Tensor) -> Tensor:
    before = torch.cat([torch.zeros_like(cumulative_mass[:, :1]), cumulative_mass[:, :-1]], dim=1)
    return before < HEAD_MASS


# Name → head mask [N, k] from the inclusive cumulative mass in descending order: the code of AKL's authors, and the
# re-implementation published with ToDi.
AKL_SPLITS: dict[str, Callable[[Tensor], Tensor]] = {
    "official": _crossing_token_in_rest,
    "todi": _crossing_token_in_head,
}

Divergence = Callable[[Coarse, DivergenceOptions], tuple[Tensor, Tensor]]

DIVERGENCES: dict[str, Divergence] = {
    "fkl": forward_kl,
    "rkl": reverse_kl,
    "akl": adaptive_kl,
    "todi": token_wise_kl,
}

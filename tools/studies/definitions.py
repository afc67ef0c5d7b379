"""The divergences over the whole vocabulary, written out in plain torch: what online training minimises and what judges.

Nothing here comes from `trainer`: the studies hold its losses against these.
"""

import torch
from torch import Tensor

LOSSES = ("fkl", "rkl", "akl", "todi")
NAMES = {"fkl": "FKL", "rkl": "RKL", "akl": "AKL", "todi": "ToDi"}
HEAD_MASS = 0.5  # μ of AKL


def divergence(loss: str, log_p: Tensor, log_q: Tensor) -> Tensor:
    """FKL, RKL, AKL (Wu et al., arXiv 2404.02657) or ToDi (Jung et al., arXiv 2505.16297; β = 1) of each position, nats.

    log_p, log_q [N, V]: teacher and student at the training temperature. [N], differentiable in log_q; no gradient
    passes through AKL's weight and ToDi's α.
    """
    if loss == "fkl":
        return _forward(log_p, log_q)
    if loss == "rkl":
        return _reverse(log_p, log_q)
    if loss == "akl":
        weight = akl_weight(log_p, log_q.detach())
        return weight * _forward(log_p, log_q) + (1 - weight) * _reverse(log_p, log_q)
    if loss == "todi":
        alpha = torch.sigmoid(log_p - log_q).detach()
        ratio = log_p - log_q
        return (alpha * log_p.exp() * ratio - (1 - alpha) * log_q.exp() * ratio).sum(1)
    raise ValueError(f"loss is {loss!r}; accepted are {', '.join(LOSSES)}")


def akl_weight(log_p: Tensor, log_q: Tensor, least: Tensor | None = None) -> Tensor:
    """AKL's weight of FKL, [N]: the gap Σ|p−q| of the head over that of all tokens.

    The head is what the authors' code makes it: the tokens whose inclusive cumulative mass is ≤ μ, and the first. least:
    its `least_of_head`, if known.
    """
    p = log_p.exp()
    least = least_of_head(p, crossing=False) if least is None else least
    gap = (p - log_q.exp()).abs()
    return (gap * (p >= least[:, None])).sum(1) / gap.sum(1).clamp_min(torch.finfo(gap.dtype).tiny)


def least_of_head(p: Tensor, *, crossing: bool) -> Tensor:
    """The least probability in the head of p [N, V], the most probable tokens up to the mass μ: [N].

    crossing: whether the token that crosses μ is one of them; the first always is.
    """
    in_order = p.sort(dim=1, descending=True).values
    mass = in_order.cumsum(1)
    size = (mass - in_order < HEAD_MASS if crossing else mass <= HEAD_MASS).sum(1).clamp_min(1)
    return in_order.gather(1, size[:, None] - 1)[:, 0]


def _forward(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(1)


def _reverse(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_q.exp() * (log_q - log_p)).sum(1)

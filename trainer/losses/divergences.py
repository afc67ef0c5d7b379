"""Divergences between two coarse distributions, each with its gradient in closed form.

A divergence is a function of the two distributions that returns

    value [N]      the divergence of each position, in nats
    slope [N, C]   u = ∂ value / ∂ log q of each outcome, as if the outcomes' log q were independent

and an entry in DIVERGENCES. Its options are keyword-only; one out of range raises ValueError. The gradient with respect
to the logits follows from the slope alone. Where outcomes are merged tokens, an f-divergence is a lower bound of its
full-vocabulary value.
"""

from collections.abc import Callable
from math import factorial, isfinite
from typing import Any

import torch
from torch import Tensor

from trainer.losses.coarse import Coarse, dot

HEAD_MASS = 0.5  # μ of AKL: the share of the teacher's mass that makes up the head
HEAD_SEARCH = 64  # tokens among which the first attempt looks for the head
TOP_RANGE = 64  # tokens of whom a maximum is taken, in the search for the largest of a whole vocabulary


def forward_kl(coarse: Coarse) -> tuple[Tensor, Tensor]:
    """FKL, Σ p log(p/q). Hinton et al. 2015, arXiv 1503.02531."""
    return coarse.fkl, -coarse.p


def reverse_kl(coarse: Coarse) -> tuple[Tensor, Tensor]:
    """RKL, Σ q log(q/p). Gu et al. 2024 (MiniLLM), arXiv 2306.08543."""
    return coarse.rkl, torch.addcmul(coarse.q, coarse.q, coarse.log_ratio)


def jeffreys(coarse: Coarse) -> tuple[Tensor, Tensor]:
    """FKL + RKL, Σ (q−p) log(q/p). Jeffreys 1946, doi 10.1098/rspa.1946.0056."""
    (forward, forward_slope), (reverse, reverse_slope) = forward_kl(coarse), reverse_kl(coarse)
    return forward + reverse, forward_slope + reverse_slope


def adaptive_kl(coarse: Coarse, *, akl_split: str = "official") -> tuple[Tensor, Tensor]:
    """AKL, w·FKL + (1−w)·RKL with w = g_head/(g_head+g_tail), no gradient through w. Wu et al., arXiv 2404.02657.

    The gap g is Σ|p−q| over the teacher's most probable tokens (the head) and over the rest. Only entries can be in
    the head: the parts of the tail are no tokens. It is exact where the entries hold HEAD_MASS or more. `akl_split`
    says where the token that crosses HEAD_MASS goes, see AKL_SPLITS.
    """
    if akl_split not in AKL_SPLITS:
        raise ValueError(f"akl_split is {akl_split!r}; accepted are {', '.join(AKL_SPLITS)}")
    gap = (coarse.p - coarse.q).detach().abs_()  # [N, C]
    entry_p, order = _largest_entries(coarse.p[:, : coarse.num_entries])
    head_gap = (gap.gather(1, order) * akl_head(entry_p, akl_split)).sum(1)
    w = head_gap / gap.sum(1).clamp_min(torch.finfo(gap.dtype).tiny)

    reverse, slope = reverse_kl(coarse)
    slope = slope.mul_(1 - w[:, None]).addcmul_(coarse.p, -w[:, None])
    return w * coarse.fkl + (1 - w) * reverse, slope


def token_wise_kl(coarse: Coarse, *, beta: float = 1.0) -> tuple[Tensor, Tensor]:
    """ToDi, Σ α p log(p/q) + (1−α) q log(q/p) with α = σ(β log(p/q)), no gradient through α.

    Jung et al. 2025, arXiv 2505.16297. At β = 1 the value is FKL + RKL; only the gradient differs.
    """
    _check_finite("beta", beta)
    p, q, r = coarse.p, coarse.q, coarse.log_ratio
    if beta == 1:  # σ(log(q/p)), without an exponential
        reverse_weight = (q / (p + q).clamp_min_(torch.finfo(p.dtype).tiny)).detach()
    else:
        reverse_weight = torch.sigmoid(beta * r).detach()
    reverse = reverse_weight * q
    difference = (reverse - p).addcmul_(reverse_weight, p)  # (1−α)·q − α·p
    return dot(difference, r), torch.addcmul(difference, reverse, r)


def jensen_shannon(coarse: Coarse, *, beta: float = 0.5) -> tuple[Tensor, Tensor]:
    """Generalised JSD, β·KL(p‖m) + (1−β)·KL(q‖m) with m = βp + (1−β)q, 0 < β < 1.

    Agarwal et al. 2024 (GKD), arXiv 2306.13649. Divided by β it tends to FKL as β → 0, divided by 1−β to RKL as β → 1.
    """
    _check_finite("beta", beta)
    if not 0 < beta < 1:
        raise ValueError(f"beta is {beta}; it must lie strictly between 0 and 1 (in place of 0 and 1 use fkl and rkl)")
    p, q, r = coarse.p, coarse.q, coarse.log_ratio
    log_m_over_p, log_m_over_q = _log_mixture(r, beta), _log_mixture(-r, 1 - beta)
    value = -(beta * p * log_m_over_p + (1 - beta) * q * log_m_over_q).sum(1)
    return value, -(1 - beta) * q * log_m_over_q


def skewed_forward_kl(coarse: Coarse, *, skew: float = 0.1) -> tuple[Tensor, Tensor]:
    """SFKL, KL(p ‖ skew·p + (1−skew)·q), 0 ≤ skew < 1. Ko et al. 2024 (DistiLLM), arXiv 2402.03898."""
    _check_skew(skew)
    p, r = coarse.p, coarse.log_ratio
    log_m_over_p = _log_mixture(r, skew)
    return -(p * log_m_over_p).sum(1), -(1 - skew) * p * (r - log_m_over_p).exp()


def skewed_reverse_kl(coarse: Coarse, *, skew: float = 0.1) -> tuple[Tensor, Tensor]:
    """SRKL, KL(q ‖ (1−skew)·p + skew·q), 0 ≤ skew < 1. Ko et al. 2024 (DistiLLM), arXiv 2402.03898."""
    _check_skew(skew)
    q, r = coarse.q, coarse.log_ratio
    log_m_over_q = _log_mixture(-r, skew)
    p_over_m = (-r - log_m_over_q).exp()
    return -(q * log_m_over_q).sum(1), q * ((1 - skew) * p_over_m - log_m_over_q)


def total_variation(coarse: Coarse) -> tuple[Tensor, Tensor]:
    """TVD, ½ Σ |p−q|. Wen et al. 2023 (f-distill), arXiv 2307.15190.

    Its gradient has the sign of q−p and not its size: it does not fade as q nears p.
    """
    difference = coarse.q - coarse.p
    return difference.abs().sum(1) / 2, coarse.q * difference.sign() / 2


def alpha_beta(coarse: Coarse, *, alpha: float = 0.2, beta: float = 0.7) -> tuple[Tensor, Tensor]:
    """α–β divergence, −1/(αβ) Σ [p^α q^β − α/(α+β) p^(α+β) − β/(α+β) q^(α+β)], and its limits where α, β or α+β is 0.

    Cichocki et al. 2011, doi 10.3390/e13010134; Wang et al. 2025 (ABKD), arXiv 2505.04560, whose setting for following
    instructions is the default. (1, 0) is FKL, (0, 1) is RKL. Only at α+β = 1 is it an f-divergence, so only there is
    the value on merged outcomes a lower bound. Exponents below 0 grow without bound as a mass nears 0.

    Both results are divided differences of exp, at the exponents of the three terms, which have no singular limits:
    value = Σ r²·exp[log p^(α+β), log p^α q^β, log q^(α+β)] and u = r·exp[log p^α q^β, log q^(α+β)].
    """
    _check_finite("alpha", alpha)
    _check_finite("beta", beta)
    r = coarse.log_ratio
    log_p = coarse.log_p.masked_fill(~coarse.counted, 0.0)
    # Exponents of the three terms beside log p^(α+β), so that their distances are exact near r = 0.
    exponents = torch.stack([torch.zeros_like(r), beta * r, (alpha + beta) * r])  # [3, N, C]
    low, middle, high = exponents.sort(dim=0).values
    value = r.square() * ((alpha + beta) * log_p + high).exp() * _second_difference(low - high, middle - high)
    larger = torch.maximum(exponents[1], exponents[2])
    slope = r * ((alpha + beta) * log_p + larger).exp() * _first_difference(-(alpha * r).abs())
    return value.sum(1), slope


def akl_head(p: Tensor, akl_split: str) -> Tensor:
    """Tell which of a teacher's most probable tokens, p [N, k] in descending order, are in AKL's head: [N, k] bool."""
    head = AKL_SPLITS[akl_split](p.cumsum(1))
    head[:, :1] = True
    return head


def _largest_entries(p: Tensor) -> tuple[Tensor, Tensor]:
    """Return probabilities [N, k] in descending order, and their columns: as many as the head may have, or all."""
    searched = HEAD_SEARCH
    while 16 * searched <= p.shape[1]:  # otherwise sorting costs no more, and waits for no accelerator
        entries, order = _topk(p, searched)
        if bool((entries.sum(1) > HEAD_MASS).all()):
            return entries, order
        searched *= 8
    entries, order = p.sort(dim=1, descending=True, stable=True)
    return entries, order


def _topk(p: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return what p.topk(k) does of [N, V]: the k largest are in the k ranges whose maxima are the largest."""
    whole = p.shape[1] // TOP_RANGE * TOP_RANGE
    ranges = p[:, :whole].unflatten(1, (-1, TOP_RANGE))
    if ranges.shape[1] < 2 * k:
        return p.topk(k)
    begins = ranges.amax(2).topk(k).indices * TOP_RANGE
    columns = (begins[:, :, None] + torch.arange(TOP_RANGE, device=p.device)).flatten(1)
    rest = torch.arange(whole, p.shape[1], device=p.device).expand(len(p), -1)
    columns = torch.cat([columns, rest], 1)
    largest = p.gather(1, columns).topk(k)
    return largest.values, columns.gather(1, largest.indices)


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


def _log_mixture(log_ratio: Tensor, weight: float) -> Tensor:
    """log(weight + (1−weight)·e^r): exactly 0 at r = 0, finite wherever r is, for 0 ≤ weight < 1."""
    near = torch.log1p((1 - weight) * torch.expm1(log_ratio.clamp(-1, 1)))
    constant = torch.full_like(log_ratio, weight).log()
    far = torch.logaddexp(constant, log_ratio + torch.full_like(log_ratio, 1 - weight).log())
    return torch.where(log_ratio.abs() <= 1, near, far)


def _first_difference(x: Tensor) -> Tensor:
    """exp[0, x] = (e^x − 1)/x for x ≤ 0, 1 at x = 0."""
    x = x.clamp_max(-torch.finfo(x.dtype).tiny)
    return torch.expm1(x) / x


def _second_difference(x: Tensor, y: Tensor) -> Tensor:
    """exp[0, y, x] = (exp[y, 0] − exp[x, y])/(0 − x) for x ≤ y ≤ 0, ½ at x = y = 0."""
    wide = x < -0.5
    far_x = torch.where(wide, x, -1.0)
    far = (_first_difference(y) - y.exp() * _first_difference(x - y)) / -far_x
    # Close together, where the quotient loses digits: Σ h_n(x, y)/(n+2)!, h_n = Σ_i x^i y^(n−i).
    near_x, near_y = torch.where(wide, 0.0, x), torch.where(wide, 0.0, y)
    power = symmetric = torch.ones_like(x)
    near = symmetric / 2
    for n in range(1, 14):
        power = power * near_x
        symmetric = power + near_y * symmetric
        near = near + symmetric / factorial(n + 2)
    return torch.where(wide, far, near)


def _check_finite(option: str, received: Any) -> None:
    if isinstance(received, bool) or not isinstance(received, int | float) or not isfinite(received):
        raise ValueError(f"{option} is {received!r}; it must be a finite number")


def _check_skew(skew: float) -> None:
    _check_finite("skew", skew)
    if not 0 <= skew < 1:
        raise ValueError(f"skew is {skew}; it must be at least 0 and below 1")


Divergence = Callable[..., tuple[Tensor, Tensor]]

# For these an unbiased estimate of p, as tail samples give it, gives an unbiased loss.
LINEAR_IN_P = ("fkl",)

DIVERGENCES: dict[str, Divergence] = {
    "fkl": forward_kl,
    "rkl": reverse_kl,
    "akl": adaptive_kl,
    "todi": token_wise_kl,
    "jsd": jensen_shannon,
    "jeffreys": jeffreys,
    "sfkl": skewed_forward_kl,
    "srkl": skewed_reverse_kl,
    "tvd": total_variation,
    "ab": alpha_beta,
}

"""The teacher at a temperature other than 1, from its log-probabilities at T = 1."""

from dataclasses import replace
from math import inf

import torch
from torch import Tensor

from trainer.losses.targets import TeacherTargets


def tempered(targets: TeacherTargets, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Compute log p at T of the entries [N, k] and of the whole tail [N], and the log of their divisor, A_T [N].

    A_T = logaddexp(LSE(log p / T), s(1/T)). The tail at T is NOT t^(1/T): it needs `tempered_tail`.
    """
    if temperature == 1.0:
        return targets.logprobs, targets.tail_logprob, torch.zeros_like(targets.tail_logprob)
    assert targets.tempered_tail is not None
    entries = targets.logprobs.masked_fill(~targets.stored, -inf) / temperature
    log_total = torch.logaddexp(entries.logsumexp(1), targets.tempered_tail)
    return entries - log_total[:, None], targets.tempered_tail - log_total, log_total


def with_rebuilt_tail(
    targets: TeacherTargets, log_mass: Tensor, tempered_log_mass: Tensor, temperature: float
) -> TeacherTargets:
    """Give targets that lack it the tempered tail of a tail that is rebuilt from its coefficients.

    log_mass, tempered_log_mass: [n], the logsumexp of the rebuilt logits, and of these divided by T; −inf without a token.
    """
    if targets.tempered_tail is not None:
        return targets
    estimate = (targets.tail_logprob - log_mass) / temperature + tempered_log_mass
    return replace(targets, tempered_tail=estimate.masked_fill(log_mass == -inf, -inf))


def approximate_tempered_tail(targets: TeacherTargets, temperature: float, vocabulary: int) -> Tensor:
    """Estimate s(1/T) = log Σ p^(1/T) over the tail for a temperature that was not captured, [N].

    The quadratic in x = 1/T through s(0) = log of the tail's number of tokens, s(1) = log t and s′(1) = the tail's
    entropy term: at T > 1 off by some hundredths of a nat where t^(1/T) is off by more than half of one. Below T = 1
    it extrapolates.
    """
    assert targets.tail_entropy is not None
    x = 1 / temperature
    at_one, slope = targets.tail_logprob, targets.tail_entropy
    num_tokens = (vocabulary - targets.stored.sum(1)).to(at_one.dtype)
    at_zero = num_tokens.log()
    rise = at_one - at_zero
    estimate = at_zero + (2 * rise - slope) * x + (slope - rise) * x * x
    return estimate.masked_fill((num_tokens == 0) | (at_one == -inf), -inf)

"""How the part of the teacher that was not stored becomes outcomes, at any temperature.

Every treatment returns log p of the k entries and then of the tail's outcomes, [N, C], and which of them count.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

LOG_TAIL_FLOOR = -16.0  # nats; keeps log(q/p) of a tail that the teacher leaves all but empty finite


@dataclass(frozen=True)
class TeacherTargets:
    """What is known of the teacher at N positions; log masses in nats, T = 1, over its whole vocabulary."""

    token_ids: Tensor  # [N, k] integer, −1 pads
    logprobs: Tensor  # [N, k], −inf pads
    tail_logprob: Tensor  # [N] log(1 − Σ p)
    tempered_tail: Tensor | None = None  # [N] s(1/T) = log Σ p^(1/T) over the tail, for the temperature in use
    tail_groups: Tensor | None = None  # [V] integer, the group of each token id
    group_logprobs: Tensor | None = None  # [N, G] log mass of each group outside the entries, may be −inf

    @property
    def stored(self) -> Tensor:
        """Which entries hold a token, [N, k] bool; a token of probability 0 is left to the tail."""
        return (self.token_ids >= 0) & (self.logprobs != -inf)


def bucket(targets: TeacherTargets, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Give the whole tail one outcome: a lower bound of the full divergence, stationary at q = p."""
    entries, tail = _tempered(targets, temperature)
    return _outcomes(targets, entries, tail[:, None])


def groups(targets: TeacherTargets, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Give each group of tail tokens one outcome, T = 1 only: between the bucket and the full divergence."""
    if targets.group_logprobs is None or targets.tail_groups is None:
        raise ValueError("tail='groups' needs tail_groups [V] and group_logprobs [N, G]; without them use 'bucket'")
    if temperature != 1.0:
        raise ValueError(
            f"tail='groups' is not possible at temperature {temperature:g}: at T ≠ 1 only the total of the tail is "
            "known, not its groups; use tail='bucket'"
        )
    return _outcomes(targets, targets.logprobs, targets.group_logprobs)


def ignore(targets: TeacherTargets, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Drop the tail's outcome and renormalise nothing. An ablation: not stationary at q = p."""
    log_p, counted = bucket(targets, temperature)
    counted[:, -1] = False
    return log_p, counted


def renormalise(targets: TeacherTargets, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Spread the tail's mass over the entries, p / Σ p, and drop its outcome. An ablation like `ignore`."""
    entries = targets.logprobs.masked_fill(~targets.stored, -inf) / temperature
    entries = entries - entries.logsumexp(1, keepdim=True)
    log_p, counted = _outcomes(targets, entries, targets.tail_logprob[:, None])
    counted[:, -1] = False
    return log_p, counted


TAILS: dict[str, Callable[[TeacherTargets, float], tuple[Tensor, Tensor]]] = {
    "bucket": bucket,
    "groups": groups,
    "ignore": ignore,
    "renormalise": renormalise,
}


def _outcomes(targets: TeacherTargets, entries: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
    log_p = torch.cat([entries, tail.clamp_min(LOG_TAIL_FLOOR)], dim=1)
    counted = torch.cat([targets.stored, torch.ones_like(tail, dtype=torch.bool)], dim=1)
    return log_p, counted


def _tempered(targets: TeacherTargets, temperature: float) -> tuple[Tensor, Tensor]:
    """Log p at T of the entries [N, k] and of the tail [N], normalised by A_T = logaddexp(LSE(log p / T), s(1/T))."""
    if temperature == 1.0:
        return targets.logprobs, targets.tail_logprob
    if targets.tempered_tail is None:
        raise ValueError(
            f"temperature {temperature:g} needs tempered_tail [N] = log Σ p^(1/{temperature:g}) over the tokens "
            "outside the entries, which tail_logprob does not tell: capture it, or use temperature 1"
        )
    entries = targets.logprobs.masked_fill(~targets.stored, -inf) / temperature
    log_total = torch.logaddexp(entries.logsumexp(1), targets.tempered_tail)
    return entries - log_total[:, None], targets.tempered_tail - log_total

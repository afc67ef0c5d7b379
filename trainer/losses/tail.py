"""How the part of the teacher that was not stored becomes outcomes, at any temperature.

Every treatment is a function (targets, temperature, student) → Outcomes and an entry in TAILS. The student is asked
for its logits by `cap` only.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, log

import torch
from torch import Tensor

from trainer.losses.targets import TeacherTargets, mask_tokens_
from trainer.losses.temperature import tempered
from trainer.losses.transform import LogitTransform

LOG_TAIL_FLOOR = -16.0  # nats; keeps log(q/p) of a tail that the teacher leaves all but empty finite
FIRST_CAP_SEARCH = 64  # tokens among which the first attempt looks for the tokens that the cap binds


@dataclass(frozen=True)
class Outcomes:
    """The teacher over K tokens and then the parts of the tail."""

    token_ids: Tensor  # [N, K] int64, the stored entries first, −1 pads
    log_p: Tensor  # [N, K + G]
    counted: Tensor  # [N, K + G] bool
    tail_groups: Tensor | None = None  # [V] which part of the tail a token is in; None where G is 1
    estimated_p: Tensor | None = None  # [N, K + G] unbiased for p over all tokens, for what is linear in p


@dataclass(frozen=True)
class StudentRows:
    """The student at the same positions."""

    raw: Tensor  # [N, V] before the transform
    transform: LogitTransform

    @property
    def vocabulary(self) -> int:
        """The number of tokens."""
        return self.raw.shape[1]

    def tail_log_q(self, targets: TeacherTargets, temperature: float) -> Tensor:
        """Compute the log of each token's share of the student's tail at T, [N, V], −inf at the entries."""
        logits = self.transform.apply(self.raw.to(targets.logprobs.dtype)) / temperature
        mask_tokens_(logits, targets.token_ids)
        log_mass = logits.logsumexp(1, keepdim=True)
        return logits.sub_(log_mass.masked_fill(log_mass == -inf, 0.0))


def bucket(targets: TeacherTargets, temperature: float, student: StudentRows) -> Outcomes:
    """Give the whole tail one outcome: a lower bound of the full divergence, stationary at q = p."""
    entries, tail, _ = tempered(targets, temperature)
    return _outcomes(targets.token_ids, entries, tail)


def groups(targets: TeacherTargets, temperature: float, student: StudentRows) -> Outcomes:
    """Give each group of tail tokens one outcome, T = 1 only: between the bucket and the full divergence."""
    assert targets.group_logprobs is not None
    return _outcomes(targets.token_ids, targets.logprobs, targets.group_logprobs, targets.tail_groups)


def cap(targets: TeacherTargets, temperature: float, student: StudentRows) -> Outcomes:
    """Give the tail the student's own shape, but no token more than the least probable entry: bucket ≤ cap ≤ full.

    p̂ = min(c·q, p_k) off the entries with Σ p̂ = t, no gradient through p̂. Tokens under the cap share one ratio p̂/q,
    so they are one outcome; those at the cap, which water-filling finds from the student's largest, are one each. Costs
    three tensors of the size of the block of logits, and on an accelerator waits for it.
    """
    entries, tail, _ = tempered(targets, temperature)
    log_q = student.tail_log_q(targets, temperature)
    num_tokens = (student.vocabulary - targets.stored.sum(1)).clamp_min(1).to(tail.dtype)
    least_entry = torch.cat([entries.masked_fill(~targets.stored, 0.0), torch.zeros_like(tail)[:, None]], 1).amin(1)
    log_cap = torch.maximum(least_entry, tail - num_tokens.log())
    searched = min(FIRST_CAP_SEARCH, student.vocabulary)
    while True:
        largest = log_q.topk(searched)
        num_capped, found = _water_level(largest.values, log_cap, tail)
        if searched == student.vocabulary or bool(found.all()):
            break
        searched = min(8 * searched, student.vocabulary)
    width = int(num_capped.max())
    is_capped = torch.arange(width, device=num_capped.device) < num_capped[:, None]
    capped_ids = largest.indices[:, :width].masked_fill(~is_capped, -1)
    rest = (tail.double().exp() - num_capped * log_cap.double().exp()).clamp_min(0.0).log().to(tail.dtype)
    return _outcomes(
        torch.cat([targets.token_ids, capped_ids], 1),
        torch.cat([entries, log_cap[:, None].expand(-1, width)], 1),
        torch.where(num_capped == 0, tail, rest),
    )


def samples(targets: TeacherTargets, temperature: float, student: StudentRows) -> Outcomes:
    """Let tokens that were drawn from the tail join the entries: a tighter bucket for every divergence.

    For what is linear in p (FKL) the draws also estimate the full vocabulary without bias: a token drawn c times of s
    weighs t·c/s (RandomSamplingKD, arXiv 2503.16870, is the case without entries), at T ≠ 1 times its p_T / p.
    """
    assert targets.sample_ids is not None and targets.sample_logprobs is not None
    entries, tail, log_total = tempered(targets, temperature)
    ids, order = targets.sample_ids.sort(dim=1)
    logprobs = targets.sample_logprobs.gather(1, order)
    first = torch.ones_like(ids, dtype=torch.bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    drawn = first & (ids >= 0)
    times = torch.searchsorted(ids, ids, right=True) - torch.searchsorted(ids, ids)
    num_draws = (ids >= 0).sum(1, keepdim=True).clamp_min(1)

    tempered_logprobs = logprobs / temperature - log_total[:, None]
    taken = tempered_logprobs.masked_fill(~drawn, -inf).logsumexp(1)
    rest = torch.where(taken == -inf, tail, tail + torch.log1p(-(taken - tail).exp().clamp(max=1.0)))
    weights = (tempered_logprobs - logprobs + targets.tail_logprob[:, None]).exp() * times / num_draws
    rest_p = torch.where(drawn.any(1), 0.0, tail.exp())  # without draws the bucket is all there is
    return _outcomes(
        torch.cat([targets.token_ids, ids.masked_fill(~drawn, -1)], 1),
        torch.cat([entries, tempered_logprobs], 1),
        rest,
        estimated_p=torch.cat([entries.exp(), weights, rest_p[:, None]], 1),
    )


def ignore(targets: TeacherTargets, temperature: float, student: StudentRows) -> Outcomes:
    """Drop the tail's outcome and renormalise nothing. An ablation: not stationary at q = p."""
    outcomes = bucket(targets, temperature, student)
    outcomes.counted[:, -1] = False
    return outcomes


def renormalise(targets: TeacherTargets, temperature: float, student: StudentRows) -> Outcomes:
    """Spread the tail's mass over the entries, p / Σ p, and drop its outcome. An ablation like `ignore`."""
    entries = targets.logprobs.masked_fill(~targets.stored, -inf) / temperature
    entries = entries - entries.logsumexp(1, keepdim=True)
    outcomes = _outcomes(targets.token_ids, entries, targets.tail_logprob)
    outcomes.counted[:, -1] = False
    return outcomes


def uniform(targets: TeacherTargets, temperature: float, student: StudentRows) -> Outcomes:
    """Give every tail token the same probability, and so an outcome of its own. An ablation like `ignore`.

    It costs several tensors of the size of the block of logits.
    """
    entries, tail, _ = tempered(targets, temperature)
    vocabulary = student.vocabulary
    others = torch.arange(vocabulary + 1, device=tail.device).repeat(len(tail), 1)  # padding writes to the last column
    others.scatter_(1, targets.token_ids.masked_fill(~targets.stored, vocabulary), -1)
    num_tokens = (vocabulary - targets.stored.sum(1)).clamp_min(1).to(tail.dtype)
    each = (tail.clamp_min(LOG_TAIL_FLOOR) - num_tokens.log())[:, None].expand(-1, vocabulary)
    return _outcomes(torch.cat([targets.token_ids, others[:, :vocabulary]], 1), torch.cat([entries, each], 1), tail)


Treatment = Callable[[TeacherTargets, float, StudentRows], Outcomes]

TAILS: dict[str, Treatment] = {
    "bucket": bucket,
    "groups": groups,
    "cap": cap,
    "samples": samples,
    "ignore": ignore,
    "renormalise": renormalise,
    "uniform": uniform,
}


DENSE_TAILS = ("cap", "uniform", "low_rank")  # they make several tensors as large as the logits


def check_tail(targets: TeacherTargets, tail: str, temperature: float, approximate: bool) -> None:
    """Raise ValueError if the targets lack what a treatment needs. approximate: the tail at a T may be estimated."""
    if tail == "groups":
        if targets.group_logprobs is None or targets.tail_groups is None:
            raise ValueError("tail='groups' needs tail_groups [V] and group_logprobs [N, G]; without them use 'bucket'")
        if temperature != 1.0:
            raise ValueError(
                f"tail='groups' is not possible at temperature {temperature:g}: at T ≠ 1 only the total of the tail is "
                "known, not its groups; use tail='bucket'"
            )
    if tail == "low_rank" and (targets.tail_coefficients is None or targets.tail_basis is None):
        raise ValueError(
            "tail='low_rank' needs tail_coefficients [N, R] and their tail_basis; without them use 'bucket'"
        )
    if tail == "samples" and (targets.sample_ids is None or targets.sample_logprobs is None):
        raise ValueError("tail='samples' needs sample_ids [N, s] and sample_logprobs [N, s]; without them use 'bucket'")
    if (
        temperature != 1.0
        and tail not in ("renormalise", "low_rank")
        and targets.tempered_tail is None
        and not approximate
    ):
        raise ValueError(
            f"temperature {temperature:g} needs tempered_tail [N] = log Σ p^(1/{temperature:g}) over the tokens "
            "outside the entries, which tail_logprob does not tell: capture it, use temperature 1, or give tail_entropy "
            "[N] and approximate_temperature=True"
        )


def _outcomes(
    token_ids: Tensor,
    tokens: Tensor,
    tail: Tensor,
    tail_groups: Tensor | None = None,
    estimated_p: Tensor | None = None,
) -> Outcomes:
    """Put tokens [N, K] and the tail, [N] or [N, G], together as outcomes, by their log p at the temperature."""
    tail = tail.reshape(len(token_ids), -1)
    tail = tail.clamp_min(LOG_TAIL_FLOOR - log(max(1, tail.shape[1])))  # so that all parts together keep the floor
    log_p = torch.cat([tokens, tail], dim=1)
    counted = torch.cat([token_ids >= 0, torch.ones_like(tail, dtype=torch.bool)], dim=1)
    return Outcomes(token_ids, log_p, counted, tail_groups, estimated_p)


def _water_level(log_q: Tensor, log_cap: Tensor, log_t: Tensor) -> tuple[Tensor, Tensor]:
    """Count the student's largest tail tokens that the cap binds, [N], and say whether M tokens are enough, [N] bool.

    log_q: [N, M], shares of the tail, descending. m tokens are at the cap if the next one, scaled like the rest, stays
    below it: (t − m·cap) / (1 − Σ_m q) · q_{m+1} ≤ cap.
    """
    q, cap, t = log_q.double().exp(), log_cap.double().exp()[:, None], log_t.double().exp()[:, None]
    m = torch.arange(q.shape[1], device=q.device)
    before = q.cumsum(1) - q
    holds = (t - m * cap) * q <= cap * (1 - before)
    return torch.where(holds.any(1), holds.int().argmax(1), q.shape[1]), holds.any(1)

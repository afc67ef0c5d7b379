"""The error of a training step's gradient if only k entries and masses of the tail are stored.

The gradient of a divergence with respect to logit j is q_j·(s(ρ_j) − Σ q s(ρ)), where ρ_j = p/q of the outcome that token j
belongs to: itself, its tail group, or the whole tail. So storing less only replaces ρ_j. numpy, float64, in chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from logitcache.format.tail_basis import TailBasis
from logitcache.format.targets import PAD_ID, SparseTargets

VALUES_PER_CHUNK = 1 << 21

HEAD_MASS = 0.5  # μ of AKL


def _forward_slope(log_ratio: np.ndarray, q: np.ndarray, head: np.ndarray) -> np.ndarray:
    slope: np.ndarray = -np.exp(log_ratio)
    return slope


def _reverse_slope(log_ratio: np.ndarray, q: np.ndarray, head: np.ndarray) -> np.ndarray:
    return 1 - log_ratio


def _adaptive_slope(log_ratio: np.ndarray, q: np.ndarray, head: np.ndarray) -> np.ndarray:
    """w·FKL + (1 − w)·RKL, w the head's part of Σ|p − q|; an outcome's gap is its tokens' Σ q·|ρ − 1|."""
    gap = q * np.abs(np.expm1(log_ratio))
    total = gap.sum(axis=1, keepdims=True)
    w = (gap * head).sum(axis=1, keepdims=True) / np.where(total > 0, total, 1.0)
    slope: np.ndarray = w * _forward_slope(log_ratio, q, head) + (1 - w) * _reverse_slope(log_ratio, q, head)
    return slope


def _token_wise_slope(log_ratio: np.ndarray, q: np.ndarray, head: np.ndarray) -> np.ndarray:
    slope: np.ndarray = (1 - log_ratio - np.exp(2 * log_ratio)) / (1 + np.exp(log_ratio))
    return slope


SLOPES: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    "fkl": _forward_slope,
    "rkl": _reverse_slope,
    "akl": _adaptive_slope,
    "todi": _token_wise_slope,
}
"""Loss → s, the derivative by an outcome's q, from log(p/q) [N, E], q [N, E] and AKL's head, bool [N, E].

Hinton et al. 2015; Gu et al. 2024; Wu et al. 2025 (the head as in the authors' code); Jung et al. 2025 at β = 1.
"""

STUDENTS = {"early": (0.25, 0.35, 1.0), "late": (0.8, 0.1, 0.5)}
"""Stage of training → a, b, σ of the student p^a · (mean of p)^b · exp(σ·noise) that stands in for the real one.

Fitted on one teacher, of 7.5 M parameters, to a student of 3 M parameters and to a mixture of the two with noise: there the
errors come out 0.6 to 1.2 times the real ones and in their order. Without noise, groups of tokens of about the same mean
probability would keep such a student's ratios exactly and seem to cost no error.
"""


@dataclass(frozen=True)
class Outcomes:
    """The (almost) full distribution at N positions as E outcomes: tokens, most probable first, then the rests of groups.

    logprobs, mean_probs: float64 [N, E], log p and the outcome's mean p over a sample.  groups: int [N, E], tail group.
    ids: int [N, E], token; V + g for the rest of group g.  sizes: int [N, E], tokens of the outcome.
    """

    logprobs: np.ndarray
    mean_probs: np.ndarray
    groups: np.ndarray
    ids: np.ndarray
    sizes: np.ndarray

    @classmethod
    def of_logprobs(cls, logprobs: np.ndarray, mean_probs: np.ndarray, tail_groups: np.ndarray) -> Outcomes:
        """Returns the outcomes of full distributions, float [N, V], each token one.  mean_probs, tail_groups: of each id, [V]."""
        ids = np.argsort(-logprobs, axis=1, kind="stable")
        ordered = np.take_along_axis(logprobs, ids, axis=1).astype(np.float64)
        return cls(ordered, mean_probs[ids], tail_groups[ids], ids, np.ones_like(ids))

    @classmethod
    def of_targets(cls, targets: SparseTargets, mean_probs: np.ndarray, tail_groups: np.ndarray) -> Outcomes:
        """Returns the outcomes of targets with many entries, and with tail groups for the rest. Arguments as of `of_logprobs`."""
        assert targets.group_logprobs is not None
        num_groups = targets.group_logprobs.shape[1]
        is_entry = targets.token_ids != PAD_ID
        ids = np.where(is_entry, targets.token_ids, 0).astype(np.int64)
        groups, entry_means = tail_groups[ids], np.where(is_entry, mean_probs[ids], 0.0)
        rests = np.broadcast_to(np.arange(num_groups), targets.group_logprobs.shape)
        rest_sizes = np.bincount(tail_groups, minlength=num_groups) - group_sums(is_entry, groups, num_groups)
        rest_means = np.bincount(tail_groups, mean_probs, num_groups) - group_sums(entry_means, groups, num_groups)
        rest_means = np.where(rest_sizes > 0, np.maximum(rest_means, 0.0), 0.0)
        return cls(
            logprobs=np.concatenate([targets.logprobs, targets.group_logprobs], axis=1).astype(np.float64),
            mean_probs=np.concatenate([entry_means, rest_means], axis=1),
            groups=np.concatenate([groups, rests], axis=1),
            ids=np.concatenate([ids, len(tail_groups) + rests], axis=1),
            sizes=np.concatenate([is_entry, rest_sizes], axis=1).astype(np.int64),
        )


def stand_in(outcomes: Outcomes, stage: str) -> np.ndarray:
    """Returns the log-probabilities, float64 [N, E], of the student of a stage in STUDENTS; the noise has a fixed seed."""
    of_teacher, of_mean, deviation = STUDENTS[stage]
    noise = deviation * np.random.default_rng(0).standard_normal(outcomes.logprobs.shape)
    with np.errstate(divide="ignore", invalid="ignore"):
        # The rest of a group counts as tokens of equal probability, over which the noise takes its mean.
        log_size = np.log(outcomes.sizes)
        logits = of_teacher * (outcomes.logprobs - log_size) + of_mean * (np.log(outcomes.mean_probs) - log_size)
        logits += log_size + np.where(outcomes.sizes > 1, deviation**2 / 2, noise)
    logits[(outcomes.sizes == 0) | np.isneginf(outcomes.logprobs)] = -np.inf
    normalised: np.ndarray = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    return normalised


def gradient_errors(
    outcomes: Outcomes,
    student_logprobs: np.ndarray,
    entries: Sequence[int | np.ndarray],
    *,
    grouped: bool,
    group_step_nats: float = 0.0,
    rebuilt: np.ndarray | None = None,
) -> list[dict[str, float]]:
    """Returns ‖Σ g_stored − Σ g_full‖ / ‖Σ g_full‖ by loss, for each choice of entries; sums over positions, norms over logits.

    student_logprobs: float64 [N, E].  entries: for each choice k, or the outcomes that are stored by themselves, bool [N, E].
    grouped: whether the tail's mass is known by group.  group_step_nats: the logs of the groups' shares of the tail are rounded
    to multiples of it (0: not at all), and the groups then scaled to the tail, as the loss does.  rebuilt: the teacher's logits
    as they are known in the tail, float64 [N, E]; the loss then scales their shares to the tail, and knows no groups.
    """
    num_rows, width = outcomes.logprobs.shape
    sums = np.zeros((1 + len(entries), len(SLOPES), int(outcomes.ids.max()) + 1))
    for start in range(0, num_rows, step := max(VALUES_PER_CHUNK // width, 1)):
        rows = slice(start, start + step)
        log_p, log_q, ids = outcomes.logprobs[rows], student_logprobs[rows], outcomes.ids[rows].ravel()
        p, q = np.exp(log_p), np.exp(log_q)
        groups = outcomes.groups[rows] if grouped else np.zeros_like(outcomes.groups[rows])
        log_ratio = np.subtract(log_p, log_q, out=np.zeros_like(q), where=q > 0)
        # The norm over n tokens with equal parts of a sum is that sum over √n.
        weight = q / np.sqrt(np.maximum(outcomes.sizes[rows], 1))
        for choice, stored in enumerate([width, *entries]):
            alone = np.arange(width) < stored if isinstance(stored, int) else stored[rows]
            alone = np.broadcast_to(alone, q.shape)
            known = log_ratio
            if rebuilt is not None:
                known = np.where(
                    alone, log_ratio, _scaled_to(p * ~alone, rebuilt[rows], alone) - np.where(q > 0, log_q, 0.0)
                )
            elif not alone.all():
                known = np.where(alone, log_ratio, _of_groups(p * ~alone, q * ~alone, groups, group_step_nats))
            head = (alone | (rebuilt is not None)) & _head(p)
            for loss, slope in enumerate(SLOPES.values()):
                slopes = slope(known, q, head)
                gradient = weight * (slopes - (q * slopes).sum(axis=1, keepdims=True))
                sums[choice, loss] += np.bincount(ids, gradient.ravel(), sums.shape[2])
    errors = np.linalg.norm(sums[1:] - sums[0], axis=2) / np.linalg.norm(sums[0], axis=1)
    return [dict(zip(SLOPES, row.tolist(), strict=True)) for row in errors]


def rebuilt_outcomes(
    outcomes: Outcomes, basis: TailBasis, coefficients: np.ndarray, tail_groups: np.ndarray
) -> np.ndarray:
    """Returns the logits that coefficients [N, R] rebuild, of outcomes: float64 [N, E].  tail_groups: of each id, int [V]."""
    vocab_size, num_groups = len(tail_groups), int(tail_groups.max()) + 1
    rebuilt = np.empty(outcomes.logprobs.shape)
    for start in range(0, len(rebuilt), step := max(VALUES_PER_CHUNK // vocab_size, 1)):
        rows = slice(start, start + step)
        ids, groups, sizes = outcomes.ids[rows], outcomes.groups[rows], outcomes.sizes[rows]
        logits = (basis.offset + coefficients[rows] @ basis.directions.T).astype(np.float64)
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        is_token = ids < vocab_size
        of_tokens = np.take_along_axis(weights, np.where(is_token, ids, 0), axis=1)
        rests = group_sums(weights, np.broadcast_to(tail_groups, weights.shape), num_groups)
        rests -= group_sums(of_tokens * (is_token & (sizes == 1)), groups, num_groups)
        of_rests = np.take_along_axis(np.maximum(rests, np.finfo(float).tiny), groups, axis=1)
        rebuilt[rows] = np.log(np.maximum(np.where(is_token, of_tokens, of_rests), np.finfo(float).tiny))
    return rebuilt


def known_residual(
    outcomes: Outcomes,
    student_logprobs: np.ndarray,
    stage: str,
    basis: TailBasis,
    coefficients: np.ndarray,
    targets: SparseTargets,
    mean_probability: np.ndarray,
    tail_groups: np.ndarray,
) -> np.ndarray:
    """Returns what the loss adds to rebuilt logits for the student of a stage, ρ·e as training estimates it: [N, E].

    The stand-in's logits are a·l + b·log(mean of p) + σ·noise, l the teacher's, so that its coefficients and its residuals e at
    the probe tokens follow from the teacher's, but for the noise in its coefficients.  targets: with the teacher's residuals.
    """
    of_teacher, of_mean, deviation = STUDENTS[stage]
    least = np.finfo(np.float32).tiny
    constant = (of_teacher - 1) * basis.offset + of_mean * np.log(np.maximum(mean_probability, least))
    weighted = basis.weights[:, None] * basis.directions
    of_constant = constant @ weighted
    rest = constant - constant @ basis.weights - basis.directions @ of_constant
    assert targets.probe_residuals is not None
    of_probes = targets.probe_residuals.astype(np.float64)
    own = of_teacher * of_probes + rest[targets.probe_ids]
    share = float(np.clip((of_probes * own).mean() / ((own**2).mean() + deviation**2), 0, 1))
    of_student = rebuilt_outcomes(outcomes, basis, of_teacher * coefficients + of_constant, tail_groups)
    return share * np.where(np.isfinite(student_logprobs), student_logprobs - of_student, 0.0)


def tail_divergence(outcomes: Outcomes, rebuilt: np.ndarray, k: int) -> float:
    """Returns the mean divergence of the rebuilt tails from the teacher's beyond k entries.  rebuilt: [N, E]."""
    p = np.exp(outcomes.logprobs)
    alone = np.broadcast_to(np.arange(p.shape[1]) < k, p.shape)
    tail = p * ~alone
    known = _scaled_to(tail, rebuilt, alone)
    terms = np.where(tail > 0, tail * (np.where(tail > 0, outcomes.logprobs, 0.0) - known), 0.0).sum(axis=1)
    mass = tail.sum(axis=1)
    return float((terms / np.where(mass > 0, mass, 1.0)).mean())


def _scaled_to(tail: np.ndarray, logits: np.ndarray, alone: np.ndarray) -> np.ndarray:
    """Returns log-probabilities of outcomes that are not known alone, as the logits share out the tail's mass: [N, E]."""
    shares = np.where(alone, -np.inf, logits)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_mass = np.log(tail.sum(axis=1, keepdims=True))
        known = logits - np.logaddexp.reduce(shares, axis=1, keepdims=True) + log_mass
    return np.where(np.isfinite(known), known, 0.0)


def group_sums(values: np.ndarray, groups: np.ndarray, num_groups: int) -> np.ndarray:
    """Returns the sums of each row by group: [N, E] and int [N, E] → float64 [N, G]."""
    cells = np.arange(len(groups))[:, None] * num_groups + groups
    return np.bincount(cells.ravel(), values.ravel(), len(groups) * num_groups).reshape(-1, num_groups)


def _head(p: np.ndarray) -> np.ndarray:
    """Returns the most probable tokens that have HEAD_MASS at most, and the first one: bool [N, E], most probable first."""
    head: np.ndarray = p.cumsum(axis=1) <= HEAD_MASS
    head[:, 0] = True
    return head


def _of_groups(p: np.ndarray, q: np.ndarray, groups: np.ndarray, step_nats: float) -> np.ndarray:
    """Returns log(p/q) of the group of each outcome [N, E]; 0 if the student gives the group nothing."""
    num_groups = int(groups.max()) + 1
    group_p, group_q = group_sums(p, groups, num_groups), group_sums(q, groups, num_groups)
    tail = group_p.sum(axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        stored = np.log(group_p)
        if step_nats:
            shares = np.exp(np.rint((stored - np.log(tail)) / step_nats) * step_nats)
            stored = np.log(tail * shares / shares.sum(axis=1, keepdims=True))
        ratio = np.where(group_q > 0, stored - np.log(group_q), 0.0)
    return np.take_along_axis(ratio, groups, axis=1)

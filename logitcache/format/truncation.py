"""Fewer entries: what leaves a position's entry list joins its tail, and everything known of the tail follows.

With D the entries that leave, T the old tail, T ∪ D the new one:

    log mass      log(t + Σ_D p)                    of the tail, and of each tail group
    tempered      log(Σ_T p^(1/τ) + Σ_D p^(1/τ))
    entropy       (t·e + Σ_D p log p) / (t + Σ_D p)
    samples       each stays with probability t / (t + Σ_D p), otherwise it is drawn from D in proportion to p:
                  an independent draw from the new tail where it was one from the old tail

All in float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from logitcache.format.scaling import scaled_beside_tail, scaled_to_tail
from logitcache.format.targets import PAD_ID, SparseTargets


def in_nucleus(probs: Any, rank: Any, top_p: float, min_k: int) -> Any:
    """Returns which entries are taken, bool [M, k] or [k]: entries until they hold `top_p` of the mass, at least `min_k`.

    A cache that is made smaller and a capture (`logitcache.capture.selection`) both ask this function: numpy and torch
    compute it alike.

    Args:
        probs: float64 [M, k], descending in each row.
        rank: int [k], 0 … k − 1.
        top_p: probability mass; 1 takes all entries.
        min_k: number of entries.
    """
    return rank >= 0 if top_p >= 1 else (probs.cumsum(1) - probs < top_p) | (rank < min_k)


def nucleus(logprobs: np.ndarray, top_k: int, top_p: float, min_k: int) -> np.ndarray:
    """Returns which of more entries a capture with these settings takes, bool [M, ≤ top_k]: a prefix of each row.

    logprobs: [M, k], descending, −inf beyond a position's entries.
    """
    logprobs = logprobs[:, :top_k]
    probs = np.exp(logprobs, dtype=np.float64)
    taken: np.ndarray = ~np.isneginf(logprobs) & in_nucleus(probs, np.arange(probs.shape[1]), top_p, min_k)
    return taken


def truncate(
    targets: SparseTargets,
    keep: np.ndarray,
    tail_groups: np.ndarray | None = None,
    random: np.random.Generator | None = None,
) -> SparseTargets:
    """The first `keep`, int [M], entries of each position, the others in its tail.

    tail_groups: int [V], group of each id; needed where the targets hold tail groups.
    random: decides the tail samples; needed where the targets hold some, and to be independent of what drew them.
    """
    width = int(keep.max(initial=0))
    rank = np.arange(targets.token_ids.shape[1])
    leaves = (rank >= keep[:, None]) & (targets.token_ids != PAD_ID)
    if not leaves.any():
        return targets.cut_to_width(width)
    stays = rank[:width] < keep[:, None]
    scaled = scaled_beside_tail(targets.logprobs, targets.tail_logprob)  # so that no tail exceeds 1
    logprobs = np.where(leaves, scaled, -np.inf).astype(np.float64)  # [M, k]
    left = _logsumexp(logprobs)
    tail = np.logaddexp(targets.tail_logprob, left)
    group_logprobs = sample_ids = sample_logprobs = None
    if targets.group_logprobs is not None:
        assert tail_groups is not None
        scaled_groups = scaled_to_tail(targets.group_logprobs, targets.tail_logprob)
        assert scaled_groups is not None
        shares = np.where(leaves.any(axis=1)[:, None], scaled_groups, targets.group_logprobs)
        group_logprobs = _with_entries(shares, targets.token_ids, np.exp(logprobs), tail_groups)
    if targets.sample_ids is not None and targets.sample_logprobs is not None:
        assert random is not None
        replaced = random.random(targets.sample_ids.shape) < _ratio(left, tail)[:, None]
        drawn = _draw(_ratio(logprobs, left[:, None]), targets.sample_ids.shape[1], random)
        rows = np.arange(len(drawn))[:, None]
        sample_ids = np.where(replaced, targets.token_ids[rows, drawn], targets.sample_ids)
        sample_logprobs = np.where(replaced, targets.logprobs[rows, drawn], targets.sample_logprobs)
    return SparseTargets(
        token_ids=np.where(stays, targets.token_ids[:, :width], PAD_ID),
        logprobs=np.where(stays, targets.logprobs[:, :width], -np.inf),
        tail_logprob=tail.astype(np.float32),
        group_logprobs=group_logprobs,
        tempered_tail={
            t: np.logaddexp(old, _logsumexp(logprobs / t)).astype(np.float32)
            for t, old in targets.tempered_tail.items()
        },
        tail_entropy=None if targets.tail_entropy is None else _entropy(targets, logprobs, tail),
        sample_ids=sample_ids,
        sample_logprobs=sample_logprobs,
    )


def _logsumexp(logprobs: np.ndarray) -> np.ndarray:
    """Of each row: [M]."""
    total: np.ndarray = np.logaddexp.reduce(logprobs, axis=1, initial=-np.inf)
    return total


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """exp(part − whole), 0 where both are nothing."""
    return np.exp(part - np.where(np.isneginf(whole), 0.0, whole))


def _entropy(targets: SparseTargets, logprobs: np.ndarray, tail: np.ndarray) -> np.ndarray:
    """Σ p log p over the new tail, divided by its mass, float32 [M]. tail: log of that mass."""
    assert targets.tail_entropy is not None
    finite = np.where(np.isneginf(logprobs), 0.0, logprobs)
    old = _ratio(targets.tail_logprob.astype(np.float64), tail) * targets.tail_entropy
    added = (_ratio(logprobs, tail[:, None]) * finite).sum(axis=1)
    return (old + added).astype(np.float32)


def _with_entries(
    group_logprobs: np.ndarray, token_ids: np.ndarray, probs: np.ndarray, tail_groups: np.ndarray
) -> np.ndarray:
    """Log masses of the groups, float32 [M, G], with those entries in them that have a probability [M, k]."""
    num_positions, num_groups = group_logprobs.shape
    groups = tail_groups[np.where(token_ids == PAD_ID, 0, token_ids)]
    cells = (groups + num_groups * np.arange(num_positions)[:, None]).reshape(-1)
    added = np.bincount(cells, weights=probs.reshape(-1), minlength=group_logprobs.size)
    with np.errstate(divide="ignore"):
        return np.logaddexp(group_logprobs, np.log(added).reshape(group_logprobs.shape)).astype(np.float32)


def _draw(weights: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """Columns drawn in proportion to weights [M, k], with replacement: int [M, count]; anything where all are 0."""
    cumulated = weights.cumsum(axis=1)
    wanted = random.random((len(weights), count)) * cumulated[:, -1:]
    columns = np.stack([(cumulated <= wanted[:, [i]]).sum(axis=1) for i in range(count)], axis=1)
    last = weights.shape[1] - 1 - np.argmax(weights[:, ::-1] > 0, axis=1)  # rounding may carry a draw past the last
    return np.minimum(columns, last[:, None])

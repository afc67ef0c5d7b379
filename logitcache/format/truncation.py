"""Entries that leave a position's list join its tail, and everything known of the tail follows, see `tail_parts`."""

from __future__ import annotations

from typing import Any

import numpy as np

from logitcache.format.scaling import scaled_beside_tail
from logitcache.format.tail_part import Leaving, logsumexp
from logitcache.format.tail_parts import parts_of
from logitcache.format.targets import PAD_ID, SparseTargets


def in_nucleus(probs: Any, rank: Any, top_p: float, min_k: int) -> Any:
    """Returns which entries are taken, bool [M, k] or [k]: entries until they hold `top_p` of the mass, at least `min_k`.

    A cache that is made smaller and a capture (`logitcache.capture.selection`) both ask this function: numpy and torch compute
    it alike.  probs: float64 [M, k], descending in each row.  rank: int [k], 0 … k − 1.
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
    """Moves all but the first `keep`, int [M], entries of each position to its tail.

    tail_groups: the group of each id, int [V], for targets with tail groups.  random: decides the samples of targets with
    samples, and is independent of what drew those.
    """
    width = int(keep.max(initial=0))
    rank = np.arange(targets.token_ids.shape[1])
    leaves = (rank >= keep[:, None]) & (targets.token_ids != PAD_ID)
    if not leaves.any():
        return targets.cut_to_width(width)
    stays = rank[:width] < keep[:, None]
    scaled = scaled_beside_tail(targets.logprobs, targets.tail_logprob)  # so that no tail exceeds 1
    logprobs = np.where(leaves, scaled, -np.inf).astype(np.float64)  # [M, k]
    mass = logsumexp(logprobs)
    tail = np.logaddexp(targets.tail_logprob, mass)
    leaving = Leaving(targets, leaves, logprobs, mass, tail, tail_groups, random)
    fields = {name: values for part in parts_of(targets) for name, values in part.truncate(leaving).items()}
    return SparseTargets(
        token_ids=np.where(stays, targets.token_ids[:, :width], PAD_ID),
        logprobs=np.where(stays, targets.logprobs[:, :width], -np.inf),
        tail_logprob=tail.astype(np.float32),
        **fields,
    )

"""Masses that were rounded one by one are brought to add up again."""

from __future__ import annotations

import numpy as np


def scaled_beside_tail(logprobs: np.ndarray, tail_logprob: np.ndarray) -> np.ndarray:
    """Scales log-probabilities of entries, float32 [M, k], which are stored rounded: they and the tail [M] add up to 1.

    All entries of a position change by one factor, of 2 at most: where they hold next to nothing, it is the tail's own
    rounding that would be amplified.
    """
    missing = -np.expm1(tail_logprob.astype(np.float64))
    mass = np.exp(logprobs, dtype=np.float64).sum(axis=1)
    factor = np.divide(missing, mass, where=mass > 0, out=np.ones_like(mass))
    scaled: np.ndarray = logprobs + np.log(np.clip(factor, 0.5, 2.0))[:, None].astype(np.float32)
    return scaled


def scaled_to_tail(group_logprobs: np.ndarray, tail_logprob: np.ndarray) -> np.ndarray:
    """Scales log masses of the tail's groups, float32 [M, G], which are stored rounded: they add up to the tail [M].

    All groups of a position change by one factor; where none has any mass they stay.
    """
    with np.errstate(divide="ignore"):
        total = np.log(np.exp(group_logprobs, dtype=np.float64).sum(axis=1))
    shift = np.subtract(tail_logprob, total, where=np.isfinite(total), out=np.zeros_like(total))
    scaled: np.ndarray = group_logprobs + shift[:, None].astype(np.float32)
    return scaled


def scaled_within_tail(sample_logprobs: np.ndarray, sample_ids: np.ndarray, tail_logprob: np.ndarray) -> np.ndarray:
    """Scales log-probabilities of samples, float32 [M, s], which are stored rounded: they hold no more than the tail [M].

    All samples of a position, ids [M, s], change by one factor, of 0.9 at least: rounding needs no more.
    """
    order = np.argsort(sample_ids, axis=1)
    ids = np.take_along_axis(sample_ids, order, axis=1)
    once = ids >= 0
    once[:, 1:] &= ids[:, 1:] != ids[:, :-1]
    probs = np.exp(np.take_along_axis(sample_logprobs, order, axis=1), dtype=np.float64)
    mass = np.where(once, probs, 0.0).sum(axis=1)
    factor = np.divide(np.exp(tail_logprob, dtype=np.float64), mass, where=mass > 0, out=np.ones_like(mass))
    scaled: np.ndarray = sample_logprobs + np.log(np.clip(factor, 0.9, 1.0))[:, None].astype(np.float32)
    return scaled

"""The partition of the vocabulary into tail groups."""

from __future__ import annotations

import numpy as np

CALIBRATION_POSITIONS = 4096
"""Stored positions whose mean probability orders the vocabulary."""


def rank_bands(mean_probability: np.ndarray, num_groups: int) -> np.ndarray:
    """Log-spaced bands of token rank: int32 [V], group 0 the most probable tokens.

    Ids are ranked by `mean_probability` [V]; band edges grow geometrically from rank 1 to V, so that under Zipf's law all
    bands hold about the same mass. Every group has at least one id.
    """
    vocab_size = len(mean_probability)
    edges = np.rint(np.geomspace(1, vocab_size, num_groups + 1)[1:]).astype(np.int64)
    floor = np.arange(1, num_groups + 1)
    edges = np.maximum.accumulate(np.maximum(edges, floor))
    edges = floor + np.maximum.accumulate(edges - floor)
    edges[-1] = vocab_size
    groups = np.empty(vocab_size, dtype=np.int32)
    order = np.argsort(-mean_probability, kind="stable")
    groups[order] = np.searchsorted(edges, np.arange(vocab_size), side="right")
    return groups

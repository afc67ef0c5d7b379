"""The probe tokens of a position are drawn from the vocabulary by a generator that any language computes alike.

    seed = the 8 bytes of BLAKE2b(row id, digest size 8) as a little-endian integer
    x    = seed + (position · 256 + j + 1) · 0x9E3779B97F4A7C15          of probe j = 0 … P − 1, modulo 2⁶⁴
    id   = (SplitMix64(x) >> 32) · V >> 32

so that a cache stores what belongs to them and not the ids. The position is that of the logits, as in
`CachedSequence.positions`. The README's format section has test vectors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

MOST_PROBES = 255
"""Of a position, by the generator's counting."""
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def probe_ids(row_id: str, positions: np.ndarray, num_probes: int, vocab_size: int) -> np.ndarray:
    """Returns the probe tokens of a row's positions, int32 [M, P].  positions: as in CachedSequence, int [M]."""
    return probe_ids_of_rows([row_id], [len(positions)], positions, num_probes, vocab_size)


def probe_ids_of_rows(
    row_ids: Sequence[str], lengths: Sequence[int] | np.ndarray, positions: np.ndarray, num_probes: int, vocab_size: int
) -> np.ndarray:
    """Returns the probe tokens of several rows' positions, one row after the other: int32 [Σ lengths, P]."""
    digests = b"".join(hashlib.blake2b(row_id.encode(), digest_size=8).digest() for row_id in row_ids)
    seeds = np.repeat(np.frombuffer(digests, "<u8").astype(np.uint64), lengths)
    counts = positions.astype(np.uint64)[:, None] * np.uint64(256) + np.arange(1, num_probes + 1, dtype=np.uint64)
    drawn = splitmix64(seeds[:, None] + counts * _GOLDEN) >> np.uint64(32)
    ids: np.ndarray = (drawn * np.uint64(vocab_size) >> np.uint64(32)).astype(np.int32)
    return ids


def splitmix64(state: np.ndarray) -> np.ndarray:
    """Returns uint64 numbers that look random, one of each state: SplitMix64 (Steele, Lea and Flood, 2014)."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = state ^ (state >> np.uint64(31))
    return mixed

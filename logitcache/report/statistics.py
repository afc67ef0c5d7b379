"""Statistics describe a cache's distributions: mass by k, entropy, tail, entries per position."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from logitcache.format.manifest import Manifest
from logitcache.format.targets import PAD_ID, SparseTargets
from logitcache.reading.shard_reader import ShardReader
from logitcache.storage.folder import Folder

READ_ROW_GROUPS = 16
"""Row groups that are read, evenly spread over the cache: some 130 000 positions at k = 64, however large it is."""
ENTROPY_BARS = 40
TAIL_BARS_PER_DECADE = 4
LEAST_TAIL_MASS = 1e-6
"""Tails below it stand in the first bar: rounded caches tell them no better apart."""
PERCENTILES = (5, 25, 50, 75, 95)


@dataclass(frozen=True)
class Histogram:
    """Counts of values between edges: `counts[i]` lie in edges[i]…edges[i + 1]. Values outside are counted at the ends."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Statistics:
    """The statistics of some positions; all are 0 or empty if there is none.

    num_positions: positions that were read.  sampled: these are not all of the cache.  ks: 1, 2, 4, … and the most entries of
    any position.  mass_covered: for each k the mean probability of the k most probable entries, or of all if a position has
    fewer.  entropy: "mean", "p5", "p25", "p50", "p75" and "p95" over the positions, nats; see `entropies`.
    entropy_is_lower_bound: the tail counts as one outcome, as its own entropy was not captured.  tail_mass: the same keys,
    probability outside the entries.  entries_per_position: number of entries → positions that have so many.  entropy_histogram:
    in nats.  tail_histogram: edges are tail masses, evenly spaced in their logarithm.
    """

    num_positions: int
    sampled: bool
    ks: tuple[int, ...]
    mass_covered: tuple[float, ...]
    entropy: Mapping[str, float]
    entropy_is_lower_bound: bool
    tail_mass: Mapping[str, float]
    entries_per_position: Mapping[int, int]
    entropy_histogram: Histogram
    tail_histogram: Histogram


def statistics(folder: Folder, manifest: Manifest) -> Statistics:
    """Computes the statistics of at most `READ_ROW_GROUPS` row groups, always the same ones of a cache.

    Raises UserError if a shard is not the one that the manifest names, or holds values that are no log-probabilities.
    """
    row_groups = [(info, index) for info in manifest.shards for index in range(len(info.row_group_sizes))]
    chosen = evenly_spread(len(row_groups), READ_ROW_GROUPS)
    entropy, tail_mass, covered = [np.zeros(0)], [np.zeros(0)], [np.zeros(0)]
    counts: Counter[int] = Counter()
    for number in chosen:
        info, index = row_groups[number]
        targets = ShardReader(folder, info, manifest.layout).read_row_group(index).targets
        entropy.append(entropies(targets))
        tail_mass.append(np.exp(targets.tail_logprob, dtype=np.float64))
        covered.append(np.cumsum(_probabilities(targets).sum(axis=0)))
        values, found = np.unique(targets.num_entries, return_counts=True)
        counts.update(dict(zip(values.tolist(), found.tolist(), strict=True)))
    total = counts.total()
    ks = _powers_of_two(max(counts, default=0))
    entropy_all, tail_all = np.concatenate(entropy), np.concatenate(tail_mass)
    return Statistics(
        num_positions=total,
        sampled=len(chosen) < len(row_groups),
        ks=ks,
        mass_covered=tuple(
            float(sum(masses[min(k, len(masses)) - 1] for masses in covered if len(masses)) / total) for k in ks
        ),
        entropy=_summary(entropy_all),
        entropy_is_lower_bound=not manifest.layout.tail_parts.entropy,
        tail_mass=_summary(tail_all),
        entries_per_position=dict(sorted(counts.items())),
        entropy_histogram=_histogram(
            entropy_all, np.linspace(0, np.ceil(entropy_all.max(initial=1)), ENTROPY_BARS + 1)
        ),
        tail_histogram=_histogram(tail_all, _tail_edges()),
    )


def evenly_spread(count: int, most: int) -> list[int]:
    """Returns at most `most` of the numbers 0 … count − 1, evenly spread, first and last included."""
    numbers: list[int] = np.unique(np.linspace(0, count - 1, min(count, most)).astype(int)).tolist()
    return numbers


def entropies(targets: SparseTargets) -> np.ndarray:
    """Returns the entropy of each position in nats, float64 [M], −Σ p log p over the entries and the tail.

    Without a captured tail entropy the tail is one outcome of its mass P, −P log P: a lower bound.
    """
    tail_logprob = targets.tail_logprob.astype(np.float64)
    tail_mass = np.exp(tail_logprob)
    # Where the tail has no mass its logarithm is −∞, and it adds nothing.
    own = tail_logprob if targets.tail_entropy is None else targets.tail_entropy
    tail = np.where(tail_mass > 0, tail_mass * np.where(np.isfinite(own), own, 0), 0)
    logprobs = np.where(np.isfinite(targets.logprobs), targets.logprobs, 0)
    entropy: np.ndarray = -(_probabilities(targets) * logprobs).sum(axis=1) - tail
    return entropy.clip(min=0)  # rounding may leave −0.0001 of a certain position


def _probabilities(targets: SparseTargets) -> np.ndarray:
    """Returns probabilities, float64 [M, k], 0 if a position has no entry there."""
    probabilities = np.zeros(targets.logprobs.shape)
    np.exp(targets.logprobs, dtype=np.float64, where=targets.token_ids != PAD_ID, out=probabilities)
    return probabilities


def _powers_of_two(most: int) -> tuple[int, ...]:
    """Returns 1, 2, 4, … below `most`, and `most`."""
    return (*(2**n for n in range(most.bit_length()) if 2**n < most), most) if most else ()


def _summary(values: np.ndarray) -> dict[str, float]:
    """Returns mean and percentiles; 0 if there are no values."""
    if not len(values):
        values = np.zeros(1)
    names = [f"p{percentile}" for percentile in PERCENTILES]
    return {"mean": float(values.mean())} | dict(zip(names, np.percentile(values, PERCENTILES).tolist(), strict=True))


def _tail_edges() -> np.ndarray:
    decades = -np.log10(LEAST_TAIL_MASS)
    return np.logspace(-decades, 0, round(decades * TAIL_BARS_PER_DECADE) + 1)


def _histogram(values: np.ndarray, edges: np.ndarray) -> Histogram:
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    return Histogram(tuple(edges.tolist()), tuple(counts.tolist()))

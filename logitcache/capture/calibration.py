"""The tail groups of a cache: clusters of tokens that the teacher makes probable in the same places.

Within a group the loss lets the student keep its own shape, so a group costs nothing if the teacher's and the student's
log-probabilities of its tokens rise and fall together from position to position. A few dozen positions show which tokens
rise and fall together for the teacher: `tools/bench_fidelity.py` compares these groups with bands of mean probability.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from logitcache.capture.teachers.base import LogitTeacher
from logitcache.errors import UserError
from logitcache.format.sequences import TokenSequence

CALIBRATION_POSITIONS = 64
"""Stored positions whose distributions are compared; 24 do nearly as well."""
HEAD_ENTRIES = 16
"""Tokens of a position that are taken to be entries, which no group needs to describe."""
ITERATIONS = 25
LEAST_LOGPROB = -80.0
"""The least log-probability of a token, banned ones too, so that distances stay finite."""


def make_tail_groups(teacher: LogitTeacher, sequences: Sequence[TokenSequence], num_groups: int) -> np.ndarray:
    """Returns the group of each id, int32 [V], by the teacher's distributions at stored positions drawn at random.

    Raises UserError if the teacher gives no numbers.
    """
    with np.errstate(divide="ignore"):
        logprobs = [np.log(teacher.mean_probability([one])) for one in _single_positions(sequences)]
    numbers = [one for one in logprobs if not np.isnan(one).any()]  # a row that gives none is refused when it is scored
    if not numbers:
        raise UserError("the teacher gives no log-probabilities that are numbers: try another --dtype")
    return profile_clusters(np.stack(numbers).astype(np.float32), num_groups)


def _single_positions(sequences: Sequence[TokenSequence]) -> list[TokenSequence]:
    """Returns beginnings of sequences of which only the last position is stored."""
    owners = np.repeat(np.arange(len(sequences)), [len(sequence.positions) for sequence in sequences])
    positions = np.concatenate([sequence.positions for sequence in sequences])
    single = []
    for drawn in np.random.default_rng(0).permutation(len(owners))[:CALIBRATION_POSITIONS]:
        length = int(positions[drawn]) + 2
        single.append(TokenSequence(sequences[owners[drawn]].input_ids[:length], np.arange(length) == length - 1))
    return single


def profile_clusters(logprobs: np.ndarray, num_groups: int) -> np.ndarray:
    """Returns the cluster of each token, int32 [V], by a weighted k-means; cluster 0 has the most probable tokens.

    logprobs: the teacher's full distributions at C positions, float [C, V]. A token is the point of its log-probabilities
    there, its weight the square root of its mean probability outside the head. Each of the num_groups ≤ V clusters has at least
    one id. Lloyd 1982, doi 10.1109/TIT.1982.1056489.
    """
    vocab_size = logprobs.shape[1]
    assert num_groups <= vocab_size, f"{num_groups} groups of {vocab_size} tokens"
    points = np.maximum(logprobs.T, LEAST_LOGPROB).astype(np.float32)  # [V, C]
    probabilities = np.exp(logprobs, dtype=np.float64)
    mean = probabilities.mean(axis=0)
    head = np.argpartition(-logprobs, min(HEAD_ENTRIES, vocab_size - 1), axis=1)[:, :HEAD_ENTRIES]
    np.put_along_axis(probabilities, head, 0.0, axis=1)
    weights = np.sqrt(probabilities.mean(axis=0) + np.finfo(np.float32).tiny)

    drawn = np.random.default_rng(0).choice(vocab_size, num_groups, replace=False, p=weights / weights.sum())
    centres = points[drawn]
    for _ in range(ITERATIONS):
        distances = _distances(points, centres)
        groups = distances.argmin(axis=1)
        _fill_empty(groups, weights * distances.min(axis=1), num_groups)
        memberships = (groups == np.arange(num_groups)[:, None]) * weights.astype(np.float32)  # [G, V]
        centres = memberships @ points / memberships.sum(axis=1, keepdims=True)
    order = np.argsort(-np.bincount(groups, mean, num_groups), kind="stable")
    by_size: np.ndarray = np.argsort(order).astype(np.int32)[groups]
    return by_size


def _distances(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Returns squared Euclidean distances, float32 [V, G]."""
    squares = (points**2).sum(axis=1)[:, None] + (centres**2).sum(axis=1)
    distances: np.ndarray = np.maximum(squares - 2 * points @ centres.T, 0)
    return distances


def _fill_empty(groups: np.ndarray, costs: np.ndarray, num_groups: int) -> None:
    """Gives each group without ids the costliest id of a group that has others; in place."""
    sizes = np.bincount(groups, minlength=num_groups)
    costliest = iter(np.argsort(-costs, kind="stable"))
    for empty in np.flatnonzero(sizes == 0):
        moved = next(i for i in costliest if sizes[groups[i]] > 1)
        sizes[groups[moved]] -= 1
        groups[moved] = empty
        sizes[empty] = 1

"""The mean of several teachers' distributions, each known by its entries and the mass of its tail."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from logitcache import SparseTargets
from logitcache.format.targets import PAD_ID, concatenate

VALUES_AT_ONCE = 1 << 20
"""Entries of all teachers that are averaged at a time, some 64 MiB while they are."""


def mean_targets(teachers: Sequence[SparseTargets], vocab_size: int) -> SparseTargets:
    """Mean of the teachers' probabilities at the same M positions, over the union of their entries.

    For an id that teacher i stores the probability is known. For one of the m_i ids that only others store it lies in i's
    tail, of mass t_i, and below i's smallest entry; half of min(smallest entry, t_i/m_i) stands for it and is taken out of
    the tail. So the mean is exact where all store an id; otherwise it is off by less than the smallest entry, and by less
    than half of that where the tail is no smaller than m_i such entries. Entries and tail sum to 1 as the teachers' do.
    Where the union is the whole vocabulary t_i/m_i stands for each, and nothing is left of the tail.

    Returns entries, descending, and tail; what else the teachers hold of their tails has no mean.
    """
    width = sum(teacher.token_ids.shape[1] for teacher in teachers)
    at_once = max(1, VALUES_AT_ONCE // max(width, 1))
    starts = range(0, max(len(teachers[0]), 1), at_once)
    parts = [_mean([teacher[start : start + at_once] for teacher in teachers], vocab_size) for start in starts]
    return concatenate(parts)


def _mean(teachers: Sequence[SparseTargets], vocab_size: int) -> SparseTargets:
    ids, columns = _by_id(np.concatenate([teacher.token_ids for teacher in teachers], axis=1))  # [M, K]
    held = ids < vocab_size
    first = (np.diff(ids, axis=1, prepend=PAD_ID) != 0) & held  # of the entries of an id
    union = first.sum(axis=1)  # [M]
    estimates, tails = zip(*(_taken_from_tail(teacher, union, vocab_size) for teacher in teachers), strict=True)
    # Of every id all estimates, and beyond them what those know that store it.
    known = [
        np.exp(teacher.logprobs, dtype=np.float64) - estimate[:, None]
        for teacher, estimate in zip(teachers, estimates, strict=True)
    ]
    beyond = np.take_along_axis(np.concatenate(known, axis=1), columns, axis=1)
    num_positions, k = len(ids), int(union.max(initial=0))
    entry_of = np.arange(num_positions)[:, None] * k + np.cumsum(first, axis=1) - 1  # [M, K], into [M, k] flattened
    above = np.bincount(entry_of[held], beyond[held], minlength=num_positions * k).reshape(num_positions, k)
    is_entry = np.arange(k) < union[:, None]
    probs = np.where(is_entry, above + np.sum(estimates, axis=0)[:, None], 0) / len(teachers)
    token_ids = np.full((num_positions, k), PAD_ID, np.int32)
    token_ids[is_entry] = ids[first]
    with np.errstate(divide="ignore"):
        tail_logprob = np.log(np.mean(tails, axis=0)).astype(np.float32)
        return SparseTargets(*_descending(token_ids, np.log(probs).astype(np.float32)), tail_logprob)


def _taken_from_tail(teacher: SparseTargets, union: np.ndarray, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """What stands for each id that the teacher lacks, and what that leaves of its tail; float64 [M]."""
    held = teacher.token_ids != PAD_ID
    missing = union - held.sum(axis=1)
    tail = np.exp(teacher.tail_logprob, dtype=np.float64)
    share = tail / np.maximum(missing, 1)
    smallest = np.exp(np.min(teacher.logprobs, axis=1, where=held, initial=0), dtype=np.float64)
    whole = union == vocab_size
    estimate = np.where(missing == 0, 0, np.where(whole, share, np.minimum(smallest, share) / 2))
    return estimate, np.where(whole & (missing > 0), 0, tail - missing * estimate)


def _by_id(token_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ids of each position ascending, padding last and as a large number, and the columns they came from; [M, K]."""
    keys = token_ids.view(np.uint32).astype(np.uint64) << np.uint64(32) | np.arange(token_ids.shape[1], dtype=np.uint64)
    keys.sort(axis=1)
    return (keys >> np.uint64(32)).astype(np.int64), (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)


def _descending(token_ids: np.ndarray, logprobs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Entries with the most probable first; one that no teacher gives any probability is padding."""
    surprise = np.maximum(-logprobs, np.float32(0)) + np.float32(0)  # ≥ +0: its bits ascend as it does
    keys = surprise.view(np.uint32).astype(np.uint64) << np.uint64(32) | token_ids.view(np.uint32)
    keys.sort(axis=1)
    logprobs = -(keys >> np.uint64(32)).astype(np.uint32).view(np.float32)
    token_ids = keys.astype(np.uint32).view(np.int32)
    return np.where(np.isfinite(logprobs), token_ids, np.int32(PAD_ID)), logprobs

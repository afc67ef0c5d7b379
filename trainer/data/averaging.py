"""Rows of a cache whose targets are the mean over several teachers, found in the other teachers' caches by row id."""

from __future__ import annotations

import math
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from logitcache import CachedSequence, LogitCache, SparseTargets, UserError
from logitcache.format.targets import PAD_ID, concatenate
from logitcache.reading.cache import SHUFFLE_ROW_GROUPS
from logitcache.reading.row_index import RowIndex, id_bytes

VALUES_AT_ONCE = 1 << 20
"""Entries of all teachers that are averaged at a time, some 64 MiB while they are."""


def mean_targets(teachers: Sequence[SparseTargets], vocab_size: int) -> SparseTargets:
    """Average the teachers' probabilities at the same M positions, over the union of their entries.

    For an id that teacher i stores the probability is known. For one of the m_i ids that only others store it lies in i's
    tail, of mass t_i, and below i's smallest entry; half of min(smallest entry, t_i/m_i) stands for it and is taken out of
    the tail. So the mean is exact where all store an id; otherwise it is off by less than the smallest entry, and by less
    than half of that where the tail is no smaller than m_i such entries. Entries and tail sum to 1 as the teachers' do.
    Where the union is the whole vocabulary t_i/m_i stands for each, and nothing is left of the tail.

    The teachers' k may differ. The mean holds entries, descending, and the mass of the tail; further numbers that the
    teachers hold of their tails have no mean.
    """
    width = sum(teacher.token_ids.shape[1] for teacher in teachers)
    at_once = max(1, VALUES_AT_ONCE // max(width, 1))
    starts = range(0, max(len(teachers[0]), 1), at_once)
    parts = [_mean([teacher[start : start + at_once] for teacher in teachers], vocab_size) for start in starts]
    return concatenate(parts)


def _mean(teachers: Sequence[SparseTargets], vocab_size: int) -> SparseTargets:
    ids, columns = _by_id(np.concatenate([teacher.token_ids for teacher in teachers], axis=1))  # [M, K]
    is_id = ids < vocab_size
    first = (np.diff(ids, axis=1, prepend=PAD_ID) != 0) & is_id  # of the entries of an id
    union = first.sum(axis=1)  # [M]
    estimates, tails = zip(*(_taken_from_tail(teacher, union, vocab_size) for teacher in teachers), strict=True)
    # Every teacher gives its estimate for every id; a teacher that stores the id gives the rest of its probability.
    known = [
        np.exp(teacher.logprobs, dtype=np.float64) - estimate[:, None]
        for teacher, estimate in zip(teachers, estimates, strict=True)
    ]
    beyond = np.take_along_axis(np.concatenate(known, axis=1), columns, axis=1)
    num_positions, k = len(ids), int(union.max(initial=0))
    entry_of = np.arange(num_positions)[:, None] * k + np.cumsum(first, axis=1) - 1  # [M, K], into [M, k] flattened
    above = np.bincount(entry_of[is_id], beyond[is_id], minlength=num_positions * k).reshape(num_positions, k)
    is_entry = np.arange(k) < union[:, None]
    probs = np.where(is_entry, above + np.sum(estimates, axis=0)[:, None], 0) / len(teachers)
    token_ids = np.full((num_positions, k), PAD_ID, np.int32)
    token_ids[is_entry] = ids[first]
    with np.errstate(divide="ignore"):
        tail_logprob = np.log(np.mean(tails, axis=0)).astype(np.float32)
        return SparseTargets(*_descending(token_ids, np.log(probs).astype(np.float32)), tail_logprob)


def _taken_from_tail(teacher: SparseTargets, union: np.ndarray, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Estimate the probability of each id that the teacher lacks, and the tail that is left of it; float64 [M]."""
    stored = teacher.token_ids != PAD_ID
    missing = union - stored.sum(axis=1)
    tail = np.exp(teacher.tail_logprob, dtype=np.float64)
    share = tail / np.maximum(missing, 1)
    smallest = np.exp(np.min(teacher.logprobs, axis=1, where=stored, initial=0), dtype=np.float64)
    whole = union == vocab_size
    estimate = np.where(missing == 0, 0, np.where(whole, share, np.minimum(smallest, share) / 2))
    return estimate, np.where(whole & (missing > 0), 0, tail - missing * estimate)


def _by_id(token_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sort the ids of each position, padding last and as a large number; and the columns they came from; [M, K]."""
    keys = token_ids.view(np.uint32).astype(np.uint64) << np.uint64(32) | np.arange(token_ids.shape[1], dtype=np.uint64)
    keys.sort(axis=1)
    return (keys >> np.uint64(32)).astype(np.int64), (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)


def _descending(token_ids: np.ndarray, logprobs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sort entries, the most probable first; an entry without probability becomes padding."""
    surprise = np.maximum(-logprobs, np.float32(0)) + np.float32(0)  # ≥ +0: its bits ascend as it does
    keys = surprise.view(np.uint32).astype(np.uint64) << np.uint64(32) | token_ids.view(np.uint32)
    keys.sort(axis=1)
    logprobs = -(keys >> np.uint64(32)).astype(np.uint32).view(np.float32)
    token_ids = keys.astype(np.uint32).view(np.int32)
    return np.where(np.isfinite(logprobs), token_ids, np.int32(PAD_ID)), logprobs


class TeacherTargetsById:
    """The targets of another teacher's cache, by row id.

    It keeps as many decoded row groups as shuffled streams of `caches` mix at a time, some 128 MiB. If the other cache
    has its rows in about the order of `caches`, each row group is decoded once; otherwise up to once a row.
    """

    def __init__(self, cache: LogitCache, caches: Sequence[LogitCache]) -> None:
        self.cache = cache
        self._numbers = RowLookup(cache)
        spanned = sum(1 + math.ceil(_rows_per_group(one) / _rows_per_group(cache)) for one in caches)
        self._row_group = lru_cache(SHUFFLE_ROW_GROUPS * spanned)(cache.read_row_group)

    def check_holds(self, cache: LogitCache) -> None:
        """Raises UserError if this cache lacks rows of `cache`."""
        missing = sum(int((self._numbers.find(ids) < 0).sum()) for ids in row_ids(cache))
        if missing:
            raise UserError(
                f"--average_with {self.cache.path}: {missing:,} of the {len(cache):,} rows of {cache.path} are not "
                "there. Score them with that teacher and `logitcache merge` the two, or leave them out with "
                f"`logitcache slice {cache.path} --row-ids …`"
            )

    def targets(self, row_id: str) -> SparseTargets:
        """Return the targets of a row. Raises UserError if the cache has no such row."""
        number = int(self._numbers.find(id_bytes([row_id]))[0])
        if number < 0:
            raise UserError(
                f"--average_with {self.cache.path} has no row {row_id}: was it altered since the run began?"
            )
        row_group, row = self.cache.row_group_of(number)
        return self._row_group(row_group)[row].targets


def averaged(row: CachedSequence, others: Sequence[TeacherTargetsById], vocab_size: int) -> CachedSequence:
    """Return the row with the mean targets of its own teacher and the others, see `mean_targets`."""
    targets = [row.targets, *(other.targets(row.row_id) for other in others)]
    return replace(row, targets=mean_targets(targets, vocab_size))


def _rows_per_group(cache: LogitCache) -> float:
    return len(cache) / sum(len(shard.row_group_sizes) for shard in cache.manifest.shards)


def row_ids(cache: LogitCache) -> Iterator[np.ndarray]:
    """Yield the row ids of a cache, S16 arrays in row order. Raises UserError for a malformed one."""
    for table in cache.iter_columns(["row_id"]):
        try:
            yield id_bytes(table["row_id"].to_pylist())
        except (TypeError, ValueError) as error:
            raise UserError(f"{cache.path}: {error}: fetch or build it again") from error


class RowLookup:
    """Row id → row number of a cache: 24 bytes a row in a temporary folder, which is removed with this object."""

    def __init__(self, cache: LogitCache) -> None:
        folder = tempfile.mkdtemp(prefix="row-ids-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._index = RowIndex(Path(folder), row_ids(cache), len(cache))

    def find(self, ids: np.ndarray) -> np.ndarray:
        """Return the row number of each id, int64 [n], −1 for an id that the cache lacks. ids: S16 [n]."""
        return self._index.find(ids)


def shared_rows(caches: Sequence[LogitCache], cache: LogitCache) -> int:
    """Count the rows of `cache` that one of `caches` has too. Only row ids are read, and memory does not grow with them."""
    numbers = RowLookup(cache)
    shared = np.zeros(len(cache) + 1, bool)  # the last for ids that are not there
    for other in caches:
        for ids in row_ids(other):
            shared[numbers.find(ids)] = True
    shared[-1] = False
    return sum(int(shared[numbers.find(ids)].sum()) for ids in row_ids(cache))

"""Rows of a cache with targets averaged over other teachers' caches, where rows are found by id."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from logitcache import CachedSequence, LogitCache, SparseTargets, UserError
from logitcache.reading.cache import SHUFFLE_ROW_GROUPS
from logitcache.reading.row_index import id_bytes
from trainer.data.averaging import mean_targets
from trainer.data.row_ids import RowNumbers, row_ids


class OtherTeacher:
    """Targets of another teacher's cache by row id.

    Keeps as many decoded row groups as hold the rows that shuffled streams of `caches` mix at a time, some 128 MiB. So each is
    decoded once where its rows come in about the order of `caches`; in another order, up to once a row.
    """

    def __init__(self, cache: LogitCache, caches: Sequence[LogitCache]) -> None:
        self.cache = cache
        self._numbers = RowNumbers(cache)
        spanned = sum(1 + math.ceil(_rows_per_group(one) / _rows_per_group(cache)) for one in caches)
        self._row_group = lru_cache(SHUFFLE_ROW_GROUPS * spanned)(cache.read_row_group)

    def check_holds(self, cache: LogitCache) -> None:
        """Raises UserError where this cache lacks rows of another."""
        missing = sum(int((self._numbers.find(ids) < 0).sum()) for ids in row_ids(cache))
        if missing:
            raise UserError(
                f"--average_with {self.cache.path}: {missing:,} of the {len(cache):,} rows of {cache.path} are not "
                "there. Score them with that teacher and `logitcache merge` the two, or leave them out with "
                f"`logitcache slice {cache.path} --row-ids …`"
            )

    def targets(self, row_id: str) -> SparseTargets:
        """Of one row. Raises UserError where there is none."""
        number = int(self._numbers.find(id_bytes([row_id]))[0])
        if number < 0:
            raise UserError(
                f"--average_with {self.cache.path} has no row {row_id}: was it altered since the run began?"
            )
        row_group, row = self.cache.row_group_of(number)
        return self._row_group(row_group)[row].targets


def averaged(row: CachedSequence, others: Sequence[OtherTeacher], vocab_size: int) -> CachedSequence:
    """The row with `averaging.mean_targets` of its own teacher and the others."""
    targets = [row.targets, *(other.targets(row.row_id) for other in others)]
    return replace(row, targets=mean_targets(targets, vocab_size))


def _rows_per_group(cache: LogitCache) -> float:
    return len(cache) / sum(len(shard.row_group_sizes) for shard in cache.manifest.shards)

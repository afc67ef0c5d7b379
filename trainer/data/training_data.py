"""The rows of an epoch: of one cache, or of several, mixed by rows and averaged over teachers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow.compute as pc

import logitcache
from logitcache import CachedSequence, LogitCache, UserError
from logitcache.format.tail_basis import TailBasis, with_rank
from logitcache.format.tail_parts import TailParts
from logitcache.reading.cache import SequenceStream
from trainer.data.averaging import TeacherTargetsById, averaged
from trainer.data.mixture import RepeatedCache, SmoothOrder, apportioned
from trainer.data.sources import Source, check_belong_together, common_tail_parts, open_sources, without_weights


def open_training_data(cache: Sequence[str], average_with: Sequence[str] = ()) -> TrainingData:
    """Open the caches of a run.

    Args:
        cache: PATH or PATH:WEIGHT of each cache to mix.
        average_with: caches of other teachers on the same rows.

    Raises:
        UserError: the caches do not belong together, another teacher lacks rows, or a weight cannot be meant.
    """
    sources = open_sources(cache)
    others = [logitcache.open(path) for path in without_weights(average_with)]
    check_belong_together([source.cache for source in sources] + others)
    data = TrainingData(sources, others)
    data.check_rows()
    return data


class TrainingData:
    """Rows of caches in the order of each epoch; an epoch has as many rows as all caches together.

    Without weights every row comes once in an epoch. With weights a rank takes each cache's share, goes on in the next
    epoch where it stopped, and sees each row of its part before one comes again. Everything about the order follows
    from numbers of rows, so that any place of any epoch is found without reading.

    Attributes:
        caches: the caches that are mixed.
        averaged_with: caches of other teachers on the same rows.
        path: the paths of the mixed caches, for messages.
        counted_batches: numbers of batches of epochs, kept here by `sampler.EpochBatches`.
    """

    def __init__(self, sources: Sequence[Source], averaged_with: Sequence[LogitCache] = ()) -> None:
        self._sources = tuple(sources)
        self.caches = tuple(source.cache for source in sources)
        self.averaged_with = tuple(averaged_with)
        self.path = " + ".join(str(source) for source in sources)
        self.counted_batches: dict[Any, tuple[int, int]] = {}

    @classmethod
    def of(cls, cache: LogitCache | TrainingData) -> TrainingData:
        """Take a cache as the only cache of a run; training data stay as they are."""
        return cache if isinstance(cache, TrainingData) else cls([Source(cache)])

    def __repr__(self) -> str:
        return f"TrainingData({self.path!r}, {len(self)} sequences, {self.num_positions} positions)"

    def __reduce__(self) -> Any:
        """Have a worker process that is not forked open the caches itself."""
        weights = [source.weight for source in self._sources]
        caches, averaged_with = ([cache.folder.path for cache in some] for some in (self.caches, self.averaged_with))
        return _reopened, (caches, weights, averaged_with)

    def __len__(self) -> int:
        """Rows of an epoch, over all ranks."""
        return sum(len(cache) for cache in self.caches)

    @property
    def num_positions(self) -> int:
        """The number of stored positions of an epoch over all ranks; with weights, the expected number."""
        if self._shares is None:
            return sum(cache.num_positions for cache in self.caches)
        per_row = np.array([cache.num_positions / len(cache) for cache in self.caches])
        return round(float((self._shares * per_row).sum()) * len(self))

    @property
    def weights(self) -> list[float] | None:
        """The weight of each of `caches`, as given; None without weights, when every row comes once."""
        weights = [source.weight for source in self._sources if source.weight is not None]
        return weights or None

    @property
    def vocab_size(self) -> int:
        """The size of the teachers' vocabulary, V."""
        return self.caches[0].vocab_size

    @property
    def longest(self) -> int:
        """The number of tokens of the longest sequence."""
        return max(cache.manifest.longest for cache in self.caches)

    @cached_property
    def tail_parts(self) -> TailParts:
        """The parts of the tail that all targets hold: none in the mean of several teachers."""
        return TailParts() if self.averaged_with else common_tail_parts(self.caches)

    @property
    def tail_groups(self) -> np.ndarray | None:
        """The tail group of each token id, int32 [V], if `tail_parts` has groups."""
        return self.caches[0].tail_groups if self.tail_parts.groups else None

    @property
    def tail_basis(self) -> TailBasis | None:
        """The basis of the coefficients, if `tail_parts` has a rank."""
        basis = self.caches[0].tail_basis if self.tail_parts.rank else None
        return basis and basis.first(self.tail_parts.rank)

    def check_rows(self) -> None:
        """Raises UserError if a cache of `averaged_with` lacks a row, or if a weight is too small for one row."""
        if (counts := self._rows_by_cache((0, 1))).min() == 0:
            raise UserError(
                f"--cache {self._sources[int(counts.argmin())]}: beside the other weights that is not one of the "
                f"{len(self)} rows of an epoch. Raise the weight, or leave the cache out"
            )
        for other in self._others:
            for cache in self.caches:
                other.check_holds(cache)

    def num_rows(self, shard: tuple[int, int] = (0, 1)) -> int:
        """Count the rows of a rank in an epoch, the same in every epoch. shard: (rank, world)."""
        return int(self._rows_by_cache(shard).sum())

    def stream(
        self, epoch: int, *, shuffle: bool, seed: int, shard: tuple[int, int] = (0, 1), start: int = 0
    ) -> SequenceStream:
        """Read the rows of an epoch that belong to `shard`, (rank, world).

        With `shuffle` their order is drawn from `seed` and `epoch`; that of a single cache is that of its `iter_sequences`.
        The first `start` rows are left out and not read, but the stream's `position` counts them.
        """
        rows = self._rows(epoch, shuffle, seed, shard, start)
        if self._others:
            rows = (averaged(row, self._others, self.vocab_size) for row in rows)
        return SequenceStream(rows, self.num_rows(shard), start)

    def lengths(self, epoch: int, *, shuffle: bool, seed: int, shard: tuple[int, int] = (0, 1)) -> np.ndarray:
        """Count the tokens of each row of `stream`, int32 [num_rows]. The first call reads the caches' loss masks."""
        counts = self._rows_by_cache(shard)
        cache_of = np.concatenate([np.empty(0, np.int64), *SmoothOrder(counts).blocks()])
        lengths = np.empty(len(cache_of), np.int32)
        for number, repeated in enumerate(self._repeated_caches(shuffle, seed, shard)):
            rows = repeated.row_numbers(epoch * int(counts[number]), int(counts[number]))
            lengths[cache_of == number] = self._lengths_by_cache[number][rows]
        return lengths

    def _rows(
        self, epoch: int, shuffle: bool, seed: int, shard: tuple[int, int], start: int
    ) -> Iterator[CachedSequence]:
        counts = self._rows_by_cache(shard)
        order = SmoothOrder(counts)
        first = epoch * counts + order.before(min(start, len(order)))
        streams = [
            self._with_shared_rank(repeated.rows(begin), cache)
            for cache, repeated, begin in zip(
                self.caches, self._repeated_caches(shuffle, seed, shard), first.tolist(), strict=True
            )
        ]
        for block in order.blocks(min(start, len(order))):
            for number in block.tolist():
                yield next(streams[number])

    def _with_shared_rank(self, rows: Iterator[CachedSequence], cache: LogitCache) -> Iterator[CachedSequence]:
        """Give rows the coefficients that all caches hold, and the residuals that these leave."""
        rank = self.tail_parts.rank
        if rank in (0, cache.manifest.layout.tail_parts.rank):
            return rows
        basis = cache.tail_basis
        assert basis is not None
        return (replace(row, targets=with_rank(row.targets, basis, rank)) for row in rows)

    def _repeated_caches(self, shuffle: bool, seed: int, shard: tuple[int, int]) -> list[RepeatedCache]:
        weighted = self._shares is not None
        return [
            RepeatedCache(cache, number, shuffle, seed, shard, weighted) for number, cache in enumerate(self.caches)
        ]

    def _rows_by_cache(self, shard: tuple[int, int]) -> np.ndarray:
        """Count the rows that a rank takes of each cache in an epoch, int64 [C]."""
        rows = np.array([len(cache.iter_sequences(shard=shard)) for cache in self.caches])
        if self._shares is None:
            return rows
        shares = np.where(rows > 0, self._shares, 0)  # a cache may have no row for this rank
        return apportioned(shares / max(shares.sum(), np.finfo(float).tiny), int(rows.sum()))

    @cached_property
    def _shares(self) -> np.ndarray | None:
        """The share of each cache in the rows of an epoch, float64 [C]; None without weights."""
        return None if self.weights is None else np.array(self.weights) / sum(self.weights)

    @cached_property
    def _others(self) -> list[TeacherTargetsById]:
        return [TeacherTargetsById(cache, self.caches) for cache in self.averaged_with]

    @cached_property
    def _lengths_by_cache(self) -> list[np.ndarray]:
        return [_token_lengths(cache) for cache in self.caches]


def _reopened(paths: list[str], weights: list[float | None], averaged_with: list[str]) -> TrainingData:
    sources = [Source(logitcache.open(path), weight) for path, weight in zip(paths, weights, strict=True)]
    return TrainingData(sources, [logitcache.open(path) for path in averaged_with])


def _token_lengths(cache: LogitCache) -> np.ndarray:
    """Count the tokens of each row of a cache, int32 [rows]; only the loss masks are read, a bit a token."""
    lengths = [pc.list_value_length(table["loss_mask"]).to_numpy() for table in cache.iter_columns(["loss_mask"])]
    return np.concatenate([np.empty(0, np.int32), *lengths])

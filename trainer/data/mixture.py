"""Which cache gives the next row of an epoch, and which row that is: from numbers of rows alone, at any place in it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from logitcache import CachedSequence, LogitCache
from logitcache.format.codec import DecodedRows

ROWS_PER_BLOCK = 1 << 14
DECODED_ROW_GROUPS = 4
"""A weighted cache of at most so many row groups is decoded once and kept: no more than a stream reads ahead."""


def apportioned(shares: np.ndarray, rows: int) -> np.ndarray:
    """Divide `rows` among caches by shares, float64 [C] with sum 1, into int64 [C]; the largest remainders are rounded up."""
    exact = shares * rows
    counts: np.ndarray = np.floor(exact).astype(np.int64)
    rest = rows - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:rest]] += 1
    return counts


class SmoothOrder:
    """An order of the rows of C caches, counts int64 [C], in which every stretch holds each cache's share nearly.

    Row j of cache c stands at (j + φ)/counts[c] of the way, with φ = (c + 1/2)/C, so that caches do not come in bunches.
    Two caches' rows among any first s differ from their share by 3/4 at most; of more caches, with share λ, by
    (1 − λ) + λ(C − 1).
    """

    def __init__(self, counts: np.ndarray) -> None:
        self._counts = counts
        self._num_blocks = -(-len(self) // ROWS_PER_BLOCK)

    def __len__(self) -> int:
        return int(self._counts.sum())

    def before(self, start: int) -> np.ndarray:
        """Count the rows of each cache among the first `start` rows, int64 [C]."""
        block, skipped = self._place(start)
        return self._begins(block) + np.bincount(self._block(block)[:skipped], minlength=len(self._counts))

    def blocks(self, start: int = 0) -> Iterator[np.ndarray]:
        """Yield the cache of each row from row `start` on, int64 [≈ ROWS_PER_BLOCK] at a time."""
        first, skipped = self._place(start)
        for block in range(first, self._num_blocks):
            yield self._block(block)[skipped:]
            skipped = 0

    def _place(self, start: int) -> tuple[int, int]:
        """Find the block of a row, and the number of rows before it in the block."""
        begins = range(self._num_blocks + 1)
        block = bisect_right(begins, start, key=lambda number: int(self._begins(number).sum())) - 1
        return block, start - int(self._begins(block).sum())

    def _begins(self, block: int) -> np.ndarray:
        """Count the rows of each cache before a block, which is that part of the way; in whole numbers."""
        caches = len(self._counts)
        twice_phase = 2 * np.arange(caches) + 1
        ahead = 2 * caches * self._counts * block - twice_phase * self._num_blocks
        before: np.ndarray = np.clip(-(-ahead // (2 * caches * max(self._num_blocks, 1))), 0, self._counts)
        return before

    def _block(self, block: int) -> np.ndarray:
        if block >= self._num_blocks:
            return np.empty(0, np.int64)
        begins, ends = self._begins(block), self._begins(block + 1)
        caches = np.repeat(np.arange(len(self._counts)), ends - begins)
        numbers = np.concatenate([np.arange(begin, end) for begin, end in zip(begins, ends, strict=True)])
        # A quotient of whole numbers, so that ties are equal.
        places = (2 * len(self._counts) * numbers + 2 * caches + 1) / self._counts[caches]
        return caches[np.argsort(places, kind="stable")]


@dataclass(frozen=True)
class RepeatedCache:
    """The rows that a rank reads of a cache, pass after pass, with `shuffle` every pass in an order of its own.

    Row g of this endless sequence is row g mod n of pass g div n, with n rows to a pass. Cache `number` 0 of a mixture
    comes in the order that it has without a mixture. If the mixture is `weighted`, an epoch may have many passes; a small
    cache is then decoded once and permuted as a whole.
    """

    cache: LogitCache
    number: int
    shuffle: bool
    seed: int
    shard: tuple[int, int]
    weighted: bool = False

    def rows(self, first: int) -> Iterator[CachedSequence]:
        """Yield rows from number `first` on, without end."""
        number, start = divmod(first, self._size)
        decoded: dict[int, DecodedRows] = {}
        while True:
            if self._kept_decoded:
                for row in self._order(number)[start:].tolist():
                    group, row_in_it = self.cache.row_group_of(row)
                    if group not in decoded:
                        decoded[group] = self.cache.read_row_group(group)
                    yield decoded[group][row_in_it]
            else:
                yield from self.cache.iter_sequences(self.shuffle, self._seed_of(number), self.shard, start)
            number, start = number + 1, 0

    def row_numbers(self, first: int, count: int) -> np.ndarray:
        """Look up which rows of the cache come at numbers first … first + count − 1, int64 [count]."""
        if not count:
            return np.empty(0, np.int64)
        number, start = divmod(first, self._size)
        last = (first + count - 1) // self._size
        numbers: np.ndarray = np.concatenate([self._order(n) for n in range(number, last + 1)])[start : start + count]
        return numbers

    def _order(self, number: int) -> np.ndarray:
        """List the rows of a pass, int64 [_size]."""
        if not self._kept_decoded:
            return self.cache.stream_order(self.shuffle, self._seed_of(number), self.shard)
        count, (rank, world) = len(self.cache), self.shard
        order = np.random.default_rng(self._seed_of(number)).permutation(count) if self.shuffle else np.arange(count)
        return order[count * rank // world : count * (rank + 1) // world]

    @cached_property
    def _kept_decoded(self) -> bool:
        row_groups = sum(len(info.row_group_sizes) for info in self.cache.manifest.shards)
        return self.weighted and row_groups <= DECODED_ROW_GROUPS

    @cached_property
    def _size(self) -> int:
        return len(self.cache.iter_sequences(shard=self.shard))

    def _seed_of(self, number: int) -> int:
        entropy = [self.seed, number, self.number] if self.number else [self.seed, number]
        return int(np.random.SeedSequence(entropy).generate_state(1)[0])

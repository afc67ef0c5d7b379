"""A cache read over and over: draw g is row g mod n of pass g div n, every pass in an order of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from logitcache import CachedSequence, LogitCache
from logitcache.format.codec import DecodedRows

HELD_ROW_GROUPS = 4
"""A cache of so few row groups is held decoded where it is weighted: no more than a stream reads ahead."""


@dataclass(frozen=True)
class Passes:
    """A rank's draws from a cache.

    number: of the cache in the mixture; the order of the first is that which it has alone.  shard: (rank, world).
    weighted: many passes may make an epoch; a small cache is read once then, and its rows are permuted all together.
    """

    cache: LogitCache
    number: int
    shuffle: bool
    seed: int
    shard: tuple[int, int]
    weighted: bool = False

    def rows(self, first: int) -> Iterator[CachedSequence]:
        """Draws from number `first` on, without end."""
        number, start = divmod(first, self._size)
        held: dict[int, DecodedRows] = {}
        while True:
            if self._held:
                for row in self._order(number)[start:].tolist():
                    group, row_in_it = self.cache.row_group_of(row)
                    if group not in held:
                        held[group] = self.cache.read_row_group(group)
                    yield held[group][row_in_it]
            else:
                yield from self.cache.iter_sequences(self.shuffle, self._seed_of(number), self.shard, start)
            number, start = number + 1, 0

    def row_numbers(self, first: int, count: int) -> np.ndarray:
        """Rows of the cache that draws first … first + count − 1 are, int64 [count]."""
        if not count:
            return np.empty(0, np.int64)
        number, start = divmod(first, self._size)
        last = (first + count - 1) // self._size
        return np.concatenate([self._order(n) for n in range(number, last + 1)])[start : start + count]

    def _order(self, number: int) -> np.ndarray:
        """Rows of the cache that a pass consists of, int64 [_size]."""
        if not self._held:
            return self.cache.stream_order(self.shuffle, self._seed_of(number), self.shard)
        count, (rank, world) = len(self.cache), self.shard
        order = np.random.default_rng(self._seed_of(number)).permutation(count) if self.shuffle else np.arange(count)
        return order[count * rank // world : count * (rank + 1) // world]

    @cached_property
    def _held(self) -> bool:
        return (
            self.weighted and sum(len(info.row_group_sizes) for info in self.cache.manifest.shards) <= HELD_ROW_GROUPS
        )

    @cached_property
    def _size(self) -> int:
        return len(self.cache.iter_sequences(shard=self.shard))

    def _seed_of(self, number: int) -> int:
        entropy = [self.seed, number, self.number] if self.number else [self.seed, number]
        return int(np.random.SeedSequence(entropy).generate_state(1)[0])

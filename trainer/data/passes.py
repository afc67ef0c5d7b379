"""A cache read over and over: draw g is row g mod n of pass g div n, every pass in an order of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from logitcache import CachedSequence, LogitCache


@dataclass(frozen=True)
class Passes:
    """A rank's draws from a cache.

    number: of the cache in the mixture; the order of the first is that which it has alone.  shard: (rank, world).
    """

    cache: LogitCache
    number: int
    shuffle: bool
    seed: int
    shard: tuple[int, int]

    def rows(self, first: int) -> Iterator[CachedSequence]:
        """Draws from number `first` on, without end."""
        number, start = divmod(first, self._size)
        while True:
            yield from self.cache.iter_sequences(self.shuffle, self._seed_of(number), self.shard, start)
            number, start = number + 1, 0

    def row_numbers(self, first: int, count: int) -> np.ndarray:
        """Rows of the cache that draws first … first + count − 1 are, int64 [count]."""
        if not count:
            return np.empty(0, np.int64)
        number, start = divmod(first, self._size)
        last = (first + count - 1) // self._size
        orders = [self.cache.stream_order(self.shuffle, self._seed_of(n), self.shard) for n in range(number, last + 1)]
        return np.concatenate(orders)[start : start + count]

    @property
    def _size(self) -> int:
        return len(self.cache.iter_sequences(shard=self.shard))

    def _seed_of(self, number: int) -> int:
        entropy = [self.seed, number, self.number] if self.number else [self.seed, number]
        return int(np.random.SeedSequence(entropy).generate_state(1)[0])

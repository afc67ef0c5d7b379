"""A plan says which rows of a stream make which batch. It needs the rows' lengths only; nothing is read here.

Where batches are not consecutive rows, rows are arranged in windows of 2^18 tokens, or more where batches are large, so
that a reader holds one window of decoded rows and the batch left over from the one before: with 64 entries a position
2^18 tokens are about 130 MB.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterator
from itertools import pairwise
from typing import Protocol

import numpy as np

WINDOW_TOKENS = 2**18
GROUPED_BATCHES = 32
"""At least so many batches of similar length to a window: with 16 their padding is twice as much."""
PACKED_BINS = 128
"""At least so many bins to a window, so that less than one in a hundred tokens is padding."""

Shuffle = tuple[int, int] | None
"""Seed and epoch, or None for an order that follows from the lengths alone."""


class Plan(Protocol):
    """Batches of rows of a stream, numbered from 0."""

    def __len__(self) -> int: ...

    def rows(self, batch: int) -> np.ndarray:
        """List the rows of a batch, int [n]; none for a batch that keeps a rank without rows in step."""

    def bins(self, batch: int) -> np.ndarray | None:
        """List the bins that the rows of a batch are packed into, int [n], ascending from 0. None without packing."""

    def batch_of(self, row: int) -> int:
        """Find the batch of a row, −1 for a row that is left out."""

    def first_row(self, batch: int) -> int:
        """Find the first row of the stream that this batch and the batches after it need."""


class FixedPlan:
    """Consecutive rows, equally many to a batch; found by arithmetic."""

    def __init__(self, num_rows: int, batch_size: int, num_batches: int) -> None:
        self._num_rows, self._batch_size, self._num_batches = num_rows, batch_size, num_batches

    def __len__(self) -> int:
        return self._num_batches

    def rows(self, batch: int) -> np.ndarray:
        """See Plan."""
        first = batch * self._batch_size
        return np.arange(first, max(first, min(first + self._batch_size, self._num_rows)))

    def bins(self, batch: int) -> None:
        """See Plan."""
        return None

    def batch_of(self, row: int) -> int:
        """See Plan."""
        return row // self._batch_size

    def first_row(self, batch: int) -> int:
        """See Plan."""
        return min(batch * self._batch_size, self._num_rows)


class ListedPlan:
    """Rows listed batch by batch."""

    def __init__(self, lengths: np.ndarray, rows: np.ndarray, begins: np.ndarray, bins: np.ndarray | None) -> None:
        """Take the rows of the stream in the order of the batches.

        lengths: tokens of each row of the stream, int [R].  rows: int [≤ R].  begins: int [batches + 1] into `rows`, of
        each batch and the end.  bins: the bin of each of `rows`, ascending.
        """
        self._lengths = lengths
        self._rows = rows.astype(np.int32)
        self._bins = None if bins is None else bins.astype(np.int32)
        self._begins = begins.astype(np.int64)
        self._batch_of = np.full(len(lengths), -1, dtype=np.int32)
        self._batch_of[rows] = np.repeat(np.arange(len(self)), np.diff(self._begins))
        first = np.full(len(self), len(lengths))  # a batch without rows needs none
        filled = np.diff(self._begins) > 0
        if filled.any():
            first[filled] = np.minimum.reduceat(self._rows, self._begins[:-1][filled])
        self._first_rows = np.minimum.accumulate(first[::-1])[::-1]

    def __len__(self) -> int:
        return len(self._begins) - 1

    def rows(self, batch: int) -> np.ndarray:
        """See Plan."""
        return self._rows[self._begins[batch] : self._begins[batch + 1]]

    def bins(self, batch: int) -> np.ndarray | None:
        """See Plan."""
        if self._bins is None:
            return None
        bins = self._bins[self._begins[batch] : self._begins[batch + 1]]
        return np.cumsum(np.diff(bins, prepend=bins[:1]) != 0)

    def batch_of(self, row: int) -> int:
        """See Plan."""
        return int(self._batch_of[row])

    def first_row(self, batch: int) -> int:
        """See Plan."""
        return int(self._first_rows[batch])

    def of_length(self, num_batches: int) -> ListedPlan:
        """Plan so many batches: batches of most tokens are halved, or empty ones added, or the last ones left out."""
        missing = num_batches - len(self)
        if missing == 0:
            return self
        if missing < 0:
            kept = int(self._begins[num_batches])
            bins = None if self._bins is None else self._bins[:kept]
            return ListedPlan(self._lengths, self._rows[:kept], self._begins[: num_batches + 1], bins)
        begins = self._begins.tolist()
        begins = sorted([*begins, *self._cuts(missing)])
        begins += [len(self._rows)] * (num_batches + 1 - len(begins))
        return ListedPlan(self._lengths, self._rows, np.array(begins), self._bins)

    def _cuts(self, number: int) -> list[int]:
        """Choose places to cut batches in two, each time the batch of most tokens; only while one has two rows."""
        tokens = np.concatenate([[0], np.cumsum(self._lengths[self._rows], dtype=np.int64)])

        def entry(begin: int, end: int) -> tuple[int, int, int]:
            return -int(tokens[end] - tokens[begin]), begin, end

        pairs = zip(self._begins[:-1].tolist(), self._begins[1:].tolist(), strict=True)
        heap = [entry(begin, end) for begin, end in pairs if end - begin > 1]
        heapq.heapify(heap)
        cuts: list[int] = []
        while heap and len(cuts) < number:
            _, begin, end = heapq.heappop(heap)
            cut = self._middle(begin, end)
            cuts.append(cut)
            for low, high in ((begin, cut), (cut, end)):
                if high - low > 1:
                    heapq.heappush(heap, entry(low, high))
        return cuts

    def _middle(self, begin: int, end: int) -> int:
        """Find the middle of a batch, between two bins if it has two."""
        middle = (begin + end) // 2
        if self._bins is None:
            return middle
        borders = begin + np.flatnonzero(np.diff(self._bins[begin:end])) + 1
        return int(borders[np.abs(borders - middle).argmin()]) if len(borders) else middle


def consecutive_plan(lengths: np.ndarray, tokens_per_batch: int) -> ListedPlan:
    """Plan batches of consecutive rows, as many as number × longest ≤ `tokens_per_batch` allows."""
    begins = [0]
    while begins[-1] < len(lengths):
        first = begins[-1]
        longest = np.maximum.accumulate(lengths[first : first + tokens_per_batch // int(lengths[first])])
        fits = longest * np.arange(1, len(longest) + 1, dtype=np.int64) <= tokens_per_batch
        begins.append(first + int(fits.sum()))
    return ListedPlan(lengths, np.arange(len(lengths)), np.array(begins), None)


def grouped_plan(lengths: np.ndarray, batch_size: int, tokens_per_batch: int | None, shuffle: Shuffle) -> ListedPlan:
    """Plan batches of similar length from sorted windows, as many rows as the tokens allow, or else `batch_size`.

    The batches of a window come in an order drawn for it, the same on ranks that have equally many. The rows of an
    incomplete batch wait for the next window; at the end they come last.
    """
    batches: list[np.ndarray] = []
    waiting = np.empty(0, dtype=np.int64)
    tokens = tokens_per_batch or batch_size * int(lengths.mean() if len(lengths) else 0)
    for number, window in enumerate(_windows(lengths, GROUPED_BATCHES * tokens)):
        rows = np.concatenate([waiting, window])
        rows = rows[np.argsort(-lengths[rows], kind="stable")]
        begins = [0]
        while begins[-1] < len(rows):
            longest = int(lengths[rows[begins[-1]]])
            begins.append(begins[-1] + (tokens_per_batch // longest if tokens_per_batch else batch_size))
        cut = [rows[begin:end] for begin, end in pairwise(begins)]
        waiting = cut.pop() if begins[-1] > len(rows) else rows[:0]
        batches += [cut[i] for i in _drawn(len(cut), shuffle, number)]
    if len(waiting):
        batches.append(waiting)
    return _listed(lengths, batches)


def packed_plan(lengths: np.ndarray, packed_length: int, batch_size: int, shuffle: Shuffle) -> ListedPlan:
    """Plan batches of `batch_size` bins of `packed_length` tokens, into which whole rows are packed window by window.

    The bins of a window come in an order drawn for it.
    """
    packed: list[np.ndarray] = []
    for number, window in enumerate(_windows(lengths, PACKED_BINS * packed_length)):
        bin_of = best_fit_decreasing(lengths[window], packed_length)
        by_bin = np.split(window[np.argsort(bin_of, kind="stable")], np.cumsum(np.bincount(bin_of))[:-1])
        packed += [by_bin[i] for i in _drawn(len(by_bin), shuffle, number)]
    bins = np.repeat(np.arange(len(packed)), [len(rows) for rows in packed])
    batches = [np.concatenate(packed[first : first + batch_size]) for first in range(0, len(packed), batch_size)]
    return _listed(lengths, batches, bins)


def _windows(lengths: np.ndarray, least_tokens: int) -> Iterator[np.ndarray]:
    """Yield consecutive rows, as a rule of at least so many tokens and `WINDOW_TOKENS`."""
    number = np.cumsum(lengths, dtype=np.int64) // max(WINDOW_TOKENS, least_tokens)
    begins = [0, *(np.flatnonzero(np.diff(number)) + 1).tolist(), len(lengths)]
    for begin, end in pairwise(begins):
        if end > begin:
            yield np.arange(begin, end)


def _drawn(count: int, shuffle: Shuffle, window: int) -> np.ndarray:
    return np.arange(count) if shuffle is None else np.random.default_rng((*shuffle, window)).permutation(count)


def _listed(lengths: np.ndarray, batches: list[np.ndarray], bins: np.ndarray | None = None) -> ListedPlan:
    rows = np.concatenate([np.empty(0, dtype=np.int64), *batches])
    begins = np.cumsum([0, *(len(batch) for batch in batches)])
    return ListedPlan(lengths, rows, begins, bins)


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Choose a bin for each item, int64 [n], numbered from 0. lengths: int [n], none above `capacity`.

    The longest item first, each into the bin with the least room that still takes it: at most 11/9 of the fewest bins
    possible, and one (Johnson et al., Worst-case performance bounds for simple one-dimensional packing algorithms, 1974).
    """
    bin_of = np.empty(len(lengths), dtype=np.int64)
    num_bins = 0
    rooms: list[int] = []  # the different rooms of the bins, ascending
    bins_with: dict[int, list[int]] = {}
    order = np.argsort(-lengths, kind="stable")
    for item, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        place = bisect_left(rooms, length)
        if place == len(rooms):
            chosen, room = num_bins, capacity
            num_bins += 1
        else:
            room = rooms[place]
            chosen = bins_with[room].pop()
            if not bins_with[room]:
                del rooms[place], bins_with[room]
        bin_of[item] = chosen
        room -= length
        if room in bins_with:
            bins_with[room].append(chosen)
        elif room:
            insort(rooms, room)
            bins_with[room] = [chosen]
    return bin_of

"""The order in which a stream hands out rows, and with it the order in which it needs row groups. Nothing is read here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np


class Step(NamedTuple):
    """Rows to hand out, int64 [n, 2], (row group, row in it).  row_group: to read before that, or None."""

    row_group: int | None
    rows: np.ndarray


def rank_part(sizes: np.ndarray, order: np.ndarray, rank: int, world: int) -> np.ndarray:
    """Returns a rank's share of all rows, one after the other in `order`: int64 [r, 3], row group, first row and end in it.

    It is len/world of the rows (±1).  sizes: rows of each row group, int64 [R].  order: row groups, a permutation of 0 … R − 1.
    """
    sizes = sizes[order]
    begins = np.cumsum(sizes) - sizes
    total = int(sizes.sum())
    low = np.clip(total * rank // world - begins, 0, sizes)
    high = np.clip(total * (rank + 1) // world - begins, 0, sizes)
    part: np.ndarray = np.stack([order, low, high], axis=1)[low < high]
    return part


def steps(part: np.ndarray, window: int, seed: int | None, start: int) -> Iterator[Step]:
    """Yields the rows of `part` beginning with number `start`, step by step; in an order drawn from `seed` if there is one.

    The i-th row group is open during steps i … i + window − 1. Its rows are dealt to them evenly, in an order drawn for it, and
    the rows of one step are handed out in an order drawn for that. So all rows of row groups less than `window` apart mix, the
    first rows need one row group only, and any `start` is found from the sizes alone. Without a seed, when the window is 1,
    rows come as they lie. The `window` row groups named last hold all rows of a step.
    """
    sizes = part[:, 2] - part[:, 1]
    due = np.zeros(len(part) + window - 1, dtype=np.int64)  # rows of each step
    for age in range(window):
        due[age : age + len(part)] += _dealt(sizes, age + 1, window) - _dealt(sizes, age, window)
    ends = np.cumsum(due)
    first = int(np.searchsorted(ends, start, side="right"))
    open_rows: dict[int, np.ndarray] = {}  # by row group: int64 [n, 2], in the order of dealing
    for number in range(first, len(due)):
        opened = range(max(0, number - window + 1) if number == first else number, min(number + 1, len(part)))
        open_rows |= {i: _rows(part[i], None if seed is None else np.random.default_rng((seed, i, 0))) for i in opened}
        open_rows.pop(number - window, None)
        dealt = {i: _dealt(len(open_rows[i]), number - i + 1, window) for i in open_rows}
        rows = np.concatenate(
            [open_rows[i][_dealt(len(open_rows[i]), number - i, window) : dealt[i]] for i in open_rows]
        )
        if seed is not None:
            rows = np.random.default_rng((seed, number, 1)).permutation(rows)
        if number == first:
            rows = rows[start - int(ends[first] - due[first]) :]
        needed = [int(part[i, 0]) for i in opened if dealt[i] < len(open_rows[i]) or (rows[:, 0] == part[i, 0]).any()]
        for row_group in needed[:-1]:
            yield Step(row_group, rows[:0])
        yield Step(needed[-1] if needed else None, rows)


def _rows(share: np.ndarray, shuffle: np.random.Generator | None) -> np.ndarray:
    row_group, low, high = share
    rows = np.arange(low, high)
    rows = shuffle.permutation(rows) if shuffle else rows
    return np.stack([np.full(len(rows), row_group), rows], axis=1)


def _dealt(rows: Any, steps: int, window: int) -> Any:
    """Returns how many of the rows have been dealt after a number of steps. The first row is dealt at once."""
    return -(-rows * steps // window)

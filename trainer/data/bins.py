"""Bin packing: sequences into rows of so many tokens."""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The bin of each item, int64 [n], bins numbered from 0.

    lengths: int [n], none above `capacity`. The longest item first, each into the bin with the least room that still
    takes it: at most 11/9 of the fewest bins possible, and one (Johnson et al., Worst-case performance bounds for simple
    one-dimensional packing algorithms, 1974).
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

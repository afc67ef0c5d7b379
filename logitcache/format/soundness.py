"""Decoded rows are refused if no teacher can have given their targets, or if they contradict themselves.

`check_rows` looks at every row group that is decoded, for a few hundredths of the time that decoding takes: ids, lengths,
masses, tails. `find_wrong` looks closely; the reader asks it if something seems wrong, `logitcache verify` always.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np

from logitcache.format.codec import DecodedRows
from logitcache.format.layout import Layout
from logitcache.format.quantization import mass_tolerance, mass_tolerances
from logitcache.format.tail_parts import parts_of, tail_ids
from logitcache.format.targets import PAD_ID, SparseTargets, find_defect

BLOCK_ENTRIES = 1 << 16
SORTED_ENTRIES = 1 << 16
"""Of a row group; those of the writer have up to half a million."""


def check_rows(rows: DecodedRows, layout: Layout) -> None:
    """Raises ValueError naming the first row, counted from 0 in the row group, that no cache of this layout can hold."""
    if _outside(rows.input_ids, layout.vocab_size):
        wrong = (rows.input_ids < 0) | (rows.input_ids >= layout.vocab_size)
        row = _row_of(int(np.argmax(wrong)), rows.token_offsets)
        raise ValueError(f"row {row} has an input id outside the vocabulary of {layout.vocab_size:,}")
    trained = _trained(rows.loss_mask, rows.token_offsets)
    positions = np.diff(rows.offsets)
    if not np.array_equal(trained, positions):
        row = int(np.argmax(trained != positions))
        raise ValueError(
            f"the loss mask of row {row} trains {trained[row]} tokens, {positions[row]} positions are stored"
        )
    with np.errstate(over="ignore", invalid="ignore"):
        if _is_doubtful(rows, layout) and (found := find_wrong(rows.targets, layout)):
            position, what = found
            row = _row_of(position, rows.offsets)
            raise ValueError(f"{what} at stored position {position - int(rows.offsets[row])} of row {row}")


def _row_of(place: int, offsets: np.ndarray) -> int:
    return int(np.searchsorted(offsets, place, side="right")) - 1


def _trained(loss_mask: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Counts the trained tokens of each row, int64 [rows]. The first token of a row, which nothing predicts, is none of them."""
    running = np.concatenate([[0], np.cumsum(loss_mask)])
    return np.diff(running[offsets])


def _outside(ids: np.ndarray, vocab_size: int, least: int = 0) -> bool:
    return bool(ids.size) and not least <= ids.min() <= ids.max() < vocab_size


def _is_doubtful(rows: DecodedRows, layout: Layout) -> bool:
    """Tells whether something may be wrong: False only if nothing is that training relies on."""
    targets = rows.targets
    ids, others = targets.token_ids, tail_ids(targets)
    # Of a rounded cache the decoder made the ids of ranks that ascend: they are in the vocabulary, none is there twice.
    if layout.quantization is None:
        num_pads = ids.size - int(rows.num_entries.sum(dtype=np.int64))
        if _outside(ids, layout.vocab_size, PAD_ID if num_pads else 0):
            return True
        if num_pads and np.count_nonzero(ids == PAD_ID) != num_pads:
            return True
    if any(_outside(of_tail, layout.vocab_size, PAD_ID) for of_tail in others):
        return True
    if (layout.quantization is None or others) and _repeats(ids, others):
        return True
    # Where a number is none, or a log-probability above 0, the sum is not near 1 either.
    near = np.abs(_masses(targets.logprobs) + np.exp(targets.tail_logprob) - 1) <= mass_tolerance(layout.precision)
    return not near.all() or any(wrong.any() for _, wrong in _tail_defects(targets, layout))


def _masses(logprobs: np.ndarray) -> np.ndarray:
    """Returns the sum of the probabilities of each position, float32 [M], in blocks that stay in the processor's cache."""
    masses = np.empty(len(logprobs), np.float32)
    size = max(BLOCK_ENTRIES // max(logprobs.shape[1], 1), 1)
    probs = np.empty((min(size, len(logprobs)), logprobs.shape[1]), np.float32)
    ones = np.ones(logprobs.shape[1], np.float32)
    for first in range(0, len(logprobs), size):
        block = logprobs[first : first + size]
        np.dot(np.exp(block, out=probs[: len(block)]), ones, out=masses[first : first + size])
    return masses


def _repeats(ids: np.ndarray, others: Sequence[np.ndarray]) -> bool:
    """Tells whether a position has an entry twice, or an id of the tail that is an entry.  ids: [M, k].  others: [M, s] each.

    Sorting takes longer than all else: of more than `SORTED_ENTRIES` it looks at positions that lie equally far apart.
    """
    step = 1 + ids.size // SORTED_ENTRIES
    keys = ids[::step] << 1  # entries are even
    if others:
        keys = np.concatenate([keys, *(of_tail[::step] << 1 | 1 for of_tail in others)], axis=1)
    if not keys.size:
        return False
    keys.sort(axis=1)
    flat = keys.reshape(-1)  # one row after the other: what meets across their borders is blanked
    repeated = flat[1:] - flat[:-1] <= 1
    repeated[keys.shape[1] - 1 :: keys.shape[1]] = False
    former = flat[:-1][repeated]
    return bool(((former >= 0) & (former % 2 == 0)).any())


def find_wrong(targets: SparseTargets, layout: Layout) -> tuple[int, str] | None:
    """Finds the first position that no teacher can have given, and what is wrong with it; None if there is none."""
    with np.errstate(over="ignore", invalid="ignore"):
        tolerance = mass_tolerances(targets.logprobs, layout.precision, layout.quantization)
        found = find_defect(targets, layout.vocab_size, mass_tolerance=tolerance)
        if found is not None:
            return found
        close = (part.close_defects(targets, layout.vocab_size) for part in parts_of(targets))
        defects = [*_tail_defects(targets, layout), *chain.from_iterable(close)]
        places = [(int(np.argmax(wrong)), what) for what, wrong in defects if wrong.any()]
        return min(places, key=lambda place: place[0], default=None)


def _tail_defects(targets: SparseTargets, layout: Layout) -> Iterator[tuple[str, np.ndarray]]:
    """Yields what may be wrong with the tail, and with which positions it is, bool [M]. A comparison with no number is false."""
    yield "a tail log-probability above 0", targets.tail_logprob > 1e-4
    for part in parts_of(targets):
        yield from part.defects(targets, layout.quantization)

"""Some rows of a cache are made ready for a page: which rows, how much of each, and their numbers in few bytes."""

from __future__ import annotations

import base64
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from logitcache.errors import UserError
from logitcache.format.sequences import CachedSequence
from logitcache.format.tail_basis import TailBasis, rebuilt
from logitcache.format.targets import PAD_ID, SparseTargets
from logitcache.reading.cache import LogitCache
from logitcache.report.statistics import entropies, evenly_spread

PAGE_TOKENS = 16_384
"""Tokens of all rows of a page: more would be slow to look at, and the page large."""
MOST_ROWS = 256
SHOWN_ENTRIES = 16
SHOWN_GROUPS = 4
SHOWN_REBUILT = 4
REBUILT_LOGITS = 1 << 28
"""Of all positions of a page: of a large vocabulary those of the first tokens of each row alone are shown."""
SHOWN_CHARACTERS = 256
"""Of a kept column's value, and of a token."""
SHOWN_COLUMNS = 16
"""Kept columns of a row."""
NATS_STEP = 1e-3
"""Log-probabilities and entropies travel as 16-bit multiples of it; probabilities are then right to 0.05 %."""
NOTHING = 0xFFFF
"""In place of a log-probability: −∞, or that it is not known."""


@dataclass(frozen=True)
class Samples:
    """The rows on a page.

    rows: of each its number, id, columns and sizes, plain JSON types.  arrays: all rows' numbers, one row after the other, by
    their names in `_arrays`.  ids: token ids that occur, ascending; `tokens`, `entries` and `rebuilt` count in it.
    """

    rows: list[dict[str, Any]]
    arrays: dict[str, np.ndarray]
    ids: np.ndarray

    @property
    def num_tokens(self) -> int:
        """Number of tokens that are shown."""
        return sum(row["shown"] for row in self.rows)


def chosen_rows(cache: LogitCache, rows: Sequence[str], num_sequences: int) -> list[int]:
    """Returns the numbers of the rows to show, ascending: those named by A:B, number or id, otherwise spread evenly.

    Raises UserError for rows that the cache has not, and for more than a page takes.
    """
    if not rows:
        if not 1 <= num_sequences <= MOST_ROWS:
            raise UserError(f"--num-sequences {num_sequences}: a page takes 1 to {MOST_ROWS}")
        return evenly_spread(len(cache), num_sequences)
    chosen: set[int] = set()
    ids: list[str] = []
    for text in rows:
        first, colon, last = text.partition(":")
        if len(text) < 32 and ((colon and (first + last).isdecimal()) or text == ":"):
            span = range(len(cache))[slice(int(first or 0), int(last or len(cache)))]
            if not span:
                raise UserError(f"--rows {text}: the cache has rows 0 to {len(cache) - 1}")
            chosen.update(span[: MOST_ROWS + 1])
        elif text.isdecimal() and len(text) < 32:
            if int(text) >= len(cache):
                raise UserError(f"--rows {text}: the cache has rows 0 to {len(cache) - 1}")
            chosen.add(int(text))
        else:
            ids.append(text)
    chosen.update(_numbers_of(cache, ids))
    if len(chosen) > MOST_ROWS:
        raise UserError(f"--rows {' '.join(rows)}: a page takes at most {MOST_ROWS} rows")
    return sorted(chosen)


def read_samples(cache: LogitCache, numbers: Sequence[int]) -> Samples:
    """Reads the rows of these numbers. Long rows are cut, so that all fit on the page."""
    if not numbers:
        return Samples([], {}, np.zeros(0, np.uint32))
    sequences = [cache[number] for number in numbers]
    lengths = fair_lengths([len(sequence.input_ids) for sequence in sequences], PAGE_TOKENS)
    rows, parts = [], []
    basis = cache.tail_basis
    most = fair_lengths([len(sequence.positions) for sequence in sequences], REBUILT_LOGITS // cache.vocab_size)
    for number, sequence, length, num_rebuilt in zip(numbers, sequences, lengths, most, strict=True):
        part = _arrays(sequence, length)
        if basis is not None:
            part |= _rebuilt_tail(sequence.targets[: len(part["entropy"])], basis, num_rebuilt)
        parts.append(part)
        columns = [(name, value) for name, value in sequence.columns.items() if value is not None]
        rows.append(
            {
                "number": number,
                "id": sequence.row_id,
                "columns": [[legible(name), legible(str(value))] for name, value in columns[:SHOWN_COLUMNS]],
                "more_columns": max(len(columns) - SHOWN_COLUMNS, 0),
                "shown": length,
                "tokens": len(sequence.input_ids),
                "trained": len(sequence.positions),
                "positions": len(part["entropy"]),
            }
        )
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    # Ids become places in the list of those that occur; −1 stays for "none" as the highest number of its type.
    of_tokens = [name for name in ("tokens", "entries", "rebuilt") if name in arrays]
    ids = np.unique(np.concatenate([arrays[name].ravel() for name in of_tokens]))
    ids = ids[ids >= 0]
    small = np.uint16 if len(ids) < NOTHING else np.uint32
    for name in of_tokens:
        places = np.searchsorted(ids, arrays[name])
        arrays[name] = np.where(arrays[name] < 0, np.iinfo(small).max, places).astype(small)
    return Samples(rows, arrays, ids.astype(np.uint32))


def fair_lengths(lengths: Sequence[int], budget: int) -> list[int]:
    """Divides `budget` tokens: short rows are shown whole, long rows equally much."""
    shown = list(lengths)
    left, rows = budget, len(lengths)
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        shown[index] = min(lengths[index], left // rows)
        left, rows = left - shown[index], rows - 1
    return shown


def shortened(text: str, most: int = SHOWN_CHARACTERS) -> str:
    """Cuts the text to a number of characters."""
    return text if len(text) <= most else f"{text[:most]}…"


def legible(text: str, most: int = SHOWN_CHARACTERS) -> str:
    """Cuts a text, and writes codes for characters that have no look of their own, as `tokens.js` does for tokens.

    These are controls, marks of direction and halves of surrogates; not line breaks, tabs and joiners.
    """
    return "".join(
        f"‹U+{ord(c):04X}›" if unicodedata.category(c) in _UNSEEN and c not in "\n\t\u200c\u200d" else c
        for c in shortened(text, most)
    )


_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}


def packed(array: np.ndarray) -> dict[str, str]:
    """Packs an array for JSON: its type, and its little-endian bytes in base64."""
    little = array.astype(array.dtype.newbyteorder("<"))
    return {"type": f"u{array.dtype.itemsize}", "data": base64.b64encode(little.tobytes()).decode()}


def _arrays(sequence: CachedSequence, length: int) -> dict[str, np.ndarray]:
    """Returns the numbers of a row's first tokens that `page.js` shows.

    tokens [T], trained [T]; of each of the M stored positions its entropy, tail, the actual token's log-probability and rank
    (0: in the tail), the number of entries, entries [M, 16] with logprobs and `rest`, what the others hold, and the heaviest
    groups [M, 4] with group_logprobs.
    """
    trained = sequence.loss_mask[:length].astype(np.uint8)
    num_positions = int(trained.sum())
    targets = sequence.targets[:num_positions]
    actual = sequence.input_ids[sequence.positions[:num_positions] + 1]
    found = targets.token_ids == actual[:, None]
    rank = np.where(found.any(axis=1), found.argmax(axis=1) + 1, 0) if found.size else np.zeros(num_positions, int)
    places = np.maximum(rank - 1, 0)[:, None]
    logprob = np.take_along_axis(targets.logprobs, places, axis=1)[:, 0] if found.size else np.zeros(num_positions)
    rest = np.exp(targets.logprobs[:, SHOWN_ENTRIES:], dtype=np.float64).sum(axis=1)
    groups, group_logprobs = _heaviest_groups(targets)
    return {
        "tokens": sequence.input_ids[:length],
        "trained": trained,
        "entropy": _steps(-entropies(targets)),
        "tail": _steps(targets.tail_logprob),
        "actual": np.where(rank > 0, _steps(logprob), NOTHING).astype(np.uint16),
        "rank": rank.astype(np.uint32),
        "num_entries": targets.num_entries.astype(np.uint32),
        "rest": _steps(np.log(rest, where=rest > 0, out=np.full(len(rest), -np.inf))),
        "entries": _wide(targets.token_ids, SHOWN_ENTRIES, -1),
        "logprobs": _wide(_steps(targets.logprobs), SHOWN_ENTRIES, NOTHING),
        "groups": groups,
        "group_logprobs": group_logprobs,
    }


def _rebuilt_tail(targets: SparseTargets, basis: TailBasis, most: int) -> dict[str, np.ndarray]:
    """Returns the tokens that the coefficients say are the tail's most probable, [M, 4], with logprobs; none beyond `most`."""
    ids = np.full((len(targets), SHOWN_REBUILT), -1)
    logprobs = np.full(ids.shape, -np.inf)
    for position in range(min(most, len(targets))):
        found = rebuilt(targets[position : position + 1], basis)[0]
        found[targets.token_ids[position][targets.token_ids[position] != PAD_ID]] = -np.inf
        count = min(SHOWN_REBUILT, len(found))
        largest = np.argpartition(-found, count - 1)[:count]
        ordered = largest[np.argsort(-found[largest], kind="stable")]
        shown = ordered[np.isfinite(found[ordered])]
        ids[position, : len(shown)], logprobs[position, : len(shown)] = shown, found[shown]
    return {"rebuilt": ids, "rebuilt_logprobs": _steps(logprobs)}


def _heaviest_groups(targets: SparseTargets) -> tuple[np.ndarray, np.ndarray]:
    """Returns the groups that hold most of the tail and their log masses, uint16 [M, 4]; [M, 0] if none are stored."""
    if targets.group_logprobs is None:
        nothing = np.zeros((len(targets), 0), np.uint16)
        return nothing, nothing
    order = np.argsort(-targets.group_logprobs, axis=1, kind="stable")[:, :SHOWN_GROUPS]
    return (
        _wide(order.astype(np.uint16), SHOWN_GROUPS, 0),
        _wide(_steps(np.take_along_axis(targets.group_logprobs, order, axis=1)), SHOWN_GROUPS, NOTHING),
    )


def _steps(logprobs: np.ndarray) -> np.ndarray:
    """Returns log-probabilities as uint16 multiples of −`NATS_STEP`."""
    finite = np.isfinite(logprobs)
    steps = np.rint(np.where(finite, logprobs, 0) / -NATS_STEP)
    return np.where(finite, np.clip(steps, 0, NOTHING - 1), NOTHING).astype(np.uint16)


def _wide(array: np.ndarray, width: int, fill: int) -> np.ndarray:
    """Cuts or fills up [M, k] to [M, width]."""
    missing = max(width - array.shape[1], 0)
    return np.pad(array[:, :width], ((0, 0), (0, missing)), constant_values=fill)


def _numbers_of(cache: LogitCache, ids: Sequence[str]) -> set[int]:
    """Finds the rows whose ids are these or begin with these. Only the column of ids is read."""
    found: dict[str, int] = {}
    if ids:
        number = 0
        for table in cache.iter_columns(["row_id"]):
            for row_id in table["row_id"].to_pylist():
                for text in ids:
                    if row_id.startswith(text):
                        found.setdefault(text, number)
                number += 1
    if missing := [text for text in ids if text not in found]:
        raise UserError(f"--rows {shortened(missing[0])}: neither A:B, nor a number, nor the id of a row of this cache")
    return set(found.values())

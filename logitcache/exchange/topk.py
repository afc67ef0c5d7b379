"""Plain top-k rows: `input_ids`, `topk_ids` and `topk_logprobs` as lists over positions, optional `loss_mask` and `tail_logprob`.

List i is the teacher's distribution of token i + 1; there are T − 1 of them for T tokens, or T with the last one unused. Lists of
positions that are not trained may be empty, or null.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from logitcache.exchange.distillkit import check_length
from logitcache.exchange.source_rows import SourceRow
from logitcache.exchange.values import BadRow, numbers, ragged
from logitcache.format.codec import DecodedRows, lists_of
from logitcache.format.targets import PAD_ID

IDS, LOGPROBS, TAIL, MASK = "topk_ids", "topk_logprobs", "tail_logprob", "loss_mask"
EXACT = "exact_entries"


def read_entries(
    row: SourceRow, positions: np.ndarray, num_tokens: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Returns ids int64 [N, k], log-probabilities float32 [N, k], and tail float32 [N] or None, of some positions of a row.

    Raises BadRow for lists that do not belong together, for log-probabilities above 0, and for entries that were rebuilt.
    """
    if row.has(EXACT):
        raise BadRow(f"entries beyond {EXACT} are no teacher's: export the rows without --top-k")
    ids, logprobs = ragged(row.value(IDS), IDS, "iu"), ragged(row.value(LOGPROBS), LOGPROBS, "fiu")
    check_length(ids, IDS, num_tokens)
    if len(logprobs.lengths) != len(ids.lengths):
        raise BadRow(f"{IDS} has {len(ids.lengths)} positions, {LOGPROBS} has {len(logprobs.lengths)}")
    ids, logprobs = ids.take(positions), logprobs.take(positions)
    unequal = np.flatnonzero(ids.lengths != logprobs.lengths)
    if len(unequal):
        at = unequal[0]
        raise BadRow(f"position {positions[at]}: {ids.lengths[at]} {IDS}, {logprobs.lengths[at]} {LOGPROBS}")
    padded = logprobs.padded(-np.inf, np.float32)
    above = np.flatnonzero((padded > 1e-6).any(axis=1))
    if len(above):
        raise BadRow(f"position {positions[above[0]]}: a log-probability above 0")
    return ids.padded(PAD_ID, np.int64), padded, _tail(row, positions, len(ids.lengths))


def _tail(row: SourceRow, positions: np.ndarray, count: int) -> np.ndarray | None:
    """Returns the tail of the positions, if the row has one; −inf, no mass at all, is null in a file."""
    if not row.has(TAIL):
        return None
    value = row.value(TAIL)
    plain = value.as_py() if isinstance(value, pa.Scalar) else value
    filled = [-np.inf if one is None else one for one in plain] if isinstance(plain, list) else plain
    tail = numbers(filled, TAIL, "fiu")
    if len(tail) <= int(positions.max(initial=-1)):
        raise BadRow(f"{TAIL} has {len(tail)} positions, more are trained")
    with np.errstate(over="ignore"):
        stored = tail[positions].astype(np.float32)
    if not (stored <= 1e-6).all():
        raise BadRow(f"{TAIL} is above 0, or not a number, at a trained position")
    at_most_all: np.ndarray = np.minimum(stored, 0)
    return at_most_all


def table(rows: DecodedRows) -> pa.Table:
    """Returns a row group of a cache as plain top-k rows, with T − 1 lists each."""
    stored, per_row = _predicted(rows)
    counts = np.zeros(len(stored), dtype=np.int64)
    present = np.isfinite(rows.targets.logprobs)  # one of probability 0 says no more than one that is not there
    counts[stored] = present.sum(axis=1)
    tails = np.full(len(stored), -np.inf, dtype=np.float32)
    tails[stored] = rows.targets.tail_logprob
    lengths = np.diff(rows.token_offsets)
    columns = {
        "input_ids": lists_of(pa.array(rows.input_ids, pa.int32()), lengths),
        MASK: lists_of(pa.array(rows.loss_mask, pa.bool_()), lengths),
        IDS: lists_of(lists_of(pa.array(rows.targets.token_ids[present], pa.int32()), counts), per_row),
        LOGPROBS: lists_of(lists_of(pa.array(rows.targets.logprobs[present], pa.float32()), counts), per_row),
        TAIL: lists_of(pa.array(tails, pa.float32(), mask=np.isneginf(tails)), per_row),
    }
    return pa.table(columns)


def exact_entries(rows: DecodedRows) -> pa.Array:
    """Returns the number of entries of each position in the lists of `table`."""
    stored, per_row = _predicted(rows)
    counts = np.zeros(len(stored), dtype=np.int32)
    counts[stored] = np.isfinite(rows.targets.logprobs).sum(axis=1)
    return lists_of(pa.array(counts), per_row)


def _predicted(rows: DecodedRows) -> tuple[np.ndarray, np.ndarray]:
    """Returns of every token but the first of each row whether it is trained, and the number of such tokens of each row."""
    lengths = np.diff(rows.token_offsets)
    predicted = np.ones(len(rows.input_ids), dtype=bool)
    predicted[rows.token_offsets[:-1][lengths > 0]] = False
    return rows.loss_mask[predicted], np.maximum(lengths - 1, 0)

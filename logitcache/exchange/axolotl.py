"""A cache → rows for Axolotl's distillation (github.com/axolotl-ai-cloud/axolotl, integrations/kd): v1 and v2.

The kept columns, above all the chat messages, and a list over positions. Axolotl tokenises the messages itself, and takes list r
of R for the distribution of token T − R + r: lists are aligned with the tokens that they predict, at the end of the sequence.
So they begin with the first trained token and run to the last token of the row. What it knows of a position are its entries,
all positions of a row as many of them, which it divides by their sum: the tail is lost. Tokens in between that are not
trained have a list too, which Axolotl masks: it holds the token itself with a probability of 1. So does that of a position of
which the cache holds the tail alone.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from logitcache.format.codec import DecodedRows, lists_of
from logitcache.format.sequences import CachedSequence
from logitcache.format.targets import PAD_ID

IDS = "target_token_ids"
NOTHING_NATS = -100.0
"""Log-probability of an entry that only fills a list up; JSON has no −∞."""


def table_v1(rows: DecodedRows, logprobs_field: str) -> pa.Table:
    """Returns rows with, per position, a list of {"token": "token_id:<id>", "logprob": …} in `logprobs_field`."""
    ids, logprobs, lists, positions = _lists(rows)
    tokens = pc.binary_join_element_wise("token_id:", pa.array(ids).cast(pa.string()), "")
    entries = pa.StructArray.from_arrays([tokens, pa.array(logprobs, pa.float32())], ["token", "logprob"])
    return pa.table({logprobs_field: lists_of(lists_of(entries, lists), positions)})


def table_v2(rows: DecodedRows, logprobs_field: str) -> pa.Table:
    """Returns rows with, per position, a list of log-probabilities in `logprobs_field` and their ids in `target_token_ids`."""
    ids, logprobs, lists, positions = _lists(rows)
    return pa.table(
        {
            logprobs_field: lists_of(lists_of(pa.array(logprobs, pa.float32()), lists), positions),
            IDS: lists_of(lists_of(pa.array(ids, pa.int32()), lists), positions),
        }
    )


def exact_entries(rows: DecodedRows) -> pa.Array:
    """Returns the number of entries of each position in the lists of the tables, without what only fills them up."""
    counts = []
    for number, row in enumerate(rows):
        first = int(row.positions[0]) if len(row.positions) else len(row.input_ids) - 1
        of_row = np.zeros(len(row.input_ids) - 1 - first, np.int32)
        of_row[row.positions - first] = rows.num_entries[rows.offsets[number] : rows.offsets[number + 1]]
        counts.append(of_row)
    return lists_of(pa.array(np.concatenate(counts)), [len(of_row) for of_row in counts])


def as_it_was(value: Any) -> Any:
    """Returns a kept value; a list of objects (messages, tools) that the cache holds as JSON text becomes such a list again.

    The text stays if JSON could not be written of the list: of NaN and of half a surrogate pair.
    """
    if not isinstance(value, str) or not value.startswith("["):
        return value
    try:
        items = json.loads(value)
        json.dumps(items, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        return value
    return items if all(isinstance(item, dict) for item in items) else value


def _lists(rows: DecodedRows) -> tuple[np.ndarray, np.ndarray, list[int], list[int]]:
    """Returns the ids of all lists, their log-probabilities, the length of every list, the number of lists of every row."""
    ids, logprobs, lengths, counts = [], [], [], []
    for row in rows:
        row_ids, row_logprobs = _lists_of(row)
        ids.append(row_ids.reshape(-1))
        logprobs.append(row_logprobs.reshape(-1))
        lengths += [row_ids.shape[1]] * len(row_ids)
        counts.append(len(row_ids))
    return np.concatenate(ids), np.concatenate(logprobs), lengths, counts


def _lists_of(row: CachedSequence) -> tuple[np.ndarray, np.ndarray]:
    """Returns ids int32 and log-probabilities float32 [R, k] of the row's last R tokens, k ≥ 1 the most entries of any."""
    targets = row.targets
    if not len(targets):
        return np.empty((0, 0), np.int32), np.empty((0, 0), np.float32)
    k = targets.token_ids.shape[1]
    first = int(row.positions[0])
    predicted = row.input_ids[first + 1 :]  # [R]
    ids = np.full((len(predicted), max(k, 1)), PAD_ID, dtype=np.int32)
    logprobs = np.full(ids.shape, NOTHING_NATS, dtype=np.float32)
    ids[:, 0], logprobs[:, 0] = predicted, 0.0
    known = np.isfinite(targets.logprobs).any(axis=1)
    stored = row.positions[known] - first
    ids[stored, :k] = targets.token_ids[known]
    logprobs[stored, :k] = np.maximum(targets.logprobs[known], NOTHING_NATS)
    return _filled_up(ids), logprobs


def _filled_up(ids: np.ndarray) -> np.ndarray:
    """Returns the lists with the lowest ids that they do not hold in place of PAD_ID."""
    filled = ids.copy()
    for position in np.flatnonzero((ids == PAD_ID).any(axis=1)):
        missing = ids[position] == PAD_ID
        others = np.setdiff1d(np.arange(ids.shape[1]), ids[position])
        filled[position, missing] = others[: missing.sum()]
    return filled

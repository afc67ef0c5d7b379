"""Columns beside `input_ids` that say which tokens are trained and which are padding."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from logitcache.documents.document import BadDocument

PADDING = "attention_mask"
LABELS = "labels"
LOSS_MASKS = ("loss_mask", LABELS, "completion_mask", "assistant_masks")
"""Of this project, of transformers' models, of TRL, of transformers' chat templates. All of a document must agree."""
NOT_TRAINED = -100
"""In labels; the other ones are the ids."""


def read_masks(ids: np.ndarray, columns: Mapping[str, Any]) -> tuple[slice, np.ndarray]:
    """Returns the slice of the tokens that are no padding, and which tokens are trained, bool [T].

    ids: int [T].  columns: of the document; a column that is null is absent. All tokens but padding are trained unless a column
    of LOSS_MASKS says otherwise; masks need not agree about the first token, which nothing predicts. Raises BadDocument for a
    column that is no mask of so many tokens, contradicts another one or trains padding, and for labels that are neither −100
    nor the ids.
    """
    within = find_padding(ids, columns)
    unpadded = np.zeros(len(ids), dtype=bool)
    unpadded[within] = True
    masks = {name: _read(name, columns[name], ids) for name in LOSS_MASKS if columns.get(name) is not None}
    for name, mask in masks.items():
        if (wrong := np.flatnonzero(mask & ~unpadded)).size:
            raise BadDocument(f"`{name}` trains token {wrong[0]}, which is padding by `{PADDING}`")
    first, trained = next(iter(masks.items()), ("", unpadded))
    for name, mask in masks.items():
        differ = np.flatnonzero(mask != trained)
        if (differ := differ[differ > within.start]).size:
            raise BadDocument(
                f"`{first}` and `{name}` contradict each other at token {differ[0]}; leave one out, or name the right one, "
                f"for example --columns loss_mask={name}"
            )
    return within, trained


def find_padding(ids: np.ndarray, columns: Mapping[str, Any]) -> slice:
    """Returns the slice of the tokens that `attention_mask` does not call padding. Raises BadDocument if that is no such mask."""
    if columns.get(PADDING) is None:
        return slice(0, len(ids))
    real = np.flatnonzero(_ones(PADDING, columns[PADDING], ids))
    if not real.size:
        return slice(0, 0)
    within = slice(int(real[0]), int(real[-1]) + 1)
    if len(real) != within.stop - within.start:
        raise BadDocument(f"`{PADDING}` has zeros between ones: padding can only be cut off at the ends")
    return within


def unused_masks(columns: Mapping[str, Any], used: Collection[str], num_tokens: int) -> list[str]:
    """Lists columns outside `used` that look like masks, by their name or by their values 0 and 1 for each token."""
    found = []
    for name, value in columns.items():
        if isinstance(value, list) and len(value) == num_tokens and name not in used:
            is_binary = all(type(one) in (int, bool) for one in value) and {0, 1} == set(value)
            if is_binary or re.search("mask|label", name, re.IGNORECASE):
                found.append(name)
    return found


def _read(name: str, value: Any, ids: np.ndarray) -> np.ndarray:
    """Reads a mask, bool [T]. A column that --columns calls `loss_mask` may hold labels."""
    if name == LABELS or _are_labels(value, ids):
        return _of_labels(name, value, ids)
    return _ones(name, value, ids)


def _are_labels(value: Any, ids: np.ndarray) -> bool:
    numbers = _numbers(value, ids)
    if numbers is None or numbers.dtype.kind not in "iu" or ((numbers == 0) | (numbers == 1)).all():
        return False
    return bool((numbers == NOT_TRAINED).any() or (numbers == ids).all())


def _of_labels(name: str, value: Any, ids: np.ndarray) -> np.ndarray:
    labels = _numbers(value, ids)
    if labels is None or labels.dtype.kind not in "iu":
        raise BadDocument(f"`{name}` must be a list of integers as long as `input_ids`, {len(ids)}")
    trained: np.ndarray = labels != NOT_TRAINED
    if (wrong := np.flatnonzero(trained & (labels != ids))).size:
        at = wrong[0]
        raise BadDocument(
            f"`{name}` holds {labels[at]} at token {at}, whose id is {ids[at]}: labels are the ids themselves, or "
            f"{NOT_TRAINED} where nothing is trained"
        )
    return trained


def _ones(name: str, value: Any, ids: np.ndarray) -> np.ndarray:
    numbers = _numbers(value, ids)
    if numbers is None or not ((numbers == 0) | (numbers == 1)).all():
        raise BadDocument(f"`{name}` must be a list of true and false as long as `input_ids`, {len(ids)}")
    return numbers.astype(bool)


def _numbers(value: Any, ids: np.ndarray) -> np.ndarray | None:
    """Returns a list of numbers, one for each token, as an array; None for anything else."""
    if not isinstance(value, list) or len(value) != len(ids):
        return None
    if not all(isinstance(one, int | float) for one in value):
        return None
    try:
        numbers = np.array(value, dtype=None if value else np.int64)
    except OverflowError:
        return None
    return numbers if numbers.dtype.kind in "biuf" else None

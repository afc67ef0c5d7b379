"""Token sequences, as a corpus yields them and as a cache stores them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from logitcache.format.targets import SparseTargets


def row_id(input_ids: np.ndarray, loss_mask: np.ndarray) -> str:
    """Returns the 128-bit BLAKE2b of token ids (little-endian int32) and packed loss mask, as 32 hexadecimal digits."""
    digest = hashlib.blake2b(input_ids.astype("<i4").tobytes(), digest_size=16)
    digest.update(np.packbits(loss_mask).tobytes())
    return digest.hexdigest()


def trained_positions(loss_mask: np.ndarray) -> np.ndarray:
    """Returns the positions whose logits predict a trained token, int32 [M], ascending. Position i predicts token i + 1."""
    return np.flatnonzero(loss_mask[1:]).astype(np.int32)


@dataclass(frozen=True)
class TokenSequence:
    """One sequence to score.

    input_ids: int32 [T].  loss_mask: bool [T], True where the token is trained; never for the first token, which
    nothing predicts.
    columns: kept columns of the source row.  where: file and row of the source, for messages, where they are known.
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray
    columns: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""

    @cached_property
    def row_id(self) -> str:
        """The hash that names this row wherever it travels."""
        return row_id(self.input_ids, self.loss_mask)

    @cached_property
    def positions(self) -> np.ndarray:
        """Stored positions, int32 [M]."""
        return trained_positions(self.loss_mask)


@dataclass(frozen=True)
class CachedSequence:
    """One row of a cache.

    input_ids: int32 [T].  loss_mask: bool [T].  positions: int32 [M], the logits row of each row of `targets`.
    columns: kept columns of the source row.
    """

    row_id: str
    input_ids: np.ndarray
    loss_mask: np.ndarray
    positions: np.ndarray
    targets: SparseTargets
    columns: Mapping[str, Any] = field(default_factory=dict)


class ColumnTypes:
    """Arrow type of each kept column: the one that all its values share, otherwise string, non-strings as JSON text."""

    def __init__(self) -> None:
        self._seen: dict[str, set[str]] = {}

    def see(self, columns: Mapping[str, Any]) -> None:
        """Takes a row's values into account."""
        for name, value in columns.items():
            types = self._seen.setdefault(name, set())
            if value is not None:
                types.add({bool: "bool", int: "int64", float: "double"}.get(type(value), "string"))
            if type(value) is int and not -(2**63) <= value < 2**63:
                types.add("string")

    def names(self) -> dict[str, str]:
        """Returns the name of an Arrow type for each column."""
        return {name: min(types) if len(types) == 1 else "string" for name, types in self._seen.items()}


def stored_value(column_type: str, value: Any) -> Any:
    """Returns a value as a column of that type stores it. Raises TypeError for a value that is no plain JSON type."""
    if column_type != "string" or value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


def stored_columns(types: Mapping[str, str], columns: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a row's kept columns as they are stored. types: of `ColumnTypes.names`. Raises TypeError as `stored_value`."""
    return {name: stored_value(types[name], value) for name, value in columns.items()}


def columns_text(columns: Mapping[str, Any]) -> str:
    """Returns a row's kept columns as JSON text. A value of a kind that JSON lacks becomes a string."""
    return json.dumps(dict(columns), ensure_ascii=False, default=str)

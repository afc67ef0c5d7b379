"""Lists of a source's row, from Parquet or JSON, as numpy arrays; anything else in them is refused."""

from __future__ import annotations

from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from logitcache.documents.arrow import read_scalar

_KINDS = {"b": bool, "i": int, "f": float}
_DTYPES = {"b": np.bool_, "i": np.int64, "f": np.float64}
"""Of JSON's numbers, by the letters that numpy has for kinds."""


class BadRow(ValueError):
    """A fault of a row; whoever reads the row adds file and number."""


class Ragged(NamedTuple):
    """Lists of numbers one after the other: the values of all, and the length of each, int64 [n]."""

    values: np.ndarray
    lengths: np.ndarray

    def take(self, lists: np.ndarray) -> Ragged:
        """Returns some of the lists, by ascending numbers int [m]."""
        kept = np.zeros(len(self.lengths), dtype=bool)
        kept[lists] = True
        return Ragged(self.values[np.repeat(kept, self.lengths)], self.lengths[lists])

    def padded(self, fill: float, dtype: type) -> np.ndarray:
        """Returns the lists as rows [n, longest], filled up at their ends."""
        width = int(self.lengths.max(initial=0))
        filled = np.arange(width) < self.lengths[:, None]
        rows: np.ndarray = np.full(filled.shape, fill, dtype)
        with np.errstate(over="ignore"):
            rows[filled] = self.values
        return rows


def numbers(value: Any, name: str, kinds: str) -> np.ndarray:
    """Returns a list of numbers as an array of its own type.  kinds: of numpy, such as "iu" for whole numbers.

    Raises BadRow for anything else, nulls included.
    """
    if isinstance(value, pa.Scalar):
        return _of_arrow(_list_of(value, name), name, kinds)
    return _of_python(_python_list(value, name), name, kinds)


def ragged(value: Any, name: str, kinds: str) -> Ragged:
    """Returns a list of lists of numbers; an inner list that is null has none. Raises BadRow for anything else."""
    if isinstance(value, pa.Scalar):
        lists = _list_of(value, name)
        if not _is_list(lists.type):
            raise BadRow(f"column {name!r}: lists of lists are wanted, this is {value.type}")
        lengths = pc.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False)
        return Ragged(_of_arrow(lists.flatten(), name, kinds), lengths.astype(np.int64))
    parts = [[] if part is None else _python_list(part, name) for part in _python_list(value, name)]
    lengths = np.array([len(part) for part in parts], dtype=np.int64)
    return Ragged(_of_python(list(chain.from_iterable(parts)), name, kinds), lengths)


def plain(value: Any) -> Any:
    """Returns a value of either kind of source in plain Python types. Raises BadRow for text that is not UTF-8, and the like."""
    if not isinstance(value, pa.Scalar):
        return value
    try:
        return read_scalar(value)
    except (ValueError, OverflowError) as error:
        raise BadRow(f"a kept column is not readable ({error})") from error


def _list_of(value: pa.Scalar, name: str) -> pa.Array:
    if not value.is_valid:
        raise BadRow(f"column {name!r} is missing or null")
    if not _is_list(value.type):
        raise BadRow(f"column {name!r}: a list is wanted, this is {value.type}")
    return value.values


def _is_list(arrow_type: pa.DataType) -> bool:
    return any(test(arrow_type) for test in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list))


def _of_arrow(array: pa.Array, name: str, kinds: str) -> np.ndarray:
    if array.null_count:
        raise BadRow(f"column {name!r} holds a null")
    if not len(array):
        return np.empty(0, dtype=_DTYPES[kinds[0]])
    if pa.types.is_boolean(array.type) or pa.types.is_integer(array.type) or pa.types.is_floating(array.type):
        return _checked(array.to_numpy(zero_copy_only=False), name, kinds)
    raise BadRow(f"column {name!r}: numbers are wanted, this is {array.type}")


def _python_list(value: Any, name: str) -> list[Any]:
    if value is None:
        raise BadRow(f"column {name!r} is missing or null")
    if not isinstance(value, list):
        raise BadRow(f"column {name!r}: a list is wanted, this is {_short(value)}")
    return value


def _of_python(values: list[Any], name: str, kinds: str) -> np.ndarray:
    allowed = {kind for letter, kind in _KINDS.items() if letter in kinds}
    if not allowed.issuperset(map(type, values)):
        strange = next(value for value in values if type(value) not in allowed)
        raise BadRow(f"column {name!r} holds {_short(strange)}, numbers are wanted")
    try:
        array = np.array(values, dtype=None if values else _DTYPES[kinds[0]])
    except OverflowError as error:
        raise BadRow(f"column {name!r} holds a number that is too large") from error
    return _checked(array, name, kinds)


def _checked(array: np.ndarray, name: str, kinds: str) -> np.ndarray:
    if array.dtype.kind not in kinds:
        wanted = "numbers" if "f" in kinds else "whole numbers"
        raise BadRow(f"column {name!r} holds {array.dtype} values, {wanted} are wanted")
    return array


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"

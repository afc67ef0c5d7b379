"""Rows of Arrow tables → what a .jsonl line of the same document would give.

Arrow has one type for all rows of a column: of an object it knows every key that any row has, and fills the absent ones
with null. A null that was written cannot be told from one that was filled in. The rule: **a null key of an object is an
absent key.** One exception: the `content` of a turn, which templates compare with null; a turn is an object with a
`role` (or ShareGPT's `value` of a `from`) in a column's list. Columns, and values in lists, stay null where they are null.
JSON text says exactly what it says: values of the type `arrow.json`, which `datasets` writes, keep their nulls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import pyarrow as pa

from logitcache.documents.json_text import parse_json

TURN_KEYS = (("role", "content"), ("from", "value"))
"""What makes an object a turn, and its key that may be null."""
Restore = Callable[[Any], Any]


def read_arrow(table: pa.RecordBatch | pa.Table) -> Iterator[tuple[dict[str, Any], str | None]]:
    """Yields the values of each row, and why they could not be read: a row with text that is not UTF-8 spoils no other one."""
    try:
        rows = table.to_pylist()
    except (ValueError, OverflowError):  # UnicodeDecodeError among them; a date beyond Python's
        rows = None
    columns = [(field.name, restore) for field in table.schema if (restore := _restore(field.type, depth=0))]
    for index in range(table.num_rows):
        try:
            values = dict(rows[index]) if rows is not None else _read_row(table, index)
            for name, restore in columns:
                values[name] = restore(values[name])
        except (ValueError, OverflowError, RecursionError) as error:
            yield {}, str(error)
        else:
            yield values, None


def read_scalar(value: pa.Scalar) -> Any:
    """Reads a value by the same rule. Raises ValueError or OverflowError if it cannot be read."""
    restore = _restore(value.type, depth=0) or _same
    return restore(value.as_py())


def _read_row(table: pa.RecordBatch | pa.Table, index: int) -> dict[str, Any]:
    values = {}
    for name, column in zip(table.schema.names, table.columns, strict=True):
        try:
            values[name] = column[index].as_py()
        except UnicodeDecodeError as error:
            raise ValueError(f"column {name!r} is not UTF-8 ({error})") from error
        except (ValueError, OverflowError) as error:
            raise ValueError(f"column {name!r} is not readable ({error})") from error
    return values


@lru_cache(maxsize=1024)
def _restore(type_: pa.DataType, depth: int) -> Restore | None:
    """Returns what makes values of a type plain, None if they are.  depth: 0 for a column, 1 for the values of its list."""
    if isinstance(type_, getattr(pa, "JsonType", ())):  # since pyarrow 19
        return lambda value: None if value is None else parse_json(value)
    if pa.types.is_dictionary(type_):
        return _restore(type_.value_type, depth)
    if pa.types.is_map(type_):
        item = _restore(type_.item_type, depth + 2) or _same
        return lambda value: None if value is None else {key: item(one) for key, one in value}
    if pa.types.is_struct(type_):
        return _restore_struct(type_, depth)
    if hasattr(type_, "value_type"):  # every kind of list
        one = _restore(type_.value_type, depth + 1)
        return one and (lambda value: None if value is None else [one(each) for each in value])
    return None


def _restore_struct(type_: pa.StructType, depth: int) -> Restore:
    fields = {field.name: _restore(field.type, depth + 2) or _same for field in type_}
    kept = {content for role, content in TURN_KEYS if depth == 1 and role in fields}

    def restore(value: Any) -> Any:
        if value is None:
            return None
        return {name: fields[name](one) for name, one in value.items() if one is not None or name in kept}

    return restore


def _same(value: Any) -> Any:
    return value

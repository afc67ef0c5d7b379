"""Columns of a source that travel in the cache: one Arrow type each, whatever their values are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


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
        """Column → name of an Arrow type."""
        return {name: min(types) if len(types) == 1 else "string" for name, types in self._seen.items()}


def stored_value(column_type: str, value: Any) -> Any:
    """A value of a column of that type as the cache stores it. Raises TypeError for one that is no plain JSON type."""
    if column_type != "string" or value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


def stored_columns(types: Mapping[str, str], columns: Mapping[str, Any]) -> dict[str, Any]:
    """The kept columns of a row as the cache stores them. types: of `ColumnTypes.names`. Raises TypeError as `stored_value`."""
    return {name: stored_value(types[name], value) for name, value in columns.items()}


def columns_text(columns: Mapping[str, Any]) -> str:
    """The kept columns of a row as JSON text. What JSON has not becomes a string."""
    return json.dumps(dict(columns), ensure_ascii=False, default=str)

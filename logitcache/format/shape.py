"""JSON of the shape that its readers rely on."""

from __future__ import annotations

from types import UnionType
from typing import Any


def check_shape(value: Any, shape: Any, where: str) -> None:
    """Raises TypeError naming a part that has not the shape, KeyError for one that is missing.

    shape: a type, or a union of types; a set of texts, one of which it is; [the shape of every item]; {name: shape of that
    part}, with other parts beside them, or with `...` for the name of any part. The shape of a part that may be missing stands
    in a tuple.
    Numbers are finite and not below 0; where floats are wanted whole numbers will do.
    """
    kind = shape if isinstance(shape, type | UnionType) else str if isinstance(shape, set) else type(shape)
    fits = isinstance(value, (int, float) if kind is float else kind)
    if kind in (int, float):
        fits = fits and not isinstance(value, bool) and 0 <= value < 1 << 63
    if not fits or (isinstance(shape, set) and value not in shape):
        raise TypeError(f"{where} is {value!r}"[:200])
    if isinstance(shape, list):
        for index, item in enumerate(value):
            check_shape(item, shape[0], f"{where}[{index}]")
    elif isinstance(shape, dict):
        for name, part in (dict.fromkeys(value, shape[...]) if ... in shape else shape).items():
            if not isinstance(part, tuple):
                check_shape(value[name], part, f"{where}.{name}")
            elif name in value:
                check_shape(value[name], part[0], f"{where}.{name}")

"""Thrift's compact protocol, in which Parquet's footers and page headers are written, is read into plain values.

Arrow's own bindings end the process if a damaged footer contradicts itself; this raises ValueError.
"""

from __future__ import annotations

import struct
from typing import Any

MOST_LEVELS = 16
"""Structures within structures; Parquet's have five."""
_FALSE, _TRUE, _BYTE, _INTEGERS, _DOUBLE, _BINARY, _LISTS, _STRUCT = 2, 1, 3, (4, 5, 6), 7, 8, (9, 10), 12


def parse_struct(content: bytes, at: int = 0) -> tuple[dict[int, Any], int]:
    """Returns a structure as {field number: value}, and where it ends. Raises ValueError if there is none."""
    try:
        return _struct(content, at, 0)
    except (IndexError, struct.error) as error:
        raise ValueError("a structure that does not end") from error


def _struct(content: bytes, at: int, level: int) -> tuple[dict[int, Any], int]:
    if level > MOST_LEVELS:
        raise ValueError("structures within structures without end")
    fields: dict[int, Any] = {}
    number = 0
    while head := content[at]:
        at += 1
        if head >> 4:
            number += head >> 4
        else:
            number, at = _integer(content, at)
        fields[number], at = _value(content, at, head & 15, level)
    return fields, at + 1


def _value(content: bytes, at: int, kind: int, level: int) -> tuple[Any, int]:
    if kind in _INTEGERS:
        return _integer(content, at)
    if kind in (_TRUE, _FALSE):
        return kind == _TRUE, at
    if kind == _BINARY:
        size, at = _count(content, at)
        return content[at : at + size], at + size
    if kind in _LISTS:
        return _list(content, at, level)
    if kind == _STRUCT:
        return _struct(content, at, level + 1)
    if kind == _BYTE:
        return content[at], at + 1
    if kind == _DOUBLE:
        return struct.unpack_from("<d", content, at)[0], at + 8
    raise ValueError(f"a value of kind {kind}")


def _list(content: bytes, at: int, level: int) -> tuple[list[Any], int]:
    head = content[at]
    size, kind = head >> 4, head & 15
    at += 1
    if size == 15:
        size, at = _count(content, at)
    values = []
    for _ in range(size):
        if kind in (_TRUE, _FALSE):
            value, at = content[at] == _TRUE, at + 1
        else:
            value, at = _value(content, at, kind, level + 1)
        values.append(value)
    return values, at


def _count(content: bytes, at: int) -> tuple[int, int]:
    """Reads a number of bytes or values, of which no more can follow than there are bytes."""
    count, at = _varint(content, at)
    if count > len(content) - at:
        raise ValueError(f"{count} values in {len(content) - at} bytes")
    return count, at


def _integer(content: bytes, at: int) -> tuple[int, int]:
    number, at = _varint(content, at)
    return (number >> 1) ^ -(number & 1), at


def _varint(content: bytes, at: int) -> tuple[int, int]:
    byte = content[at]
    if byte < 128:
        return byte, at + 1
    number, shift = byte & 127, 7
    while byte >= 128:
        at += 1
        byte = content[at]
        number |= (byte & 127) << shift
        shift += 7
        if shift > 70:
            raise ValueError("a number of more than 64 bits")
    return number, at + 1

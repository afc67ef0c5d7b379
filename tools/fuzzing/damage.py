"""Damage: of bytes, of text, and of JSON as a tree."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

ODD_TEXTS = [
    "",
    " ",
    "x",
    "\0",
    "\x1b[2J",
    "\u202e",
    "\ud800",
    "é👩‍👧",
    "a" * 5000,
    "../x",
    "/",
    "null",
    "nan",
    "{{ x }}",
    "!!int x",
]
ODD_NUMBERS = [
    0,
    -1,
    1,
    2,
    7,
    2**31,
    -(2**31) - 1,
    2**63,
    2**64,
    10**30,
    0.5,
    -0.0,
    1e-310,
    1e308,
    float("inf"),
    float("nan"),
]
ODD_VALUES: list[Any] = [
    None,
    True,
    False,
    *ODD_NUMBERS,
    *ODD_TEXTS,
    [],
    {},
    [[]],
    {"": None},
    [None],
    [0, "x"],
    {"a": {"b": []}},
]


def damaged_bytes(random: Random, content: bytes, times: int = 3) -> bytes:
    """Some bytes flipped, cut out, doubled or overwritten, or the rest cut off."""
    data = bytearray(content)
    for _ in range(random.randint(1, times)):
        at = random.randrange(len(data) + 1)
        until = min(at + random.choice([1, 2, 8, 100]), len(data))
        what = random.choice(["flip", "flip", "flip", "cut", "double", "noise", "zeros", "end"])
        if what == "flip" and at < len(data):
            data[at] ^= 1 << random.randrange(8)
        elif what == "cut":
            del data[at:until]
        elif what == "double":
            data[at:at] = data[at:until]
        elif what == "noise":
            data[at:until] = random.randbytes(until - at)
        elif what == "zeros":
            data[at:until] = bytes(until - at)
        elif what == "end" and random.random() < 0.3:
            del data[at:]
    return bytes(data)


def damaged_tree(random: Random, value: Any, times: int = 2) -> Any:
    """A copy of plain values in which some are replaced, removed, doubled, renamed, nested or put in another's place."""
    value = copy.deepcopy(value)
    for _ in range(random.randint(1, times)):
        places = list(_places(value))
        if not places:
            return random.choice(ODD_VALUES)
        holder, key = random.choice(places)
        what = random.choice(
            ["replace", "replace", "replace", "near", "remove", "double", "rename", "nest", "exchange"]
        )
        if what == "replace":
            holder[key] = copy.deepcopy(random.choice(ODD_VALUES))
        elif what == "near":
            holder[key] = _near(random, holder[key])
        elif what == "remove":
            del holder[key]
        elif what == "double" and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        elif what == "rename" and isinstance(holder, dict):
            holder[random.choice(ODD_TEXTS)] = holder.pop(key)
        elif what == "nest":
            for _ in range(random.choice([1, 1, 40, 100])):
                holder[key] = random.choice([[holder[key]], {"a": holder[key]}])
        elif what == "exchange":
            other, place = random.choice(places)
            if place in other if isinstance(other, dict) else place < len(other):
                holder[key] = copy.deepcopy(other[place])
    return value


def damaged_json(random: Random, content: bytes | str) -> bytes:
    """A JSON text damaged as a tree, mostly, or as bytes."""
    if random.random() < 0.2:
        return damaged_bytes(random, content.encode() if isinstance(content, str) else content)
    if random.random() < 0.02:
        return b"[" * 100_000
    return json.dumps(damaged_tree(random, json.loads(content))).encode()


def _near(random: Random, value: Any) -> Any:
    """A value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return random.choice([value + 1, value - 1, -value, value * 1000, *ODD_NUMBERS])
    if isinstance(value, str):
        at = random.randrange(len(value) + 1)
        return random.choice([value[:at], value[:at] + random.choice(ODD_TEXTS) + value[at:], value.upper(), value * 2])
    if isinstance(value, list):
        return random.sample(value, random.randint(0, len(value)))
    return value


def _places(value: Any) -> Any:
    """Each (dict or list, key or index) below a value."""
    if isinstance(value, dict | list):
        for key, below in list(value.items() if isinstance(value, dict) else enumerate(value)):
            yield value, key
            yield from _places(below)

"""The values of options are read from text."""

from __future__ import annotations

import argparse
import json
from typing import Any


def names(text: str) -> list[str]:
    """Reads NAME,NAME."""
    return [name for name in text.split(",") if name]


def numbers(text: str) -> list[float]:
    """Reads NUMBER,NUMBER. Raises ArgumentTypeError, as all of these do, for anything else."""
    try:
        return [float(number) for number in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: write numbers with commas between them") from error


def mapping(text: str) -> dict[str, str]:
    """Reads OURS=THEIRS,OURS=THEIRS."""
    pairs = [pair.partition("=") for pair in text.split(",")]
    if not all(ours and theirs for ours, _, theirs in pairs):
        raise argparse.ArgumentTypeError(f"{text!r}: write OURS=THEIRS,OURS=THEIRS")
    return {ours: theirs for ours, _, theirs in pairs}


def assignments(text: str) -> dict[str, Any]:
    """Reads NAME=VALUE,NAME=VALUE; a value is JSON, or text without a comma."""
    assigned: dict[str, Any] = {}
    rest = text
    while rest:
        name, equals, rest = rest.partition("=")
        if not (equals and name.isidentifier()):
            raise argparse.ArgumentTypeError(f"{name + equals!r} in {text!r}: write NAME=VALUE,NAME=VALUE")
        if name in assigned:
            raise argparse.ArgumentTypeError(f"{text!r}: {name} stands there twice")
        assigned[name], rest = _value(rest)
    return assigned


def _value(text: str) -> tuple[Any, str]:
    """Reads the value that `text` begins with, and returns what follows the comma after it."""
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    except ValueError:
        end = -1
    if end < 0 or text[end:].strip()[:1] not in ("", ","):
        value, _, rest = text.partition(",")
        return value, rest
    return value, text[end:].strip()[1:]


def part_of(text: str) -> tuple[int, int]:
    """Reads I/N: the I-th of N parts."""
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r}: write I/N, for example 0/8")
    return int(index), int(count)

"""PATH or PATH:WEIGHT → a cache and its share of the rows."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import logitcache
from logitcache import LogitCache, UserError

_WEIGHTED = re.compile(
    r"(?P<path>.+):(?P<weight>[+-]?(nan|inf|infinity|(\d+[.,]?\d*|[.,]\d+)(e[+-]?\d+)?[,;%]?))", re.IGNORECASE
)
"""With what looks like a number and is none, so that it is refused rather than taken as part of the path."""


@dataclass(frozen=True)
class Source:
    """A cache to learn from. weight: its part of the rows beside the other sources' weights, None without weights."""

    cache: LogitCache
    weight: float | None = None

    def __str__(self) -> str:
        return self.cache.path + ("" if self.weight is None else f":{self.weight:g}")


def open_sources(texts: Sequence[str]) -> tuple[Source, ...]:
    """Opens PATH or PATH:WEIGHT, each a folder or URL; a folder that is there under the whole text is a PATH.

    Raises UserError for weights on some only, weights that are not above 0, and what `logitcache.open` refuses.
    """
    parsed = [_parsed(text) for text in texts]
    with_weight = [text for text, (_, weight) in zip(texts, parsed, strict=True) if weight is not None]
    without = [text for text, (_, weight) in zip(texts, parsed, strict=True) if weight is None]
    if with_weight and without:
        raise UserError(
            f"--cache {with_weight[0]} has a weight and --cache {without[0]} has none: give every cache a weight "
            f"({without[0]}:0.5), or none, and every row comes once"
        )
    return tuple(Source(logitcache.open(path), weight) for path, weight in parsed)


def without_weights(average_with: Sequence[str]) -> Sequence[str]:
    """The paths of other teachers' caches. Raises UserError for one with a weight."""
    for text in average_with:
        path, weight = _split(text)
        if weight is not None:
            raise UserError(
                f"--average_with {text}: teachers to average have no weights, all count alike. Write {path} without one"
            )
    return average_with


def _parsed(text: str) -> tuple[str, float | None]:
    path, written = _split(text)
    if written is None:
        return path, None
    try:
        weight = float(written)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise UserError(
            f"--cache {text}: the weight is {written}, accepted are numbers above 0, as in --cache {path}:0.7 OTHER:0.3"
        )
    return path, weight


def _split(text: str) -> tuple[str, str | None]:
    """PATH, and WEIGHT as it is written."""
    match = _WEIGHTED.fullmatch(text)
    return (text, None) if match is None or Path(text).exists() else (match["path"], match["weight"])

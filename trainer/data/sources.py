"""PATH or PATH:WEIGHT → a cache and its share of the rows."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import logitcache
from logitcache import LogitCache, UserError

_WEIGHTED = re.compile(r"(?P<path>.+):(?P<weight>[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?)", re.IGNORECASE)


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


def _parsed(text: str) -> tuple[str, float | None]:
    match = _WEIGHTED.fullmatch(text)
    if match is None or Path(text).exists():
        return text, None
    weight = float(match["weight"])
    if not 0 < weight < math.inf:
        raise UserError(f"--cache {text}: the weight is {match['weight']}, accepted are numbers above 0")
    return match["path"], weight

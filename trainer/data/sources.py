"""Caches named on the command line: PATH or PATH:WEIGHT → opened caches that belong together."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import logitcache
from logitcache import LogitCache, UserError
from logitcache.format.tail_parts import TailParts, shared_parts

_WEIGHTED = re.compile(
    r"(?P<path>.+):(?P<weight>[+-]?(nan|inf|infinity|(\d+[.,]?\d*|[.,]\d+)(e[+-]?\d+)?[,;%]?))", re.IGNORECASE
)
"""A weight may look like a number and be none: it is then refused rather than taken as part of the path."""


@dataclass(frozen=True)
class Source:
    """A cache to learn from. weight: its share of the rows in proportion to the other weights; None without weights."""

    cache: LogitCache
    weight: float | None = None

    def __str__(self) -> str:
        return self.cache.path + ("" if self.weight is None else f":{self.weight:g}")


def open_sources(texts: Sequence[str]) -> tuple[Source, ...]:
    """Open caches by PATH or PATH:WEIGHT; if a folder has the whole text as its name, it is a PATH.

    Raises UserError if only some caches have a weight, if a weight is not above 0, or if a cache does not open.
    """
    parsed = [_parsed(text) for text in texts]
    with_weight = [text for text, (_, weight) in zip(texts, parsed, strict=True) if weight is not None]
    without = [text for text in texts if text not in with_weight]
    if with_weight and without:
        raise UserError(
            f"--cache {with_weight[0]} has a weight and --cache {without[0]} has none: give every cache a weight "
            f"({without[0]}:0.5), or none, and every row comes once"
        )
    return tuple(Source(logitcache.open(path), weight) for path, weight in parsed)


def without_weights(average_with: Sequence[str]) -> Sequence[str]:
    """Return the paths of other teachers' caches. Raises UserError if a path has a weight."""
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
    """Divide PATH:WEIGHT; the weight is as it is written, None without one."""
    match = _WEIGHTED.fullmatch(text)
    return (text, None) if match is None or Path(text).exists() else (match["path"], match["weight"])


def check_belong_together(caches: Sequence[LogitCache]) -> None:
    """Raises UserError if a cache is empty, is listed twice, or differs from the first in vocabulary or tokenizer.

    A cache that does not say which tokenizer made its ids is compared by the size of its vocabulary alone.
    """
    known: dict[str, str] = {}
    for cache in caches:
        if not len(cache):
            raise UserError(f"{cache.path} is an empty cache: leave it out")
        if cache.identity in known:
            raise UserError(
                f"{cache.path} is the same cache as {known[cache.identity]}: name it once; "
                "a weight (CACHE:2) makes its rows come more often"
            )
        known[cache.identity] = cache.path
        _check_same_ids(caches[0], cache)


def _check_same_ids(first: LogitCache, cache: LogitCache) -> None:
    tokenizers = [one.manifest.fingerprint.get("tokenizer") or {} for one in (first, cache)]
    for what, name in (("vocabulary", "vocabulary_sha256"), ("merges", "merges_sha256")):
        ours, theirs = (tokenizer.get(name) for tokenizer in tokenizers)
        if None not in (ours, theirs) and ours != theirs:
            raise UserError(
                f"{first.path} and {cache.path} were made with different tokenizers ({what} {str(ours)[:12]}… and "
                f"{str(theirs)[:12]}…): token ids must mean the same in all caches of a run. Train on one of them, or "
                "build the other with a teacher that has this tokenizer"
            )
    if first.vocab_size != cache.vocab_size:
        raise UserError(
            f"{first.path} is over {first.vocab_size} token ids and {cache.path} over {cache.vocab_size}: all caches "
            "of a run need teachers with the same number of logits"
        )


def common_tail_parts(caches: Sequence[LogitCache]) -> TailParts:
    """Returns the parts of the tail that all caches hold: groups of the same partition, coefficients in the same basis.

    Of caches with more coefficients than others, the first count.
    """
    parts = shared_parts([cache.manifest.layout.tail_parts for cache in caches])
    groups = caches[0].tail_groups
    others = [cache.tail_groups for cache in caches[1:]]
    same_groups = groups is not None and all(other is not None and np.array_equal(groups, other) for other in others)
    if not same_groups:
        parts = replace(parts, groups=0)
    return parts if basis_that_differs(caches) is None else replace(parts, rank=0, probes=0)


def basis_that_differs(caches: Sequence[LogitCache]) -> LogitCache | None:
    """Find a cache whose tail basis, as far as all have one, is not that of the first; None if a cache has no basis."""
    bases = [basis for cache in caches if (basis := cache.tail_basis) is not None]
    if len(bases) < len(caches):
        return None
    first, *others = (basis.first(min(basis.rank for basis in bases)) for basis in bases)
    for cache, other in zip(caches[1:], others, strict=True):
        for name in ("offset", "directions", "weights"):
            if not np.array_equal(getattr(first, name), getattr(other, name)):
                return cache
    return None

"""Candidate codecs of entry lists: an order of the entries × a way to write their log-probabilities.

A codec turns ids [M, k] and log-probabilities [M, k], most probable first, into flat columns of numbers and back. Quantisers
that keep floats write them as they are; those with levels write integers: counted down from the position's lowest level where
the order is not that of probability, as differences along the list where it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import log, log2

import numpy as np

Columns = dict[str, np.ndarray]
"""Name → numbers of all entries [M·k], or of all positions [M]."""

LEAST_OCCURRENCES = 16
"""Of an id that is worth naming among the frequent ones."""
LOWEST_LOGPROB = -40.0


@dataclass(frozen=True)
class Floats:
    """A quantiser that keeps floats. cast: log-probabilities → floats of any width."""

    name: str
    cast: Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Levels:
    """A quantiser to the nearest of some levels: log-probabilities, descending from 0."""

    name: str
    values: np.ndarray

    def level(self, logprobs: np.ndarray) -> np.ndarray:
        """Int32, of each log-probability."""
        between = (self.values[1:] + self.values[:-1]) / 2
        return np.searchsorted(-between, -logprobs).astype(np.int32)


Quantiser = Floats | Levels


def multiples(step: float) -> Floats:
    """float32, rounded to multiples of a step in nats."""
    return Floats(f"float32, multiples of {step:.2g}", lambda x: (np.rint(x / step) * step).astype(np.float32))


def following(scale: float) -> Floats:
    """float32, rounded to multiples of the power of two next to scale · p^(−1/3) nats: precision follows p."""

    def cast(logprobs: np.ndarray) -> np.ndarray:
        step = 2.0 ** np.rint(log2(scale) - logprobs / (3 * log(2)))
        return (np.rint(logprobs / step) * step).astype(np.float32)

    return Floats(f"float32, steps {scale:.2g}·p^(−1/3)", cast)


FLOAT32 = Floats("float32", lambda x: x.astype(np.float32))
FLOAT16 = Floats("float16", lambda x: x.astype(np.float16))


def uniform(step: float) -> Levels:
    """Levels of equal distance, nats."""
    return Levels(f"levels {step:g} apart", -step * np.arange(int(-LOWEST_LOGPROB / step) + 2))


def companded(n: int, longest: float, power: int = 3) -> Levels:
    """p = (1 − c/n)^power while steps of c are shorter than `longest` nats, then equal steps of that."""
    curve = power * np.log1p(-np.arange(n) / n)
    bend = int(np.searchsorted(-np.diff(curve), np.float64(longest)))
    more = int((curve[bend] - LOWEST_LOGPROB) / longest) + 2
    values = np.concatenate([curve[: bend + 1], curve[bend] - longest * np.arange(1, more)])
    return Levels(f"p^(1/{power}) / {n}, ≤ {longest:g} nat", values)


@dataclass(frozen=True)
class Codec:
    """order: rank (most probable first), ascending (gaps between ids) or frequent (the same, frequent ids first).

    relative: levels are counted from the position's lowest (or from the entry before, in order of rank), otherwise from 0.
    """

    order: str
    quantiser: Quantiser
    relative: bool = True

    @property
    def name(self) -> str:
        """As in a table."""
        how = "" if self.relative else ", from 0"
        along = ", delta" if self.order == "rank" and self.relative and isinstance(self.quantiser, Levels) else ""
        return f"{self.order}: {self.quantiser.name}{how}{along}"

    def encode(self, token_ids: np.ndarray, logprobs: np.ndarray, ranks_of_ids: np.ndarray) -> Columns:
        """Columns. ranks_of_ids: int [V], used in order of frequency."""
        columns: Columns = {}
        if self.order == "rank":
            columns["token_ids"], order = token_ids, np.broadcast_to(np.arange(token_ids.shape[1]), token_ids.shape)
        else:
            ranks = ranks_of_ids[token_ids] if self.order == "frequent" else token_ids
            order = np.argsort(ranks, axis=1)
            columns["id_gaps"] = np.diff(np.take_along_axis(ranks, order, axis=1), axis=1, prepend=np.int32(-1)) - 1
        if isinstance(self.quantiser, Floats):
            columns["logprobs"] = np.take_along_axis(self.quantiser.cast(logprobs), order, axis=1)
        else:
            levels = np.take_along_axis(self.quantiser.level(logprobs), order, axis=1)
            if self.relative and self.order == "rank":
                levels = np.diff(levels, axis=1, prepend=np.int32(0))
            elif self.relative:
                lowest = levels.max(axis=1)
                columns["lowest"], levels = lowest, lowest[:, None] - levels
            columns["levels"] = levels
        return {name: _narrow(column.reshape(-1)) for name, column in columns.items()}

    def decode(
        self, columns: Mapping[str, np.ndarray], k: int, ids_of_ranks: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids and log-probabilities [M, k], most probable first."""
        if isinstance(self.quantiser, Floats):
            logprobs = columns["logprobs"].reshape(-1, k).astype(np.float32)
        else:
            levels = columns["levels"].reshape(-1, k)
            if self.relative:
                levels = levels.cumsum(axis=1) if self.order == "rank" else columns["lowest"][:, None] - levels
            logprobs = self.quantiser.values.astype(np.float32)[levels]
        if self.order == "rank":
            return columns["token_ids"].reshape(-1, k), logprobs
        ids = columns["id_gaps"].reshape(-1, k).cumsum(axis=1) + np.arange(k)
        if self.order == "frequent":
            ids = ids_of_ranks[ids]
        order = np.argsort(-logprobs, axis=1, kind="stable")
        return np.take_along_axis(ids, order, axis=1), np.take_along_axis(logprobs, order, axis=1)


def frequent_ids(token_ids: np.ndarray) -> np.ndarray:
    """Ids that occur often, the most frequent first."""
    counts = np.bincount(token_ids.reshape(-1))
    order = np.argsort(-counts, kind="stable")
    return order[counts[order] >= LEAST_OCCURRENCES]


def rank_tables(frequent: np.ndarray, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Rank of each id [V] and id of each rank [F + V], frequent ids first."""
    ranks = np.arange(vocab_size) + len(frequent)
    ranks[frequent] = np.arange(len(frequent))
    return ranks, np.concatenate([frequent, np.arange(vocab_size)])


def _narrow(values: np.ndarray) -> np.ndarray:
    return values if values.dtype.kind == "f" else values.astype(np.int32)


CANDIDATES = [
    *(Codec(order, quantiser) for order in ("rank", "ascending", "frequent") for quantiser in (FLOAT32, FLOAT16)),
    Codec("rank", multiples(2.0**-14)),
    *(Codec("frequent", following(scale)) for scale in (2.0**-9, 2.0**-8, 2.0**-6)),
    *(Codec("frequent", uniform(step)) for step in (0.01, 0.02, 0.04, 0.08, 0.16)),
    *(
        Codec("frequent", companded(n, longest))
        for n, longests in (
            (100, (0.5,)),
            (144, (0.25, 0.5)),
            (200, (0.25, 0.5, 1.0)),
            (300, (0.25, 0.5)),
            (500, (0.25,)),
            (768, (0.0625, 0.125, 0.25, 0.5)),
            (1000, (0.25,)),
        )
        for longest in longests
    ),
    Codec("frequent", companded(560, 0.25, power=4)),
    Codec("frequent", companded(1200, 0.25, power=2)),
    *(Codec(order, companded(768, 0.25)) for order in ("rank", "ascending")),
    *(Codec("frequent", companded(n, longest), relative=False) for n, longest in ((768, 0.25), (200, 0.5))),
]

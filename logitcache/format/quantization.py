"""Levels of log-probability are what `balanced` and `compact` store instead of floats.

Level c stands for the probability (1 − c/n)², so that equal steps of c are equal steps of √p: the probable tokens, which
carry the divergences, are known to a thousandth of a nat, improbable ones to D nats and no finer. Where those steps would
become longer than D, equal steps of D nats go on without end. Level −1 stands for probability 0.

    p = (1 − c/n)²                            c < u = n − 2/D
    log p = 2 log(2/(D·n)) − (c − u)·D        c ≥ u

`tools/bench_codec.py` compares this grid with others at equal bytes: steps of √p have the least L1 of all roots.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np

from logitcache.errors import UserError

DEFAULT_PRECISION = "balanced"
MOST_LEVELS = 1 << 16
"""Log-probabilities of less than some −16 000 nats, which are 0 in any arithmetic, take the last level."""


MOST_STEP = 16.0
"""Nats: what was rounded by more says nothing."""


@dataclass(frozen=True)
class QuantizationSpec:
    """The rounding of the numbers that a cache does not store as captured; recorded in every shard.

    square_root_steps: n.  uniform_step: D, nats.  tail_step: nats, of tails, tempered tails and the tail's entropy.
    group_step: nats, of the log of a group's share of the tail.  sample_step: nats, of sampled log-probabilities.
    coefficient_step: of the coefficients in the cache's tail basis, by its step; None in a cache without.
    """

    square_root_steps: int
    uniform_step: float
    tail_step: float
    group_step: float
    sample_step: float
    coefficient_step: float | None = None
    probe_step: ClassVar[float] = 0.25

    @property
    def uniform_from(self) -> int:
        """u, the first level of the uniform part."""
        return round(self.square_root_steps - 2 / self.uniform_step)

    def levels(self, logprobs: np.ndarray) -> np.ndarray:
        """Returns the nearest level of each log-probability, int32; −1 for −inf."""
        n, u = self.square_root_steps, self.uniform_from
        depth = -np.minimum(logprobs.astype(np.float64), 0.0)
        knot = -2 * np.log1p(-u / n)
        with np.errstate(invalid="ignore"):
            uniform = u + (depth - knot) / self.uniform_step
            level = np.where(depth < knot, n * -np.expm1(-depth / 2), uniform)
            return np.where(np.isposinf(depth), -1, np.minimum(np.rint(level), MOST_LEVELS - 1)).astype(np.int32)

    def logprobs(self, count: int) -> np.ndarray:
        """Returns the log-probability of levels 0 … count − 1, then of level −1: float32 [count + 1]."""
        n, u = self.square_root_steps, self.uniform_from
        level = np.arange(count, dtype=np.float64)
        square_root = 2 * np.log1p(-np.minimum(level, u) / n)
        return np.append(square_root - np.maximum(level - u, 0) * self.uniform_step, -np.inf).astype(np.float32)

    def bound(self, logprobs: np.ndarray) -> np.ndarray:
        """Returns the most by which each log-probability may come back changed, nats, up to float32's own rounding."""
        n, half = self.square_root_steps, self.uniform_step / 2
        above_zero = n * np.exp(np.minimum(logprobs.astype(np.float64), 0.0) / 2)
        square_root = 2 * np.log1p(0.5 / np.maximum(above_zero - 0.5, 0.5))
        least: np.ndarray = np.minimum(square_root, half + (half / 8))
        return least

    def to_json(self) -> dict[str, Any]:
        """Returns the steps as plain JSON types."""
        return {name: step for name, step in asdict(self).items() if step is not None}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> QuantizationSpec:
        """Returns the rounding of `to_json`. Raises TypeError or ValueError for steps that round nothing."""
        quantization = cls(**data)
        steps = [step for name, step in quantization.to_json().items() if name != "square_root_steps"]
        if type(quantization.square_root_steps) is not int or not all(isinstance(step, float | int) for step in steps):
            raise TypeError(f"{quantization} is not of numbers")
        if not all(0 < step <= MOST_STEP for step in steps) or not 0 < quantization.uniform_from < MOST_LEVELS:
            raise ValueError(f"{quantization} rounds nothing")
        return quantization


PRESETS: dict[str, QuantizationSpec | None] = {
    "exact": None,
    "balanced": QuantizationSpec(1600, 2.0**-2, tail_step=2.0**-14, group_step=0.5, sample_step=2.0**-6),
    "compact": QuantizationSpec(320, 2.0**-1, tail_step=2.0**-14, group_step=1.0, sample_step=2.0**-4),
}
"""Precisions by name, finest first. exact: float32 as captured, columns that read as they are."""


COEFFICIENT_BITS = {"exact": 4, "balanced": 4, "compact": 3}
"""Bits of a coefficient of ±3 mean standard deviations, by precision: they fix its step, but for exact caches."""
FINEST_COEFFICIENT_BITS = max(COEFFICIENT_BITS.values())
"""Those of the step that a tail basis has, whatever the precision of the cache."""


def check_precision(precision: str) -> None:
    """Raises UserError for a name that is no preset."""
    if precision not in PRESETS:
        raise UserError(f"--precision {precision}: choose one of {', '.join(PRESETS)}")


def mass_tolerance(precision: str) -> float:
    """Returns how far entries and tail of a position may miss a sum of 1 once their log-probabilities have been rounded.

    It is the tolerance of stored numbers, the largest that rounding each by itself can need; `scaling` makes up for it.
    """
    quantization = PRESETS[precision]
    return 1e-4 if quantization is None else 1e-4 + float(quantization.bound(np.log([1e-3]))[0])


def mass_tolerances(logprobs: np.ndarray, precision: str, quantization: QuantizationSpec | None) -> np.ndarray:
    """Returns `mass_tolerance` of each position [M], more for entries [M, k] so improbable that rounding moves them by more."""
    least = mass_tolerance(precision)
    if quantization is None:
        return np.full(len(logprobs), least)
    relative = np.expm1(quantization.bound(logprobs))
    tolerance: np.ndarray = np.maximum(least, 1e-4 + (np.exp(logprobs, dtype=np.float64) * relative).sum(axis=1))
    return tolerance


def rounded(values: np.ndarray, step: float | None) -> np.ndarray:
    """Returns the nearest multiples of a step, float32; the values themselves without a step."""
    values = values.astype(np.float32)
    if step is None:
        return values
    scaled: np.ndarray = np.rint(values / np.float32(step))
    return scaled * np.float32(step)

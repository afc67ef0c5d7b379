"""Means over seeds, how far they can be trusted, and differences between runs of one seed."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean, stdev
from typing import TypeVar

CONFIDENCE = 0.95
Seed = TypeVar("Seed", bound=Hashable)


@dataclass(frozen=True)
class Estimate:
    """A mean over `count` seeds; half_width: of its 95 % confidence interval, None with one seed."""

    mean: float
    half_width: float | None
    count: int


def estimate(values: Sequence[float]) -> Estimate:
    """Computes the mean and its confidence interval by Student's t: mean ± t(0.975, n−1)·s/√n."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return Estimate(fmean(values), None, len(values))
    return Estimate(fmean(values), t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values)), len(values))


def paired_difference(values: Mapping[Seed, float], reference: Mapping[Seed, float]) -> Estimate | None:
    """Estimates the mean of value − reference over the shared seeds; None if there is none or a value is not finite.

    The effect of a seed on both, such as that of the order of the rows, cancels.
    """
    differences = [value - reference[seed] for seed, value in values.items() if seed in reference]
    return estimate(differences) if differences and all(map(math.isfinite, differences)) else None


@cache
def t_quantile(degrees: int) -> float:
    """Finds t with P(|T| ≤ t) = 0.95 for Student's distribution of so many degrees of freedom."""
    low, high = 0.0, 20.0  # 12.7 at one degree is the largest
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < CONFIDENCE else (low, middle)
    return high


def _within(t: float, degrees: int) -> float:
    """Computes P(|T| ≤ t) by the sums 26.7.3 and 26.7.4 of Abramowitz and Stegun, Handbook of Mathematical Functions."""
    angle = math.atan(t / math.sqrt(degrees))
    odd = degrees % 2
    term = total = math.cos(angle) if odd else 1.0
    for i in range(2 + odd, degrees - 1, 2):
        term *= math.cos(angle) ** 2 * (i - 1) / i
        total += term
    if not odd:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + (math.sin(angle) * total if degrees > 1 else 0.0))

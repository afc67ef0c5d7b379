"""What loss, temperature and λ are at a moment of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from trainer.config.config import DistillConfig
from trainer.losses.registry import options_of

T = TypeVar("T")


@dataclass(frozen=True)
class Moment:
    """loss_args: the options that this loss has."""

    loss: str
    loss_args: dict[str, Any]
    temperature: float
    kd_weight: float


def moment(config: DistillConfig, progress: float) -> Moment:
    """The settings at `progress`, the share of the run's steps that are done."""
    assert isinstance(config.loss_args, dict)
    loss = _held(config.points("loss"), progress, config.loss)
    weights = config.points("kd_weight")
    known = options_of(loss)
    return Moment(
        loss,
        {name: value for name, value in config.loss_args.items() if name in known},
        _held(config.points("temperature"), progress, config.temperature),
        _between(weights, progress) if weights else config.kd_weight,
    )


def _held(points: Sequence[tuple[float, T]], progress: float, constant: T) -> T:
    """The value of the last point that was reached."""
    return [constant, *(value for fraction, value in points if fraction <= progress)][-1]


def _between(points: Sequence[tuple[float, float]], progress: float) -> float:
    """Straight lines between the points, the first and last value before and after them."""
    fractions, values = np.array(points).T
    return float(np.interp(progress, fractions, values))

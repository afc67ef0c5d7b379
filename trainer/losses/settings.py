"""Which loss is meant."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class LossSettings:
    """A divergence, what it does about the teacher's tail, and at which temperature.

    Attributes:
        loss: the name of a divergence.
        tail: the name of a treatment of the tail, see tail.py.
        temperature: T of both distributions.
        approximate_temperature: whether a temperature is allowed whose tail was not captured, see temperature.py.
        loss_args: the options of the divergence.
        residual_weight: ρ of the low-rank tail, 0 to 1, see low_rank.py.
    """

    loss: str = "todi"
    tail: str = "bucket"
    temperature: float = 1.0
    approximate_temperature: bool = False
    loss_args: Mapping[str, Any] = field(default_factory=dict)
    residual_weight: float = 0.0

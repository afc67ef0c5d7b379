"""Which loss is meant."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class LossSettings:
    """A divergence, what it does about the teacher's tail, and at which temperature.

    loss: name of a divergence, and its options in loss_args.  tail: name of a treatment, see tail.py.
    approximate_temperature: allow a temperature whose tail was not captured, see temperature.py.
    """

    loss: str = "todi"
    tail: str = "bucket"
    temperature: float = 1.0
    approximate_temperature: bool = False
    loss_args: Mapping[str, Any] = field(default_factory=dict)

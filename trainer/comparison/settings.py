"""Which settings decide a run, and which say only where and how it was done."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

from trainer.config.config import DistillConfig, decides_run, public_places
from trainer.config.fields import DecidesRun

SEEDS = {"seed", "data_seed"}
KD_ONLY = {
    *("loss", "loss_args", "loss_schedule", "temperature", "temperature_schedule", "approximate_temperature"),
    *("tail", "ablation", "t_squared", "kd_weight_schedule"),
}
"""Settings without effect if kd_weight is 0 throughout."""


def matters(name: str) -> bool:
    """Says whether two runs that differ in this setting are different runs."""
    return decides_run(name) is not DecidesRun.NEVER


def filled_in(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Brings settings that a former version wrote to those of this one: settings it did not know had their defaults."""
    fields = {field.name: field.default for field in dataclasses.fields(DistillConfig)}
    known = {name: value for name, value in fields.items() if value is not dataclasses.MISSING}
    plain = {name: value.value if isinstance(value, Enum) else value for name, value in known.items()}
    filled = {**plain, **settings}
    cache = filled["cache"]
    several = filled | {"cache": [cache] if isinstance(cache, str) else cache, "loss_args": filled["loss_args"] or {}}
    return several | public_places(several)


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names the settings that are not the same in all runs that have them, in the order of the first."""
    names = dict.fromkeys(name for of_one in settings for name in of_one)
    return [name for name in names if len({_text(of_one[name]) for of_one in settings if name in of_one}) > 1]


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)

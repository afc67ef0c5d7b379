"""Settings that change over a run, given as points: value@fraction of the run's steps, separated by commas."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from logitcache import UserError
from trainer.config.fields import setting

T = TypeVar("T")

SCHEDULED = ("loss", "kd_weight", "temperature")


@dataclass
class ScheduleSettings:
    """Schedules of loss, λ and temperature. Each sets its plain setting to the value at the end of the run."""

    loss_schedule: str | None = setting(
        None,
        "Losses one after the other: fkl@0,rkl@0.2 is forward KL for the first fifth of the steps, then reverse KL.",
    )
    kd_weight_schedule: str | None = setting(
        None, "λ at points of the run, straight lines between them: 1@0,0.5@1 falls from 1 to 0.5."
    )
    temperature_schedule: str | None = setting(
        None, "Temperatures one after the other: 4@0,2@0.3,1@0.6. The cache must hold the tail at each of them."
    )

    def check_schedules(self) -> None:
        """Sets loss, kd_weight and temperature to the ends of their schedules. Raises UserError for contradictions."""
        for name in SCHEDULED:
            points = self.points(name)
            if not points:
                continue
            last, given = points[-1][1], getattr(self, name)
            if given not in (self.__dataclass_fields__[name].default, last):
                raise UserError(
                    f"--{name} {given} --{name}_schedule {getattr(self, f'{name}_schedule')}: the schedule says which "
                    f"{name} holds when, and ends at {last}. Leave --{name} out"
                )
            setattr(self, name, last)

    def points(self, name: str) -> list[tuple[float, Any]]:
        """Reads the (fraction, value) of loss, kd_weight or temperature; none if it has no schedule."""
        text = getattr(self, f"{name}_schedule")
        if text is None:
            return []
        kind: Callable[[str], Any] = str if name == "loss" else float
        return parse_points(text, f"--{name}_schedule {text}", kind, from_start=name != "kd_weight")

    def value_at(self, name: str, progress: float) -> Any:
        """Look up loss, kd_weight or temperature at `progress`, the share of the run's steps that are done.

        Loss and temperature stay as they are until their next point; kd_weight lies on straight lines between points.
        """
        points = self.points(name)
        if name == "kd_weight" and points:
            fractions, weights = np.array(points).T
            return float(np.interp(progress, fractions, weights))
        return [getattr(self, name), *(value for fraction, value in points if fraction <= progress)][-1]


def parse_points(text: str, what: str, kind: Callable[[str], T], *, from_start: bool) -> list[tuple[float, T]]:
    """Reads the points of a schedule, value@fraction separated by commas, as (fraction, value).

    Args:
        text: the schedule.
        what: the beginning of an error.
        kind: makes a value of its text.
        from_start: the first fraction must be 0.

    Raises:
        UserError: the text is anything else, or fractions do not ascend within 0 … 1.
    """
    points = []
    for part in text.split(","):
        value, at, fraction = part.strip().rpartition("@")
        try:
            points.append((float(fraction), kind(value)))
        except ValueError:
            at = ""
        if not (at and value):
            raise UserError(
                f"{what}: {part.strip()!r} is not value@fraction, such as {'fkl@0' if kind is str else '1@0'}"
            )
    fractions = [fraction for fraction, _ in points]
    if fractions != sorted(set(fractions)) or not all(0 <= fraction <= 1 for fraction in fractions):
        raise UserError(f"{what}: fractions of the run are expected, ascending from 0 to 1")
    if from_start and fractions[0] != 0:
        raise UserError(f"{what}: it does not say what the run begins with: the first fraction must be 0")
    if from_start and fractions[-1] == 1:
        raise UserError(f"{what}: at 1 the run is over: no step has {points[-1][1]}")
    return points

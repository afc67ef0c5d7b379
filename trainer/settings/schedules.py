"""Settings that change over a run, as fractions of its steps."""

from dataclasses import dataclass


@dataclass
class ScheduleSettings:
    """Schedules of loss, temperature and weight."""

    def check_schedules(self) -> None:
        """Raises UserError for settings that contradict each other."""

"""When a run ends early, and which checkpoint is its result."""

from dataclasses import dataclass


@dataclass
class StoppingSettings:
    """Early stopping and the best checkpoint, by any metric of the held-out cache."""

    def check_stopping(self) -> None:
        """Raises UserError for settings that contradict each other."""

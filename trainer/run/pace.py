"""How fast a run is, and for what share of the time it waits for data."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback


class Pace(TrainerCallback):
    """A clock that runs while steps are made, and not while a model is evaluated or saved."""

    def __init__(self) -> None:
        self._begun = 0.0
        self.reset()

    def reset(self) -> None:
        """Forgets what was counted."""
        self.seconds = self.waited_s = 0.0
        self.tokens = self.padded_tokens = 0

    def wait_begins(self) -> None:
        """A step asks for its batches."""
        self._begun = time.perf_counter()

    def wait_ends(self, tokens: int, padded_tokens: int) -> None:
        """They are there. tokens: of sequences.  padded_tokens: those, and the padding."""
        self.waited_s += time.perf_counter() - self._begun
        self.tokens += tokens
        self.padded_tokens += padded_tokens

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The optimizer has made its step."""
        self.seconds += time.perf_counter() - self._begun

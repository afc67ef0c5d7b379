"""The lines of a comparison under way: one for each run that ends, and on a terminal one of all that are running."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Mapping

from logitcache.errors import printable
from trainer.comparison.finished import read_run
from trainer.comparison.recipe import PlannedRun
from trainer.config.metrics import metric_of
from trainer.terminal import say

INTERVAL_S = 60.0
SHOWN = ("ce", "fkl", "rkl", "agreement")


class StatusLine:
    """Counts runs. Without a terminal the running ones are told once a minute."""

    def __init__(self, total: int) -> None:
        self._total, self._ended, self._shown = total, 0, ""
        self._terminal = sys.stdout.isatty()
        self._last_line = time.monotonic()

    def finished(self, run: PlannedRun, took: str, *, fresh: bool) -> None:
        """Tells the metrics of a finished run. fresh: it was done just now."""
        metrics = read_run(run.folder).metrics
        numbers = "  ".join(f"{metric_of(name).heading} {metrics[name]:.4g}" for name in SHOWN if name in metrics)
        self._ended_line(run, f"{numbers}  {f'({took})' if fresh else '(already there)'}")

    def failed(self, run: PlannedRun) -> None:
        """Tells that a run ended with an error."""
        self._ended_line(run, "failed")

    def show(self, running: Mapping[str, str]) -> None:
        """Shows how far each folder's run is."""
        line = f"{self._ended} of {self._total} done; " + ", ".join(
            f"{name} {where}" for name, where in running.items()
        )
        if self._terminal and line != self._shown:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[K{printable(line)[:width]}", end="", flush=True)
            self._shown = line
        elif not self._terminal and time.monotonic() - self._last_line >= INTERVAL_S:
            self.say(line)

    def say(self, line: str) -> None:
        """Prints a line above the line of the running ones."""
        self.close()
        say(line)
        self._last_line = time.monotonic()

    def close(self) -> None:
        """Removes the line of the running ones."""
        if self._shown:
            print("\r\x1b[K", end="", flush=True)
            self._shown = ""

    def _ended_line(self, run: PlannedRun, text: str) -> None:
        self._ended += 1
        width = len(str(self._total))
        self.say(f"[{self._ended:{width}}/{self._total}] {run.folder.name}  {text}")

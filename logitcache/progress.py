"""The progress of long work is a bar on a terminal, otherwise a plain line now and then."""

from __future__ import annotations

import logging
import sys
import time

from tqdm import tqdm

LINE_INTERVAL_S = 10.0

logger = logging.getLogger("logitcache")


class Progress:
    """A counter of units of work, which shows the rate, and the time left if the total is known."""

    def __init__(self, label: str, total: int | None, done: int, unit: str) -> None:
        self._label, self._total, self._done, self._unit = label, total, done, unit
        self._first, self._began, self._last_line = done, time.monotonic(), time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(desc=label, total=total, initial=done, unit=unit, unit_scale=True, dynamic_ncols=True)

    def start(self) -> None:
        """Starts the clock: the time until now was spent waiting and says nothing about the rate."""
        self._began = self._last_line = time.monotonic()
        if self._bar is not None:
            self._bar.reset(self._total)
            self._bar.update(self._done)

    def advance(self, count: int) -> None:
        """Adds finished units."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - self._last_line >= LINE_INTERVAL_S:
            self._last_line = time.monotonic()
            rate = (self._done - self._first) / (self._last_line - self._began)
            logger.info("%s: %s, %s %s/s%s", self._label, self._so_far(), f"{rate:,.0f}", self._unit, self._left(rate))

    def _so_far(self) -> str:
        if self._total is None:
            return f"{self._done:,} {self._unit}"
        return f"{self._done:,} of {self._total:,} {self._unit} ({100 * self._done / self._total:.0f} %)"

    def _left(self, rate: float) -> str:
        return "" if self._total is None else f", {duration((self._total - self._done) / rate)} left"

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()


def duration(seconds: float) -> str:
    """Returns seconds as people write them: 42 s, 3 min 20 s, 5 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"

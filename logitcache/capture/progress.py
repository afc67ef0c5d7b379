"""Progress of long work: a bar on a terminal, a plain line now and then otherwise."""

from __future__ import annotations

import logging
import sys
import time

from tqdm import tqdm

LINE_INTERVAL_S = 10.0

logger = logging.getLogger("logitcache")


class Progress:
    """Counts units of work; shows the rate and the time left."""

    def __init__(self, label: str, total: int, done: int, unit: str) -> None:
        self._label, self._total, self._done, self._unit = label, total, done, unit
        self._first, self._began, self._last_line = done, time.monotonic(), time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(desc=label, total=total, initial=done, unit=unit, unit_scale=True, dynamic_ncols=True)

    def advance(self, count: int) -> None:
        """Adds finished units."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - self._last_line >= LINE_INTERVAL_S:
            self._last_line = time.monotonic()
            rate = (self._done - self._first) / (self._last_line - self._began)
            left_s = (self._total - self._done) / rate
            logger.info(
                "%s: %s of %s %s (%.0f %%), %s %s/s, %s left",
                self._label,
                f"{self._done:,}",
                f"{self._total:,}",
                self._unit,
                100 * self._done / self._total,
                f"{rate:,.0f}",
                self._unit,
                duration(left_s),
            )

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()


def duration(seconds: float) -> str:
    """Seconds as people write them: 42 s, 3 min 20 s, 5 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"

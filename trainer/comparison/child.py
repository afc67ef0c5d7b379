"""A command that runs beside this one, with its output in a log file that stays locked until the command has ended."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import signal
import subprocess
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import BinaryIO

import psutil

LAST_BYTES = 65536
STEP = re.compile(rb"step (\d+)/(\d+)")
LAUNCHERS_REPORT = re.compile(r"[WE]\d{4} .*torch/distributed/elastic/")
"""The beginning of torchrun's report on a rank that failed, which follows the rank's own lines."""


def locked_log(path: Path) -> BinaryIO | None:
    """Opens a log to append to; None while a process that was given the log is alive."""
    log = path.open("ab")
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log.close()
        return None
    return log


class Child:
    """A running command."""

    def __init__(
        self, command: Sequence[str], log: BinaryIO, environment: Mapping[str, str], *, launcher: bool = False
    ) -> None:
        """Starts a command with a log of `locked_log`, whose lock the child holds too.

        environment: variables beside those of this process.  launcher: the command starts ranks and waits for them.
        """
        self._launcher = launcher
        self._log_began = Path(log.name).stat().st_size
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,  # Ctrl-C on the terminal reaches this process, which passes it on once
        )

    def status(self) -> int | None:
        """Returns the exit status, None while the command runs."""
        return self._process.poll()

    def interrupt(self) -> None:
        """Sends the signal of Ctrl-C, to the ranks themselves: launchers give them too little time or tell them nothing."""
        if self.status() is None:
            process = psutil.Process(self._process.pid)
            for each in (process.children() if self._launcher else []) or [process]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.send_signal(signal.SIGINT)

    def kill(self) -> None:
        """Ends the command and all processes that it started, whatever they do."""
        if self.status() is None:
            for process in (*psutil.Process(self._process.pid).children(recursive=True), self._process):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self._process.wait()

    def last_lines(self, log: Path, count: int) -> list[str]:
        """Returns the last lines of the output that are not empty, lines of a rank before lines of the launcher."""
        text = _end_of(log, self._log_began).decode(errors="replace")
        lines = [line for line in text.splitlines() if line.strip()]
        errors = [number for number, line in enumerate(lines, 1) if line.startswith("trainer: error: ")]
        ranks = lines[: errors[-1]] if errors else takewhile(lambda line: not LAUNCHERS_REPORT.match(line), lines)
        return (list(ranks) or lines)[-count:]


def last_step(log: Path) -> str:
    """Reads from a run's log how far the run is: 120/300, or "starting"."""
    steps = STEP.findall(_end_of(log))
    return b"/".join(steps[-1]).decode() if steps else "starting"


def _end_of(log: Path, begin: int = 0) -> bytes:
    try:
        with log.open("rb") as file:
            file.seek(max(begin, file.seek(0, os.SEEK_END) - LAST_BYTES))
            return file.read()
    except FileNotFoundError:
        return b""

"""Values of options and tables of numbers that several commands share."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentTypeError
from collections.abc import Mapping
from pathlib import Path

from logitcache import UserError
from logitcache.table import aligned
from trainer.config.metrics import HELD_OUT, METRICS

INTERRUPTED = 130


def check_writable(out: Path) -> None:
    """Raises UserError if no file can be written under that name."""
    if out.is_dir():
        raise UserError(f"--out {out}: this is a folder; name a file")
    if not os.access(out.parent, os.W_OK):
        raise UserError(f"--out {out}: no file can be written in {out.parent}: name an existing folder")


def positive(text: str) -> int:
    """Parses a whole number of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text}: a whole number of at least 1 is expected")
    return int(text)


def quieten() -> None:
    """Keeps transformers' progress bars out of log files."""
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def metrics_table(metrics: Mapping[str, float]) -> str:
    """Shows the metrics of a held-out cache, a line each."""
    return aligned([(METRICS[name].description, f"{metrics[name]:,.5g}") for name in HELD_OUT])

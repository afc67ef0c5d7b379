"""Printed text may quote somebody else's file: its control characters are spelled out, here and nowhere else."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from logitcache.errors import printable


def say(text: str, *, error: bool = False) -> None:
    """Prints text. error: to stderr."""
    print(printable(text), file=sys.stderr if error else sys.stdout, flush=True)


class _Record(logging.LogRecord):
    def getMessage(self) -> str:
        return printable(super().getMessage().expandtabs())


@contextmanager
def printable_logs() -> Iterator[None]:
    """Makes the logs and warnings of every library printable while the block runs, whoever shows them."""
    factory, shown = logging.getLogRecordFactory(), warnings.formatwarning

    def formatwarning(*args: Any, **options: Any) -> str:
        return printable(shown(*args, **options))

    logging.setLogRecordFactory(_Record)
    warnings.formatwarning = formatwarning
    try:
        yield
    finally:
        logging.setLogRecordFactory(factory)
        warnings.formatwarning = shown

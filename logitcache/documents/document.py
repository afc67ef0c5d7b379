"""A document: one row of a source, with the place where it was found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Document:
    """One row of a source.

    where: file and row, for messages.  error: why `values` could not be read.  row: its number in the source; of a line,
    from 1.
    """

    values: Mapping[str, Any]
    where: str
    error: str | None = None
    row: int = 0


class BadDocument(Exception):
    """The document cannot be used; the message says why."""

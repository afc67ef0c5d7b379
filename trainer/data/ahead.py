"""Items made before they are asked for, in one background thread."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

AHEAD = 3
"""Batches that are made or being made beside the one handed out."""


def made_ahead(items: Iterator[T]) -> Iterator[T]:
    """Yields the items while a thread makes the next `AHEAD` of them; it begins at once.

    What making an item raises is raised when its turn comes. Dropping the iterator, or closing it, ends the thread
    after the item that it is at.
    """
    made = _made(items)
    next(made)
    return made  # type: ignore[return-value]


def _made(items: Iterator[T]) -> Iterator[T | None]:
    """None as soon as the thread is at work, and then the items."""
    end = object()
    finalizing = sys.is_finalizing  # bound here: when the interpreter ends, modules are emptied before iterators go
    thread = ThreadPoolExecutor(1, "batches")

    def make() -> Future[T | object]:
        return thread.submit(next, items, end)

    waiting = deque(make() for _ in range(AHEAD))
    try:
        yield None
        while (item := waiting.popleft().result()) is not end:
            waiting.append(make())
            yield item  # type: ignore[misc]
    finally:
        if not finalizing():
            thread.shutdown(wait=False, cancel_futures=True)

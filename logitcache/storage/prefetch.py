"""Threads in the background do work ahead of its use."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

NUM_THREADS = 2
"""pyarrow, zstd and numpy run without Python's lock, and one of two requests to a store waits while the other's answer is
decoded."""
AHEAD = 3
"""Results that are under way or ready beside the one handed out: with row groups as work 3 × 4 MiB, decoded."""


def prefetched(work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Yields work(item) of every item, in order, while threads are at the next `AHEAD` of them.

    An exception of `work` is raised when its item's turn comes. Dropping the iterator, or closing it, drops the work that was
    not begun and ends the threads after what they are at. A forked process starts threads of its own.
    """
    remaining = iter(items)
    waiting: deque[tuple[T, Future[R]]] = deque()
    process = os.getpid()
    finalizing = sys.is_finalizing  # bound here: when the interpreter ends, modules are emptied before iterators go
    threads = ThreadPoolExecutor(NUM_THREADS, "prefetch")
    try:
        while True:
            if process != os.getpid():  # threads are not forked: their work is done again
                process = os.getpid()
                threads = ThreadPoolExecutor(NUM_THREADS, "prefetch")
                waiting = deque((item, threads.submit(work, item)) for item, _ in waiting)
            for item in islice(remaining, AHEAD + 1 - len(waiting)):
                waiting.append((item, threads.submit(work, item)))
            if not waiting:
                return
            yield waiting.popleft()[1].result()
    finally:
        if not finalizing() and process == os.getpid():
            threads.shutdown(wait=False, cancel_futures=True)


def begun_ahead(work: Callable[[T], object], items: Iterable[T], ahead: int, num_threads: int) -> Iterator[T]:
    """Yields the items, in order, while threads do `work` with the next `ahead` of them.

    Use it for work whose effect is cached, such as copying a shard: the caller repeats the call later and finds it done.
    Results and exceptions of the call in the background are ignored. After a fork the child does no work in the background.
    """
    waiting: deque[T] = deque()
    process = os.getpid()
    finalizing = sys.is_finalizing  # bound here: when the interpreter ends, modules are emptied before iterators go
    threads = ThreadPoolExecutor(num_threads, "ahead")
    try:
        for item in items:
            waiting.append(item)
            if process == os.getpid():
                threads.submit(work, item)
            if len(waiting) > ahead:
                yield waiting.popleft()
        yield from waiting
    finally:
        if not finalizing() and process == os.getpid():
            threads.shutdown(wait=False, cancel_futures=True)

"""Work ahead of its use: in order, so much and no more, and gone when nobody wants it."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from itertools import count
from multiprocessing.queues import SimpleQueue

import pytest

from logitcache.storage.prefetch import AHEAD, NUM_THREADS, begun_ahead, prefetched

PATIENCE_S = 60


class Result:
    """Something whose lifetime can be seen."""

    def __init__(self, number: int) -> None:
        self.number = number


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def wait_for_their_end(running: list[threading.Thread]) -> None:
    for thread in running:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def test_results_come_in_order_however_long_each_takes() -> None:
    def work(number: int) -> int:
        time.sleep(0.002 * (number % 3 == 0))
        return number * number

    assert list(prefetched(work, range(40))) == [number * number for number in range(40)]
    assert list(prefetched(work, [])) == []


def test_the_next_result_is_made_while_the_present_one_is_used() -> None:
    begun = [threading.Event() for _ in range(2 + AHEAD)]

    def work(number: int) -> int:
        begun[number].set()
        return number

    results = prefetched(work, range(len(begun)))
    assert next(results) == 0
    assert all(event.wait(PATIENCE_S) for event in begun[: 1 + AHEAD])
    assert not begun[1 + AHEAD].is_set()


def test_no_more_is_held_than_what_is_handed_out_and_what_is_ahead() -> None:
    lock = threading.Lock()
    alive: weakref.WeakSet[Result] = weakref.WeakSet()
    most = 0

    def work(number: int) -> Result:
        nonlocal most
        result = Result(number)
        with lock:
            alive.add(result)
            most = max(most, len(alive))
        return result

    for number, result in enumerate(prefetched(work, range(50))):
        assert result.number == number
    assert NUM_THREADS <= most <= AHEAD + 2  # the loop's variable holds the former result while it asks for the next


def test_items_are_asked_for_as_they_are_needed_and_by_the_user_of_the_results() -> None:
    asked: list[str] = []

    def items() -> Iterator[int]:
        for number in count():
            asked.append(threading.current_thread().name)
            yield number

    results = prefetched(abs, items())
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    assert asked == [threading.current_thread().name] * (5 + AHEAD)


def test_an_error_comes_in_its_turn_and_ends_the_work() -> None:
    def work(number: int) -> int:
        if number == 3:
            raise ValueError("shard 3 was altered")
        return number

    results = prefetched(work, count())
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    running = threads()
    with pytest.raises(ValueError, match="shard 3 was altered"):
        next(results)
    wait_for_their_end(running)
    assert list(results) == []


@pytest.mark.parametrize("close", [False, True], ids=["dropped", "closed"])
def test_who_stops_asking_leaves_no_thread_and_no_result(close: bool) -> None:
    made: list[weakref.ref[Result]] = []

    def work(number: int) -> Result:
        result = Result(number)
        made.append(weakref.ref(result))
        return result

    before = set(threads())
    results = prefetched(work, count())
    next(results)
    running = [thread for thread in threads() if thread not in before]
    assert running
    if close:
        results.close()  # type: ignore[attr-defined]
    else:
        del results
    wait_for_their_end(running)
    assert len(made) <= 1 + AHEAD
    assert all(reference() is None for reference in made)


def test_a_forked_process_continues_with_threads_of_its_own() -> None:
    results = prefetched(lambda number: number * 10, iter(range(12)))
    head = [next(results) for _ in range(4)]
    context = multiprocessing.get_context("fork")
    answers: SimpleQueue[list[int]] = context.SimpleQueue()
    child = context.Process(target=lambda: answers.put(list(results)))
    child.start()
    assert head + answers.get() == [number * 10 for number in range(12)]
    child.join(PATIENCE_S)
    assert child.exitcode == 0
    assert head + list(results) == [number * 10 for number in range(12)]


def test_a_forked_process_ends_though_it_never_asked() -> None:
    results = prefetched(abs, count())
    next(results)
    child = multiprocessing.get_context("fork").Process(target=int)
    child.start()
    child.join(PATIENCE_S)
    assert child.exitcode == 0
    assert next(results) == 1


@pytest.mark.slow
def test_a_program_ends_while_a_stream_is_half_read() -> None:
    script = """
from itertools import count
from logitcache.storage.prefetch import prefetched
results = prefetched(abs, count())
print(next(results))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")


def test_work_is_begun_for_so_many_items_ahead_of_the_one_handed_out() -> None:
    begun = [threading.Event() for _ in range(8)]
    items = begun_ahead(lambda number: begun[number].set(), iter(range(8)), ahead=3, num_threads=2)
    assert next(items) == 0
    assert all(event.wait(PATIENCE_S) for event in begun[:4])
    assert not begun[4].is_set()
    assert list(items) == [1, 2, 3, 4, 5, 6, 7]


def test_what_fails_ahead_keeps_no_item_back() -> None:
    def work(number: int) -> None:
        raise ValueError(number)

    assert list(begun_ahead(work, range(5), ahead=2, num_threads=2)) == [0, 1, 2, 3, 4]


def test_who_stops_asking_ends_the_work_ahead() -> None:
    before = set(threading.enumerate())
    items = begun_ahead(abs, count(), ahead=5, num_threads=2)
    next(items)
    running = [thread for thread in threading.enumerate() if thread not in before]
    assert running
    del items
    wait_for_their_end(running)


def test_a_forked_process_gets_the_items_that_are_left() -> None:
    items = begun_ahead(abs, iter(range(9)), ahead=3, num_threads=2)
    head = [next(items) for _ in range(2)]
    context = multiprocessing.get_context("fork")
    answers: SimpleQueue[list[int]] = context.SimpleQueue()
    child = context.Process(target=lambda: answers.put(list(items)))
    child.start()
    assert head + answers.get() == list(range(9))
    child.join(PATIENCE_S)
    assert child.exitcode == 0
    assert head + list(items) == list(range(9))

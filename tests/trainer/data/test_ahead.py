"""Batches are made in the background: a bounded number of them, no longer than somebody waits for them."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate import skip_first_batches

from logitcache import LogitCache, UserError
from tests.helpers.batches import equal
from trainer.data.collator import Batch, Collator
from trainer.data.loader import AHEAD, BatchLoader, prefetch
from trainer.data.sampler import Batching

TIMEOUT_S = 30.0


def background() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def await_no_thread() -> None:
    for thread in background():
        thread.join(TIMEOUT_S)
    assert not background()


def test_items_are_made_before_they_are_asked_for_and_no_more_than_a_few() -> None:
    made: list[int] = []
    several = threading.Event()

    def items() -> Iterator[int]:
        for i in range(100):
            made.append(i)
            if i == AHEAD:
                several.set()
            yield i

    ahead = prefetch(items())
    assert next(ahead) == 0
    assert several.wait(TIMEOUT_S)
    assert len(made) <= AHEAD + 1
    assert list(ahead) == list(range(1, 100))


def test_one_thread_makes_all_items() -> None:
    threads = list(prefetch(threading.current_thread().name for _ in range(20)))
    assert len(set(threads)) == 1
    assert threads[0] != threading.current_thread().name


def test_an_error_is_raised_when_its_item_s_turn_comes() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise UserError("row 2 is damaged")

    ahead = prefetch(items())
    assert next(ahead) == 1
    with pytest.raises(UserError, match="row 2 is damaged"):
        next(ahead)
    await_no_thread()


@pytest.mark.parametrize("batching", [Batching(2), Batching(2, packed_length=24)])
def test_the_thread_ends_when_the_iterator_is_dropped_and_after_the_last_batch(
    batching: Batching, cache: LogitCache
) -> None:
    loader = BatchLoader(cache, batching, Collator())
    batches = iter(loader)
    next(batches)
    assert background()
    del batches
    gc.collect()
    await_no_thread()
    list(loader)
    await_no_thread()
    list(skip_first_batches(loader, 1))
    await_no_thread()


@pytest.mark.parametrize("batching", [Batching(2), Batching(2, packed_length=24)])
def test_the_next_epoch_is_begun_with_the_last_batch_of_one(batching: Batching, cache: LogitCache) -> None:
    made: list[Batch] = []
    several = threading.Event()
    num_batches = len(BatchLoader(cache, batching, Collator(), shuffle=True, num_epochs=2))

    class Watched(Collator):
        def __call__(self, *args: Any) -> Batch:
            made.append(super().__call__(*args))
            if len(made) == num_batches + AHEAD:
                several.set()
            return made[-1]

    loader = BatchLoader(cache, batching, Watched(), shuffle=True, num_epochs=2)
    first = list(loader)
    assert several.wait(TIMEOUT_S)
    loader.set_epoch(1)
    second = list(loader)
    assert all(found is expected for found, expected in zip(first + second, made, strict=True))
    await_no_thread()  # no epoch comes after the second


@pytest.mark.parametrize("asked_for", [0, 2])
def test_an_epoch_that_was_begun_makes_way_for_another(asked_for: int, cache: LogitCache) -> None:
    loader, fresh = (BatchLoader(cache, 2, Collator(), shuffle=True, num_epochs=3) for _ in range(2))
    list(loader)
    for each in (loader, fresh):
        each.set_epoch(asked_for)
    assert equal(list(loader), list(fresh))


def test_the_thread_of_an_epoch_to_come_ends_with_its_loader(cache: LogitCache) -> None:
    loader = BatchLoader(cache, 2, Collator(), num_epochs=2)
    gc.disable()
    try:
        list(loader)
        assert background()
        del loader
        await_no_thread()
    finally:
        gc.enable()


def test_an_epoch_that_was_begun_is_left_for_any_other_batch(cache: LogitCache) -> None:
    loader = BatchLoader(cache, 2, Collator(), shuffle=True, num_epochs=3)
    list(loader)
    loader.set_epoch(1)
    found = list(skip_first_batches(loader, 3))
    fresh = BatchLoader(cache, 2, Collator(), shuffle=True, num_epochs=3)
    fresh.set_epoch(1)
    assert equal(found, list(fresh)[3:])


OPEN_AT_EXIT = """
import itertools, threading
from logitcache.storage.prefetch import begun_ahead, prefetched
from trainer.data.loader import prefetch
threading.left_open = [  # goes late, when modules are empty
    prefetch(itertools.count()), prefetched(abs, itertools.count()), begun_ahead(abs, itertools.count(), 3, 2)
]
print([next(items) for items in threading.left_open])
"""


@pytest.mark.slow
def test_iterators_that_are_open_when_the_interpreter_ends_say_nothing() -> None:
    ended = subprocess.run([sys.executable, "-c", OPEN_AT_EXIT], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "[0, 0, 0]\n", "")


class Damaged(Collator):
    """Fails at the batch with a given first token."""

    at: int

    def __call__(self, *args: Any) -> Batch:
        batch = super().__call__(*args)
        if int(batch.input_ids[0, 0]) == self.at:
            raise UserError("shard 7 is damaged: fetch it again")
        return batch


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_user_s_error_comes_out_as_it_was_raised(num_workers: int, cache: LogitCache) -> None:
    collator = Damaged()
    object.__setattr__(collator, "at", int(cache[6].input_ids[0]))
    batches = iter(BatchLoader(cache, 2, collator, num_workers=num_workers))
    assert len([next(batches) for _ in range(3)]) == 3
    with pytest.raises(UserError, match=r"^shard 7 is damaged: fetch it again$"):
        next(batches)


def test_batches_are_pinned_where_they_are_made(monkeypatch: pytest.MonkeyPatch, cache: LogitCache) -> None:
    pinned_by: list[str] = []

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        pinned_by.append(threading.current_thread().name)
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    loader = BatchLoader(cache, 4, Collator(), pin_memory=True)
    [*skip_first_batches(loader, 2)]
    assert pinned_by and all(name.startswith("batches") for name in pinned_by)
    assert not loader.pin_memory

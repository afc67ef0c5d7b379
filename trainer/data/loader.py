"""Caches → batches of tensors: shuffled by epoch, sharded by rank, resumable at any batch."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from dataclasses import replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from torch.utils.data import DataLoader, Dataset, get_worker_info

from logitcache import CachedSequence, LogitCache, UserError
from trainer.data.collator import Batch, Collator
from trainer.data.plans import Plan
from trainer.data.sampler import Batching, EpochBatches, Key
from trainer.data.training_data import TrainingData

T = TypeVar("T")

AHEAD = 3
"""Batches that are ready or in the making beside the batch that is handed out."""


class BatchLoader(DataLoader[Batch]):
    """A DataLoader whose batches depend on data, seed, epoch and shard only, not on its worker processes.

    Rows are decoded, and batches collated, in the background in any case: without worker processes by one thread. With
    W worker processes each decodes every row of the rank and collates one batch in W.
    """

    dataset: BatchDataset

    def __init__(
        self,
        data: LogitCache | TrainingData,
        batching: Batching | int,
        collator: Collator,
        *,
        shuffle: bool = False,
        seed: int = 0,
        shard: tuple[int, int] = (0, 1),
        drop_last: bool = False,
        num_epochs: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
        **options: Any,
    ) -> None:
        """Plan the batches of a run; nothing is read yet but, for plans by length, the lengths of the rows.

        Args:
            data: a cache, or the caches of a run.
            batching: the content of a batch; a number is a batch size.
            collator: makes a batch of sequences.
            shuffle: whether every epoch has another order of rows, drawn from `seed`.
            seed: of all orders.
            shard: (rank, world).
            drop_last: leave incomplete batches out.
            num_epochs: of the run; every epoch has as many batches as the epoch that needs most.
            num_workers: as pin_memory and options, of torch's DataLoader.

        Raises:
            UserError: a sequence fits into no batch.
        """
        data = TrainingData.of(data)
        batching = Batching(batching) if isinstance(batching, int) else batching
        batches = EpochBatches(data, batching, shard, drop_last, shuffle=shuffle, seed=seed, num_epochs=num_epochs)
        pins_ahead = pin_memory and not num_workers  # torch's loader would pin in the thread that trains
        dataset = BatchDataset(data, batches, collator, shuffle=shuffle, seed=seed, shard=shard, pin_memory=pins_ahead)
        super().__init__(
            dataset,
            batch_sampler=batches,
            collate_fn=only,
            num_workers=num_workers,
            pin_memory=pin_memory and not pins_ahead,
            **options,
        )

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """Yield batches. A UserError of a worker process keeps its message, before which torch would put a traceback."""
        try:
            yield from super().__iter__()
        except UserError as error:
            raise UserError(str(error).rpartition("UserError: ")[2].strip()) from error
        finally:
            self.dataset.close()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""
        assert isinstance(self.batch_sampler, EpochBatches)
        self.batch_sampler.set_epoch(epoch)


def only(batches: list[Batch]) -> Batch:
    """Return the only batch of a list: the dataset gives whole batches, so a DataLoader has nothing to collate."""
    [batch] = batches
    return batch


def sequences_of_batches(
    plan: Plan, stream: Iterator[CachedSequence], first: int, every: int
) -> Iterator[list[CachedSequence]]:
    """Yield the sequences of batches first, first + every, …; sequences of the later ones wait in memory.

    The stream begins with row plan.first_row(first) and is read forward.
    """
    next_row = plan.first_row(first)
    waiting: dict[int, CachedSequence] = {}
    for batch in range(first, len(plan), every):
        wanted = plan.rows(batch).tolist()
        while next_row <= max(wanted, default=-1):
            sequence = next(stream)
            ahead = plan.batch_of(next_row) - first
            if ahead >= 0 and ahead % every == 0:
                waiting[next_row] = sequence
            next_row += 1
        yield [waiting.pop(row) for row in wanted]


class BatchDataset(Dataset[Batch]):
    """The collated batches of a rank, indexed by (epoch, batch).

    Reading batches in order is fast: rows are streamed once. Any other batch can be read too, at the price of a seek.

    In the process that trains, a background thread makes batches before they are asked for; a loader that accelerate
    makes of this dataset in order to skip batches profits as well. With the last batch of an epoch the thread begins the
    next epoch. A worker process makes a batch when torch's loader asks for it, which is early enough.

    `len` is the number of rows of an epoch over all ranks.
    """

    def __init__(
        self,
        data: TrainingData,
        batches: EpochBatches,
        collator: Collator,
        *,
        shuffle: bool,
        seed: int,
        shard: tuple[int, int],
        pin_memory: bool = False,
    ) -> None:
        """Take the arguments of BatchLoader. pin_memory: pin batches here; with worker processes the loader pins them."""
        self.data, self._batches, self._collator = data, batches, collator
        self._shuffle, self._seed, self._shard = shuffle, seed, shard
        self._pin_memory = pin_memory
        self._forward: Iterator[Batch] | None = None
        self._awaited: tuple[int, Key] | None = None  # process and batch that `_forward` gives next

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: Key) -> Batch:
        worker = get_worker_info()
        every = worker.num_workers if worker else 1
        forward = self._forward
        if forward is None or self._awaited != (os.getpid(), key):
            self._forward = None  # whose thread ends
            forward = self._prefetched(key) if worker is None else self._collated(key, every)
        self._forward = self._awaited = None
        batch = next(forward)
        following = Key(key.epoch, key.batch + every)
        if following.batch < len(self._batches):
            self._forward, self._awaited = forward, (os.getpid(), following)
        elif worker is None and key.epoch + 1 < self._batches.num_epochs:
            following = Key(key.epoch + 1, 0)
            self._forward, self._awaited = self._prefetched(following), (os.getpid(), following)
        return batch

    def close(self) -> None:
        """End the background thread of the epoch that is read; the thread of an epoch to come goes on."""
        if self._awaited is None or self._awaited[1].batch:
            self._forward = self._awaited = None

    def _prefetched(self, key: Key) -> Iterator[Batch]:
        """Prefetch batches from a key on. A copy without `_forward` makes them: so the thread ends with this dataset."""
        return prefetch(copy(self)._collated(key, every=1))

    def _collated(self, key: Key, every: int) -> Iterator[Batch]:
        plan = self._batches.plan(key.epoch)
        start = plan.first_row(key.batch)
        epoch = self._batches.order(key.epoch)
        stream = self.data.stream(epoch, shuffle=self._shuffle, seed=self._seed, shard=self._shard, start=start)
        for number, sequences in enumerate(sequences_of_batches(plan, stream, key.batch, every)):
            bins = plan.bins(key.batch + number * every)
            if not sequences:
                sequences = [self._empty]
                bins = None if bins is None else np.zeros(1, dtype=np.int64)
            batch = self._collator(sequences, bins)
            yield batch.pin_memory() if self._pin_memory else batch

    @cached_property
    def _empty(self) -> CachedSequence:
        """Two tokens without stored positions, with which a rank whose rows ran out computes beside the others."""
        row = next(iter(self.data.stream(0, shuffle=False, seed=0)))
        return replace(
            row,
            input_ids=row.input_ids[:2],
            loss_mask=row.loss_mask[:2],
            positions=row.positions[:0],
            targets=row.targets[:0],
        )

    def __getstate__(self) -> dict[str, Any]:
        """Leave the background thread to this process, for worker processes that are not forked."""
        return self.__dict__ | {"_forward": None, "_awaited": None}


def prefetch(items: Iterator[T]) -> Iterator[T]:
    """Yield the items of an iterator while a thread fetches the next `AHEAD` items; the thread begins at once.

    An error of the iterator is raised when the turn of its item comes. Dropping or closing the result ends the thread
    after the item at which it is.
    """
    items_ahead = _prefetch(items)
    next(items_ahead)
    return items_ahead  # type: ignore[return-value]


def _prefetch(items: Iterator[T]) -> Iterator[T | None]:
    """Yield None as soon as the thread is at work, and then the items."""
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

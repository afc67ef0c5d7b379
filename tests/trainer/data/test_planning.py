"""Every row once an epoch, within the budget, in equally many batches on every rank, found again after any interruption."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import numpy as np
import pytest
from accelerate import skip_first_batches
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import Trainer

from logitcache import CachedSequence, SparseTargets, UserError
from logitcache.reading.cache import SequenceStream
from tests.helpers.batches import equal
from trainer.config.config import DistillConfig
from trainer.data import plans
from trainer.data.collator import Batch, Collator
from trainer.data.loader import BatchLoader
from trainer.data.plans import best_fit_decreasing, consecutive_plan, grouped_plan, packed_plan
from trainer.data.sampler import Batching, EpochBatches, num_batches, num_epochs
from trainer.data.training_data import TrainingData


class NumberedRows(TrainingData):
    """Rows whose tokens are all the row's number, from 1, in memory. num_read: rows that streams gave."""

    path = "numbered rows"

    def __init__(self, lengths: list[int]) -> None:
        self._lengths = np.array(lengths, dtype=np.int32)
        self.num_read = 0
        self.counted_batches = {}

    def __repr__(self) -> str:
        return f"NumberedRows({self._lengths.tolist()})"

    @property
    def longest(self) -> int:
        return int(self._lengths.max())

    def __len__(self) -> int:
        return len(self._lengths)

    def _order(self, epoch: int, shuffle: bool, seed: int, shard: tuple[int, int]) -> np.ndarray:
        order = np.random.default_rng((seed, epoch)).permutation(len(self)) if shuffle else np.arange(len(self))
        return order[shard[0] :: shard[1]]

    def num_rows(self, shard: tuple[int, int] = (0, 1)) -> int:
        return len(range(shard[0], len(self), shard[1]))

    def lengths(self, epoch: int, *, shuffle: bool, seed: int, shard: tuple[int, int] = (0, 1)) -> np.ndarray:
        lengths: np.ndarray = self._lengths[self._order(epoch, shuffle, seed, shard)]
        return lengths

    def stream(
        self, epoch: int, *, shuffle: bool, seed: int, shard: tuple[int, int] = (0, 1), start: int = 0
    ) -> SequenceStream:
        return SequenceStream(
            self._numbered(self._order(epoch, shuffle, seed, shard)[start:]), self.num_rows(shard), start
        )

    def _numbered(self, order: np.ndarray) -> Iterator[CachedSequence]:
        for row in order.tolist():
            self.num_read += 1
            ids = np.full(self._lengths[row], row + 1, dtype=np.int32)
            targets = SparseTargets(np.zeros((1, 1), np.int32), np.zeros((1, 1), np.float32), np.zeros(1, np.float32))
            yield CachedSequence(str(row), ids, np.arange(len(ids)) == 1, np.array([0], np.int32), targets)


@dataclass(frozen=True)
class Run:
    """Everything that decides on batches."""

    lengths: list[int]
    batching: Batching
    world: int
    shuffle: bool
    drop_last: bool
    num_epochs: int
    window_tokens: int

    def loader(self, rank: int = 0, **options: Any) -> BatchLoader:
        return BatchLoader(
            NumberedRows(self.lengths),
            self.batching,
            Collator(),
            shuffle=self.shuffle,
            seed=5,
            shard=(rank, self.world),
            drop_last=self.drop_last,
            num_epochs=self.num_epochs,
            **options,
        )

    def batches(self, rank: int, epoch: int) -> list[Batch]:
        loader = self.loader(rank)
        loader.set_epoch(epoch)
        with self.windows():
            return list(loader)

    def windows(self) -> Any:
        return patch.multiple(plans, WINDOW_TOKENS=self.window_tokens, GROUPED_BATCHES=1, PACKED_BINS=1)


BATCHINGS = st.one_of(
    st.builds(Batching, batch_size=st.integers(1, 5), group_by_length=st.booleans()),
    st.builds(Batching, tokens_per_batch=st.integers(12, 60), group_by_length=st.booleans()),
    st.builds(Batching, batch_size=st.integers(1, 3), packed_length=st.integers(12, 40)),
)
RUNS = st.builds(
    Run,
    lengths=st.lists(st.integers(2, 12), min_size=1, max_size=40),
    batching=BATCHINGS,
    world=st.integers(1, 3),
    shuffle=st.booleans(),
    drop_last=st.just(False),
    num_epochs=st.integers(1, 3),
    window_tokens=st.integers(1, 150),
)


def rows_in(batch: Batch) -> list[int]:
    """Numbers of the rows of which a batch holds stored positions."""
    return sorted(batch.labels.tolist())


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(RUNS)
def test_every_row_comes_once_an_epoch_in_equally_many_batches_on_every_rank(run: Run) -> None:
    number = set()
    for epoch in range(run.num_epochs):
        by_rank = [run.batches(rank, epoch) for rank in range(run.world)]
        assert sorted(row for batches in by_rank for batch in batches for row in rows_in(batch)) == list(
            range(1, len(run.lengths) + 1)
        )
        number |= {len(batches) for batches in by_rank}
    with run.windows():
        assert number == {len(run.loader())}


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(RUNS)
def test_no_batch_exceeds_its_budget(run: Run) -> None:
    batching = run.batching
    for rank in range(run.world):
        for batch in run.batches(rank, 0):
            rows, longest = batch.input_ids.shape
            if batching.tokens_per_batch:
                assert rows * longest <= batching.tokens_per_batch
            else:
                assert rows <= batching.batch_size
            assert longest <= (batching.packed_length or 12)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(RUNS, st.data())
def test_any_batch_is_the_same_after_skipping_those_before_it(run: Run, data: st.DataObject) -> None:
    with run.windows():
        whole = run.loader()
        skipped = data.draw(st.integers(0, len(whole)))
        rest = list(skip_first_batches(run.loader(), skipped))
        expected = list(whole)[skipped:]
    assert equal(rest, expected)


@pytest.mark.slow
@settings(max_examples=50, deadline=None)
@given(RUNS)
def test_drop_last_gives_every_rank_and_epoch_as_many_batches_and_no_row_twice(run: Run) -> None:
    run = replace(run, drop_last=True)
    number = set()
    for epoch in range(run.num_epochs):
        rows: list[int] = []
        for rank in range(run.world):
            batches = run.batches(rank, epoch)
            number.add(len(batches))
            rows += [row for batch in batches for row in rows_in(batch)]
            full = run.batching.tokens_per_batch is None and run.batching.packed_length is None
            assert not full or all(len(batch.input_ids) == run.batching.batch_size for batch in batches)
        assert len(set(rows)) == len(rows)
    assert len(number) == 1


@pytest.mark.slow
@given(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 50))
def test_bins_hold_every_item_and_no_two_could_be_one(lengths: list[int], capacity: int) -> None:
    bin_of = best_fit_decreasing(np.array(lengths, dtype=np.int32), capacity)
    loads = np.bincount(bin_of, weights=lengths) if lengths else np.empty(0)
    assert (loads <= capacity).all() and (loads > 0).all()
    assert np.sort(loads)[:2].sum() > capacity or len(loads) < 2


@pytest.mark.slow
@given(st.lists(st.integers(2, 30), min_size=1, max_size=60), st.integers(30, 99))
def test_consecutive_batches_take_every_row_that_still_fits(lengths: list[int], budget: int) -> None:
    plan = consecutive_plan(np.array(lengths, dtype=np.int32), budget)
    expected: list[list[int]] = []
    for row in range(len(lengths)):
        together = [*expected[-1], row] if expected else [row]
        fits = len(together) * max(lengths[i] for i in together) <= budget
        expected = [*expected[:-1], together] if expected and fits else [*expected, [row]]
    assert [plan.rows(batch).tolist() for batch in range(len(plan))] == expected


def random_lengths(count: int) -> np.ndarray:
    lengths: np.ndarray = np.clip(np.random.default_rng(0).lognormal(5.5, 0.6, count), 16, 2048).astype(np.int32)
    return lengths


def padding(lengths: np.ndarray, plan: plans.ListedPlan) -> float:
    used = sum(len(rows) * int(lengths[rows].max()) for rows in map(plan.rows, range(len(plan))))
    return 1 - float(lengths.sum()) / used


def test_grouping_and_packing_save_padding() -> None:
    lengths = random_lengths(20_000)
    assert padding(lengths, consecutive_plan(lengths, 16384)) > 0.5
    assert padding(lengths, grouped_plan(lengths, 8, 16384, (0, 0))) < 0.05
    assert padding(lengths, grouped_plan(lengths, 8, None, (0, 0))) < 0.05
    packed = packed_plan(lengths, 2048, 8, (0, 0))
    assert 1 - lengths.sum() / (8 * 2048 * len(packed)) < 0.02


@pytest.mark.parametrize("batching", [Batching(group_by_length=True), Batching(4, packed_length=2048)])
def test_a_reader_holds_a_window_of_rows_and_a_batch(batching: Batching) -> None:
    lengths = random_lengths(20_000)
    if batching.packed_length:
        plan = packed_plan(lengths, batching.packed_length, batching.batch_size, (0, 0))
    else:
        plan = grouped_plan(lengths, batching.batch_size, None, (0, 0))
    read = held = most = 0
    for batch in range(len(plan)):
        rows = plan.rows(batch)
        held += int(lengths[read : rows.max() + 1].sum())
        read = max(read, int(rows.max()) + 1)
        most = max(most, held)
        held -= int(lengths[rows].sum())
    assert most <= plans.WINDOW_TOKENS + 2 * 8192


def test_skipping_reads_nothing_but_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "WINDOW_TOKENS", 400)
    monkeypatch.setattr(plans, "GROUPED_BATCHES", 2)
    for batching in (Batching(4), Batching(4, group_by_length=True), Batching(tokens_per_batch=40)):
        data = NumberedRows(random_lengths(1000).clip(2, 10).tolist())
        loader = BatchLoader(data, batching, Collator(), shuffle=True)
        list(skip_first_batches(loader, len(loader) - 2))
        assert 0 < data.num_read < 100


def test_the_epochs_differ_and_each_follows_from_the_seed() -> None:
    run = Run([3, 5, 7, 9] * 8, Batching(packed_length=20), 1, True, False, 2, 100)
    first, second = run.batches(0, 0), run.batches(0, 1)
    assert [rows_in(batch) for batch in first] != [rows_in(batch) for batch in second]
    assert equal(first, run.batches(0, 0))


def test_without_shuffling_the_batches_of_a_window_come_from_long_to_short() -> None:
    run = Run([3, 5, 7, 9] * 8, Batching(4, group_by_length=True), 1, False, False, 1, 1000)
    longest = [batch.input_ids.shape[1] for batch in run.batches(0, 0)]
    assert longest == sorted(longest, reverse=True)
    assert [batch.input_ids.shape[1] for batch in replace(run, shuffle=True).batches(0, 0)] != longest


def test_epochs_beyond_those_that_were_counted_repeat_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.data.sampler.PLANNED_ROWS", 64)
    run = Run([3, 5, 7, 9] * 8, Batching(packed_length=20), 1, True, False, 100, 100)
    assert equal(run.batches(0, 1), run.batches(0, 7))
    assert not equal(run.batches(0, 1), run.batches(0, 2))


def test_epochs_of_few_rows_are_counted_for_a_bounded_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.data.sampler.PLANNED_ORDERS", 6)
    data = NumberedRows([3, 5, 7, 9])
    orders = []
    lengths = NumberedRows.lengths

    def watched(self: NumberedRows, epoch: int, **options: Any) -> np.ndarray:
        orders.append(epoch)
        return lengths(self, epoch, **options)

    monkeypatch.setattr(NumberedRows, "lengths", watched)
    for world, expected in ((1, 6), (2, 3), (100, 1)):
        batches = EpochBatches(data, Batching(packed_length=20), (0, world), shuffle=True, num_epochs=10**6)
        assert len(batches) > 0
        assert set(orders) == set(range(expected))
        assert len(orders) == expected * world
        assert batches.order(expected + 1) == (expected + 1) % expected
        orders.clear()
        again = EpochBatches(data, Batching(packed_length=20), (world - 1, world), shuffle=True, num_epochs=expected)
        full = EpochBatches(data, Batching(packed_length=20), (0, world), True, shuffle=True, num_epochs=10**6)
        assert len(again) == len(batches) and len(full) <= len(batches)
        assert orders == []  # counted once for all


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("batching", [{}, {"packing": True, "packed_length": 20}, {"tokens_per_batch": 30}])
def test_the_trainer_makes_no_more_epochs_of_max_steps_than_were_planned(
    batching: dict[str, Any], drop_last: bool, accumulation: int, tmp_path: Path
) -> None:
    data = NumberedRows(np.random.default_rng(0).integers(2, 13, 40).tolist())
    stub = SimpleNamespace(
        get_total_train_batch_size=lambda args: 1, get_sp_size=lambda: 1, num_examples=lambda loader: 1
    )
    for max_steps in (1, 7, 8, 40, 90, 200):
        config = DistillConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            max_steps=max_steps,
            per_device_train_batch_size=3,
            gradient_accumulation_steps=accumulation,
            dataloader_drop_last=drop_last,
            **batching,
        )
        loader: Any = [None] * num_batches(config, data)
        made = Trainer.set_initial_training_values(cast(Any, stub), config, loader)[0]
        assert made <= num_epochs(config, data)
        assert made == num_epochs(config, data) or batching


def test_a_rank_without_rows_keeps_step_with_two_tokens_and_no_positions() -> None:
    run = Run([12, 12], Batching(1, packed_length=12), 3, False, False, 1, 100)
    [batch] = run.batches(2, 0)
    assert batch.input_ids.shape == (1, 2)
    assert batch.num_positions == len(batch.labels) == 0
    assert batch.num_tokens == 2


@pytest.mark.slow
def test_batches_are_the_same_from_worker_processes() -> None:
    for batching in (Batching(2, packed_length=20), Batching(3, group_by_length=True)):
        run = Run([3, 5, 7, 9] * 8, batching, 1, True, False, 1, 100)
        with run.windows():
            alone, workers = list(run.loader()), list(run.loader(num_workers=2))
        assert equal(alone, workers)


@pytest.mark.parametrize("batching", [Batching(packed_length=11), Batching(tokens_per_batch=11)])
def test_a_sequence_that_fits_into_no_batch_is_named(batching: Batching) -> None:
    setting = r"--(packed_length|tokens_per_batch) 11"
    with pytest.raises(UserError, match=f"{setting}: the longest sequence of numbered rows has 12 tokens"):
        EpochBatches(NumberedRows([3, 12]), batching)


@pytest.mark.slow
@settings(max_examples=50, deadline=None)
@given(RUNS, st.integers(1, 20))
def test_a_plan_made_longer_keeps_bins_whole_where_it_can(run: Run, more: int) -> None:
    assume(run.batching.packed_length)
    assert run.batching.packed_length
    plan = packed_plan(np.array(run.lengths, dtype=np.int32), run.batching.packed_length, run.batching.batch_size, None)
    num_bins = sum(int(bins[-1]) + 1 for bins in map(plan.bins, range(len(plan))) if bins is not None)
    longer = plan.of_length(len(plan) + more)
    of_longer = [bins for bins in map(longer.bins, range(len(longer))) if bins is not None]
    assert len(longer) == len(plan) + more
    if len(longer) <= num_bins:
        assert sum(int(bins[-1]) + 1 for bins in of_longer) == num_bins

"""The order of a stream: every row once, no row group early, none twice, and any place in it reached by itself."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logitcache.reading.order import Step, rank_part, steps
from tests.helpers.smallcaches import small

SIZES = st.lists(st.integers(1, 9), max_size=30)


def plan(sizes: list[int], window: int, seed: int | None, start: int = 0) -> list[Step]:
    part = rank_part(np.array(sizes, dtype=np.int64), np.arange(len(sizes)), 0, 1)
    return list(steps(part, window, seed, start))


def rows(plan: list[Step]) -> list[tuple[int, int]]:
    return [(row_group, row) for step in plan for row_group, row in step.rows.tolist()]


@given(sizes=SIZES, window=st.integers(1, 8), seed=st.integers(0, 99), data=st.data())
@small
def test_a_shuffle_continues_from_any_row_with_the_row_groups_it_still_needs(
    sizes: list[int], window: int, seed: int, data: st.DataObject
) -> None:
    whole = plan(sizes, window, seed)
    start = data.draw(st.integers(0, sum(sizes)))
    rest = plan(sizes, window, seed, start)
    assert rows(rest) == rows(whole)[start:]
    read = [step.row_group for step in rest if step.row_group is not None]
    assert sorted(read) == sorted({row_group for row_group, _ in rows(rest)})


@given(sizes=SIZES, window=st.integers(1, 8), seed=st.integers(0, 99), start=st.integers(0, 40))
@small
def test_the_row_groups_named_last_hold_every_row_of_a_step(
    sizes: list[int], window: int, seed: int, start: int
) -> None:
    named: list[int] = []
    for step in plan(sizes, window, seed, start):
        if step.row_group is not None:
            named.append(step.row_group)
        assert {row_group for row_group, _ in step.rows.tolist()} <= set(named[-window:])


@given(sizes=SIZES, start=st.integers(0, 40))
@small
def test_without_a_shuffle_the_rows_come_as_they_lie(sizes: list[int], start: int) -> None:
    assert (
        rows(plan(sizes, 1, None, start)) == [(g, row) for g, size in enumerate(sizes) for row in range(size)][start:]
    )


@pytest.mark.parametrize("size", [1, 3, 4, 4003])
def test_the_rows_of_a_row_group_are_dealt_evenly_to_the_steps_in_which_it_is_open(size: int) -> None:
    window = 4
    shuffled = plan([size] * 6, window, seed=0)
    assert sorted(rows(shuffled)) == [(g, row) for g in range(6) for row in range(size)]
    for row_group in range(6):
        due = [int((step.rows[:, 0] == row_group).sum()) for step in shuffled]
        assert due[:row_group] == [0] * row_group
        assert due[row_group + window :] == [0] * (len(due) - row_group - window)
        assert due[row_group] == -(-size // window)
        assert set(due[row_group : row_group + window]) <= {size // window, -(-size // window)}


@pytest.mark.slow
def test_every_row_is_equally_likely_at_every_place() -> None:
    places = np.array(
        [
            [place for _, place in sorted((row, n) for n, (_, row) in enumerate(rows(plan([4], 2, seed))))]
            for seed in range(4000)
        ]
    )
    for row in range(4):
        counts = np.bincount(places[:, row], minlength=4)
        assert (np.abs(counts - 1000) < 140).all()  # 5 σ


def test_rows_that_are_neighbours_on_disk_are_no_neighbours_in_a_shuffle() -> None:
    order = [row for _, row in rows(plan([400], 4, seed=0))]
    assert order != sorted(order)
    assert sum(b - a == 1 for a, b in pairwise(order)) < 12


@given(sizes=SIZES, world=st.integers(1, 6), seed=st.integers(0, 99))
@small
def test_ranks_have_their_shares_in_the_order_that_is_given(sizes: list[int], world: int, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(sizes))
    every = [(int(g), row) for g in order for row in range(sizes[g])]
    shares = [
        [
            (int(g), row)
            for g, low, high in rank_part(np.array(sizes, dtype=np.int64), order, rank, world)
            for row in range(low, high)
        ]
        for rank in range(world)
    ]
    assert [row for share in shares for row in share] == every
    assert max(map(len, shares)) - min(map(len, shares)) <= 1

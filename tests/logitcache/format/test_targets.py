"""SparseTargets: cutting, joining, and finding what no teacher can have produced."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logitcache import SparseTargets
from logitcache.format.targets import PAD_ID, concatenate, find_defect
from tests.helpers.smallcaches import (
    EVERYTHING,
    VOCAB,
    full_distributions,
    random_rows,
    scored_rows,
    small,
    sparse_targets,
)

POSITIONS = 6


def targets(seed: int = 0) -> SparseTargets:
    """Six positions with 4, 5, 6, 4, 5 and 6 entries and every optional field."""
    full = full_distributions(np.random.default_rng(seed), POSITIONS)
    return sparse_targets(full, [4, 5, 6, 4, 5, 6], EVERYTHING)


def assert_equal(a: SparseTargets, b: SparseTargets) -> None:
    for field in fields(SparseTargets):
        ours, theirs = getattr(a, field.name), getattr(b, field.name)
        if isinstance(ours, dict):
            assert ours.keys() == theirs.keys()
            assert all(np.array_equal(ours[key], theirs[key]) for key in ours)
        else:
            assert np.array_equal(ours, theirs), field.name


def test_num_entries_counts_what_is_not_padding() -> None:
    assert targets().num_entries.tolist() == [4, 5, 6, 4, 5, 6]
    assert len(targets()) == targets().num_positions == POSITIONS


def test_narrowing_cuts_the_entry_lists_and_nothing_else() -> None:
    whole = targets()[:1]
    narrow = whole.cut_to_width(4)
    assert narrow.token_ids.tolist() == [whole.token_ids[0, :4].tolist()]
    assert narrow.logprobs.tolist() == [whole.logprobs[0, :4].tolist()]
    assert_equal(narrow, SparseTargets(**{**vars(whole), "token_ids": narrow.token_ids, "logprobs": narrow.logprobs}))


@pytest.mark.parametrize(
    ("rows", "kept"),
    [
        (slice(1, 3), [1, 2]),
        (np.array([5, 0]), [5, 0]),
        (np.array([True, False, False, True, False, False]), [0, 3]),
        (slice(0, 0), []),
    ],
)
def test_indexing_selects_the_positions_in_every_field(rows: Any, kept: list[int]) -> None:
    whole, selected = targets(), targets()[rows]
    assert len(selected) == len(kept)
    for place, position in enumerate(kept):
        assert_equal(selected[place : place + 1], whole[position : position + 1])


@small
@given(cuts=st.lists(st.integers(0, POSITIONS), max_size=3))
def test_parts_of_different_widths_join_to_what_they_were_cut_from(cuts: list[int]) -> None:
    whole = targets()
    edges = [0, *sorted(cuts), POSITIONS]
    parts = [whole[a:b] for a, b in itertools.pairwise(edges)]
    parts = [part.cut_to_width(int(part.num_entries.max(initial=0))) for part in parts]
    assert_equal(concatenate(parts), whole)


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
@small
@given(rows=scored_rows(EVERYTHING))
def test_what_a_teacher_gives_has_no_defect(rows: list[Any]) -> None:
    for _, valid in rows:
        assert find_defect(valid, VOCAB) is None


def foreign_id(t: SparseTargets, p: int) -> None:
    t.token_ids[p, 1] = VOCAB


def negative_id(t: SparseTargets, p: int) -> None:
    t.token_ids[p, 1] = -2


def repeated_id(t: SparseTargets, p: int) -> None:
    t.token_ids[p, 3] = t.token_ids[p, 0]


def padding_in_front(t: SparseTargets, p: int) -> None:
    t.token_ids[p, 0], t.logprobs[p, 0] = PAD_ID, -np.inf


def not_a_number(t: SparseTargets, p: int) -> None:
    t.logprobs[p, 2] = np.nan


def impossible_entry(t: SparseTargets, p: int) -> None:
    t.logprobs[p, 3] = -np.inf


def more_than_certain(t: SparseTargets, p: int) -> None:
    t.logprobs[p, 0] = 0.1


def swapped(t: SparseTargets, p: int) -> None:
    t.logprobs[p, [0, 1]] = t.logprobs[p, [1, 0]]


def tail_not_a_number(t: SparseTargets, p: int) -> None:
    t.tail_logprob[p] = np.nan


def tail_of_everything(t: SparseTargets, p: int) -> None:
    t.tail_logprob[p] = 0.0


DEFECTS: list[tuple[Callable[[SparseTargets, int], None], str]] = [
    (foreign_id, "a token id outside the vocabulary"),
    (negative_id, "a token id outside the vocabulary"),
    (repeated_id, "the same token id twice"),
    (padding_in_front, "an entry after padding"),
    (not_a_number, "a log-probability that is not finite"),
    (impossible_entry, "a log-probability that is not finite"),
    (more_than_certain, "a log-probability above 0"),
    (swapped, "log-probabilities that do not descend"),
    (tail_not_a_number, "a tail log-probability that is not a number"),
    (tail_of_everything, "entries and tail that do not sum to 1"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("damage", "reason"), DEFECTS, ids=[damage.__name__ for damage, _ in DEFECTS])
@small
@given(position=st.integers(0, POSITIONS - 1), seed=st.integers(0, 100))
def test_every_defect_is_found_where_it_is(
    damage: Callable[[SparseTargets, int], None], reason: str, position: int, seed: int
) -> None:
    damaged = targets(seed)
    damage(damaged, position)
    assert find_defect(damaged, VOCAB) == (position, reason)


@given(first=st.sampled_from(DEFECTS), second=st.sampled_from(DEFECTS))
@small
def test_of_two_defects_the_first_position_is_named(first: Any, second: Any) -> None:
    damaged = targets()
    first[0](damaged, 2)
    second[0](damaged, 4)
    assert find_defect(damaged, VOCAB) == (2, first[1])


def test_the_mass_may_be_wrong_by_the_tolerance() -> None:
    off = SparseTargets(
        np.array([[3]], dtype=np.int32), np.log([[0.5]], dtype=np.float32), np.log([0.50005], dtype=np.float32)
    )
    assert find_defect(off, VOCAB) is None
    assert find_defect(off, VOCAB, mass_tolerance=1e-5) == (0, "entries and tail that do not sum to 1")


def test_random_rows_are_sound() -> None:
    assert all(find_defect(t, VOCAB) is None for _, t in random_rows(20, EVERYTHING))

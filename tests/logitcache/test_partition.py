"""The tail groups: bands of token rank."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from smallcaches import small

from logitcache.capture.partition import rank_bands


@st.composite
def sizes(draw: st.DrawFn) -> tuple[int, int]:
    vocab_size = draw(st.integers(1, 2000))
    return vocab_size, draw(st.integers(1, vocab_size))


@given(size=sizes(), seed=st.integers(0, 100))
@example(size=(1, 1), seed=0)
@example(size=(2000, 2000), seed=0)
@example(size=(2000, 1999), seed=0)
@small
def test_every_group_has_ids_and_more_probable_ids_come_in_earlier_groups(size: tuple[int, int], seed: int) -> None:
    vocab_size, num_groups = size
    probability = np.random.default_rng(seed).random(vocab_size)
    groups = rank_bands(probability, num_groups)
    assert groups.dtype == np.int32
    assert sorted(set(groups.tolist())) == list(range(num_groups))
    by_rank = groups[np.argsort(-probability)]
    assert (np.diff(by_rank) >= 0).all()


@pytest.mark.parametrize("vocab_size", [*range(1, 40), 150_000])
def test_no_number_of_groups_leaves_one_empty(vocab_size: int) -> None:
    for num_groups in range(1, min(vocab_size, 40) + 1):
        groups = rank_bands(-np.arange(vocab_size, dtype=np.float64), num_groups)
        assert (np.bincount(groups, minlength=num_groups) > 0).all()
        assert len(np.unique(groups)) == num_groups


def test_under_zipfs_law_the_bands_hold_about_the_same_mass() -> None:
    zipf = 1 / np.arange(1, 100_001)
    masses = np.bincount(rank_bands(zipf, 4), weights=zipf)
    assert masses.max() < 1.5 * masses.min()


def test_ids_that_tie_are_ranked_by_number() -> None:
    groups = rank_bands(np.zeros(100), 3)
    assert (np.diff(groups) >= 0).all()

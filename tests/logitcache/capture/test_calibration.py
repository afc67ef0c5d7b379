"""Tail groups by the teacher's own distributions."""

from __future__ import annotations

import numpy as np
import pytest

from logitcache.capture.calibration import profile_clusters


def log_softmax(logits: np.ndarray) -> np.ndarray:
    normalised: np.ndarray = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    return normalised


def test_tokens_that_rise_and_fall_together_share_a_group() -> None:
    random = np.random.default_rng(1)
    kinds = random.permutation(np.arange(400) % 4)
    of_kinds = 6 * random.standard_normal((40, 4))
    groups = profile_clusters(log_softmax(of_kinds[:, kinds] + 0.2 * random.standard_normal((40, 400))), 4)
    assert len(set(zip(kinds, groups, strict=True))) == 4


def test_groups_are_in_order_of_their_mass() -> None:
    logprobs = log_softmax(3 * np.random.default_rng(2).standard_normal((30, 300)))
    groups = profile_clusters(logprobs, 8)
    masses = np.bincount(groups, np.exp(logprobs).mean(axis=0))
    assert groups.dtype == np.int32
    assert (np.diff(masses) <= 0).all()


@pytest.mark.parametrize("num_groups", [1, 5, 20])
def test_every_group_has_an_id_even_where_tokens_cannot_be_told_apart(num_groups: int) -> None:
    groups = profile_clusters(np.full((3, 20), -np.log(20)), num_groups)
    assert np.array_equal(np.unique(groups), np.arange(num_groups))


def test_banned_tokens_are_grouped_like_any() -> None:
    logits = np.random.default_rng(3).standard_normal((10, 60))
    logits[:, 50:] = -np.inf
    groups = profile_clusters(log_softmax(logits), 3)
    assert len(np.unique(groups[50:])) == 1
    assert np.array_equal(np.unique(groups), np.arange(3))


def test_the_same_distributions_give_the_same_groups() -> None:
    logprobs = log_softmax(np.random.default_rng(4).standard_normal((10, 80)))
    assert np.array_equal(profile_clusters(logprobs, 6), profile_clusters(logprobs.copy(), 6))

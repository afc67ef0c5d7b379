"""Tail groups and the tail basis by the teacher's own distributions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from logitcache import UserError
from logitcache.capture import calibration
from logitcache.capture.calibration import leading_directions, make_tail_basis, profile_clusters
from logitcache.capture.projection import CovarianceProduct, summed_probabilities
from logitcache.capture.teachers.base import TeacherModel
from logitcache.capture.teachers.hf import TransformersTeacher
from logitcache.format.layout import Layout
from logitcache.format.quantization import PRESETS
from logitcache.format.sequences import TokenSequence
from logitcache.format.tail_basis import check_tail_basis
from logitcache.format.tail_parts import TailParts
from tests.helpers.smallcaches import small


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


@given(st.integers(0, 10_000), st.integers(3, 80), st.integers(1, 40), st.floats(0, 3), st.booleans())
@small
def test_directions_are_the_leading_eigenvectors(
    seed: int, vocab_size: int, num_factors: int, decay: float, some_weigh_nothing: bool
) -> None:
    random = np.random.default_rng(seed)
    factors = random.standard_normal((200, num_factors)) * np.arange(1, num_factors + 1) ** -decay
    logits = factors @ random.standard_normal((num_factors, vocab_size))
    logits -= logits.mean(axis=0)
    weights = random.random(vocab_size) + 0.1
    weights[: vocab_size // 3 * some_weigh_nothing] = 0
    weights = (weights / weights.sum()).astype(np.float32)
    logits -= (logits @ weights)[:, None]
    rank = int(random.integers(1, min(vocab_size - (weights == 0).sum() - 1, num_factors) + 1))
    exact = np.linalg.svd(logits * np.sqrt(weights), compute_uv=False) ** 2 / len(logits)

    directions, variances = leading_directions(
        lambda block: (logits.T @ (logits @ (weights[:, None] * block)) / len(logits)).astype(np.float32), weights, rank
    )
    found = len(variances)
    assert found == rank or exact[found] <= 1e-6 * exact[0]
    assert np.allclose(directions.T @ (weights[:, None] * directions), np.eye(found), atol=1e-4)
    assert np.abs(weights @ directions).max() <= 1e-5
    assert np.allclose(variances, exact[:found], rtol=1e-2, atol=1e-5 * exact[0])
    coefficients = logits @ (weights[:, None] * directions)
    assert (coefficients**2).mean(axis=0).sum() >= 0.999 * exact[:found].sum()
    if rank == num_factors:  # nothing is left of any token, whatever it weighs
        assert np.abs(logits - coefficients @ directions.T).max() <= 1e-2 * np.abs(logits).max()


class Given:
    """A teacher of which the last token of a position decides the logits."""

    def __init__(self, logits: np.ndarray) -> None:
        self.logits = logits.astype(np.float32)

    def of(self, sequence: TokenSequence) -> torch.Tensor:
        return torch.from_numpy(self.logits[sequence.input_ids[sequence.positions]])

    def mean_probability(self, sequences: Iterable[TokenSequence]) -> np.ndarray:
        total = sum(summed_probabilities(self.of(sequence)) for sequence in sequences)
        assert isinstance(total, torch.Tensor)
        return (total / total.sum()).numpy()

    def covariance_product(
        self, sequences: Iterable[TokenSequence], block: np.ndarray, offset: np.ndarray, weights: np.ndarray
    ) -> np.ndarray:
        product = CovarianceProduct(block, offset, weights, "cpu")
        for sequence in sequences:
            product.add(self.of(sequence))
        return product.result().numpy()


def random_sequences(count: int, length: int, seed: int = 0) -> list[TokenSequence]:
    random = np.random.default_rng(seed)
    mask = np.arange(length) > 0
    return [TokenSequence(random.integers(0, 200, length, dtype=np.int32), mask) for _ in range(count)]


def basis_of(logits: np.ndarray, sequences: list[TokenSequence], rank: int) -> Any:
    return make_tail_basis(Given(logits), sequences, rank)  # type: ignore[arg-type]


LOGITS = np.random.default_rng(5).standard_normal((200, 30)) @ np.random.default_rng(6).standard_normal((30, 50))


def test_rows_without_numbers_and_banned_tokens_do_not_spoil_the_basis() -> None:
    logits = LOGITS.copy()
    logits[7] = np.nan
    logits[:, 3] = -np.inf
    logits[:, 4] = np.finfo(np.float32).min
    basis = basis_of(logits, random_sequences(20, 60), 6)
    for numbers in (basis.offset, basis.directions, basis.weights, basis.variances):
        assert np.isfinite(numbers).all()
    assert basis.weights[3] == basis.weights[4] == 0
    assert np.array_equal(basis.directions[3], basis.directions[4])
    assert basis.offset[3] < basis.offset.max() - 1000


def test_the_step_is_of_four_bits_and_of_three_in_a_compact_cache() -> None:
    basis = basis_of(LOGITS, random_sequences(20, 60), 6)
    assert basis.step == pytest.approx(6 * np.sqrt(basis.variances.mean()) / 16)
    steps = {}
    for precision in PRESETS:
        layout = Layout(200, TailParts(rank=6), precision=precision).with_coefficient_step(basis.step)
        check_tail_basis(replace(basis, offset=np.zeros(200)), layout)
        steps[precision] = layout.quantization and layout.quantization.coefficient_step
    assert steps == {"exact": None, "balanced": basis.step, "compact": 2 * basis.step}


@pytest.mark.parametrize(
    ("logits", "rank", "message"),
    [
        (
            LOGITS,
            40,
            r"--tail-rank 40: its basis is made from at least 80 different positions.* are 54: choose at most 27,",
        ),
        (LOGITS[:, :4], 4, "--tail-rank 4: the teacher's logits vary in 3 directions only"),
        (np.full((200, 50), np.nan), 6, "the teacher gives no log-probabilities that are numbers"),
    ],
    ids=["too few positions", "too few directions", "no numbers"],
)
def test_a_basis_that_cannot_be_made_is_refused(logits: np.ndarray, rank: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        basis_of(logits, random_sequences(6, 10), rank)


def test_random_directions_follow_where_the_logits_vary_in_few() -> None:
    logits = np.outer(np.arange(200) % 3, LOGITS[0, :20])
    basis = basis_of(logits, random_sequences(20, 60), 6)
    assert (basis.variances > 0).tolist() == [True] + 5 * [False]
    products = basis.directions.T @ (basis.weights[:, None] * basis.directions)
    assert np.allclose(products, np.eye(6), atol=1e-3)
    assert np.abs(basis.weights @ basis.directions).max() <= 1e-5


def test_positions_come_from_many_sequences_and_each_of_them_once() -> None:
    sequences = random_sequences(50, 40)
    drawn = list(calibration._some_positions(sequences + sequences, 400))
    assert sum(len(sequence.positions) for sequence in drawn) == 400
    assert len(drawn) >= 30
    few = list(calibration._some_positions(sequences[:3], 100))
    assert sum(len(sequence.positions) for sequence in few) == 100
    everything = list(calibration._some_positions(sequences[:3], 1000))
    assert sum(len(sequence.positions) for sequence in everything) == 3 * 39


def test_the_basis_is_of_the_covariance_of_all_logits_of_transformers(teacher: Path, texts: list[str]) -> None:
    model = TeacherModel.load(str(teacher), None, "float32", False)
    loaded = TransformersTeacher(model)
    ids = [np.array(model.tokenizer(text)["input_ids"], np.int32) for text in texts]
    sequences = [TokenSequence(row, np.arange(len(row)) > 0) for row in ids]
    rank = 12
    basis = make_tail_basis(loaded, sequences, rank)

    drawn = list(calibration._some_positions(sequences, rank * calibration.POSITIONS_PER_DIRECTION))
    logits = torch.cat([logits.double() for _, _, logits in loaded._logits(drawn)]).numpy()
    assert len(logits) == rank * calibration.POSITIONS_PER_DIRECTION
    weights = np.sqrt(torch.from_numpy(logits).softmax(dim=1).mean(dim=0).numpy())
    weights /= weights.sum()
    assert np.allclose(basis.weights, weights, rtol=1e-5)
    logits -= (logits @ weights)[:, None]
    mean = logits.mean(axis=0)
    assert np.ptp(basis.offset - mean) <= 1e-4
    covariance = (logits - mean).T @ (logits - mean) / len(logits)
    roots = np.sqrt(weights)
    variances, vectors = np.linalg.eigh(covariance * np.outer(roots, roots))
    variances, vectors = variances[::-1], vectors[:, ::-1]
    assert np.allclose(basis.variances, variances[:rank], rtol=1e-3)
    coefficients = (logits - mean) @ (weights[:, None] * basis.directions)
    assert np.allclose(coefficients.var(axis=0), variances[:rank], rtol=2e-3)
    # All that ours have in common with the directions that are wanted; the last may be mixed with what follows them.
    common = (basis.directions * roots[:, None]).T @ vectors[:, :rank]
    assert (common**2).sum() >= rank - 0.05
    assert np.abs(np.diag(common)[:3]).min() >= 0.99

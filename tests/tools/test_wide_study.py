"""What the study of a wide teacher measures at fixed positions, and the rows that its teacher learns from."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from logitcache import LogitCache
from logitcache.format.tail_basis import TailBasis
from tests.helpers.cachemaking import VOCAB, llama, random_sequences, teacher_logprobs, write_cache

TOOLS = Path(__file__).parents[2] / "tools"
sys.path[:0] = [str(TOOLS / "studies"), str(TOOLS / "demo")]

import rebuilding  # noqa: E402
from rebuilding import KnownTeacher, Stored  # noqa: E402
from train_wide_teacher import pieces  # noqa: E402


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> LogitCache:
    return write_cache(tmp_path_factory.mktemp("cache"), random_sequences(6, seed=3))


@pytest.fixture(scope="module")
def known(cache: LogitCache) -> KnownTeacher:
    """A teacher in a basis of all directions that there are."""
    random = np.random.default_rng(0)
    weights = random.random(VOCAB) + 0.1
    weights /= weights.sum()
    block = random.standard_normal((VOCAB, VOCAB - 1))
    block -= weights @ block
    directions = block @ np.linalg.inv(np.linalg.cholesky(block.T @ (weights[:, None] * block))).T
    offset = random.standard_normal(VOCAB, np.float32)
    variances = np.ones(VOCAB - 1, np.float32)
    basis = TailBasis(offset, directions.astype(np.float32), weights.astype(np.float32), 1.0, variances)
    return KnownTeacher(llama(), [cache[row] for row in range(len(cache))], basis)


@pytest.fixture(scope="module")
def student(known: KnownTeacher) -> torch.Tensor:
    return known.of(llama(seed=5))


def test_all_directions_leave_nothing_of_a_teacher_unknown(known: KnownTeacher, student: torch.Tensor) -> None:
    whole = Stored(4, VOCAB - 1, residual_weight=0.0)
    assert rebuilding.explained(known, VOCAB - 1) == pytest.approx(1, abs=1e-4)
    assert rebuilding.tail_divergence(known, whole) == pytest.approx((0, 0), abs=1e-5)
    errors, weight = rebuilding.gradient_errors(known, student, rebuilding.full_gradients(known, student), whole)
    assert errors == pytest.approx([0] * 4, abs=1e-3)
    assert weight == 0


def test_no_direction_and_the_students_own_residual_are_the_bucket(known: KnownTeacher, student: torch.Tensor) -> None:
    full = rebuilding.full_gradients(known, student)
    (bucket, _), (none, _) = (
        rebuilding.gradient_errors(known, student, full, stored) for stored in (Stored(16), Stored(16, 0, None, 1.0))
    )
    assert none == pytest.approx(bucket, rel=0.01)  # AKL's head may end beyond the entries
    assert min(bucket) > 0.01


def test_probes_find_a_student_that_is_the_teacher(known: KnownTeacher) -> None:
    targets = known.targets(Stored(4, 2))
    assert rebuilding.of_probes(targets, known.logits) == pytest.approx(1, abs=0.05)
    assert rebuilding.of_probes(targets, -known.logits) == 0


def test_the_tails_divergence_is_that_of_a_loop(known: KnownTeacher, cache: LogitCache) -> None:
    stored, basis = Stored(4, 3), known.basis
    logprobs = torch.cat([teacher_logprobs(llama(), cache[row]) for row in range(len(cache))])
    values, masses = [], []
    for log_p in logprobs:
        tail = log_p.argsort(descending=True)[4:]
        coefficients = (basis.directions[:, :3].double() * (basis.weights * (log_p - basis.offset))[:, None]).sum(0)
        rebuilt = (basis.offset + basis.directions[:, :3].double() @ coefficients)[tail].log_softmax(0)
        true = log_p[tail].log_softmax(0)
        values.append(float((true.exp() * (true - rebuilt)).sum()))
        masses.append(float(log_p[tail].exp().sum()))
    expected = (np.mean(values), np.mean(np.multiply(values, masses)))
    assert rebuilding.tail_divergence(known, stored) == pytest.approx(expected, rel=1e-3)


def test_more_bits_take_more_bytes_and_lose_less(known: KnownTeacher) -> None:
    coarse, fine = Stored(4, 8, bits=2), Stored(4, 8, bits=6)
    assert known.bytes_per_position(Stored(4)) < known.bytes_per_position(coarse) < known.bytes_per_position(fine)
    exact = rebuilding.tail_divergence(known, Stored(4, 8))[0]
    lost = [rebuilding.tail_divergence(known, stored)[0] - exact for stored in (coarse, fine)]
    assert abs(lost[1]) < abs(lost[0])


def test_pieces_are_whole_lines_of_the_source() -> None:
    source = "".join(f"line {number}\n" * 40 for number in range(20))
    rows = pieces("bert", source)
    assert source.startswith("".join(row["text"] for row in rows))
    assert all(1000 <= len(row["text"]) < 1010 and row["text"].endswith("\n") for row in rows)
    assert len({row["id"] for row in rows}) == len(rows) > 3

"""Logits → what is stored of them, against the full distribution in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from logitcache import SparseTargets, UserError
from logitcache.capture import selection
from logitcache.capture.projection import DeviceBasis
from logitcache.capture.selection import TailGroups, draw_uniforms, select, select_from_top_k, top_k
from logitcache.capture.settings import CaptureSettings
from logitcache.capture.wire_format import fields, position_width, unpack
from logitcache.format.layout import Layout
from logitcache.format.tail_parts import TailParts
from logitcache.format.targets import concatenate, find_defect
from logitcache.format.truncation import nucleus
from tests.helpers.kernels import DEVICE
from tests.helpers.smallcaches import small, sparse_targets

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_logits(seed: int, positions: int, vocab_size: int, spread: float = 3.0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(scale=spread, size=(positions, vocab_size))).float()


def full(logits: torch.Tensor) -> np.ndarray:
    """Log-probabilities of the logits as they are, in float64 [N, V]."""
    exact: np.ndarray = logits.double().log_softmax(dim=-1).numpy()
    return exact


def captured(**settings: Any) -> CaptureSettings:
    return CaptureSettings.from_json(CaptureSettings(8, min_k=1).to_json() | settings)


def selected(
    logits: torch.Tensor,
    settings: CaptureSettings,
    group_of: np.ndarray | None = None,
    uniforms: np.ndarray | None = None,
) -> SparseTargets:
    """What `select` packs, on a copy that it may overwrite; with `basis_of` and `probes_of` if the settings have a rank."""
    parts = settings.tail_parts
    packed = select(
        logits.to(DEVICE, copy=True),
        settings,
        None if group_of is None else TailGroups(group_of, DEVICE),
        None if uniforms is None else torch.from_numpy(uniforms).to(DEVICE),
        DeviceBasis(*basis_of(logits.shape[1], parts.rank), DEVICE) if parts.rank else None,
        torch.from_numpy(probes_of(logits, parts.probes)).to(DEVICE) if parts.probes else None,
    )
    assert packed.dtype == torch.int32
    assert packed.shape == (len(logits), position_width(settings))
    return unpack(packed.cpu().numpy(), settings)


def basis_of(vocab_size: int, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Directions [V, R], orthonormal and centred under the weights, offset [V] and weights [V]: float32."""
    random = np.random.default_rng(vocab_size)
    weights = random.random(vocab_size) ** 3
    weights /= weights.sum()
    directions = random.standard_normal((vocab_size, rank))
    directions -= weights @ directions
    directions = np.linalg.qr(directions * np.sqrt(weights)[:, None])[0] / np.sqrt(weights)[:, None]
    arrays = directions, random.standard_normal(vocab_size), weights
    return tuple(array.astype(np.float32) for array in arrays)  # type: ignore[return-value]


def probes_of(logits: torch.Tensor, count: int) -> np.ndarray:
    """Tokens that depend on the logits alone, however they are cut up: int64 [N, P]."""
    digits = (logits[:, :1].double() * 1e4).long().abs().numpy()
    return np.asarray((digits + 7 * np.arange(count)) % logits.shape[1])


def counts_under_top_p(logprobs: np.ndarray, settings: CaptureSettings) -> list[int]:
    """Entries are taken, most probable first, until they hold the mass; at least min_k, at most top_k."""
    counts = []
    for row in logprobs:
        taken, mass = 0, 0.0
        for probability in sorted(np.exp(row), reverse=True)[: settings.top_k]:
            if mass >= settings.top_p and taken >= settings.min_k:
                break
            taken, mass = taken + 1, mass + probability
        counts.append(taken)
    return counts


def assert_close(found: np.ndarray | None, expected: np.ndarray | None, tolerance: float = 2e-5) -> None:
    assert found is not None and expected is not None
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    assert np.array_equal(np.isneginf(found), np.isneginf(expected))
    finite = np.isfinite(expected)
    assert np.allclose(found[finite], expected[finite], rtol=1e-5, atol=tolerance)


def assert_entries_and_tail(found: SparseTargets, expected: SparseTargets) -> None:
    found = found.cut_to_width(expected.token_ids.shape[1])
    assert found.token_ids.tolist() == expected.token_ids.tolist()
    assert_close(found.logprobs, expected.logprobs)
    assert_close(found.tail_logprob, expected.tail_logprob)


@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(2, 60), st.data())
@small
def test_everything_is_that_of_the_full_distribution(seed: int, positions: int, vocab_size: int, data: Any) -> None:
    groups = data.draw(st.integers(1, min(4, vocab_size)))
    settings = captured(
        top_k=data.draw(st.integers(1, vocab_size)), tail_groups=groups, temperatures=(0.5, 2.0), tail_entropy=True
    )
    logits = random_logits(seed, positions, vocab_size)
    group_of = np.random.default_rng(seed).permutation(np.arange(vocab_size) % groups)
    layout = Layout(vocab_size, TailParts(groups=groups, temperatures=(0.5, 2.0), entropy=True))
    expected = sparse_targets(full(logits), [settings.top_k] * positions, layout, group_of)
    found = selected(logits, settings, group_of)
    assert_entries_and_tail(found, expected)
    assert_close(found.group_logprobs, expected.group_logprobs)
    for temperature in (0.5, 2.0):
        assert_close(found.tempered_tail[temperature], expected.tempered_tail[temperature], 1e-4)
    assert_close(found.tail_entropy, expected.tail_entropy, 1e-4)
    assert find_defect(found, vocab_size, mass_tolerance=1e-5) is None


@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(2, 60), st.floats(-30, 30), st.data())
@small
def test_coefficients_and_residuals_are_by_their_definition(
    seed: int, positions: int, vocab_size: int, shift: float, data: Any
) -> None:
    rank = data.draw(st.integers(1, vocab_size - 1))
    logits = random_logits(seed, positions, vocab_size)
    settings = captured(top_k=1, tail_rank=rank, tail_probes=3)
    found = selected(logits, settings)
    directions, offset, weights = (array.astype(np.float64) for array in basis_of(vocab_size, rank))
    differences = logits.double().numpy() - offset
    coefficients = differences @ (weights[:, None] * directions)
    left = differences - (differences @ weights)[:, None] - coefficients @ directions.T
    largest = np.abs(directions).max()
    assert_close(found.tail_coefficients, coefficients.astype(np.float32))
    residuals = np.take_along_axis(left, probes_of(logits, 3), axis=1)
    assert_close(found.probe_residuals, residuals.astype(np.float32), 1e-4 * largest)
    shifted = selected(logits + shift, captured(top_k=1, tail_rank=rank))
    assert_close(shifted.tail_coefficients, coefficients.astype(np.float32), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_whole_vocabulary_is_selected_as_in_float64(dtype: torch.dtype) -> None:
    """Of logits in bfloat16 many are equal: any of them may be the entry."""
    vocab_size, k, rank = 151_936, 64, 8
    logits = random_logits(2, 6, vocab_size).to(dtype)
    group_of = np.arange(vocab_size) % 32
    settings = captured(top_k=k, tail_groups=32, temperatures=(2.0,), tail_entropy=True, tail_rank=rank, tail_probes=2)
    found, exact = selected(logits, settings, group_of), full(logits)
    assert_close(found.logprobs, -np.sort(-exact, axis=1)[:, :k].astype(np.float32))
    assert_close(found.logprobs, np.take_along_axis(exact, found.token_ids, axis=1).astype(np.float32))
    tail = exact.copy()
    np.put_along_axis(tail, found.token_ids, -np.inf, axis=1)
    masses = np.stack([np.exp(tail)[:, group_of == group].sum(axis=1) for group in range(32)], axis=1)
    assert_close(found.group_logprobs, np.log(masses).astype(np.float32))
    assert_close(found.tail_logprob, np.log(masses.sum(axis=1)).astype(np.float32))
    assert_close(found.tempered_tail[2.0], np.log(np.exp(tail / 2).sum(axis=1)).astype(np.float32), 1e-4)
    entropy = np.sum(np.exp(tail) * np.where(np.isneginf(tail), 0, tail), axis=1) / masses.sum(axis=1)
    assert_close(found.tail_entropy, entropy.astype(np.float32), 1e-4)
    directions, offset, weights = (array.astype(np.float64) for array in basis_of(vocab_size, rank))
    coefficients = (logits.double().numpy() - offset) @ (weights[:, None] * directions)
    assert_close(found.tail_coefficients, coefficients.astype(np.float32), 1e-4)


def test_banned_tokens_leave_coefficients_finite() -> None:
    logits = random_logits(0, 3, 20)
    logits[1, 5] = -torch.inf
    found = selected(logits, captured(tail_rank=2, tail_probes=4))
    assert found.tail_coefficients is not None and found.probe_residuals is not None
    assert np.isfinite(found.tail_coefficients).all() and np.isfinite(found.probe_residuals).all()
    others = [0, 2]
    expected = selected(logits[others], captured(tail_rank=2))
    assert_close(found.tail_coefficients[others], expected.tail_coefficients)


def test_what_is_not_asked_for_is_not_captured() -> None:
    found = selected(random_logits(0, 3, 20), captured())
    assert found.group_logprobs is found.tail_entropy is found.sample_ids is found.sample_logprobs is None
    assert found.tail_coefficients is found.probe_residuals is found.probe_ids is None
    assert found.tempered_tail == {}


def test_the_tail_of_a_confident_teacher_is_exact() -> None:
    logits = torch.zeros(2, 1000)
    logits[0, 7] = 28.0  # 1 − p = 999 e^−28 = 7e-10
    logits[1, 9] = 200.0  # 1 − p = 999 e^−200, below the smallest float32
    group_of = np.arange(1000) % 2
    settings = captured(top_k=1, tail_groups=2, temperatures=(2.0,), tail_entropy=True)
    found = selected(logits, settings, group_of)
    layout = Layout(1000, TailParts(groups=2, temperatures=(2.0,), entropy=True))
    expected = sparse_targets(full(logits), [1, 1], layout, group_of)
    assert 6e-10 < np.exp(expected.tail_logprob[0]) < 8e-10
    assert_entries_and_tail(found, expected)
    assert_close(found.group_logprobs, expected.group_logprobs)
    assert_close(found.tempered_tail[2.0], expected.tempered_tail[2.0])
    assert_close(found.tail_entropy, expected.tail_entropy)


def test_the_whole_vocabulary_leaves_no_tail() -> None:
    settings = captured(top_k=12, tail_groups=3, temperatures=(2.0,), tail_entropy=True, tail_samples=2)
    found = selected(random_logits(1, 4, 12), settings, np.arange(12) % 3, np.random.default_rng(2).random((4, 2)))
    assert (found.tail_logprob == -np.inf).all()
    assert found.group_logprobs is not None and (found.group_logprobs == -np.inf).all()
    assert (found.tempered_tail[2.0] == -np.inf).all()
    assert found.tail_entropy is not None and (found.tail_entropy == 0).all()
    assert found.sample_ids is not None and (found.sample_ids == -1).all()
    assert found.sample_logprobs is not None and (found.sample_logprobs == -np.inf).all()


def test_a_token_that_the_teacher_excludes_is_no_entry() -> None:
    logits = random_logits(2, 3, 10)
    logits[:, 4:] = -torch.inf
    found = selected(logits, captured(top_k=8))
    assert_entries_and_tail(found, sparse_targets(full(logits), [4, 4, 4], Layout(10)))
    assert find_defect(found, 10) is None


def test_group_masses_of_a_large_vocabulary_add_up_to_the_tail() -> None:
    found = selected(torch.zeros(1, 150_000), captured(top_k=1, tail_groups=2), (np.arange(150_000) > 20).astype(int))
    assert found.group_logprobs is not None
    assert np.exp(found.group_logprobs.astype(np.float64)).sum() == pytest.approx(1 - 1 / 150_000, abs=1e-6)


def test_groups_of_very_unequal_mass_and_size_are_each_exact() -> None:
    logits = random_logits(8, 3, 5000)
    group_of = np.minimum(np.arange(5000) // 7, 40)[np.random.default_rng(8).permutation(5000)]
    logits -= torch.from_numpy(group_of)  # masses from 1 down to 1e-20
    settings = captured(top_k=30, tail_groups=41)
    exact = full(logits)
    found = selected(logits, settings, group_of)
    expected = sparse_targets(exact, [30] * 3, Layout(5000, TailParts(groups=41)), group_of).group_logprobs
    assert expected is not None and expected.min() < -40
    assert_close(found.group_logprobs, expected, 1e-5)


def test_a_group_that_lies_in_the_entries_has_no_mass() -> None:
    logits = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0]])
    found = selected(logits, captured(top_k=2, tail_groups=3), np.array([0, 0, 1, 2, 2]))
    assert found.group_logprobs is not None
    assert np.isneginf(found.group_logprobs[0]).tolist() == [True, False, False]


@given(st.integers(0, 10_000), st.floats(0.05, 0.999), st.integers(1, 20), st.integers(1, 20))
@small
def test_top_p_takes_entries_until_they_hold_the_mass(seed: int, top_p: float, floor: int, cap: int) -> None:
    settings = captured(top_k=max(floor, cap), min_k=min(floor, cap), top_p=top_p)
    logits = random_logits(seed, 6, 40)
    exact = full(logits)
    cumulative = np.cumsum(-np.sort(-np.exp(exact)), axis=1)
    clear = (np.abs(cumulative - top_p) > 1e-6).all(axis=1)  # float32 may decide the others either way
    counts = counts_under_top_p(exact, settings)
    found = selected(logits, settings)
    assert found.token_ids.shape[1] == settings.top_k
    assert found.num_entries[clear].tolist() == np.array(counts)[clear].tolist()
    assert_entries_and_tail(found, sparse_targets(exact, found.num_entries.tolist(), Layout(40)))


def test_top_p_shows_floor_cap_and_mass_by_hand() -> None:
    probabilities = torch.tensor([[0.6, 0.2, 0.1, 0.05, 0.03, 0.02]])

    def entries(**settings: Any) -> int:
        return int(selected(probabilities.log(), captured(top_k=5, **settings)).num_entries[0])

    assert entries(top_p=0.5) == 1
    assert entries(top_p=0.7) == 2
    assert entries(top_p=0.92) == 4
    assert entries(top_p=0.999) == 5
    assert entries(top_p=0.5, min_k=3) == 3
    assert entries(top_p=1.0) == 5


@small
@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=30).filter(any),
    st.sampled_from([0.25, 0.5, 0.75, 1.0]) | st.floats(0.01, 1.0),
    st.integers(1, 30),
)
def test_the_nucleus_of_a_capture_is_that_of_a_cache_that_is_made_smaller(
    weights: list[int], top_p: float, min_k: int
) -> None:
    with np.errstate(divide="ignore"):  # equal weights are ties, those of 0 banned tokens
        row = np.log(np.sort(weights)[::-1] / np.sum(weights)).astype(np.float32)[None]
    settings = CaptureSettings(top_k=len(weights), top_p=top_p, min_k=min_k)
    captured_entries = selection._nucleus(torch.from_numpy(row).double(), settings).numpy()
    assert np.array_equal(captured_entries, nucleus(row, len(weights), top_p, min_k))


def test_samples_are_drawn_from_the_tail_by_its_probabilities() -> None:
    draws, vocab_size = 20_000, 700
    logits = random_logits(3, 2, vocab_size, spread=1.5)
    exact = full(logits)
    uniforms = np.random.default_rng(4).random((2, draws))
    found = selected(logits, captured(top_k=5, tail_samples=draws), uniforms=uniforms)
    assert found.sample_ids is not None and found.sample_logprobs is not None
    for row in range(2):
        tail = np.exp(exact[row])
        tail[found.token_ids[row]] = 0
        tail /= tail.sum()
        counts = np.bincount(found.sample_ids[row], minlength=vocab_size)
        assert (counts[found.token_ids[row]] == 0).all()
        assert chi_square_is_plausible(counts, draws * tail)
        assert not chi_square_is_plausible(counts, draws * np.roll(tail, 1))
        assert np.allclose(found.sample_logprobs[row], exact[row][found.sample_ids[row]], atol=2e-5)


def chi_square_is_plausible(counts: np.ndarray, expected: np.ndarray) -> bool:
    """Pearson's statistic lies within four standard deviations of its mean; outcomes expected less than 5 times are pooled."""
    rare = expected < 5
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    return bool(abs(statistic - freedom) < 4 * np.sqrt(2 * freedom))


def test_samples_are_the_inverse_distribution_function_at_the_uniforms() -> None:
    logits = torch.tensor([[0.5, 0.125, 0.25, 0.125]]).log()
    uniforms = np.array([[0.0, 0.249, 0.251, 0.749, 0.751, 1 - 2.0**-53]])
    found = selected(logits, captured(top_k=1, tail_samples=6), uniforms=uniforms)
    assert found.sample_ids is not None
    assert found.sample_ids.tolist() == [[1, 1, 2, 2, 3, 3]]


@given(st.integers(0, 10_000), st.integers(2, 2000))
@small
def test_samples_are_those_of_a_cumulated_sum_over_the_vocabulary(seed: int, vocab_size: int) -> None:
    logits = random_logits(seed, 3, vocab_size)
    settings = captured(top_k=1, tail_samples=20)
    uniforms = draw_uniforms(f"{seed:032x}", 3, 20)
    found = selected(logits, settings, uniforms=uniforms)
    tail = np.exp(full(logits))
    np.put_along_axis(tail, found.token_ids.astype(np.int64), 0, axis=1)
    cumulated = tail.cumsum(axis=1)
    assert found.sample_ids is not None
    for row in range(3):
        distance = uniforms[row, :, None] * cumulated[row, -1] - cumulated[row]
        clear = np.abs(distance).min(axis=1) > 1e-6 * cumulated[row, -1]  # rounding may decide the others either way
        assert found.sample_ids[row][clear].tolist() == (distance >= 0).sum(axis=1)[clear].tolist()


def test_the_least_and_the_largest_uniform_never_leave_the_tail() -> None:
    logits = torch.full((3, 1000), -torch.inf)
    logits[:, [100, 300, 301, 640]] = torch.tensor([3.0, 1.0, 2.0, 0.0])
    logits[2] = torch.tensor([9.0, *[0.0] * 999])
    uniforms = np.array([[0.0, 1 - 2.0**-53]] * 3)
    found = selected(logits, captured(top_k=1, tail_samples=2), uniforms=uniforms)
    assert found.sample_ids is not None
    assert found.sample_ids.tolist() == [[300, 640], [300, 640], [1, 999]]


def test_the_uniforms_belong_to_the_row_id() -> None:
    first, again, other = draw_uniforms("a" * 32, 5, 3), draw_uniforms("a" * 32, 5, 3), draw_uniforms("b" * 32, 5, 3)
    assert first.dtype == np.float64
    assert first.tolist() == again.tolist()
    assert not np.isclose(first, other).any()
    assert (first >= 0).all() and (first < 1).all()


@given(st.integers(0, 10_000), st.integers(1, 3000), st.booleans(), st.data())
@small
def test_the_two_stages_of_top_k_find_what_one_stage_finds(
    seed: int, vocab_size: int, tied: bool, data: st.DataObject
) -> None:
    logits = random_logits(seed, 4, vocab_size)
    logits = logits.round() if tied else logits
    k = data.draw(st.integers(1, vocab_size))
    values, ids = top_k(logits, k)
    assert torch.equal(values, logits.topk(k).values)
    assert torch.equal(logits.gather(1, ids), values)
    assert all(len(set(row)) == k for row in ids.tolist())


EVERYTHING: dict[str, Any] = {
    "tail_groups": 3,
    "temperatures": (0.5, 2.0),
    "tail_entropy": True,
    "tail_samples": 4,
    "tail_rank": 5,
    "tail_probes": 2,
}


def assert_same(found: SparseTargets, expected: SparseTargets) -> None:
    assert found.token_ids.tolist() == expected.token_ids.tolist()
    assert found.sample_ids is not None and expected.sample_ids is not None
    assert found.sample_ids.tolist() == expected.sample_ids.tolist()
    for name in ("logprobs", "tail_logprob", "group_logprobs", "tail_entropy", "sample_logprobs"):
        assert_close(getattr(found, name), getattr(expected, name), 1e-6)
    for name in ("tail_coefficients", "probe_residuals"):
        assert_close(getattr(found, name), getattr(expected, name))
    for temperature, values in expected.tempered_tail.items():
        assert_close(found.tempered_tail[temperature], values, 1e-6)


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_rows_selected_in_chunks_are_those_selected_at_once(top_p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = captured(top_p=top_p, **EVERYTHING)
    logits, uniforms = random_logits(9, 50, 900), np.random.default_rng(9).random((50, 4))
    group_of = np.arange(900) % 3
    whole = selected(logits, settings, group_of, uniforms)
    parts = [selected(logits[i : i + 7], settings, group_of, uniforms[i : i + 7]) for i in range(0, 50, 7)]
    assert_same(concatenate(parts), whole)
    monkeypatch.setattr(selection, "CPU_BLOCK_LOGITS", 3 * 900)
    assert_same(selected(logits, settings, group_of, uniforms), whole)


@pytest.mark.parametrize("stays_half", [False, True], ids=["as on a CPU", "as on a GPU"])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_give_what_their_float32_copies_give(
    dtype: torch.dtype, top_p: float, stays_half: bool
) -> None:
    settings = captured(top_k=10, top_p=top_p, **EVERYTHING)
    logits, uniforms = random_logits(5, 4, 400).to(dtype), np.random.default_rng(5).random((4, 4))
    group_of = np.arange(400) % 3
    expected = selected(logits.float(), settings, group_of, uniforms)
    if stays_half:
        basis = DeviceBasis(*basis_of(400, 5), "cpu")
        described = basis.describe(logits, torch.from_numpy(probes_of(logits, 2)))
        packed = selection._select(logits, torch.from_numpy(uniforms), settings, TailGroups(group_of, "cpu"))
        packed |= {name: values.view(torch.int32) for name, values in described.items()}
        columns = torch.cat([packed[name] for name in fields(settings)], dim=1)
        assert_same(unpack(columns.numpy(), settings), expected)
    else:
        assert_same(selected(logits, settings, group_of, uniforms), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_reduced_in_float32(dtype: torch.dtype) -> None:
    logits = random_logits(5, 4, 40).to(dtype)
    found = selected(logits, captured(top_k=10))
    exact = full(logits)
    assert np.allclose(found.logprobs, np.take_along_axis(exact, found.token_ids.astype(np.int64), axis=1), atol=2e-5)
    assert_close(found.tail_logprob, sparse_targets(exact, [10] * 4, Layout(40)).tail_logprob)


def test_no_positions_give_no_targets() -> None:
    settings = captured(**EVERYTHING)
    found = selected(torch.empty(0, 20), settings, np.arange(20) % 3, np.empty((0, 4)))
    assert found.token_ids.shape == (0, 8)


def engine_top_k(logits: torch.Tensor, count: int) -> tuple[np.ndarray, np.ndarray]:
    top = logits.log_softmax(dim=-1).topk(count, dim=-1)
    return top.indices.numpy().astype(np.int32), top.values.numpy()


@given(st.integers(0, 10_000), st.sampled_from([0.3, 0.8, 0.95, 1.0]), st.integers(1, 8))
@small
def test_an_engines_top_k_gives_the_same_as_the_logits(seed: int, top_p: float, min_k: int) -> None:
    settings = captured(top_p=top_p, min_k=min_k)
    logits = random_logits(seed, 5, 40)
    expected = selected(logits, settings)
    found = select_from_top_k(*engine_top_k(logits, 8), settings, vocab_size=40)
    expected = expected.cut_to_width(found.token_ids.shape[1])
    assert found.token_ids.tolist() == expected.token_ids.tolist()
    assert_close(found.logprobs, expected.logprobs, 1e-6)
    assert np.abs(np.exp(found.tail_logprob) - np.exp(expected.tail_logprob)).max() < 1e-6
    assert find_defect(found, 40, mass_tolerance=1e-5) is None


def test_a_longer_list_of_an_engine_is_cut_to_top_k() -> None:
    logits = random_logits(6, 5, 40)
    found = select_from_top_k(*engine_top_k(logits, 20), captured(), vocab_size=40)
    assert found.token_ids.tolist() == selected(logits, captured()).token_ids.tolist()


def test_padding_columns_among_an_engines_top_k_are_left_to_the_tail() -> None:
    probabilities = torch.tensor([[0.4, 0.1, 0.0, 0.2, 0.3], [0.4, 0.3, 0.1, 0.15, 0.05]])
    found = select_from_top_k(*engine_top_k(probabilities.log(), 3), captured(top_k=3), vocab_size=4)
    assert found.token_ids.tolist() == [[0, 3, -1], [0, 1, 3]]
    assert np.allclose(np.exp(found.logprobs), [[0.4, 0.2, 0], [0.4, 0.3, 0.15]])
    assert np.allclose(np.exp(found.tail_logprob), [0.4, 0.15])
    assert find_defect(found, 4) is None


def test_an_engine_that_gives_only_padding_leaves_everything_to_the_tail() -> None:
    ids, logprobs = np.array([[7, 8]], dtype=np.int32), np.log(np.array([[0.5, 0.3]], dtype=np.float32))
    found = select_from_top_k(ids, logprobs, captured(top_k=2, min_k=2), vocab_size=4)
    assert found.token_ids.shape == (1, 0)
    assert found.tail_logprob.tolist() == [0.0]


def test_an_engines_tail_is_never_smaller_than_the_rounding_of_one() -> None:
    ids, logprobs = np.array([[0, 1]], dtype=np.int32), np.array([[0.0, -30.0]], dtype=np.float32)
    found = select_from_top_k(ids, logprobs, captured(top_k=2), vocab_size=4)
    assert found.tail_logprob.tolist() == [np.float32(-24 * np.log(2))]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 0}, "--top-k 0: the teacher's vocabulary has 50 tokens"),
        ({"top_k": 51}, "--top-k 51: the teacher's vocabulary has 50 tokens, choose 1…50"),
        ({"top_p": 0.0}, r"--top-p 0\.0: choose a probability mass in \(0, 1\]"),
        ({"top_p": float("nan")}, "--top-p nan"),
        ({"min_k": 9}, "--min-k 9: choose 1…8, the value of --top-k"),
        ({"tail_groups": 51}, "--tail-groups 51: choose 0…50"),
        ({"temperatures": (2.0, 2.0000001)}, r"--temperatures 2\.0, 2\.0000001: columns are named by six digits"),
        ({"temperatures": (1.0, 0.5, 0.0)}, r"--temperatures 0\.0, 0\.5: all must be positive and finite"),
        ({"temperatures": (float("inf"),)}, "--temperatures inf"),
        ({"tail_samples": -1}, "--tail-samples -1: must not be negative"),
        ({"tail_rank": 50}, "--tail-rank 50: choose 0…49"),
        ({"tail_rank": 41}, "--tail-rank 41: choose 0…40, the width of the teacher's hidden states"),
        ({"tail_rank": 4, "tail_probes": 256}, "--tail-probes 256: choose 0…255"),
        ({"tail_probes": 2}, "--tail-probes 2 needs --tail-rank"),
    ],
)
def test_settings_that_no_teacher_can_meet_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CaptureSettings.from_json(CaptureSettings(8).to_json() | settings).check(50, 40)


def test_settings_take_their_canonical_form() -> None:
    settings = CaptureSettings(8, tail_parts=TailParts(temperatures=(2, 1.0, 0.5, 2.0)))
    settings.check(50)
    assert settings == CaptureSettings(8, 1.0, 8, tail_parts=TailParts(groups=0, temperatures=(0.5, 2.0)))
    assert CaptureSettings(40, 0.9).min_k == 32
    assert CaptureSettings.from_json(settings.to_json()) == settings


def test_settings_know_what_top_k_alone_cannot_give() -> None:
    assert CaptureSettings(8, 0.9, tail_parts=TailParts(temperatures=(1.0,))).beyond_top_k == []
    wanted = CaptureSettings(8, tail_parts=TailParts(groups=2, temperatures=(2.0,), entropy=True))
    assert wanted.beyond_top_k == ["--tail-groups", "--temperatures", "--tail-entropy"]

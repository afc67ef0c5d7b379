"""The mean of several teachers: against a slow loop, and against the exact mean where every token is stored."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logitcache import CachedSequence, LogitCache, SparseTargets, UserError
from logitcache.format import shards
from logitcache.format.tail_parts import TailParts
from logitcache.format.targets import PAD_ID, find_defect
from tests.helpers.cachemaking import VOCAB, llama, random_sequences, write_cache
from trainer.data import averaging
from trainer.data.averaging import mean_targets
from trainer.data.training_data import open_training_data

SMALL_VOCAB = 12
examples = settings(max_examples=200, deadline=None, database=None)


def distributions(random: np.random.Generator, positions: int, vocab_size: int) -> np.ndarray:
    """float64 [M, V], rows that sum to 1."""
    weights: np.ndarray = np.exp(random.normal(scale=3, size=(positions, vocab_size)))
    weights /= weights.sum(axis=1, keepdims=True)
    return weights


def stored(full: np.ndarray, num_entries: np.ndarray) -> SparseTargets:
    """The most probable entries of `full` [M, V], so many of each position, and the rest's mass."""
    order = np.argsort(-full, axis=1, kind="stable")[:, : int(num_entries.max(initial=0))]
    held = np.arange(order.shape[1]) < num_entries[:, None]
    probs = np.where(held, np.take_along_axis(full, order, axis=1), 0)
    tail = np.where(num_entries == full.shape[1], 0, 1 - probs.sum(axis=1))
    with np.errstate(divide="ignore"):
        return SparseTargets(
            np.where(held, order, PAD_ID).astype(np.int32),
            np.log(probs).astype(np.float32),
            np.log(np.maximum(tail, 0)).astype(np.float32),
        )


def slow_mean(teachers: list[SparseTargets], vocab_size: int) -> list[tuple[dict[int, float], float]]:
    """id → probability of each position, and the tail's mass: by the letter of the docstring."""
    result = []
    for m in range(len(teachers[0])):
        entries, tails = [], []
        for teacher in teachers:
            pairs = zip(teacher.token_ids[m].tolist(), teacher.logprobs[m].tolist(), strict=True)
            entries.append({token: np.exp(logprob) for token, logprob in pairs if token != PAD_ID})
            tails.append(float(np.exp(np.float64(teacher.tail_logprob[m]))))
        union = set().union(*entries)
        for number, entry in enumerate(entries):
            missing = union - set(entry)
            if missing:
                share = tails[number] / len(missing)
                whole = len(union) == vocab_size
                estimate = share if whole else min(min(entry.values(), default=np.inf), share) / 2
                tails[number] = 0.0 if whole else tails[number] - estimate * len(missing)
                entry.update(dict.fromkeys(missing, estimate))
        mean = {token: sum(entry[token] for entry in entries) / len(entries) for token in union}
        result.append((mean, sum(tails) / len(tails)))
    return result


def assert_is(targets: SparseTargets, expected: list[tuple[dict[int, float], float]]) -> None:
    assert len(targets) == len(expected)
    for m, (mean, tail) in enumerate(expected):
        held = targets.token_ids[m] != PAD_ID
        found = dict(zip(targets.token_ids[m][held].tolist(), np.exp(targets.logprobs[m][held]), strict=True))
        assert found == pytest.approx(mean, rel=1e-5)
        assert np.exp(targets.tail_logprob[m]) == pytest.approx(tail, rel=1e-5, abs=1e-12)


@st.composite
def teachers_of_the_same_positions(draw: st.DrawFn) -> tuple[list[np.ndarray], list[SparseTargets]]:
    """Full distributions, and what was stored of each: another number of entries at each position."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    positions = draw(st.integers(0, 5))
    full = [distributions(random, positions, SMALL_VOCAB) for _ in range(draw(st.integers(1, 4)))]
    most = draw(st.sampled_from([3, 6, SMALL_VOCAB]))
    return full, [stored(one, random.integers(0, most + 1, positions)) for one in full]


@pytest.mark.slow
@given(made=teachers_of_the_same_positions(), at_once=st.sampled_from([1, 20, 1 << 20]))
@examples
def test_the_mean_is_that_of_a_loop_over_positions(
    made: tuple[list[np.ndarray], list[SparseTargets]], at_once: int
) -> None:
    _, teachers = made
    with patch.object(averaging, "VALUES_AT_ONCE", at_once):
        assert_is(mean_targets(teachers, SMALL_VOCAB), slow_mean(teachers, SMALL_VOCAB))


@pytest.mark.slow
@given(made=teachers_of_the_same_positions())
@examples
def test_the_mean_is_a_distribution_over_the_union(made: tuple[list[np.ndarray], list[SparseTargets]]) -> None:
    _, teachers = made
    mean = mean_targets(teachers, SMALL_VOCAB)
    assert mean.token_ids.dtype == np.int32
    assert mean.logprobs.dtype == mean.tail_logprob.dtype == np.float32
    assert find_defect(mean, SMALL_VOCAB, mass_tolerance=1e-5) is None
    for m in range(len(mean)):
        union = {token for teacher in teachers for token in teacher.token_ids[m].tolist()} - {PAD_ID}
        assert set(mean.token_ids[m].tolist()) - {PAD_ID} == union


@pytest.mark.slow
@given(made=teachers_of_the_same_positions())
@examples
def test_an_id_that_a_teacher_lacks_is_off_by_less_than_its_smallest_entry(
    made: tuple[list[np.ndarray], list[SparseTargets]],
) -> None:
    full, teachers = made
    mean = mean_targets(teachers, SMALL_VOCAB)
    exact = np.mean(full, axis=0)
    for m in range(len(mean)):
        ids = mean.token_ids[m][mean.token_ids[m] != PAD_ID]
        bound = np.zeros(len(ids))
        for teacher in teachers:
            own = teacher.token_ids[m] != PAD_ID
            smallest = np.exp(teacher.logprobs[m][own].min(initial=0))
            missing = len(ids) - own.sum()
            enough = len(ids) < SMALL_VOCAB and np.exp(teacher.tail_logprob[m]) >= missing * smallest
            lacks = ~np.isin(ids, teacher.token_ids[m])
            bound += lacks * (smallest / 2 if enough else smallest) / len(teachers)
        error = np.abs(np.exp(mean.logprobs[m][: len(ids)]) - exact[m][ids])
        assert (error <= bound + 1e-6).all()


def test_where_every_token_is_stored_the_mean_is_exact() -> None:
    random = np.random.default_rng(0)
    full = [distributions(random, 30, VOCAB) for _ in range(3)]
    mean = mean_targets([stored(one, np.full(30, VOCAB)) for one in full], VOCAB)
    assert np.isneginf(mean.tail_logprob).all()
    by_id = np.take_along_axis(mean.logprobs, np.argsort(mean.token_ids, axis=1), axis=1)
    np.testing.assert_allclose(np.exp(by_id), np.mean(full, axis=0), rtol=1e-6)


def test_a_teacher_that_stores_every_token_leaves_no_tail_to_the_others() -> None:
    random = np.random.default_rng(1)
    full = [distributions(random, 5, VOCAB) for _ in range(2)]
    mean = mean_targets([stored(full[0], np.full(5, VOCAB)), stored(full[1], np.full(5, 8))], VOCAB)
    assert np.isneginf(mean.tail_logprob).all()
    np.testing.assert_allclose(np.exp(mean.logprobs).sum(axis=1), 1, rtol=1e-6)


def test_the_mean_of_equal_teachers_is_the_teacher() -> None:
    teacher = stored(distributions(np.random.default_rng(2), 9, VOCAB), np.arange(9))
    mean = mean_targets([teacher, teacher, teacher], VOCAB)
    np.testing.assert_array_equal(mean.token_ids, teacher.token_ids)
    np.testing.assert_allclose(mean.logprobs, teacher.logprobs, rtol=1e-6)
    np.testing.assert_allclose(mean.tail_logprob, teacher.tail_logprob, rtol=1e-6)


def test_a_token_without_any_probability_is_no_entry() -> None:
    impossible = SparseTargets(
        np.array([[3, 5]], np.int32), np.array([[0, -np.inf]], np.float32), np.array([-np.inf], np.float32)
    )
    mean = mean_targets([impossible, impossible], VOCAB)
    assert mean.token_ids.tolist() == [[3, PAD_ID]]
    assert mean.logprobs.tolist() == [[0, -np.inf]]


# Caches


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> tuple[LogitCache, LogitCache]:
    """Two teachers' caches of 60 rows; the other has other row groups, another k, and some rows more."""
    rows = random_sequences(60, seed=5)
    with patch.object(shards, "ROW_GROUP_BYTES", 1200):
        first = write_cache(tmp_path_factory.mktemp("first"), rows, k=8, groups=np.arange(VOCAB) % 3)
    with patch.object(shards, "ROW_GROUP_BYTES", 900):
        more = [*random_sequences(5, seed=6), *rows]
        other = write_cache(tmp_path_factory.mktemp("other"), more, k=5, teacher=llama(seed=9))
    assert len(first.manifest.shards[0].row_group_sizes) > 8
    return first, other


def by_id(rows: object) -> dict[str, CachedSequence]:
    return {row.row_id: row for row in rows}  # type: ignore[attr-defined]


def assert_averaged(rows: dict[str, CachedSequence], first: LogitCache, other: LogitCache) -> None:
    theirs = by_id(other)
    for row in first:
        mean = rows[row.row_id]
        assert_is(mean.targets, slow_mean([row.targets, theirs[row.row_id].targets], VOCAB))
        np.testing.assert_array_equal(mean.input_ids, row.input_ids)
        np.testing.assert_array_equal(mean.positions, row.positions)


@pytest.mark.slow
@pytest.mark.parametrize("shuffle", [False, True])
def test_rows_are_averaged_in_the_order_of_the_first(teachers: tuple[LogitCache, LogitCache], shuffle: bool) -> None:
    first, other = teachers
    data = open_training_data([first.path], [other.path])
    streams = [one.stream(2, shuffle=shuffle, seed=1) for one in (data, open_training_data([first.path]))]
    rows, alone = (list(stream) for stream in streams)
    assert [row.row_id for row in rows] == [row.row_id for row in alone]
    assert_averaged(by_id(rows), first, other)
    lengths = data.lengths(2, shuffle=shuffle, seed=1)
    assert lengths.tolist() == [len(row.input_ids) for row in rows]
    assert [row.row_id for row in data.stream(2, shuffle=shuffle, seed=1, start=50)] == [r.row_id for r in rows[50:]]


@pytest.mark.slow
def test_the_other_teachers_rows_may_come_in_another_order(
    teachers: tuple[LogitCache, LogitCache], tmp_path: Path
) -> None:
    shuffled = np.random.default_rng(0).permutation(60)
    rows = random_sequences(60, seed=5)
    with patch.object(shards, "ROW_GROUP_BYTES", 900):
        other = write_cache(tmp_path, [rows[number] for number in shuffled], k=6, teacher=llama(seed=10))
    data = open_training_data([teachers[0].path], [other.path])
    assert_averaged(by_id(data.stream(0, shuffle=True, seed=0)), teachers[0], other)


@pytest.mark.slow
def test_of_caches_in_the_same_order_each_row_group_is_decoded_once_an_epoch(
    teachers: tuple[LogitCache, LogitCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, other = teachers
    decoded: Counter[int] = Counter()
    data = open_training_data([first.path], [other.path])
    read = data.averaged_with[0].read_row_group

    def counted(index: int) -> object:
        decoded[index] += 1
        return read(index)

    monkeypatch.setattr(data.averaged_with[0], "read_row_group", counted)
    data.__dict__.pop("_others")  # it holds the method as it was
    assert len(list(data.stream(0, shuffle=True, seed=0))) == 60
    assert set(decoded.values()) == {1}


@pytest.mark.slow
def test_a_mixture_is_averaged_with_a_teacher_of_all_its_rows(
    teachers: tuple[LogitCache, LogitCache], tmp_path: Path
) -> None:
    first, other = teachers
    second = write_cache(tmp_path, random_sequences(5, seed=6), k=8)
    data = open_training_data([first.path, second.path], [other.path])
    rows = by_id(data.stream(0, shuffle=True, seed=0))
    assert len(rows) == 65
    assert_averaged(rows, first, other)
    assert_averaged(rows, second, other)


def test_a_mean_offers_entries_and_the_tails_mass_alone(teachers: tuple[LogitCache, LogitCache]) -> None:
    first, other = teachers
    data = open_training_data([first.path], [other.path])
    assert open_training_data([first.path]).tail_parts.groups == 3
    assert (data.tail_parts, data.tail_groups) == (TailParts(), None)
    assert next(data.stream(0, shuffle=False, seed=0)).targets.group_logprobs is None
    assert [cache.path for cache in data.averaged_with] == [other.path]
    assert data.path == first.path
    assert (len(data), data.num_positions) == (60, first.num_positions)


def test_a_teacher_that_lacks_rows_is_refused(teachers: tuple[LogitCache, LogitCache], tmp_path: Path) -> None:
    first, other = teachers
    with pytest.raises(UserError, match=rf"{first.path}: 5 of the 65 rows of {other.path} are not there.*merge.*slice"):
        open_training_data([other.path], [first.path])

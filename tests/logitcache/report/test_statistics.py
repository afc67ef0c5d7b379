"""Statistics of a cache, against the same computed position by position."""

from __future__ import annotations

from dataclasses import replace
from math import exp, isclose, log
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

import logitcache
from logitcache import UserError
from logitcache.format.layout import Layout
from logitcache.format.manifest import Manifest
from logitcache.reading.shard_reader import ShardReader
from logitcache.report import statistics as module
from logitcache.report.statistics import READ_ROW_GROUPS, Statistics, entropies, statistics
from logitcache.storage.folder import Folder
from tests.helpers.smallcaches import EVERYTHING, VOCAB, full_distributions, random_rows, sparse_targets, write_cache


def of(cache: logitcache.LogitCache) -> Statistics:
    return statistics(Folder(cache.path), cache.manifest)


@pytest.fixture(scope="module", params=[EVERYTHING, Layout(VOCAB, precision="exact")], ids=["everything", "exact"])
def cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> logitcache.LogitCache:
    """40 ragged rows in 10 row groups."""
    layout = request.param
    path = tmp_path_factory.mktemp("cache")
    return write_cache(path, random_rows(40, layout), layout, rows_per_shard=10, row_group_bytes=1500)


@pytest.mark.slow
def test_mass_by_k_is_the_mean_over_positions_of_their_most_probable_entries(cache: logitcache.LogitCache) -> None:
    found = of(cache)
    assert found.ks == (1, 2, 4, 8)
    for k, covered in zip(found.ks, found.mass_covered, strict=True):
        masses = [sum(exp(p) for p in logprobs[:k]) for row in cache for logprobs in row.targets.logprobs.tolist()]
        assert isclose(covered, sum(masses) / len(masses), rel_tol=1e-6)
    assert found.num_positions == cache.num_positions
    assert not found.sampled


def test_percentiles_are_those_of_all_positions(cache: logitcache.LogitCache) -> None:
    found = of(cache)
    tails = [exp(p) for row in cache for p in row.targets.tail_logprob.tolist()]
    assert isclose(found.tail_mass["mean"], sum(tails) / len(tails), rel_tol=1e-6)
    below = sum(tail <= found.tail_mass["p75"] for tail in tails) / len(tails)
    assert abs(below - 0.75) <= 1 / len(tails)
    assert list(found.entropy) == ["mean", "p5", "p25", "p50", "p75", "p95"] == list(found.tail_mass)
    assert found.entropy["p5"] < found.entropy["p50"] < found.entropy["p95"]


def test_histograms_count_every_position(cache: logitcache.LogitCache) -> None:
    found = of(cache)
    counts = [count for row in cache for count in row.targets.num_entries.tolist()]
    assert found.entries_per_position == {count: counts.count(count) for count in sorted(set(counts))}
    for histogram in (found.entropy_histogram, found.tail_histogram):
        assert sum(histogram.counts) == cache.num_positions
        assert len(histogram.edges) == len(histogram.counts) + 1
    tails = np.exp(np.concatenate([row.targets.tail_logprob for row in cache]))
    low, high = found.tail_histogram.edges[-3:-1]
    assert found.tail_histogram.counts[-2] == sum(low <= tail < high for tail in tails)


def test_with_the_tails_entropy_the_entropy_is_that_of_the_whole_distribution() -> None:
    full = full_distributions(np.random.default_rng(0), 20)
    expected = [-sum(exp(p) * p for p in row) for row in full.tolist()]
    targets = sparse_targets(full, [3, 8] * 10, EVERYTHING)
    assert np.allclose(entropies(targets), expected, rtol=1e-5)


def test_without_it_the_tail_is_one_outcome_and_the_entropy_a_lower_bound() -> None:
    full = full_distributions(np.random.default_rng(0), 20)
    targets = sparse_targets(full, [5] * 20, Layout(VOCAB))
    found = entropies(targets)
    for row, entropy in zip(full.tolist(), found.tolist(), strict=True):
        *entries, tail = [*sorted(map(exp, row))[-5:], sum(sorted(map(exp, row))[:-5])]
        assert isclose(entropy, -sum(p * log(p) for p in [*entries, tail]), rel_tol=1e-5)
        assert entropy < -sum(exp(p) * p for p in row)


def test_entries_without_probability_and_an_empty_tail_add_nothing() -> None:
    full = np.full((1, VOCAB), -np.inf)
    full[0, 7] = 0
    with np.errstate(invalid="ignore"):
        certain = sparse_targets(full, [4], Layout(VOCAB))
    assert entropies(certain).tolist() == [0]
    assert entropies(replace(certain, tail_entropy=np.zeros(1, np.float32))).tolist() == [0]


def test_a_cache_says_whether_its_entropy_is_a_lower_bound(tmp_path: Path) -> None:
    for number, layout in enumerate([EVERYTHING, Layout(VOCAB)]):
        cache = write_cache(tmp_path / str(number), random_rows(3, layout), layout)
        assert of(cache).entropy_is_lower_bound is not layout.tail_parts.entropy


@pytest.mark.slow
def test_few_row_groups_of_many_are_read_the_same_ones_each_time(tmp_path: Path) -> None:
    layout = Layout(VOCAB)
    cache = write_cache(tmp_path, random_rows(40, layout), layout, rows_per_shard=20, row_group_bytes=1)
    read = []
    plain = ShardReader.read_row_group

    def counting(shard: ShardReader, index: int) -> object:
        read.append((shard.path, index))
        return plain(shard, index)

    with patch.object(ShardReader, "read_row_group", counting):
        first = of(cache)
        assert len(read) == len(set(read)) == READ_ROW_GROUPS
        assert (read[0][1], read[-1][1]) == (0, 19)
        assert len({path for path, _ in read}) == 2
        assert of(cache) == first
    assert first.sampled
    assert 0 < first.num_positions < cache.num_positions
    with patch.object(module, "READ_ROW_GROUPS", 40):
        assert of(cache).num_positions == cache.num_positions


def test_a_cache_without_positions_has_statistics_of_nothing(tmp_path: Path) -> None:
    found = statistics(Folder(tmp_path), Manifest(Layout(VOCAB), {}, (), {}, "tests"))
    assert (found.num_positions, found.ks, found.mass_covered, found.sampled) == (0, (), (), False)
    assert set(found.entropy.values()) == {0.0}


def test_what_is_no_log_probability_is_bad_input(tmp_path: Path) -> None:
    layout = Layout(VOCAB, precision="exact")
    sequence, targets = random_rows(1, layout)[0]
    broken = replace(targets, logprobs=np.full_like(targets.logprobs, np.nan))
    cache = write_cache(tmp_path, [(sequence, targets), (sequence, broken)], layout, row_group_bytes=1)
    with pytest.raises(UserError, match=r"a log-probability that is not finite .*row group 1"):
        of(cache)

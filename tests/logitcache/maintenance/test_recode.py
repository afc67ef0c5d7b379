"""A recoded cache holds what a capture with fewer entries would have stored."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import logitcache
from logitcache import LogitCache, SparseTargets, UserError
from logitcache.cli import main
from logitcache.format.layout import Layout
from logitcache.format.quantization import PRESETS, mass_tolerance, rounded
from logitcache.format.sequences import TokenSequence
from logitcache.format.tail_parts import TailParts
from logitcache.format.targets import find_defect
from logitcache.format.truncation import nucleus, truncate
from tests.helpers.exchanging import findings
from tests.helpers.maintained import CAPTURE, assert_same_row, assert_same_targets, history, make_cache
from tests.helpers.smallcaches import (
    COEFFICIENT_STEP,
    EVERYTHING,
    VOCAB,
    Row,
    at_precision,
    full_distributions,
    random_rows,
    small,
    sparse_targets,
)

FORMAT_1 = Path(__file__).parents[2] / "data/format1/cache"
EXACT = at_precision(EVERYTHING, "exact")
NO_SAMPLES = replace(EXACT, tail_parts=replace(EXACT.tail_parts, samples=0))


def bands(num_groups: int) -> np.ndarray:
    return (np.arange(VOCAB) * 7 % num_groups).astype(np.int32)


def assert_close(found: SparseTargets, expected: SparseTargets, atol: float = 2e-6) -> None:
    """The same entries; the tail and all that is known of it within float32's rounding."""
    assert found.token_ids.tolist() == expected.token_ids.tolist()
    assert found.logprobs.tolist() == expected.logprobs.tolist()
    pairs = [(found.tail_logprob, expected.tail_logprob), (found.group_logprobs, expected.group_logprobs)]
    pairs += [(found.tempered_tail[t], values) for t, values in expected.tempered_tail.items()]
    pairs.append((found.tail_entropy, expected.tail_entropy))
    for ours, theirs in pairs:
        assert ours is not None
        assert theirs is not None
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=atol)


@small
@given(
    counts=st.lists(st.tuples(st.integers(0, VOCAB), st.integers(0, VOCAB)), min_size=1, max_size=6),
    num_groups=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_narrowed_targets_are_those_of_a_capture_of_fewer_entries(
    counts: list[tuple[int, int]], num_groups: int, seed: int
) -> None:
    layout = replace(NO_SAMPLES, tail_parts=replace(NO_SAMPLES.tail_parts, groups=num_groups))
    full = full_distributions(np.random.default_rng(seed), len(counts))
    groups = bands(num_groups)
    held = [max(pair) for pair in counts]
    keep = [min(pair) for pair in counts]
    found = truncate(sparse_targets(full, held, layout, groups), np.array(keep), groups)
    # Where everything was an entry, the reference's tail is rounding noise of 1e-17 or nothing.
    assert_close(found, sparse_targets(full, keep, layout, groups))


def test_positions_that_lose_nothing_keep_every_bit() -> None:
    targets = sparse_targets(full_distributions(np.random.default_rng(0), 5), [8, 3, 0, 50, 7], EXACT)
    found = truncate(targets, np.array([8, 3, 0, 50, 7]), bands(3), np.random.default_rng(0))
    assert_same_targets(found, targets)
    some = truncate(targets, np.array([8, 3, 0, 50, 2]), bands(3), np.random.default_rng(0))
    assert_same_targets(some[:4], targets[:4].cut_to_width(50))


@small
@given(
    top_k=st.integers(1, 60),
    top_p=st.floats(0.05, 1.0),
    min_k=st.integers(1, 60),
    count=st.integers(0, VOCAB),
    seed=st.integers(0, 1000),
)
def test_the_nucleus_is_the_shortest_list_that_holds_the_mass(
    top_k: int, top_p: float, min_k: int, count: int, seed: int
) -> None:
    full = full_distributions(np.random.default_rng(seed), 1)
    targets = sparse_targets(full, [count], Layout(VOCAB))
    probs = np.exp(targets.logprobs[0], dtype=np.float64)
    expected = next((n for n in range(count) if probs[:n].sum() >= top_p and n >= min_k and top_p < 1), count)
    assert nucleus(targets.logprobs, top_k, top_p, min_k).sum(axis=1).tolist() == [min(expected, top_k)]


def test_the_nucleus_is_that_of_a_capture() -> None:
    import torch

    from logitcache.capture.selection import select
    from logitcache.capture.settings import CaptureSettings
    from logitcache.capture.wire_format import unpack

    logits = torch.from_numpy(full_distributions(np.random.default_rng(0), 40)).float()
    wide, narrow_settings = CaptureSettings(top_k=32), CaptureSettings(top_k=20, top_p=0.9, min_k=3)
    targets = unpack(select(logits.clone(), wide).numpy(), wide)
    expected = unpack(select(logits.clone(), narrow_settings).numpy(), narrow_settings)
    keep = nucleus(targets.logprobs, 20, 0.9, 3).sum(axis=1)
    assert len(set(keep.tolist())) > 3
    assert keep.tolist() == expected.num_entries.tolist()


class TestTailSamples:
    """Independent draws from the new tail, whatever became of the old one."""

    VOCAB = 12
    NUM_SAMPLES = 4
    LAYOUT = Layout(VOCAB, TailParts(samples=NUM_SAMPLES), precision="exact")

    def source(self, root: Path) -> tuple[LogitCache, np.ndarray]:
        """A cache of `rows`, and the log-probabilities [V]."""
        rows, full = self.rows()
        return make_cache(root, rows, self.LAYOUT, rows_per_shard=100, capture={"top_k": 9}), full

    @classmethod
    @cache
    def rows(cls) -> tuple[list[Row], np.ndarray]:
        """One distribution at 6 000 positions, with 9 entries of 12 each; and its log-probabilities [V]."""
        random = np.random.default_rng(0)
        full = full_distributions(random, 1, cls.VOCAB) / 3
        full -= np.log(np.exp(full).sum())
        rows: list[Row] = []
        for number in range(300):
            tokens = np.append(random.integers(0, cls.VOCAB, 20), number % cls.VOCAB).astype(np.int32)
            targets = sparse_targets(np.repeat(full, 20, axis=0), [9] * 20, cls.LAYOUT, seed=number)
            rows.append((TokenSequence(tokens, np.arange(21) > 0), targets))
        return rows, full[0]

    def samples(self, cache: LogitCache) -> np.ndarray:
        return np.concatenate([row.targets.sample_ids for row in cache])

    def assert_drawn_from_the_tail(self, samples: np.ndarray, full: np.ndarray, k: int) -> None:
        tail = np.argsort(-full)[k:]
        expected = np.exp(full[tail]) / np.exp(full[tail]).sum()
        counts = np.bincount(samples.reshape(-1), minlength=self.VOCAB)
        assert counts.sum() == counts[tail].sum()
        assert chi_square(counts[tail], expected) < critical(len(tail) - 1)
        # Of two samples of one position neither knows of the other.
        pairs = np.zeros((self.VOCAB, self.VOCAB))
        np.add.at(pairs, (samples[:, 0], samples[:, 1]), 1)
        joint = np.outer(expected, expected)
        assert chi_square(pairs[np.ix_(tail, tail)].reshape(-1), joint.reshape(-1)) < critical(joint.size - 1)

    @pytest.mark.slow
    @pytest.mark.parametrize("k", [7, 2, 1])
    def test_they_follow_the_new_tail(self, tmp_path: Path, k: int) -> None:
        source, full = self.source(tmp_path / "source")
        cache = logitcache.recode(source.path, tmp_path / "out", top_k=k)
        self.assert_drawn_from_the_tail(self.samples(cache), full, k)
        for row in cache:
            assert row.targets.sample_ids is not None
            assert row.targets.sample_logprobs is not None
            assert (np.abs(row.targets.sample_logprobs - full[row.targets.sample_ids]) < 1e-6).all()

    @pytest.mark.slow
    def test_they_do_so_after_several_steps(self, tmp_path: Path) -> None:
        cache, full = self.source(tmp_path / "source")
        for k in (7, 5, 3):
            cache = logitcache.recode(cache.path, tmp_path / f"out{k}", top_k=k)
        self.assert_drawn_from_the_tail(self.samples(cache), full, 3)

    def test_they_come_from_the_entries_where_there_was_no_tail(self, tmp_path: Path) -> None:
        full = np.repeat(full_distributions(np.random.default_rng(3), 1, 6), 2000, axis=0)
        targets = sparse_targets(full, [6] * 2000, Layout(6, TailParts(samples=3)))
        assert (np.asarray(targets.sample_ids) == -1).all()
        found = truncate(targets, np.full(2000, 2), random=np.random.default_rng(0))
        tail = np.argsort(-full[0])[2:]
        counts = np.bincount(np.asarray(found.sample_ids).reshape(-1), minlength=6)
        expected = np.exp(full[0][tail]) / np.exp(full[0][tail]).sum()
        assert counts.sum() == counts[tail].sum() == 6000
        assert chi_square(counts[tail], expected) < critical(3)

    @pytest.mark.slow
    def test_the_same_command_draws_the_same(self, tmp_path: Path) -> None:
        source, _ = self.source(tmp_path / "source")
        one, other = (logitcache.recode(source.path, tmp_path / name, top_k=3) for name in ("a", "b"))
        assert np.array_equal(self.samples(one), self.samples(other))


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    """Pearson's statistic of counts against probabilities."""
    return float(((counts - counts.sum() * expected) ** 2 / (counts.sum() * expected)).sum())


def critical(degrees: int) -> float:
    """What the chi-square distribution exceeds about once in 30 000 times (Wilson and Hilferty, 1931)."""
    return float(degrees * (1 - 2 / (9 * degrees) + 4.0 * np.sqrt(2 / (9 * degrees))) ** 3)


def captured(layout: Layout, k: int, count: int = 30) -> list[Row]:
    """The same sequences and distributions for every k."""
    random = np.random.default_rng(5)
    rows = []
    for number in range(count):
        length = int(random.integers(2, 14))
        tokens = random.integers(0, layout.vocab_size, length).astype(np.int32)
        columns = {
            name: {"id": number, "url": f"u{number}", "score": 0.5, "flag": True}[name] for name in layout.columns
        }
        sequence = TokenSequence(tokens, np.arange(length) > 0, columns)
        full = full_distributions(random, length - 1, layout.vocab_size)
        rows.append((sequence, sparse_targets(full, [k] * (length - 1), layout)))
    return rows


@pytest.mark.slow
def test_fewer_entries_are_what_a_capture_of_fewer_gives(tmp_path: Path) -> None:
    layout = replace(NO_SAMPLES, vocab_size=300)
    source = make_cache(tmp_path / "64", captured(layout, 64), layout, capture={"top_k": 64, "min_k": 32})
    expected = make_cache(tmp_path / "16", captured(layout, 16), layout, capture={"top_k": 16, "min_k": 16})
    found = logitcache.recode(source.path, tmp_path / "out", top_k=16)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.row_id == theirs.row_id
        assert ours.columns == theirs.columns
        assert_close(ours.targets, theirs.targets)
    assert found.manifest.mean_tail_mass == pytest.approx(expected.manifest.mean_tail_mass)
    assert {**found.manifest.fingerprint["capture"], "shard_positions": 0} == {
        "top_k": 16,
        "top_p": 1.0,
        "min_k": 16,
        "precision": "exact",
        "shard_positions": 0,
    }


def test_a_nucleus_of_a_cache_has_a_floor_and_a_cap(tmp_path: Path) -> None:
    layout = replace(NO_SAMPLES, vocab_size=300)
    source = make_cache(tmp_path / "64", captured(layout, 64), layout, capture={"top_k": 64, "min_k": 32})
    cache = logitcache.recode(source.path, tmp_path / "out", top_k=40, top_p=0.8, min_k=4)
    counts = np.concatenate([row.targets.num_entries for row in cache])
    assert counts.min() == 4
    assert counts.max() > 10
    for ours, theirs in zip(cache, source, strict=True):
        mass = np.exp(theirs.targets.logprobs, dtype=np.float64).cumsum(axis=1)
        assert ours.targets.num_entries.tolist() == np.clip((mass < 0.8).sum(axis=1) + 1, 4, 40).tolist()
    assert cache.manifest.fingerprint["capture"]["top_p"] == 0.8
    assert cache.manifest.fingerprint["capture"]["min_k"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["balanced", "compact"])
def test_a_coarser_precision_is_that_of_a_capture_with_it(tmp_path: Path, precision: str) -> None:
    exact = make_cache(tmp_path / "exact", captured(EXACT, 8), EXACT)
    layout = at_precision(EXACT, precision)
    expected = make_cache(tmp_path / precision, captured(EXACT, 8), layout)
    found = logitcache.recode(exact.path, tmp_path / "out", precision=precision)
    assert found.manifest.layout == expected.manifest.layout
    assert found.manifest.fingerprint["capture"]["precision"] == precision
    assert found.manifest.fingerprint["format"] == {"version": 3, "rounding": PRESETS[precision].to_json()}  # type: ignore[union-attr]
    for ours, theirs in zip(found, expected, strict=True):
        assert_same_row(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("precision", list(PRESETS))
def test_what_comes_out_is_what_a_teacher_can_have_produced(tmp_path: Path, precision: str) -> None:
    layout = at_precision(EVERYTHING, precision)
    source = make_cache(tmp_path / "source", random_rows(30, layout), layout)
    cache = logitcache.recode(source.path, tmp_path / "out", top_k=4, top_p=0.95, min_k=2)
    for row in cache:
        assert find_defect(row.targets, VOCAB, mass_tolerance=mass_tolerance(precision)) is None
        assert row.targets.num_entries.max() <= 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("drop", "missing"),
    [
        (["tail_samples"], {"sample_ids", "sample_logprobs"}),
        (["tail_entropy", "temperatures"], {"tail_entropy", "tail_log_norm_T0.5", "tail_log_norm_T2"}),
        (["tail_groups"], {"group_levels"}),
        (["tail_probes"], {"probe_residuals"}),
        (["tail_rank"], {"tail_coefficients", "probe_residuals"}),
        (["url", "flag"], {"url", "flag"}),
    ],
)
def test_dropped_columns_are_gone_and_the_rest_stays(tmp_path: Path, drop: list[str], missing: set[str]) -> None:
    source = make_cache(tmp_path / "source", random_rows(20, EVERYTHING), EVERYTHING)
    cache = logitcache.recode(source.path, tmp_path / "out", drop=drop)
    before, after = (set(c.manifest.layout.schema().names) for c in (source, cache))
    assert before - after == missing
    assert not after - before
    capture = cache.manifest.fingerprint["capture"]
    empty: dict[str, Any] = {"tail_samples": 0, "tail_entropy": False, "temperatures": [], "tail_groups": 0}
    assert {name: capture.get(name) for name in drop} == {name: empty.get(name) for name in drop}
    assert (tmp_path / "out/tail_groups.parquet").exists() == ("tail_groups" not in drop)
    assert (tmp_path / "out/tail_basis.parquet").exists() == ("tail_rank" not in drop)
    assert cache.manifest.fingerprint["format"]["version"] == (2 if "tail_rank" in drop else 3)
    for ours, theirs in zip(cache, source, strict=True):
        assert ours.columns == {name: value for name, value in theirs.columns.items() if name not in missing}
        assert np.array_equal(ours.targets.token_ids, theirs.targets.token_ids)
        assert np.array_equal(ours.targets.logprobs, theirs.targets.logprobs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "nothing to recode: give --top-k, --top-p, --min-k, --precision, --tail-rank or --drop"),
        ({"top_k": 9}, r"--top-k 9: the cache holds 8 entries of a position, choose 1…8"),
        ({"top_k": 0}, "--top-k 0"),
        ({"top_p": 1.5}, r"--top-p 1.5: choose a probability mass in \(0, 1\]"),
        ({"top_p": 0.5, "min_k": 9}, "--min-k 9: choose 1…8"),
        ({"precision": "exact"}, "--precision exact: finer than what the cache holds, choose one of balanced, compact"),
        ({"precision": "fine"}, "--precision fine: choose one of exact, balanced, compact"),
        (
            {"drop": ["title"]},
            r"--drop title: the cache holds tail_groups, temperatures, .* tail_rank, tail_probes, id, url, score, flag",
        ),
        ({"top_k": 2, "shard_positions": 0}, "--shard-positions 0: at least 1 is needed"),
        ({"tail_rank": 4}, "--tail-rank 4: of 3 coefficients that are kept of a position, choose 1…3"),
        ({"tail_rank": 0}, "--tail-rank 0: of 3"),
        (
            {"tail_rank": 1, "drop": ["tail_rank"]},
            "--tail-rank 1: of 0 coefficients that are kept of a position, none would",
        ),
    ],
)
def test_what_the_cache_does_not_hold_is_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    source = make_cache(tmp_path / "source", random_rows(3, EVERYTHING), EVERYTHING)
    with pytest.raises(UserError, match=message):
        logitcache.recode(source.path, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_p": 0.95}, r"--top-p 0.95: the cache's entries were taken up to a mass of 0.9, choose no more"),
        ({"top_p": 0.5, "min_k": 5}, r"--min-k 5: the cache's own floor is 3, choose 1…3"),
        ({"top_p": 1.0}, "--top-p 1.0"),
    ],
)
def test_a_nucleus_is_not_made_larger(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    capture = {**CAPTURE, "top_p": 0.9, "min_k": 3}
    source = make_cache(tmp_path / "source", random_rows(3, EVERYTHING), EVERYTHING, capture=capture)
    with pytest.raises(UserError, match=message):
        logitcache.recode(source.path, tmp_path / "out", **settings)
    smaller = logitcache.recode(source.path, tmp_path / "out", top_p=0.5)
    assert smaller.manifest.fingerprint["capture"]["min_k"] == 3


def test_a_cache_of_format_1_is_brought_to_this_format(tmp_path: Path) -> None:
    source = logitcache.open(FORMAT_1)
    same = logitcache.recode(FORMAT_1, tmp_path / "exact", precision="exact")
    assert same.manifest.layout.precision == "exact"
    for ours, theirs in zip(same, source, strict=True):
        assert_same_row(ours, theirs)
    smaller = logitcache.recode(FORMAT_1, tmp_path / "balanced", precision="balanced")
    assert smaller.manifest.layout.precision == "balanced"
    assert [row.row_id for row in smaller] == [row.row_id for row in source]


def test_the_command_says_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_cache(tmp_path / "source", random_rows(40, EVERYTHING), EVERYTHING)
    out = tmp_path / "out"
    command = ["recode", source.path, "--out", str(out), "--top-k", "3", "--drop", "tail_samples,url"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    cache = logitcache.open(out)
    assert (
        f"changed    {source.manifest.num_bytes:,} → {cache.manifest.num_bytes:,} bytes, 40 → 40 sequences\n" in printed
    )
    (step,) = history(cache)
    assert {name: step[name] for name in ("command", "top_k", "top_p", "min_k", "precision", "drop", "sequences")} == {
        "command": "recode",
        "top_k": 3,
        "top_p": 1.0,
        "min_k": 3,
        "precision": "balanced",
        "drop": ["tail_samples", "url"],
        "sequences": 40,
    }


@pytest.mark.parametrize("precision", ["balanced", "compact"])
def test_the_tail_of_rounded_entries_never_exceeds_one(precision: str) -> None:
    quantization = PRESETS[precision]
    assert quantization is not None
    for k in range(300, 620, 20):  # of a uniform teacher, whose entries are all rounded the same way
        levels = quantization.levels(np.full((1, k), -np.log(k)))
        logprobs = quantization.logprobs(int(levels.max()) + 1)[levels]
        targets = SparseTargets(np.arange(k, dtype=np.int32)[None], logprobs, np.array([-np.inf], np.float32))
        assert truncate(targets, np.array([1])).tail_logprob[0] < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRESETS)
def test_fewer_coefficients_are_the_first_and_the_residuals_are_theirs(tmp_path: Path, precision: str) -> None:
    layout = at_precision(EVERYTHING, precision)
    source = make_cache(tmp_path / "source", random_rows(20, layout, seed=3), layout)
    cache = logitcache.recode(source.path, tmp_path / "out", tail_rank=1)
    assert cache.manifest.layout == replace(layout, tail_parts=replace(layout.tail_parts, rank=1))
    assert cache.manifest.fingerprint["capture"]["tail_rank"] == 1
    assert history(cache)[-1]["tail_rank"] == 1
    assert source.tail_basis is not None and cache.tail_basis is not None
    directions = source.tail_basis.directions
    assert np.array_equal(cache.tail_basis.directions, directions[:, :1])
    assert not findings(cache)
    step = layout.quantization.probe_step if layout.quantization else 1e-5
    for ours, theirs in zip(cache, source, strict=True):
        found, held = (sequence.targets.to_torch() for sequence in (ours, theirs))
        assert torch.equal(found["tail_coefficients"], held["tail_coefficients"][:, :1])
        assert torch.equal(found["probe_ids"], held["probe_ids"]) and torch.equal(found["token_ids"], held["token_ids"])
        dropped = torch.tensor(directions)[held["probe_ids"], 1:] @ held["tail_coefficients"][:, 1:, None]
        given = held["probe_residuals"] + dropped[:, :, 0]
        assert (found["probe_residuals"] - given).abs().max() <= step / 2 + 1e-5
    same = logitcache.recode(cache.path, tmp_path / "again", tail_rank=1, top_k=4)
    assert np.array_equal(same[3].targets.probe_residuals, cache[3].targets.probe_residuals)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("before", "after", "step"), [("exact", "balanced", 1), ("exact", "compact", 2), ("balanced", "compact", 2)]
)
def test_coefficients_have_the_step_of_the_new_precision(tmp_path: Path, before: str, after: str, step: int) -> None:
    layout = at_precision(EVERYTHING, before)
    source = make_cache(tmp_path / "source", random_rows(20, layout, seed=3), layout)
    cache = logitcache.recode(source.path, tmp_path / "out", precision=after)
    assert cache.manifest.layout == at_precision(EVERYTHING, after)
    assert cache.manifest.layout.quantization is not None and source.tail_basis is not None
    assert cache.manifest.layout.quantization.coefficient_step == step * source.tail_basis.step
    assert cache.manifest.files["tail_basis.parquet"] == source.manifest.files["tail_basis.parquet"]
    assert not findings(cache)
    for ours, theirs in zip(cache, source, strict=True):
        found, held = ours.targets.tail_coefficients, theirs.targets.tail_coefficients
        assert found is not None and held is not None
        assert np.array_equal(found, rounded(held, step * COEFFICIENT_STEP))

"""Estimates of a build, from samples of the corpus and of the teacher's distributions."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import logitcache
from logitcache.capture.calibration import make_tail_basis, make_tail_groups
from logitcache.capture.corpus.documents import find_sources
from logitcache.capture.corpus.sample import sample_corpus
from logitcache.capture.corpus.tokenize import Corpus, CorpusSettings
from logitcache.capture.estimate.estimate import Estimate, estimate, plan, stored_bytes, truncate_to_top_k
from logitcache.capture.estimate.judgement import thinned
from logitcache.capture.settings import CaptureSettings
from logitcache.capture.teachers.base import Teacher, TeacherModel
from logitcache.capture.teachers.hf import TransformersTeacher
from logitcache.errors import UserError
from logitcache.format.layout import Layout
from logitcache.format.sequences import TokenSequence
from logitcache.format.tail_parts import TailParts
from logitcache.format.targets import SparseTargets, concatenate
from tests.helpers.references import full_logprobs

V = 512
SETTINGS = CorpusSettings(max_length=128)


class CountingTokenizer:
    """A tokenizer that counts how often it is called; all that `text` needs of it."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self.calls = tokenizer, 0
        self.eos_token_id, self.chat_template = tokenizer.eos_token_id, tokenizer.chat_template

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.calls += 1
        return self._tokenizer(*arguments, **options)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 documents of up to 19 words, some of them empty."""
    path = tmp_path_factory.mktemp("many") / "many.jsonl"
    counts = np.random.default_rng(1).integers(0, 20, size=600)
    path.write_text("".join(json.dumps({"text": " ".join(["teacher"] * int(count))}) + "\n" for count in counts))
    return path


def test_a_sample_of_everything_counts_what_the_corpus_holds(many: Path, teacher_tokenizer: Any) -> None:
    sources = find_sources(str(many))
    corpus = Corpus(sources, teacher_tokenizer, V, SETTINGS)
    sequences = list(corpus)
    sample = sample_corpus(sources, teacher_tokenizer, V, SETTINGS)
    assert sample.num_documents == sample.num_sampled == 600
    assert [s.row_id for s in sample.sequences] == [s.row_id for s in sequences]
    assert (sample.num_sequences.value, sample.num_sequences.standard_error) == (len(sequences), 0)
    assert sample.num_tokens.value == pytest.approx(sum(len(s.input_ids) for s in sequences))
    assert sample.num_positions.value == pytest.approx(sum(len(s.positions) for s in sequences))
    assert sample.skipped == corpus.skipped and sample.skipped["empty"] > 0
    assert sample.longest == max(len(s.input_ids) for s in sequences)


def test_what_is_said_of_documents_does_not_change_their_number(tmp_path: Path, teacher_tokenizer: Any) -> None:
    path = tmp_path / "chats.jsonl"
    chat = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
    path.write_text((json.dumps({"messages": chat}) + "\n") * 3 + '{"messages": []}\n' * 4)
    settings = CorpusSettings(max_length=100, skip_bad=True)
    sample = sample_corpus(find_sources(str(path)), teacher_tokenizer, 512, settings)
    assert (sample.num_documents, sample.num_sequences.value) == (7, 3)


def test_only_the_sample_is_tokenised_and_its_totals_are_within_their_error(many: Path, teacher_tokenizer: Any) -> None:
    sources = find_sources(str(many))
    sequences = list(Corpus(sources, teacher_tokenizer, V, SETTINGS))
    counting = CountingTokenizer(teacher_tokenizer)
    sample = sample_corpus(sources, counting, V, SETTINGS, num_documents=100)
    assert counting.calls <= 101
    assert (sample.num_documents, sample.num_sampled) == (600, 100)
    total = sample.num_positions
    assert abs(total.value - sum(len(s.positions) for s in sequences)) < 3 * total.standard_error
    per_document = [len(s.positions) for s in sample.sequences] + [0] * sample.skipped["empty"]
    expected = 600 * np.std(per_document, ddof=1) / np.sqrt(100) * np.sqrt(1 - 100 / 600)
    assert total.standard_error == pytest.approx(expected)
    assert str(total).count("±") == 1


def test_the_sample_is_spread_over_all_sources(tmp_path: Path, teacher_tokenizer: Any) -> None:
    for part in range(4):
        rows = [json.dumps({"text": "teacher", "part": part, "row": row}) + "\n" for row in range(100)]
        (tmp_path / f"{part}.jsonl").write_text("".join(rows))
    settings = CorpusSettings(max_length=128, keep=("part", "row"))
    sample = sample_corpus(find_sources(str(tmp_path)), teacher_tokenizer, V, settings, num_documents=120)
    places = [100 * s.columns["part"] + s.columns["row"] for s in sample.sequences]
    assert places == sorted(set(places)), "each at most once, in order"
    assert len(places) == 120
    assert (np.bincount(np.array(places) // 100) > 15).all()


def test_the_first_document_decides_the_layout_even_unsampled(tmp_path: Path, teacher_tokenizer: Any) -> None:
    path = tmp_path / "mixed.jsonl"
    first = {"text": "teacher student"}
    others = [{"text": "teacher student", "prompt": "teacher", "completion": "student"}] * 50
    path.write_text("".join(json.dumps(row) + "\n" for row in [first, *others]))
    sample = sample_corpus(find_sources(str(path)), teacher_tokenizer, V, SETTINGS, num_documents=3)
    assert sample.document_type == "text"


def test_bad_documents_are_refused_by_row_or_counted(tmp_path: Path, teacher_tokenizer: Any) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "teacher"}\n{"text": 3}\nnot json\n{"text": "student teacher"}\n')
    sources = find_sources(str(path))
    with pytest.raises(UserError, match=r"bad\.jsonl, line 2: text is wanted.*--skip-bad"):
        sample_corpus(sources, teacher_tokenizer, V, SETTINGS)
    sample = sample_corpus(sources, teacher_tokenizer, V, CorpusSettings(max_length=128, skip_bad=True))
    assert sample.skipped == {"bad": 2}
    assert sample.first_bad is not None and "line 2" in sample.first_bad
    assert len(sample.sequences) == 2


def test_a_corpus_with_nothing_to_train_on_is_refused(tmp_path: Path, teacher_tokenizer: Any) -> None:
    path = tmp_path / "empty.jsonl"
    for content, left_out in [("", "none at all"), ('{"text": ""}\n' * 3, "3 empty")]:
        path.write_text(content)
        with pytest.raises(UserError, match=f"nothing to train on.*{left_out}"):
            sample_corpus(find_sources(str(path)), teacher_tokenizer, V, SETTINGS)


@pytest.fixture(scope="module")
def engine(teacher: Path) -> TransformersTeacher:
    return TransformersTeacher(TeacherModel.load(str(teacher), None, "auto", False))


@pytest.fixture(scope="module")
def sequences(corpus: Path, teacher_tokenizer: Any) -> list[TokenSequence]:
    return sample_corpus(find_sources(str(corpus)), teacher_tokenizer, V, SETTINGS).sequences[:6]


def test_narrowing_gives_what_the_teacher_gives_with_fewer_entries(
    engine: TransformersTeacher, sequences: list[TokenSequence]
) -> None:
    tail_groups = make_tail_groups(engine, sequences, 8)
    engine.set_tail_groups(tail_groups)
    wide = list(engine.score(sequences, CaptureSettings(top_k=100, tail_parts=TailParts(groups=8))))
    for one, few in zip(
        wide, engine.score(sequences, CaptureSettings(top_k=10, tail_parts=TailParts(groups=8))), strict=True
    ):
        found = truncate_to_top_k(one, 10, tail_groups)
        assert np.array_equal(found.token_ids, few.token_ids)
        assert found.tail_logprob == pytest.approx(few.tail_logprob, abs=1e-5)
        assert few.group_logprobs is not None and found.group_logprobs is not None
        assert np.exp(found.group_logprobs) == pytest.approx(np.exp(few.group_logprobs), abs=1e-6)
        assert truncate_to_top_k(one, 10, None).group_logprobs is None


def test_thinning_keeps_single_positions_of_whole_sequences(
    engine: TransformersTeacher, sequences: list[TokenSequence]
) -> None:
    few = thinned(sequences, 20)
    assert sum(len(s.positions) for s in few) == 20
    whole = {s.input_ids.tobytes(): set(s.positions.tolist()) for s in sequences}
    assert all(set(s.positions.tolist()) <= whole[s.input_ids.tobytes()] for s in few)
    assert len(thinned(sequences, 10**6)) == len(sequences)


def test_stored_bytes_count_entries_groups_and_kept_columns(
    engine: TransformersTeacher, sequences: list[TokenSequence]
) -> None:
    tail_groups = make_tail_groups(engine, sequences, 8)
    engine.set_tail_groups(tail_groups)
    scored = list(engine.score(sequences, CaptureSettings(top_k=64, tail_parts=TailParts(groups=8))))
    kept = [
        TokenSequence(s.input_ids, s.loss_mask, {"note": row * 500}) for s, row in zip(sequences, "abcdef", strict=True)
    ]
    positions = sum(len(s.positions) for s in sequences)

    def per_position(sequences: list[TokenSequence], k: int, layout: Layout) -> float:
        groups = tail_groups if layout.tail_parts.groups else None
        return stored_bytes(sequences, [truncate_to_top_k(t, k, groups) for t in scored], layout) / positions

    few, many = per_position(sequences, 16, Layout(V)), per_position(sequences, 64, Layout(V))
    assert 48 / 2 < many - few < 2 * 48
    assert 2 < per_position(sequences, 16, Layout(V, TailParts(groups=8))) - few < 8 + 4
    assert per_position(kept, 16, Layout(V, columns={"note": "string"})) > few


class TopKOnly:
    """A teacher that gives its top-k and the tail, as an engine without logits does."""

    def __init__(self, engine: TransformersTeacher) -> None:
        self._engine = engine

    def score(self, sequences: Iterable[TokenSequence], settings: CaptureSettings) -> Iterator[SparseTargets]:
        assert not settings.beyond_top_k and settings.top_k <= 40
        return self._engine.score(sequences, settings)

    def close(self) -> None:
        pass


def of_corpus(teacher: Teacher, corpus: Path, tokenizer: Any, settings: CaptureSettings, sees_logits: bool) -> Estimate:
    sample = sample_corpus(find_sources(str(corpus)), tokenizer, V, SETTINGS)
    layout = Layout(V, settings.tail_parts)
    return estimate(teacher, sample, layout, settings, sees_logits=sees_logits)


@pytest.fixture(scope="module")
def estimated(engine: TransformersTeacher, corpus: Path, teacher_tokenizer: Any) -> Estimate:
    settings = CaptureSettings(top_k=40, tail_parts=TailParts(groups=16, temperatures=(2.0,), rank=4, probes=2))
    return of_corpus(engine, corpus, teacher_tokenizer, settings, sees_logits=True)


@pytest.mark.slow
def test_every_choice_has_its_bytes_mass_and_errors(estimated: Estimate) -> None:
    ks = [8, 16, 32, 40, 64, 128, 256]
    tails = [(0, 0), (16, 0), (0, 1), (0, 2), (0, 4)]
    assert [(c.top_k, c.tail_groups, c.tail_rank) for c in estimated.choices] == [(k, *t) for k in ks for t in tails]
    for tail in tails:
        choices = [c for c in estimated.choices if (c.tail_groups, c.tail_rank) == tail]
        assert all((c.tail_divergence is None) == (not c.tail_rank) for c in choices)
        assert all((c.variance_captured is None) == (not c.tail_rank) for c in choices)
        for figures in zip(*(c.gradient_error.values() for c in choices), strict=True):
            assert 0 < figures[-1] < figures[0]
        sizes = [c.bytes_per_position for c in choices]
        assert sizes == sorted(sizes)
        masses = [c.mass_covered for c in choices]
        assert masses == sorted(masses)
    of_ranks = {c.tail_rank: (c.variance_captured, c.tail_divergence) for c in estimated.choices if c.top_k == 8}
    assert 0 < of_ranks[1][0] < of_ranks[2][0] < of_ranks[4][0] < 1  # type: ignore[operator]
    assert of_ranks[1][1] > of_ranks[2][1] > of_ranks[4][1] > 0  # type: ignore[operator]
    assert estimated.not_told_apart == 0, "the vocabulary is smaller than the entries that stand for it"


@pytest.mark.slow
def test_the_mass_covered_is_that_of_the_full_distributions(estimated: Estimate, teacher: Path) -> None:
    covered = []
    for sequence in estimated.sample.sequences:
        probs = full_logprobs(teacher, sequence.input_ids)[sequence.positions.astype(np.int64)].exp()
        covered.append(probs.topk(32, dim=1).values.sum(dim=1).numpy())
    found = {c.top_k: c.mass_covered for c in estimated.choices}
    assert found[32] == pytest.approx(np.concatenate(covered).mean(), abs=1e-5)


@pytest.mark.slow
def test_bytes_and_time_follow_from_what_was_scored_as_the_build_will(
    estimated: Estimate, engine: TransformersTeacher
) -> None:
    sequences, settings = estimated.sample.sequences, estimated.settings
    basis = make_tail_basis(engine, sequences, settings.tail_parts.rank)
    engine.set_tail_basis(basis)
    layout = Layout(V, settings.tail_parts).with_coefficient_step(basis.step)
    targets = list(engine.score(sequences, settings))
    positions = len(concatenate(targets))
    assert estimated.bytes_per_position == pytest.approx(stored_bytes(sequences, targets, layout) / positions, rel=0.05)
    assert estimated.num_bytes == pytest.approx(estimated.bytes_per_position * positions)
    tokens = sum(len(s.input_ids) for s in sequences)
    assert estimated.scoring_s * estimated.tokens_per_s == pytest.approx(tokens)


def test_the_table_is_aligned_and_says_what_its_errors_are(estimated: Estimate) -> None:
    text = estimated.table()
    rows = [line for line in text.splitlines() if line.startswith(("stored", "k = "))]
    assert len(rows) == 1 + len(estimated.choices)
    assert len({len(row) for row in rows}) == 1
    assert (
        "k = 40 + 16 groups" in text
        and "k = 40 + rank 4" in text
        and "KL of tail" in text
        and "k = 8 + rank 1 " in text
    )
    assert f"{estimated.sample.num_positions.value:,.0f}" in text
    assert "gradient" in text


def test_what_is_left_out_is_told_for_the_whole_corpus(estimated: Estimate) -> None:
    sample = replace(
        estimated.sample, num_documents=400, skipped={"empty": 3, "bad": 1}, first_bad="train.jsonl, line 2: no text"
    )
    text = replace(estimated, sample=sample).table()
    assert "left out   30 empty, 10 bad; first bad: train.jsonl, line 2: no text" in text


def test_a_plan_prices_kept_columns_of_any_kind_as_the_build_stores_them(teacher: Path, tmp_path: Path) -> None:
    table = pa.table({"text": ["one", "two"], "at": [datetime(2026, 1, 1), None], "raw": [b"x", b"y"]})
    pq.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text('{"text": "three", "at": 7, "raw": {"a": 1}}\n')
    settings: dict[str, Any] = {"keep": ["at", "raw"], "backend": "transformers", "top_k": 4}
    data = [str(tmp_path / "a.parquet"), str(tmp_path / "b.jsonl")]
    cache = logitcache.build(str(teacher), data, tmp_path / "cache", **settings)
    assert [sequence.columns["at"] for sequence in cache] == ["2026-01-01 00:00:00", None, "7"]
    assert plan(str(teacher), data, **settings).sample.num_documents == 3


def test_a_teacher_without_logits_gives_mass_only_and_up_to_its_own_k(
    engine: TransformersTeacher, corpus: Path, teacher_tokenizer: Any
) -> None:
    found = of_corpus(TopKOnly(engine), corpus, teacher_tokenizer, CaptureSettings(top_k=40), sees_logits=False)
    assert [(c.top_k, c.tail_groups, dict(c.gradient_error)) for c in found.choices] == [
        (k, 0, {}) for k in (8, 16, 32, 40)
    ]
    assert 0 < found.choices[0].mass_covered < found.choices[-1].mass_covered < 1
    assert found.not_told_apart is None
    assert "top-k only" in found.table()

"""The plan of a build: shards that cover the corpus in order, and read back as they were written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitcache import UserError
from logitcache.assembly.resume import recorded_spec
from logitcache.capture.corpus.documents import Source
from logitcache.capture.corpus.tokenize import Corpus, CorpusSettings
from logitcache.capture.plan import BuildPlan, make_plan
from logitcache.documents.document import Document
from logitcache.format.sequences import TokenSequence
from logitcache.storage.folder import Folder

SPEC = {"teacher": {"name": "tiny"}, "capture": {"top_k": 8}}


def corpus(rows: list[dict[str, Any]], **settings: Any) -> Corpus:
    def documents() -> Iterator[Document]:
        for number, row in enumerate(rows):
            yield Document(row, f"rows {number}")

    return Corpus([Source("rows", dict, documents)], None, 512, CorpusSettings(64, **settings))


def documents(count: int = 30) -> list[dict[str, Any]]:
    random = np.random.default_rng(0)
    return [{"input_ids": random.integers(0, 512, int(random.integers(2, 20))).tolist(), "id": i} for i in range(count)]


def all_sequences(plan: BuildPlan) -> list[TokenSequence]:
    return [sequence for index in range(len(plan.shards)) for sequence in plan.sequences(index)]


def test_the_shards_cover_the_corpus_in_order(tmp_path: Path) -> None:
    plan = make_plan(Folder(tmp_path), SPEC, corpus(documents(), keep=("id",)), shard_positions=40)
    expected = list(corpus(documents(), keep=("id",)))
    found = all_sequences(plan)
    assert len(plan.shards) > 4
    assert [s.row_id for s in found] == [s.row_id for s in expected]
    assert [s.columns for s in found] == [{"id": i} for i in range(30)]
    assert all(np.array_equal(a.loss_mask, b.loss_mask) for a, b in zip(found, expected, strict=True))
    assert plan.longest == max(len(s.input_ids) for s in expected)
    assert plan.num_positions == sum(len(s.positions) for s in expected)


def test_every_shard_holds_what_its_counts_say_and_is_as_large_as_asked_for(tmp_path: Path) -> None:
    plan = make_plan(Folder(tmp_path), SPEC, corpus(documents()), shard_positions=40)
    for index, shard in enumerate(plan.shards):
        rows = list(plan.sequences(index))
        assert shard.num_sequences == len(rows)
        assert shard.num_positions == sum(len(row.positions) for row in rows)
        assert index == len(plan.shards) - 1 or 40 <= shard.num_positions < 40 + 20
    assert plan.shard_name(1) == f"data/train-00001-of-{len(plan.shards):05d}.parquet"


def test_a_plan_read_back_is_the_plan_that_was_made(tmp_path: Path) -> None:
    made = make_plan(
        Folder(tmp_path), SPEC, corpus([*documents(), {"input_ids": [1]}], keep=("id",)), shard_positions=40
    )
    assert BuildPlan.read(Folder(tmp_path)) == made
    assert made.spec == SPEC
    assert made.skipped == {"empty": 1}
    assert made.num_documents == 31


def test_the_same_corpus_gives_the_same_hash_and_another_one_another(tmp_path: Path) -> None:
    hashes = []
    for name, rows, size in (("a", documents(), 40), ("b", documents(), 1000), ("c", documents()[::-1], 40)):
        (tmp_path / name).mkdir()
        hashes.append(make_plan(Folder(tmp_path / name), SPEC, corpus(rows), size).sequences_sha256)
    assert hashes[0] == hashes[1] != hashes[2]


def test_more_rows_than_a_row_group_of_the_plan_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("logitcache.capture.plan.ROWS_PER_GROUP", 7)
    plan = make_plan(Folder(tmp_path), SPEC, corpus(documents()), shard_positions=10_000)
    assert [s.row_id for s in all_sequences(plan)] == [s.row_id for s in corpus(documents())]


@pytest.mark.parametrize(
    ("values", "column_type", "kept"),
    [
        ([1, None, -5], "int64", [1, None, -5]),
        ([1.5, 2.0, None], "double", [1.5, 2.0, None]),
        ([True, False, None], "bool", [True, False, None]),
        (["a", "ü\n", None], "string", ["a", "ü\n", None]),
        ([1, "a", None], "string", ["1", "a", None]),
        ([1, 2.5, True], "string", ["1", "2.5", "true"]),
        ([["x"], {"y": "ü"}, None], "string", ['["x"]', '{"y": "ü"}', None]),
        ([1, 2**63, None], "string", ["1", str(2**63), None]),
        ([None, None, None], "string", [None, None, None]),
    ],
    ids=["int", "float", "bool", "text", "int and text", "numbers", "nested", "too large", "nothing"],
)
def test_kept_columns_have_one_type_or_become_text(
    tmp_path: Path, values: list[Any], column_type: str, kept: list[Any]
) -> None:
    rows = [{"input_ids": [1, 2, 3], "kept": value} for value in values]
    plan = make_plan(Folder(tmp_path), SPEC, corpus(rows, keep=("kept",)), shard_positions=2)
    assert plan.column_types == {"kept": column_type}
    found = [sequence.columns["kept"] for sequence in all_sequences(plan)]
    assert found == kept
    assert [type(value) for value in found] == [type(value) for value in kept]


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([], r"0 documents \(none at all\)"),
        ([{"input_ids": []}, {"input_ids": [1]}], r"2 documents \(2 empty\)"),
        ([{"input_ids": [1, 2], "loss_mask": [1, 0]}, {"input_ids": []}], r"2 documents \(1 untrainable, 1 empty\)"),
    ],
)
def test_a_corpus_without_anything_to_train_is_refused(tmp_path: Path, rows: list[dict[str, Any]], reason: str) -> None:
    with pytest.raises(UserError, match=f"the corpus holds no sequence to train on: {reason}"):
        make_plan(Folder(tmp_path), SPEC, corpus(rows), shard_positions=40)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("good", [0, 1, 29])
def test_a_corpus_that_fails_leaves_nothing_behind(tmp_path: Path, good: int) -> None:
    with pytest.raises(UserError, match=f"rows {good}: `input_ids` must be"):
        make_plan(Folder(tmp_path), SPEC, corpus([*documents()[:good], {"input_ids": "x"}]), shard_positions=40)
    assert list(tmp_path.iterdir()) == []
    assert recorded_spec(Folder(tmp_path)) is None


def test_a_plan_that_was_cut_off_is_made_again(tmp_path: Path) -> None:
    leftover = tmp_path / ".build/tokens/00099.parquet"
    leftover.parent.mkdir(parents=True)
    leftover.write_text("half")
    assert recorded_spec(Folder(tmp_path)) is None
    make_plan(Folder(tmp_path), SPEC, corpus(documents()), shard_positions=40)
    assert not leftover.exists()


def test_a_kept_column_that_no_document_has_is_refused(tmp_path: Path) -> None:
    source = Source("x", dict, lambda: iter([Document({"input_ids": [1, 2, 3], "id": 1}, "x, row 0")]))
    corpus = Corpus([source], None, 10, CorpusSettings(max_length=8, keep=("id", "ulr")))
    with pytest.raises(UserError, match="--keep ulr: no document has this column"):
        make_plan(Folder(tmp_path), {}, corpus, 100)
    assert not list(tmp_path.iterdir())

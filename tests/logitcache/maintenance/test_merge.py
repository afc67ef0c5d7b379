"""Several caches as one: every row once, and only where they were made alike."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import logitcache
from logitcache import LogitCache, UserError
from logitcache.assembly.finalize import trusted_files
from logitcache.cli import main
from logitcache.format.layout import Layout
from logitcache.format.tail_basis import write_tail_basis
from logitcache.format.tail_groups import write_tail_groups
from logitcache.format.tail_parts import TAIL_GROUPS_NAME
from logitcache.storage.folder import Folder
from tests.helpers.maintained import CAPTURE, TOKENIZER, assert_same_row, contents, history, make_cache
from tests.helpers.smallcaches import (
    COLUMNS,
    EVERYTHING,
    FINGERPRINT,
    VOCAB,
    Row,
    at_precision,
    random_rows,
    small,
    tail_basis,
)

LAYOUT = Layout(VOCAB, columns=COLUMNS)
TEACHER: dict[str, Any] = FINGERPRINT["teacher"]  # type: ignore[assignment]


@pytest.mark.slow
def test_rows_follow_each_other_cache_after_cache(tmp_path: Path) -> None:
    parts = [make_cache(tmp_path / str(i), random_rows(20, EVERYTHING, seed=i), EVERYTHING) for i in range(3)]
    merged = logitcache.merge([part.path for part in parts], tmp_path / "out", shard_positions=50)
    assert len(merged.manifest.shards) > 3
    expected = [row for part in parts for row in part]
    for ours, theirs in zip(merged, expected, strict=True):
        assert_same_row(ours, theirs)
    assert merged.tail_groups is not None
    assert (tmp_path / "out/tokenizer/tokenizer.json").read_text() == '{"model": {}}'


@pytest.mark.slow
def test_parts_that_became_coarser_are_merged_to_what_the_whole_becomes(tmp_path: Path) -> None:
    parts = [make_cache(tmp_path / str(i), random_rows(9, EVERYTHING, seed=i), EVERYTHING) for i in range(2)]
    change: dict[str, Any] = {"precision": "compact", "tail_rank": 2, "drop": ["tail_samples"]}
    coarser = [logitcache.recode(part, f"{part.path}-coarser", **change) for part in parts]
    merged = logitcache.merge(coarser, tmp_path / "merged")
    whole = logitcache.recode(logitcache.merge(parts, tmp_path / "whole"), tmp_path / "recoded", **change)
    assert merged.manifest.layout == whole.manifest.layout
    assert merged.manifest.files == whole.manifest.files
    for ours, theirs in zip(merged, whole, strict=True):
        assert_same_row(ours, theirs)


def test_of_rows_with_one_id_the_first_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = random_rows(30, LAYOUT)
    renamed = [(replace(sequence, columns={"url": "second"}), targets) for sequence, targets in rows]
    one = make_cache(tmp_path / "one", rows[:20], LAYOUT)
    other = make_cache(tmp_path / "other", [*renamed[25:30], *renamed[15:25], renamed[27]], LAYOUT)
    assert main(["merge", one.path, other.path, "--out", str(tmp_path / "out")]) == 0
    merged = logitcache.open(tmp_path / "out")
    ids = [sequence.row_id for sequence, _ in rows]
    assert [ids.index(row.row_id) for row in merged] == [*range(20), *range(25, 30), *range(20, 25)]
    assert [row.columns["url"] == "second" for row in merged] == [False] * 20 + [True] * 10
    assert history(merged)[0]["duplicates"] == 6
    assert capsys.readouterr().out.endswith(" bytes, 36 → 30 sequences, 6 duplicates left out\n")


@pytest.mark.slow
@small
@given(
    parts=st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=20), min_size=2, max_size=4),
    rows_per_bucket=st.sampled_from([1, 2, 5, 1000]),
)
def test_duplicates_are_found_however_few_rows_are_compared_at_a_time(
    parts: list[list[int]], rows_per_bucket: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("merge")
    pool = random_rows(31, Layout(VOCAB))
    caches = [
        make_cache(root / str(i), [pool[number] for number in part], Layout(VOCAB)) for i, part in enumerate(parts)
    ]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("logitcache.reading.row_index.ROWS_PER_BUCKET", rows_per_bucket)
        patched.setattr("logitcache.reading.row_index.ROWS_PER_BATCH", rows_per_bucket)
        merged = logitcache.merge([cache.path for cache in caches], root / "out", shard_positions=20)
    ids = [sequence.row_id for sequence, _ in pool]
    assert [ids.index(row.row_id) for row in merged] == list(dict.fromkeys(number for part in parts for number in part))


def make_other(root: Path, rows: Sequence[Row], change: dict[str, Any]) -> LogitCache:
    """A cache like the others but for one thing."""
    change = dict(change)
    changed = change.pop("layout", {})
    layout = at_precision(replace(EVERYTHING, **changed), changed.get("precision", EVERYTHING.precision))
    groups, basis = change.pop("groups", None), change.pop("basis", None)
    cache = make_cache(root, rows, layout, **change)
    if groups is not None:
        write_tail_groups(Folder(root), groups)
    if basis is not None:
        write_tail_basis(Folder(root), tail_basis(EVERYTHING, seed=basis))
    if groups is not None or basis is not None:
        replace(cache.manifest, files=trusted_files(Folder(root))).write(Folder(root))
    return logitcache.open(root)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"teacher": {**TEACHER, "dtype": "bfloat16"}},
            r"teacher\.dtype is float32 in .*/one, bfloat16 in .*/other\. Only caches of one teacher",
        ),
        (
            {"tokenizer": {**TOKENIZER, "vocabulary_sha256": "2" * 64}},
            r"tokenizer\.vocabulary_sha256 is 1{12}… in .*, 2{12}… in .*Only caches",
        ),
        (
            {"capture": {**CAPTURE, "top_k": 6}},
            r"capture\.top_k is 8 in .*/one, 6 in .*/other\. `logitcache recode` can bring both",
        ),
        (
            {"layout": {"precision": "exact"}},
            r"precision is balanced in .*/one, exact in .*/other.*`logitcache recode`",
        ),
        (
            {"layout": {"tail_parts": replace(EVERYTHING.tail_parts, entropy=False)}},
            r"tail_entropy is True in .*, False in .*`logitcache recode`",
        ),
        ({"layout": {"columns": {"id": "int64"}}}, r"columns\.url is string in .*, None in .*`logitcache recode`"),
        ({"layout": {"columns": {**COLUMNS, "id": "string"}}}, r"columns\.id is int64 in .*, string in"),
        (
            {"groups": np.zeros(VOCAB, np.int32)},
            r"tail_groups is 3e16dded2f53… in .*/one, .* in .*/other\. Only caches",
        ),
        ({"basis": 1}, r"tail_basis is [0-9a-f]{12}… in .*/one, .* in .*/other\. Only caches of .* and tail basis"),
        (
            {"layout": {"tail_parts": replace(EVERYTHING.tail_parts, rank=2)}},
            r"tail_rank is 3 in .*, 2 in .*tail_basis.*`logitcache recode`",
        ),
    ],
)
def test_caches_that_were_made_otherwise_are_refused_naming_what_differs(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    rows = random_rows(5, EVERYTHING)
    if change.get("layout", {}).get("columns", {}).get("id") == "string":
        rows = [(replace(sequence, columns={"id": "x"}), targets) for sequence, targets in rows]
    one = make_other(tmp_path / "one", random_rows(5, EVERYTHING), {})
    other = make_other(tmp_path / "other", rows, change)
    with pytest.raises(UserError, match="these caches cannot be merged: " + message) as caught:
        logitcache.merge([one.path, one.path, other.path], tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_caches_with_and_without_tail_groups_are_brought_to_the_same_by_recode(tmp_path: Path) -> None:
    one = make_cache(tmp_path / "one", random_rows(5, EVERYTHING), EVERYTHING)
    other = logitcache.recode(one.path, tmp_path / "other", drop=["tail_groups"])
    with pytest.raises(UserError, match=r"num_tail_groups is 3 in .*, 0 in .*`logitcache recode` can bring both"):
        logitcache.merge([one.path, other.path], tmp_path / "out")


def test_recode_brings_caches_to_the_same(tmp_path: Path) -> None:
    one = make_cache(tmp_path / "one", random_rows(5, LAYOUT), LAYOUT, capture={**CAPTURE, "top_k": 4, "min_k": 4})
    exact = replace(LAYOUT, precision="exact", quantization=None)
    other = make_cache(tmp_path / "other", random_rows(5, exact, seed=1), exact)
    recoded = logitcache.recode(other.path, tmp_path / "recoded", top_k=4, precision="balanced")
    assert len(logitcache.merge([one.path, recoded.path], tmp_path / "out")) == 10


def test_corpora_may_differ_and_are_joined(tmp_path: Path) -> None:
    corpora = [
        {"sources": [{"name": "a"}, {"name": "b"}], "max_length": 64, "layout": None},
        {"sources": [{"name": "b"}, {"name": "c"}], "max_length": 128, "layout": None},
    ]
    generations = [{"n": 1, "seed": 0}, {"n": 1, "seed": 1}]
    parts = [
        make_cache(tmp_path / str(i), random_rows(5, LAYOUT, seed=i), LAYOUT, corpus=corpus, generation=generation)
        for i, (corpus, generation) in enumerate(zip(corpora, generations, strict=True))
    ]
    manifest = logitcache.merge([part.path for part in parts], tmp_path / "out").manifest
    corpus = dict(manifest.fingerprint["corpus"])
    assert len(corpus.pop("sequences_sha256")) == 64
    assert corpus == {"sources": [{"name": "a"}, {"name": "b"}, {"name": "c"}], "layout": None}
    assert "generation" not in manifest.fingerprint
    assert [source["generation"] for source in manifest.history[0]["from"]] == generations
    assert manifest.skipped == {"empty": 4}


def test_the_history_holds_the_histories_of_all(tmp_path: Path) -> None:
    one = make_cache(tmp_path / "one", random_rows(10, LAYOUT), LAYOUT)
    other = make_cache(tmp_path / "other", random_rows(10, LAYOUT, seed=1), LAYOUT)
    part = logitcache.slice(other.path, tmp_path / "part", rows="0:4")
    merged = logitcache.merge([one.path, part.path], tmp_path / "out")
    (step,) = history(merged)
    assert (step["command"], step["sequences"], step["positions"]) == ("merge", 14, merged.num_positions)
    first, second = step["from"]
    assert (first["path"], first["sequences"], first["positions"]) == (one.path, 10, one.num_positions)
    assert first["history"] == []
    assert [former["command"] for former in second["history"]] == ["slice"]
    assert re.fullmatch("[0-9a-f]{64}", first["fingerprint_sha256"])
    again = logitcache.slice(merged.path, tmp_path / "again", rows="0:3")
    assert [former["command"] for former in history(again)] == ["merge", "slice"]


def test_one_cache_is_not_enough(tmp_path: Path) -> None:
    one = make_cache(tmp_path / "one", random_rows(5, LAYOUT), LAYOUT)
    with pytest.raises(UserError, match="merge needs at least two caches"):
        logitcache.merge([one.path], tmp_path / "out")


def test_ids_of_a_killed_merge_are_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [make_cache(tmp_path / str(i), random_rows(10, LAYOUT, seed=i), LAYOUT).path for i in range(2)]
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(np, "argsort", interrupt)
        logitcache.merge(parts, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    logitcache.merge(parts, tmp_path / "out")
    assert not any("ids" in name for name in contents(tmp_path / "out"))


def interrupt(*arguments: Any, **settings: Any) -> None:
    raise KeyboardInterrupt


def test_tail_groups_are_copied(tmp_path: Path) -> None:
    parts = [make_cache(tmp_path / str(i), random_rows(5, EVERYTHING, seed=i), EVERYTHING) for i in range(2)]
    logitcache.merge([part.path for part in parts], tmp_path / "out")
    assert contents(tmp_path / "out")[TAIL_GROUPS_NAME] == contents(tmp_path / "0")[TAIL_GROUPS_NAME]

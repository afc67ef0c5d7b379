"""logitcache.build with --reuse: what other caches hold is copied, the rest is scored, and nobody can tell which was which."""

from __future__ import annotations

import json
import logging
import random
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import logitcache
from logitcache import CachedSequence, LogitCache, SparseTargets, UserError, cli
from logitcache.capture import reuse, worker
from logitcache.capture.engine import start_teacher
from logitcache.capture.finish import finish
from logitcache.capture.reuse import ReusedCaches
from logitcache.format.layout import METADATA_KEY, Layout
from logitcache.format.manifest import Manifest
from logitcache.format.quantization import PRESETS
from logitcache.format.sequences import TokenSequence
from logitcache.format.shards import ShardWriter
from logitcache.format.targets import concatenate
from logitcache.reading import row_index
from logitcache.reading.row_index import RowIndex, id_bytes
from logitcache.reading.shard_reader import ShardReader
from logitcache.storage.atomic import file_sha256
from logitcache.storage.folder import Folder
from tests.helpers.processes import FORKED
from tests.helpers.smallcaches import random_rows, small, write_cache
from tests.helpers.underway import num_finished_shards

EVERYTHING: dict[str, Any] = {
    "tail_groups": 4,
    "temperatures": (1, 2),
    "tail_entropy": True,
    "tail_samples": 2,
    "tail_rank": 4,
}


def build(teacher: Path, documents: Path, out: Path, **settings: Any) -> LogitCache:
    defaults: dict[str, Any] = {"backend": "transformers", "top_k": 16, "tail_rank": 0, "shard_positions": 400}
    cache: LogitCache = logitcache.build(str(teacher), str(documents), out, **{**defaults, **settings})
    return cache


def write_documents(path: Path, texts: Sequence[str], first: int = 0) -> Path:
    path.write_text("".join(json.dumps({"text": text, "id": first + i}) + "\n" for i, text in enumerate(texts)))
    return path


@pytest.fixture(scope="module")
def old(teacher: Path, texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> LogitCache:
    """The first 25 documents, with everything that can be captured."""
    folder = tmp_path_factory.mktemp("old")
    documents = write_documents(folder / "old.jsonl", texts[:25])
    return build(teacher, documents, folder / "cache", keep=("id",), **EVERYTHING)


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Row ids that a teacher was given to score, of all builds of the test."""
    seen: list[str] = []

    def start(*arguments: Any) -> Any:
        teacher: Any = start_teacher(*arguments)
        score = teacher.score

        def counted(sequences: Iterable[TokenSequence]) -> Iterator[TokenSequence]:
            for sequence in sequences:
                seen.append(sequence.row_id)
                yield sequence

        def counting(sequences: Iterable[TokenSequence], settings: Any) -> Iterator[SparseTargets]:
            yield from score(counted(sequences), settings)

        teacher.score = counting
        return teacher

    monkeypatch.setattr(worker, "start_teacher", start)
    return seen


@pytest.fixture
def no_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "start_teacher", lambda *_: pytest.fail("weights were loaded"))


def stop_at_shard(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Ctrl-C when the `number`-th shard (from 0) of a build is begun."""
    begun: list[str] = []

    def writer(folder: Any, name: str, layout: Any) -> ShardWriter:
        if len(begun) == number:
            raise KeyboardInterrupt
        begun.append(name)
        return ShardWriter(folder, name, layout)

    monkeypatch.setattr("logitcache.assembly.write.ShardWriter", writer)


def arrays(row: CachedSequence) -> list[Any]:
    targets = row.targets
    extras = [targets.group_logprobs, targets.tail_entropy, targets.sample_logprobs, *targets.tempered_tail.values()]
    extras += [targets.tail_coefficients, targets.probe_residuals]
    return [
        row.row_id,
        row.input_ids.tolist(),
        row.loss_mask.tolist(),
        by_id(targets),
        targets.tail_logprob.tolist(),
        *(None if extra is None else extra.tolist() for extra in extras),
    ]


def by_id(targets: SparseTargets) -> list[dict[int, float]]:
    """Of each position; which of two equal log-probabilities stands first is open."""
    rows = zip(targets.token_ids.tolist(), targets.logprobs.tolist(), strict=True)
    return [{token: logprob for token, logprob in zip(*row, strict=True) if token >= 0} for row in rows]


def assert_same_but_for_rounding(ours: LogitCache, whole: LogitCache) -> None:
    assert [row.row_id for row in ours] == [row.row_id for row in whole]
    assert [shard.num_sequences for shard in ours.manifest.shards] == [s.num_sequences for s in whole.manifest.shards]
    assert ours.manifest.fingerprint == whole.manifest.fingerprint
    quantization = ours.manifest.layout.quantization
    for mine, theirs in zip(ours, whole, strict=True):
        assert mine.input_ids.tolist() == theirs.input_ids.tolist()
        assert mine.loss_mask.tolist() == theirs.loss_mask.tolist()
        assert dict(mine.columns) == dict(theirs.columns)
        for a, b in zip(by_id(mine.targets), by_id(theirs.targets), strict=True):
            assert a.keys() == b.keys()
            was = np.array([b[token] for token in a])
            bound = 2 * quantization.bound(was) if quantization else 0.0  # two neighbouring levels
            assert (np.abs(np.array(list(a.values())) - was) <= bound + 1e-4).all()
        assert np.allclose(mine.targets.tail_logprob, theirs.targets.tail_logprob, atol=1e-3)


def assert_copied_unchanged(ours: LogitCache, source: LogitCache) -> None:
    """Every row of `ours` that the source has is the source's to the last bit."""
    theirs = {row.row_id: arrays(row) for row in source}
    shared = [row for row in ours if row.row_id in theirs]
    assert shared
    for row in shared:
        assert arrays(row) == theirs[row.row_id]


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRESETS)
def test_the_cache_is_the_one_of_a_build_that_scores_everything(
    teacher: Path, texts: list[str], corpus: Path, tmp_path: Path, scored: list[str], precision: str
) -> None:
    some = write_documents(tmp_path / "some.jsonl", [texts[i] for i in (30, 7, 2, 39, 3, 15, 16, 17, 28, 0)])
    source = build(teacher, some, tmp_path / "some", precision=precision)
    whole = build(teacher, corpus, tmp_path / "whole", precision=precision)
    scored.clear()
    cache = build(teacher, corpus, tmp_path / "c", precision=precision, reuse=source.path)
    there = {row.row_id for row in source}
    assert scored == [row.row_id for row in whole if row.row_id not in there]
    assert_same_but_for_rounding(cache, whole)
    assert_copied_unchanged(cache, source)


@pytest.mark.slow
def test_of_a_corpus_that_grew_only_what_is_new_is_scored_and_the_tail_groups_stay(
    teacher: Path, corpus: Path, tmp_path: Path, old: LogitCache, scored: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "logitcache"):
        cache = build(teacher, corpus, tmp_path / "c", reuse=old.path, **EVERYTHING)
    assert scored == [row.row_id for row in cache][25:]
    assert_copied_unchanged(cache, old)
    for name in ("tail_groups.parquet", "tail_basis.parquet"):
        assert (tmp_path / "c" / name).read_bytes() == (Path(old.path) / name).read_bytes()
    share = round(100 * old.num_positions / cache.num_positions)
    assert f"reusing 25 of 40 sequences ({share} % of the positions) from {old.path}" in caplog.text


@pytest.mark.slow
def test_the_manifest_says_what_was_copied_and_from_where(
    teacher: Path, corpus: Path, tmp_path: Path, old: LogitCache
) -> None:
    cache = build(teacher, corpus, tmp_path / "c", reuse=[old.path], **EVERYTHING)
    (step,) = cache.manifest.history
    assert (step["command"], step["sequences"], step["positions"]) == ("build --reuse", 25, old.num_positions)
    (source,) = step["from"]
    assert source["path"] == str(Path(old.path).resolve())
    assert source["manifest_sha256"] == file_sha256(Path(old.path) / "logitcache.json")
    assert len(source["fingerprint_sha256"]) == 64
    assert (source["sequences"], source["positions"], source["history"]) == (25, old.num_positions, [])


def test_no_teacher_is_loaded_when_every_row_is_there_in_any_order_and_repeated(
    teacher: Path, texts: list[str], tmp_path: Path, old: LogitCache, no_teacher: None
) -> None:
    order = [random.Random(0).randrange(25) for _ in range(60)]
    documents = write_documents(tmp_path / "again.jsonl", [texts[i] for i in order])
    cache = build(teacher, documents, tmp_path / "c", reuse=old.path, shard_positions=300, **EVERYTHING)
    assert [arrays(row) for row in cache] == [arrays(old[i]) for i in order]
    assert cache.manifest.history[0]["sequences"] == 60
    assert not (tmp_path / "c/.build").exists()


def test_kept_columns_are_those_of_the_new_corpus(
    teacher: Path, texts: list[str], tmp_path: Path, old: LogitCache, no_teacher: None
) -> None:
    documents = tmp_path / "renamed.jsonl"
    lines = [{"text": text, "id": f"new {i}", "url": "u"} for i, text in enumerate(texts[:25])]
    documents.write_text("".join(json.dumps(line) + "\n" for line in lines))
    cache = build(teacher, documents, tmp_path / "c", reuse=old.path, keep=("id", "url"), **EVERYTHING)
    assert [dict(row.columns) for row in cache] == [{"id": f"new {i}", "url": "u"} for i in range(25)]


@pytest.mark.slow
def test_rows_are_copied_from_several_caches_the_first_that_has_one_gives_it(
    teacher: Path, texts: list[str], corpus: Path, tmp_path: Path, scored: list[str]
) -> None:
    parts = [(0, 12), (8, 20), (30, 40)]
    sources = []
    for first, end in parts:
        documents = write_documents(tmp_path / f"{first}.jsonl", texts[first:end])
        sources.append(build(teacher, documents, tmp_path / f"{first}"))
    scored.clear()
    cache = build(teacher, corpus, tmp_path / "c", reuse=[source.path for source in sources])
    assert scored == [row.row_id for row in cache][20:30]
    assert [source["sequences"] for source in cache.manifest.history[0]["from"]] == [12, 8, 10]


def test_a_cache_without_a_common_row_is_told_and_everything_is_scored(
    teacher: Path, tmp_path: Path, old: LogitCache, scored: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    documents = write_documents(tmp_path / "other.jsonl", ["Something else.", "And more of it."])
    cache = build(teacher, documents, tmp_path / "c", reuse=old.path, **EVERYTHING)
    assert scored == [row.row_id for row in cache]
    assert "no row of this corpus is there, all are scored" in caplog.text
    assert cache.manifest.history == ()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 8}, r"--reuse .*: capture\.top_k is 16 there, 8 here"),
        ({"top_p": 0.9}, r"capture\.top_p is 1\.0 there, 0\.9 here"),
        ({"precision": "exact"}, "precision is balanced there, exact here"),
        ({"tail_groups": 5}, r"capture\.tail_groups is 4 there, 5 here"),
        ({"temperatures": (1,)}, r"capture\.temperatures is 1 items there, 0 items here"),
        ({"tail_samples": 0}, r"capture\.tail_samples is 2 there, 0 here"),
        ({"dtype": "bfloat16"}, r"teacher\.dtype is float32 there, bfloat16 here"),
    ],
)
def test_a_cache_made_with_other_settings_is_refused_before_the_weights_load(
    teacher: Path,
    corpus: Path,
    tmp_path: Path,
    old: LogitCache,
    no_teacher: None,
    settings: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(UserError, match=message):
        build(teacher, corpus, tmp_path / "c", reuse=old.path, **{**EVERYTHING, **settings})
    assert not (tmp_path / "c").exists()


@pytest.mark.slow
def test_caches_with_different_tail_groups_are_not_both_reused(
    teacher: Path, texts: list[str], corpus: Path, tmp_path: Path
) -> None:
    paths = []
    for number in (0, 20):
        documents = write_documents(tmp_path / f"{number}.jsonl", [texts[number][::-1]])
        paths.append(build(teacher, documents, tmp_path / f"{number}", tail_groups=4).path)
    with pytest.raises(UserError, match="their tail groups are not the same"):
        build(teacher, corpus, tmp_path / "c", tail_groups=4, reuse=paths)


def test_a_cache_that_is_missing_unfinished_or_damaged_is_refused_before_the_weights_load(
    teacher: Path, corpus: Path, tmp_path: Path, old: LogitCache, no_teacher: None
) -> None:
    def refused(path: Path, message: str) -> None:
        with pytest.raises(UserError, match=message):
            build(teacher, corpus, tmp_path / "c", reuse=path, **EVERYTHING)

    refused(tmp_path / "missing", r"--reuse .*/missing: .*/missing does not exist, or leave --reuse out")
    broken = tmp_path / "broken"
    shutil.copytree(old.path, broken)
    shard = broken / old.manifest.shards[1].name
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 1
    shard.write_bytes(content)
    refused(broken, "altered: its SHA-256 is not the manifest's")
    shard.write_bytes(content[:-1])
    refused(broken, "--reuse .*: .*truncated or altered")
    groups = broken / "tail_groups.parquet"
    shutil.copy(Path(old.path) / old.manifest.shards[1].name, shard)
    groups.write_bytes(groups.read_bytes()[:-1])
    refused(broken, "tail_groups.parquet was altered")
    (broken / "logitcache.json").unlink()
    (broken / ".build").mkdir()
    refused(broken, "--reuse .* is an unfinished build")


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_cache_is_not_reused_for_itself(
    teacher: Path, corpus: Path, tmp_path: Path, old: LogitCache, overwrite: bool
) -> None:
    shutil.copytree(old.path, tmp_path / "c")
    (tmp_path / "link").symlink_to(tmp_path / "c")
    for path in (tmp_path / "c", tmp_path / "link", tmp_path / "x/../c/"):
        with pytest.raises(UserError, match="choose a place outside the cache of --reuse"):
            build(teacher, corpus, tmp_path / "c", reuse=str(path), overwrite=overwrite, **EVERYTHING)
    with pytest.raises(UserError, match="choose a place outside the cache of --reuse"):
        build(teacher, corpus, tmp_path / "c/new", reuse=tmp_path / "c", overwrite=overwrite, **EVERYTHING)
    assert len(logitcache.open(tmp_path / "c")) == 25


def test_a_finished_build_is_left_as_it_is_though_the_other_cache_is_gone(
    teacher: Path, corpus: Path, tmp_path: Path, old: LogitCache
) -> None:
    shutil.copytree(old.path, tmp_path / "old")
    build(teacher, corpus, tmp_path / "c", reuse=tmp_path / "old", **EVERYTHING)
    shutil.rmtree(tmp_path / "old")
    manifest = (tmp_path / "c/logitcache.json").stat().st_mtime_ns
    for again in ({"reuse": tmp_path / "old"}, {}):
        build(teacher, corpus, tmp_path / "c", **EVERYTHING, **again)
    assert (tmp_path / "c/logitcache.json").stat().st_mtime_ns == manifest


@pytest.mark.slow
def test_a_resumed_build_may_reuse_the_cache_again_or_not(
    teacher: Path, corpus: Path, tmp_path: Path, old: LogitCache, scored: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build(teacher, corpus, tmp_path / "whole", reuse=old.path, **EVERYTHING)
    shutil.copytree(old.path, tmp_path / "old")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        stop_at_shard(patched, 2)
        build(teacher, corpus, tmp_path / "c", reuse=tmp_path / "old", **EVERYTHING)
    shutil.copytree(tmp_path / "c", tmp_path / "same")
    copied = whole.manifest.shards[0].num_sequences + whole.manifest.shards[1].num_sequences
    assert copied < 25

    same = build(teacher, corpus, tmp_path / "same", reuse=tmp_path / "old", **EVERYTHING)
    assert_same_but_for_rounding(same, whole)
    assert same.manifest.history[0]["sequences"] == 25

    shutil.rmtree(tmp_path / "old")
    with pytest.raises(UserError, match="old does not exist, or leave --reuse out: its rows are then scored"):
        build(teacher, corpus, tmp_path / "c", reuse=tmp_path / "old", **EVERYTHING)
    scored.clear()
    cache = build(teacher, corpus, tmp_path / "c", **EVERYTHING)
    assert scored == [row.row_id for row in whole][copied:]
    assert_same_but_for_rounding(cache, whole)
    assert np.array_equal(cache.tail_groups, old.tail_groups)  # type: ignore[arg-type]
    assert cache.manifest.history[0]["sequences"] == copied


@pytest.mark.slow
def test_a_build_with_tail_groups_of_its_own_does_not_go_on_with_rows_of_others(
    teacher: Path, texts: list[str], tmp_path: Path, old: LogitCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = write_documents(tmp_path / "other.jsonl", [text[::-1] for text in texts[:8]] + texts[:8])
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        stop_at_shard(patched, 1)
        build(teacher, documents, tmp_path / "c", **EVERYTHING)
    with pytest.raises(UserError, match=r"its tail groups are not those that .* was begun with"):
        build(teacher, documents, tmp_path / "c", reuse=old.path, **EVERYTHING)
    assert build(teacher, documents, tmp_path / "c", **EVERYTHING).manifest.history == ()


def test_a_teacher_that_stops_early_leaves_no_half_shard(
    teacher: Path, corpus: Path, tmp_path: Path, old: LogitCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Tired:
        def __init__(self, teacher: Any) -> None:
            self.set_tail_groups, self.set_tail_basis = teacher.set_tail_groups, teacher.set_tail_basis
            self.close, self._teacher = teacher.close, teacher

        def score(self, sequences: Any, settings: Any) -> Iterator[SparseTargets]:
            yield from list(self._teacher.score(sequences, settings))[:-1]

    monkeypatch.setattr(worker, "start_teacher", lambda *arguments: Tired(start_teacher(*arguments)))
    with pytest.raises(UserError, match=r"the teacher scored \d+ sequences and then no more"):
        build(teacher, corpus, tmp_path / "c", reuse=old.path, **EVERYTHING)
    planned = json.loads((tmp_path / "c/.build/plan.json").read_text())["shards"]
    assert len(list((tmp_path / "c/data").iterdir())) == len(planned) - 1


@pytest.mark.slow
def test_shard_ranges_copy_and_score_each_their_own(
    teacher: Path, corpus: Path, tmp_path: Path, old: LogitCache, scored: list[str]
) -> None:
    whole = build(teacher, corpus, tmp_path / "whole", reuse=old.path, **EVERYTHING)
    scored.clear()
    for index in range(2):
        build(teacher, corpus, tmp_path / "c", reuse=old.path, shard_range=(index, 2), **EVERYTHING)
    cache = finish(tmp_path / "c")
    assert len(scored) == 15
    assert_same_but_for_rounding(cache, whole)
    assert cache.manifest.history == whole.manifest.history


@pytest.mark.engine
def test_ray_engines_copy_and_score(
    cluster: None, teacher: Path, corpus: Path, texts: list[str], tmp_path: Path
) -> None:
    some = write_documents(tmp_path / "some.jsonl", texts[1::2])
    source = build(teacher, some, tmp_path / "some", **EVERYTHING)
    whole = build(teacher, corpus, tmp_path / "whole", reuse=source.path, **EVERYTHING)
    cache = build(teacher, corpus, tmp_path / "c", reuse=source.path, executor="ray", engines=1, **EVERYTHING)
    assert_same_but_for_rounding(cache, whole)
    assert_copied_unchanged(cache, source)
    assert cache.manifest.history == whole.manifest.history


KILLS = 3


def run_build(teacher: str, corpus: str, out: Path, source: str) -> None:
    import torch

    torch.set_num_threads(1)
    build(Path(teacher), Path(corpus), out, reuse=source, shard_positions=60, tail_groups=4)


@pytest.mark.slow
def test_kills_and_then_the_same_rows_as_an_uninterrupted_build(
    teacher: Path, corpus: Path, texts: list[str], tmp_path: Path
) -> None:
    some = write_documents(tmp_path / "some.jsonl", [texts[i] for i in range(40) if i % 3])
    source = build(teacher, some, tmp_path / "some", tail_groups=4)
    whole = build(teacher, corpus, tmp_path / "whole", reuse=source.path, shard_positions=60, tail_groups=4)
    out, moments = tmp_path / "killed", random.Random(0)
    for _ in range(KILLS):
        before = num_finished_shards(out)
        process = FORKED.Process(target=run_build, args=(str(teacher), str(corpus), out, source.path))
        process.start()
        while process.is_alive() and num_finished_shards(out) < before + 1:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.02))
        process.kill()
        process.join()
        if (out / "logitcache.json").exists():
            shutil.rmtree(out)  # a fast machine: begin another one
    cache = build(teacher, corpus, out, reuse=source.path, shard_positions=60, tail_groups=4)
    assert not (out / ".build").exists()
    assert_same_but_for_rounding(cache, whole)
    assert_copied_unchanged(cache, source)
    assert cache.manifest.history == whole.manifest.history


def as_format_1(cache: LogitCache) -> None:
    """Makes an exact cache say that it was written before there was a choice of precision."""

    def older(layout: dict[str, Any]) -> dict[str, Any]:
        kept = {name: value for name, value in layout.items() if name not in ("precision", "rounding")}
        return {**kept, "format_version": 1, "logprob_step": 2.0**-14, "group_step": 2.0**-5}

    manifest = json.loads((Path(cache.path) / "logitcache.json").read_text())
    for shard in manifest["shards"]:
        path = Path(cache.path) / shard["name"]
        file = pq.ParquetFile(path)
        groups = [file.read_row_group(group) for group in range(file.num_row_groups)]
        layout = older(json.loads(groups[0].schema.metadata[METADATA_KEY]))
        schema = groups[0].schema.with_metadata({METADATA_KEY: json.dumps(layout).encode()})
        with pq.ParquetWriter(path, schema, write_page_checksum=True) as writer:
            for table in groups:
                writer.write_table(table.replace_schema_metadata(schema.metadata), row_group_size=len(table))
        shard |= {"num_bytes": path.stat().st_size, "sha256": file_sha256(path)}
    del manifest["fingerprint"]["capture"]["precision"], manifest["history"]
    manifest |= {
        "format_version": 1,
        "layout": older(manifest["layout"]),
        "num_bytes": sum(shard["num_bytes"] for shard in manifest["shards"]),
    }
    (Path(cache.path) / "logitcache.json").write_text(json.dumps(manifest))


@pytest.mark.slow
def test_a_cache_of_format_1_is_an_exact_one(
    teacher: Path, texts: list[str], corpus: Path, tmp_path: Path, scored: list[str]
) -> None:
    documents = write_documents(tmp_path / "old.jsonl", texts[:30])
    as_format_1(build(teacher, documents, tmp_path / "old", precision="exact"))
    source = logitcache.open(tmp_path / "old")
    with pytest.raises(UserError, match="precision is exact there, balanced here"):
        build(teacher, corpus, tmp_path / "c", precision="balanced", reuse=source.path)
    scored.clear()
    cache = build(teacher, corpus, tmp_path / "c", reuse=source.path)
    assert cache.manifest.layout.precision == "exact"
    assert len(scored) == 10
    assert_copied_unchanged(cache, source)


def test_the_command_takes_several_caches_and_refuses_in_one_line(
    teacher: Path, corpus: Path, tmp_path: Path, old: LogitCache, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["build", "--teacher", str(teacher), "--data", str(corpus), "--backend", "transformers", "--top-k", "8"]
    arguments = [*command, "--out", str(tmp_path / "c"), "--reuse", old.path, str(tmp_path / "none")]
    assert cli.main(arguments) == 2
    assert f"error: --reuse {tmp_path / 'none'}: " in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("in_order", [True, False])
def test_rows_are_read_in_windows_and_in_order_a_row_group_hardly_twice(
    tmp_path: Path, in_order: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = Layout(50)
    cache = write_cache(tmp_path, random_rows(200, layout), layout, rows_per_shard=50, row_group_bytes=1000)
    num_row_groups = sum(len(shard.row_group_sizes) for shard in cache.manifest.shards)
    monkeypatch.setattr(reuse, "WINDOW_BYTES", 4000)
    read: list[int] = []
    decode = ShardReader.read_row_group

    def counting(shard: ShardReader, index: int) -> Any:
        read.append(index)
        return decode(shard, index)

    monkeypatch.setattr(ShardReader, "read_row_group", counting)
    places = np.arange(200) if in_order else np.random.default_rng(0).permutation(200)
    positions = np.array([len(cache[int(place)].positions) for place in places])
    expected = [arrays(cache[int(place)]) for place in places]
    read.clear()
    assert [arrays(row) for row in ReusedCaches([str(tmp_path)]).rows(places, positions)] == expected
    assert num_row_groups > 20
    if in_order:
        assert len(read) == num_row_groups


def test_a_copied_row_does_not_hold_its_row_group(tmp_path: Path) -> None:
    layout = Layout(50)
    cache = write_cache(tmp_path, random_rows(200, layout), layout)
    row = next(ReusedCaches([str(tmp_path)]).rows(np.array([3]), np.array([5])))
    assert row.targets.token_ids.base is None
    assert len(concatenate([row.targets])) == len(cache[3].positions)


def test_a_row_that_was_exchanged_since_it_was_found_is_refused(
    teacher: Path, corpus: Path, tmp_path: Path, old: LogitCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = ReusedCaches.rows
    monkeypatch.setattr(ReusedCaches, "rows", lambda self, places, positions: rows(self, places[::-1], positions))
    with pytest.raises(UserError, match=r"--reuse has row .* there by now"):
        build(teacher, corpus, tmp_path / "c", reuse=old.path, **EVERYTHING)


def test_a_copied_row_that_no_teacher_can_have_given_is_refused(
    teacher: Path, corpus: Path, tmp_path: Path, old: LogitCache
) -> None:
    shutil.copytree(old.path, tmp_path / "old")
    broken = logitcache.open(tmp_path / "old")
    manifest, name = broken.manifest, broken.manifest.shards[0].name
    rows = [broken[i] for i in range(manifest.shards[0].num_sequences)]
    with ShardWriter(Folder(tmp_path / "old"), name, manifest.layout) as writer:
        for row in rows:
            certain = np.zeros_like(row.targets.tail_logprob)  # and the entries beside it
            sequence = TokenSequence(row.input_ids, row.loss_mask, row.columns)
            writer.write(sequence, replace(row.targets, tail_logprob=certain))
    Manifest(
        manifest.layout,
        manifest.fingerprint,
        (writer.info, *manifest.shards[1:]),
        manifest.skipped,
        manifest.created_by,
        manifest.files,
    ).write(Folder(tmp_path / "old"))
    with pytest.raises(UserError, match="was altered: entries and tail that do not sum to 1 at stored position"):
        build(teacher, corpus, tmp_path / "c", reuse=tmp_path / "old", **EVERYTHING)


@small
@given(st.lists(st.integers(0, 40), max_size=60), st.integers(1, 8))
def test_the_index_finds_the_first_row_of_each_id(numbers: list[int], rows_per_bucket: int) -> None:
    # Ids that end in zero bytes, and some that differ in them only.
    names = [bytes([n % 5 * 60, *[0] * 13, n // 5 * (n % 2), n]).hex() for n in range(41)]
    ids = [names[n] for n in numbers]
    chunks = [id_bytes(ids[i : i + 7]) for i in range(0, len(ids), 7)]
    with pytest.MonkeyPatch.context() as patched, tempfile.TemporaryDirectory() as directory:
        patched.setattr(row_index, "ROWS_PER_BUCKET", rows_per_bucket)
        patched.setattr(row_index, "ROWS_PER_BATCH", 10)
        found = RowIndex(Path(directory), chunks, len(ids)).find(id_bytes(names))
    assert found.tolist() == [ids.index(name) if name in ids else -1 for name in names]


def test_what_is_no_row_id_is_not_indexed() -> None:
    for ids in (["0" * 31], ["0" * 34, "0" * 30], ["g" * 32]):
        with pytest.raises(ValueError, match="hexadecimal"):
            id_bytes(ids)

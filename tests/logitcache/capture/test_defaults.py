"""What a build stores if nobody says: by what the route shows, and as the cache that is continued or reused has it."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

import logitcache
from logitcache import LogitCache, UserError
from logitcache.capture import engine, worker
from logitcache.capture import settings as settings_module
from logitcache.capture.finish import finish
from logitcache.capture.inputs import resolve_inputs
from logitcache.capture.plan import BuildPlan
from logitcache.capture.settings import CaptureSettings
from logitcache.capture.teachers.vllm import engine as vllm_engine
from logitcache.capture.teachers.vllm import pooling as vllm_pooling
from logitcache.storage.folder import Folder
from tests.logitcache.capture.test_build import rows, stop_at_shard

BUCKET = {"top_k": 64, "min_k": 32}
LOW_RANK = {"top_k": 16, "min_k": 16, "tail_rank": 64, "tail_probes": 2}
NARROW = LOW_RANK | {"tail_rank": 63}
"""Of a teacher with hidden states of 64 numbers."""


def build(teacher: Path, corpus: Path, out: Path | str, **options: Any) -> LogitCache:
    options = {"backend": "transformers", "shard_positions": 400, **options}
    cache: LogitCache = logitcache.build(str(teacher), str(corpus), out, **options)
    return cache


def stored(capture: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `LOW_RANK`'s settings that there are."""
    return {name: capture[name] for name in LOW_RANK if name in capture}


def captured(cache: LogitCache) -> dict[str, Any]:
    return stored(cache.manifest.fingerprint["capture"])


@pytest.fixture
def earlier(monkeypatch: pytest.MonkeyPatch) -> Callable[[], AbstractContextManager[None]]:
    """Inside it are the defaults of versions before coefficients: 64 entries and the mass of the tail."""

    @contextmanager
    def patched() -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(settings_module, "DEFAULT_RANK", 0)
            yield

    return patched


def begin(teacher: Path, corpus: Path, out: Path | str, patch: pytest.MonkeyPatch, **options: Any) -> None:
    """A build that is interrupted after its first shard."""
    with patch.context() as patched, pytest.raises(KeyboardInterrupt):
        stop_at_shard(patched, 1)
        build(teacher, corpus, out, **options)


@pytest.mark.parametrize(
    ("given", "most_rank", "expected"),
    [
        ({}, 100, LOW_RANK),
        ({}, 4, LOW_RANK | {"tail_rank": 4}),
        ({}, 0, BUCKET),
        ({"tail_rank": 0}, 100, BUCKET),
        ({"tail_rank": 9}, 0, LOW_RANK | {"tail_rank": 9}),
        ({"tail_rank": 9, "top_k": 33, "tail_probes": 0}, 100, {"top_k": 33, "min_k": 32, "tail_rank": 9}),
        ({"tail_groups": 4}, 100, BUCKET),
        ({"tail_groups": 4, "tail_rank": 9}, 100, LOW_RANK | {"tail_rank": 9}),
        ({"tail_groups": 0}, 100, LOW_RANK),
        ({"top_k": 64}, 100, LOW_RANK | BUCKET),
        ({"tail_probes": 1}, 100, LOW_RANK | {"tail_probes": 1}),
        ({"top_k": 5}, 100, LOW_RANK | {"top_k": 5, "min_k": 5}),
        ({"min_k": 20}, 100, LOW_RANK | {"top_k": 20, "min_k": 20}),
        ({"top_p": 0.9}, 100, LOW_RANK | BUCKET),
        ({"top_p": 0.9, "min_k": 8}, 100, LOW_RANK | {"top_k": 64, "min_k": 8}),
        ({"top_p": 1.0}, 100, LOW_RANK),
    ],
)
def test_the_defaults_go_by_what_the_route_shows_and_by_what_is_given(
    given: dict[str, Any], most_rank: int, expected: dict[str, Any]
) -> None:
    found = CaptureSettings.of_options(given, 1000, most_rank)
    found.check(1000)
    assert stored(found.to_json()) == expected
    assert CaptureSettings.of_options({}, 3, 2).top_k == 3


@pytest.mark.parametrize(
    ("route", "expected"),
    [
        ({"backend": "transformers"}, NARROW),
        ({"backend": "vllm"}, NARROW),
        ({"backend": "vllm", "capture_route": "flat"}, BUCKET),
        ({"backend": "openai", "base_url": "http://localhost:1/v1"}, BUCKET),
    ],
)
def test_coefficients_are_the_default_where_the_route_shows_logits(
    teacher: Path, corpus: Path, route: dict[str, Any], expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "why_not_vllm", lambda: None)
    monkeypatch.setattr(vllm_engine, "why_not_engine", lambda *_: None)
    monkeypatch.setattr(vllm_pooling, "why_not_pooling", lambda *_: None)
    monkeypatch.setattr(engine.EngineChoice, "describe_server", lambda _: {"name": "tiny"})
    assert stored(resolve_inputs(str(teacher), str(corpus), **route).settings.to_json()) == expected
    monkeypatch.setattr(vllm_pooling, "why_not_pooling", lambda *_: "it has no logits")
    if route == {"backend": "vllm"}:
        assert stored(resolve_inputs(str(teacher), str(corpus), **route).settings.to_json()) == BUCKET


@pytest.mark.slow
def test_a_plan_shows_the_default_and_the_row_of_it(teacher: Path, corpus: Path) -> None:
    found = logitcache.plan(str(teacher), str(corpus), backend="transformers")
    lines = found.table().splitlines()
    assert [line.endswith("(k = 16 + rank 63, balanced)") for line in lines if line.startswith("bytes")] == [True]
    assert sum(line.startswith("k = 16 + rank 63 ") for line in lines) == 1
    [default] = [choice for choice in found.choices if (choice.top_k, choice.tail_rank) == (16, 63)]
    assert default.bytes_per_position == pytest.approx(found.bytes_per_position, rel=0.05)


def test_a_build_begun_with_other_defaults_is_continued_and_opened_by_the_same_command(
    teacher: Path,
    corpus: Path,
    tmp_path: Path,
    earlier: Callable[[], AbstractContextManager[None]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = f"memory://{tmp_path}/c"
    with earlier():
        whole = build(teacher, corpus, tmp_path / "whole")
        begin(teacher, corpus, out, monkeypatch)
    with caplog.at_level(logging.INFO, "logitcache"):
        continued = build(teacher, corpus, out)
        assert captured(continued) == BUCKET
        assert rows(continued) == rows(whole)
        note = "--top-k 64, --min-k 32, --tail-rank 0, --tail-probes 0 (by default: --top-k 16, --min-k 16, --tail-rank 63, "
        assert caplog.text.count(f"what is not given is as in {out}: {note}--tail-probes 2)") == 1
    build(teacher, corpus, tmp_path / "whole", top_k=64)
    with pytest.raises(UserError, match=r"a finished cache made otherwise: capture\.tail_rank was None, now 6; format"):
        build(teacher, corpus, tmp_path / "whole", tail_rank=6)
    anew = build(teacher, corpus, tmp_path / "anew")
    with pytest.raises(
        UserError, match=r"made otherwise: capture\.tail_rank was 63, now None; capture.tail_probes was 2"
    ):
        build(teacher, corpus, tmp_path / "anew", tail_rank=0)
    assert captured(anew) == NARROW
    assert (anew.manifest.layout.tail_parts.rank, anew.manifest.layout.tail_parts.probes) == (63, 2)
    assert anew[0].targets.token_ids.shape[1] == 16


def test_a_setting_that_was_given_may_be_left_out_and_is_compared_where_it_is_given(
    teacher: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(teacher, corpus, tmp_path, monkeypatch, top_k=5, tail_groups=3, precision="exact")
    with pytest.raises(UserError, match=r"made otherwise: capture\.top_k was 5, now 6\. Repeat"):
        build(teacher, corpus, tmp_path, top_k=6)
    with pytest.raises(UserError, match=r"made otherwise: capture\.tail_groups was 3, now 0\. Repeat"):
        build(teacher, corpus, tmp_path, tail_groups=0)
    capture = build(teacher, corpus, tmp_path).manifest.fingerprint["capture"]
    assert (capture["top_k"], capture["min_k"], capture["tail_groups"], capture["precision"]) == (5, 5, 3, "exact")


@pytest.mark.parametrize("given", [{}, {"top_k": 5}])
def test_overwriting_continues_what_the_same_command_may_have_begun_and_nothing_else(
    teacher: Path, corpus: Path, tmp_path: Path, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(teacher, corpus, tmp_path, monkeypatch, tail_rank=0, overwrite=True, **given)
    first = next((tmp_path / "data").iterdir())
    written = first.stat().st_mtime_ns
    cache = build(teacher, corpus, tmp_path, overwrite=True)
    assert captured(cache) == (NARROW if given else BUCKET)
    assert (first.stat().st_mtime_ns == written) == (not given)


def test_ranges_of_a_build_take_what_the_first_one_began_with(
    teacher: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logitcache.assembly.placement.LOOK_AGAIN_S", 0.01)
    build_range = {"backend": "transformers", "shard_positions": 400}
    started = threading.Thread(
        target=logitcache.build,
        args=(str(teacher), str(corpus), tmp_path),
        kwargs=build_range | {"shard_range": (1, 2)},
    )
    started.start()
    build(teacher, corpus, tmp_path, shard_range=(0, 2), tail_rank=0)
    started.join()
    assert captured(finish(tmp_path)) == BUCKET


def test_a_reused_cache_gives_what_is_not_given(
    teacher: Path,
    corpus: Path,
    tmp_path: Path,
    earlier: Callable[[], AbstractContextManager[None]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with earlier():
        old = build(teacher, corpus, tmp_path / "old", temperatures=(2,))
    monkeypatch.setattr(worker, "start_teacher", lambda *_: pytest.fail("weights were loaded"))
    with caplog.at_level(logging.INFO, "logitcache"):
        cache = build(teacher, corpus, tmp_path / "c", reuse=old.path)
    assert captured(cache) == BUCKET
    assert rows(cache) == rows(old)
    assert f"what is not given is as in --reuse {old.path}: --top-k 64" in caplog.text
    with pytest.raises(UserError, match=r"--reuse .*: capture\.tail_rank is None there, 6 here\. Its"):
        build(teacher, corpus, tmp_path / "d", reuse=old.path, tail_rank=6)


def test_a_corpus_too_short_for_a_basis_that_nobody_asked_for_gets_none(
    teacher: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text((json.dumps({"input_ids": [1, 2, 3, 4, 5, 6]}) + "\n") * 20)  # 100 positions, 5 different ones
    with caplog.at_level(logging.INFO, "logitcache"):
        cache = build(teacher, data, tmp_path / "c")
    assert captured(cache) == BUCKET
    assert "and there are 5: choose at most 2, or a longer corpus; so no coefficients are stored" in caplog.text
    caplog.clear()
    assert build(teacher, data, tmp_path / "c").identity == cache.identity
    for given in ({"tail_rank": 6}, {"tail_probes": 1}):
        with pytest.raises(UserError, match=r"--tail-rank (6|63): .* there are 5"):
            build(teacher, data, tmp_path / "d", **given)
    plan = logitcache.plan(str(teacher), str(data), backend="transformers")
    assert {plan.settings.tail_parts.rank, *(choice.tail_rank for choice in plan.choices)} == {0}
    assert captured(build(teacher, data, tmp_path / "d", tail_rank=2)) == LOW_RANK | {"tail_rank": 2}


def test_a_corpus_that_repeats_itself_is_built_by_default(
    teacher: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = tmp_path / "rows.jsonl"
    lengths = range(60, 63)  # other positions than each other's, but the same few contexts
    data.write_text("".join(json.dumps({"input_ids": [1, 2] * length}) + "\n" for length in lengths))
    with caplog.at_level(logging.INFO, "logitcache"):
        cache = build(teacher, data, tmp_path / "c")
    assert "directions only at the corpus's beginning: the other" in caplog.text
    assert captured(cache) == NARROW
    assert not logitcache.verify(cache).findings


def test_groups_and_basis_are_the_same_whatever_the_size_of_the_shards(
    teacher: Path, corpus: Path, tmp_path: Path
) -> None:
    options = {"top_k": 8, "tail_rank": 4, "tail_groups": 3}
    small, large = (
        build(teacher, corpus, tmp_path / str(size), shard_positions=size, **options) for size in (150, 10_000)
    )
    assert len(small.manifest.shards) > 5 and len(large.manifest.shards) == 1
    for name in ("tail_basis.parquet", "tail_groups.parquet"):
        assert small.manifest.files[name] == large.manifest.files[name]
    assert rows(small) == rows(large)
    assert len(logitcache.merge([small, large], tmp_path / "merged")) == len(small)


def test_the_positions_of_a_basis_are_read_as_far_as_it_needs_them(
    teacher: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logitcache.capture.calibration.CALIBRATION_SEQUENCES", 2)
    monkeypatch.setattr(worker, "start_teacher", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        build(teacher, corpus, tmp_path, tail_rank=4, shard_positions=30)
    plan = BuildPlan.read(Folder(tmp_path))
    lengths = [len(sequence.positions) for sequence in plan.calibration_sequences()]
    assert sum(lengths[:-1]) < 4 * 64 <= sum(lengths)
    assert plan.shards[0].num_positions < sum(lengths)
    rows_in_order = [len(s.positions) for index in range(len(plan.shards)) for s in plan.sequences(index)]
    assert lengths == rows_in_order[: len(lengths)]

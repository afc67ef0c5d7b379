"""What a build stores if nobody says: by what the route shows, and as the cache that is continued or reused has it."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path
from typing import Any

import pytest

import logitcache
from logitcache import LogitCache, UserError
from logitcache.capture import settings as settings_module
from logitcache.capture import worker
from logitcache.capture.finish import finish
from logitcache.capture.plan import BuildPlan
from logitcache.capture.settings import CaptureSettings
from logitcache.storage.folder import Folder
from tests.logitcache.capture.test_build import rows, stop_at_shard

BUCKET = {"top_k": 64, "min_k": 32}
LOW_RANK = {"top_k": 8, "min_k": 8, "tail_rank": 6, "tail_probes": 2}


def build(teacher: Path, corpus: Path, out: Path | str, **options: Any) -> LogitCache:
    options = {"backend": "transformers", "shard_positions": 400, **options}
    cache: LogitCache = logitcache.build(str(teacher), str(corpus), out, **options)
    return cache


def captured(cache: LogitCache) -> dict[str, Any]:
    """Those of `LOW_RANK`'s settings that a cache has."""
    capture = cache.manifest.fingerprint["capture"]
    return {name: capture[name] for name in LOW_RANK if name in capture}


@pytest.fixture
def bucket_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings_module, "DEFAULT_RANK", 0)
    monkeypatch.setattr(settings_module, "BUCKET_TOP_K", 64)


def low_rank_by_default(patch: pytest.MonkeyPatch) -> None:
    """A later version, by whose defaults there are coefficients."""
    patch.setattr(settings_module, "DEFAULT_RANK", 6)
    patch.setattr(settings_module, "LOW_RANK_TOP_K", 8)


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
        ({"tail_probes": 1}, 100, LOW_RANK | {"tail_probes": 1}),
        ({"top_k": 5}, 100, LOW_RANK | {"top_k": 5, "min_k": 5}),
        ({"min_k": 20, "top_p": 0.9}, 100, LOW_RANK | {"top_k": 20, "min_k": 20}),
    ],
)
def test_the_defaults_go_by_what_the_route_shows_and_by_what_is_given(
    given: dict[str, Any], most_rank: int, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    low_rank_by_default(monkeypatch)
    found = CaptureSettings.of_options(given, 1000, most_rank)
    found.check(1000)
    assert {name: value for name, value in found.to_json().items() if name in LOW_RANK} == expected
    assert CaptureSettings.of_options({}, 3, 2).top_k == 3


def test_a_build_begun_with_other_defaults_is_continued_and_opened_by_the_same_command(
    teacher: Path,
    corpus: Path,
    tmp_path: Path,
    bucket_by_default: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    whole = build(teacher, corpus, tmp_path / "whole")
    out = f"memory://{tmp_path}/c"
    begin(teacher, corpus, out, monkeypatch)
    low_rank_by_default(monkeypatch)
    with caplog.at_level(logging.INFO, "logitcache"):
        continued = build(teacher, corpus, out)
        assert captured(continued) == BUCKET
        assert rows(continued) == rows(whole)
        note = (
            "--top-k 64, --min-k 32, --tail-rank 0, --tail-probes 0 (by default: --top-k 8, --min-k 8, --tail-rank 6, "
        )
        assert caplog.text.count(f"what is not given is as in {out}: {note}--tail-probes 2)") == 1
    build(teacher, corpus, tmp_path / "whole", top_k=64)
    with pytest.raises(UserError, match=r"a finished cache made otherwise: capture\.tail_rank was None, now 6; format"):
        build(teacher, corpus, tmp_path / "whole", tail_rank=6)
    assert captured(build(teacher, corpus, tmp_path / "anew")) == LOW_RANK


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
    low_rank_by_default(monkeypatch)
    cache = build(teacher, corpus, tmp_path, overwrite=True)
    assert captured(cache) == (LOW_RANK if given else BUCKET)
    assert (first.stat().st_mtime_ns == written) == (not given)


def test_ranges_of_a_build_take_what_the_first_one_began_with(
    teacher: Path, corpus: Path, tmp_path: Path, bucket_by_default: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logitcache.capture.build.LOOK_AGAIN_S", 0.01)
    build_range = {"backend": "transformers", "shard_positions": 400}
    started = threading.Thread(
        target=logitcache.build,
        args=(str(teacher), str(corpus), tmp_path),
        kwargs=build_range | {"shard_range": (1, 2)},
    )
    low_rank_by_default(monkeypatch)
    started.start()
    build(teacher, corpus, tmp_path, shard_range=(0, 2), tail_rank=0)
    started.join()
    assert captured(finish(tmp_path)) == BUCKET


def test_a_reused_cache_gives_what_is_not_given(
    teacher: Path,
    corpus: Path,
    tmp_path: Path,
    bucket_by_default: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    old = build(teacher, corpus, tmp_path / "old", temperatures=(2,))
    low_rank_by_default(monkeypatch)
    monkeypatch.setattr(worker, "start_teacher", lambda *_: pytest.fail("weights were loaded"))
    with caplog.at_level(logging.INFO, "logitcache"):
        cache = build(teacher, corpus, tmp_path / "c", reuse=old.path)
    assert rows(cache) == rows(old)
    assert f"what is not given is as in --reuse {old.path}: --top-k 64" in caplog.text
    with pytest.raises(UserError, match=r"--reuse .*: capture\.tail_rank is None there, 6 here\. Its"):
        build(teacher, corpus, tmp_path / "d", reuse=old.path, tail_rank=6)


def test_a_corpus_too_short_for_a_basis_that_nobody_asked_for_gets_none(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    low_rank_by_default(monkeypatch)
    data = tmp_path / "rows.jsonl"
    data.write_text((json.dumps({"input_ids": [1, 2, 3, 4, 5, 6]}) + "\n") * 20)  # 100 positions, 5 different ones
    with caplog.at_level(logging.INFO, "logitcache"):
        cache = build(teacher, data, tmp_path / "c")
    assert captured(cache) == BUCKET
    assert "and there are 5: choose at most 2, or a longer corpus; so no coefficients are stored" in caplog.text
    caplog.clear()
    assert build(teacher, data, tmp_path / "c").identity == cache.identity
    for given in ({"tail_rank": 6}, {"tail_probes": 1}):
        with pytest.raises(UserError, match=r"--tail-rank 6: .* there are 5"):
            build(teacher, data, tmp_path / "d", **given)
    plan = logitcache.plan(str(teacher), str(data), backend="transformers")
    assert {plan.settings.tail_parts.rank, *(choice.tail_rank for choice in plan.choices)} == {0}
    assert captured(build(teacher, data, tmp_path / "d", tail_rank=2)) == LOW_RANK | {"tail_rank": 2}


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

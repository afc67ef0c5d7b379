"""The real vLLM engine in whole builds, killed and resumed, and the flat route by itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

import logitcache
from logitcache.capture.settings import CaptureSettings
from logitcache.capture.teachers.base import TeacherModel
from logitcache.capture.teachers.vllm import flat as vllm_flat
from logitcache.capture.teachers.vllm.flat import VllmFlatTeacher
from logitcache.cli import main
from logitcache.errors import UserError
from logitcache.format.sequences import TokenSequence
from tests.helpers.processes import run_command, started_command
from tests.helpers.references import assert_scores_agree, full_logprobs
from tests.helpers.underway import num_finished_shards

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("forked_vllm")]


def command(teacher: Path, corpus: Path, out: Path) -> list[str]:
    # Fewer tokens a step than the longest sequence has: prompts are prefilled in chunks.
    passed_on = ["--max-num-batched-tokens", "64", "--max-num-seqs=32"]
    return [
        *("logitcache", "build", "--backend", "vllm", "--top-k", "16", "--tail-rank", "0", "--shard-positions", "60"),
        *("--precision", "exact"),
        *("--teacher", str(teacher), "--data", str(corpus), "--out", str(out), *passed_on),
    ]


@pytest.fixture(scope="module")
def cache(teacher: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> logitcache.LogitCache:
    """Built by two processes: the first, whose engine vLLM spawned as it does for users, was killed after its first shards."""
    out = tmp_path_factory.mktemp("vllm") / "cache"
    first = subprocess.Popen([sys.executable, "-m", *command(teacher, corpus, out)], stderr=subprocess.PIPE, text=True)
    while first.poll() is None and num_finished_shards(out) < 2:
        time.sleep(0.001)
    children = psutil.Process(first.pid).children(recursive=True) if first.poll() is None else []
    os.kill(first.pid, signal.SIGKILL)
    errors = first.communicate(timeout=60)[1]
    assert first.returncode == -signal.SIGKILL, errors
    assert children, "the engine runs in a process of its own"
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive, "the engine outlived the build"
    kept = {path: path.stat().st_mtime_ns for path in out.glob("data/*.parquet")}
    second = run_command(*command(teacher, corpus, out))
    assert second.returncode == 0, second.stderr
    assert "continuing: " in second.stderr
    recorded = {path for path, written in kept.items() if path.stat().st_mtime_ns == written}
    assert len(recorded) >= 2
    return logitcache.open(out)


def test_scores_are_those_of_transformers_in_float32(cache: logitcache.LogitCache, teacher: Path) -> None:
    assert cache.manifest.fingerprint["teacher"]["engine"] == "vllm"
    assert cache.manifest.fingerprint["teacher"]["route"] == "pooling"
    assert_scores_agree(cache, teacher, list(range(0, 40, 3)))


def test_rows_are_those_of_a_build_with_transformers(
    cache: logitcache.LogitCache, teacher: Path, corpus: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"backend": "transformers", "top_k": 16, "tail_rank": 0, "precision": "exact"}
    reference = logitcache.build(str(teacher), str(corpus), tmp_path / "c", **settings)
    assert len(cache) == len(reference)
    for ours, theirs in zip(cache, reference, strict=True):
        assert ours.row_id == theirs.row_id
        assert np.array_equal(ours.positions, theirs.positions)
        assert np.allclose(ours.targets.logprobs, theirs.targets.logprobs, atol=1e-4)
        assert np.allclose(np.exp(ours.targets.tail_logprob), np.exp(theirs.targets.tail_logprob), atol=1e-5)


def test_ctrl_c_ends_build_and_engine_with_one_line(teacher: Path, texts: list[str], tmp_path: Path) -> None:
    out, many = tmp_path / "cache", tmp_path / "many.jsonl"  # so many that it is not done before it is told
    many.write_text("".join(json.dumps({"text": f"{number} {text}"}) + "\n" for number in range(100) for text in texts))
    with started_command(*command(teacher, many, out)) as run:
        while run.is_alive() and not num_finished_shards(out):
            time.sleep(0.001)
        children = psutil.Process(run.pid).children(recursive=True)
        os.killpg(run.pid, signal.SIGINT)  # as a terminal does: to the build and its engine
    errors = run.said[1]
    assert run.exitcode == 130, errors
    own = [line for line in errors.splitlines() if "resource_tracker" not in line]  # which vLLM's end may make complain
    assert own[-1].startswith("logitcache: stopped; the same command continues")
    assert "Traceback" not in errors
    assert not psutil.wait_procs(children, timeout=60)[1]


def test_an_option_that_vllm_does_not_know_is_refused_in_one_line(
    teacher: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, *options = command(teacher, corpus, tmp_path / "c")
    assert main([*options, "--no-such-option", "1"]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(errors) == 1
    assert "--no-such-option" in errors[0]


@pytest.fixture(scope="module")
def flat(teacher: Path) -> Iterator[VllmFlatTeacher]:
    """The engine's core is in a process of its own, as vLLM places it by default."""
    model = TeacherModel.load(str(teacher), None, "float32", False)
    started = VllmFlatTeacher(model, 200, 16, {"max_num_batched_tokens": 64, "max_num_seqs": 8})
    yield started
    started.close()


def sequences(count: int) -> list[TokenSequence]:
    random = np.random.default_rng(0)
    lengths = random.integers(2, 201, count)
    masks = [np.concatenate([[False, True], random.random(length - 2) < 0.6]) for length in lengths]
    return [TokenSequence(random.integers(0, 512, len(mask), dtype=np.int32), mask) for mask in masks]


@pytest.mark.parametrize("top_k", [4, 16])
def test_the_flat_route_streams_what_transformers_gives(
    flat: VllmFlatTeacher, teacher: Path, top_k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_flat, "SUBMITTED_ENTRIES", 300 * (top_k + 1))  # windows of some 300 tokens
    asked = sequences(12)
    taken: list[TokenSequence] = []

    def taking() -> Iterator[TokenSequence]:
        for sequence in asked:
            taken.append(sequence)
            yield sequence

    for index, targets in enumerate(flat.score(taking(), CaptureSettings(top_k=top_k))):
        assert sum(len(sequence.input_ids) for sequence in taken[index + 1 :]) <= 300 + 200, "reads too far ahead"
        full = full_logprobs(teacher, asked[index].input_ids)[asked[index].positions.astype(np.int64)]
        ids = torch.from_numpy(targets.token_ids).long()
        assert ids.shape == (len(asked[index].positions), top_k)
        expected = full.gather(1, ids)
        assert np.abs(targets.logprobs - expected.numpy()).max() <= 1e-4
        assert np.abs(np.exp(targets.tail_logprob) - (1 - expected.exp().sum(dim=1)).numpy()).max() <= 1e-5
    assert index == len(asked) - 1


def test_the_flat_route_notices_rows_of_other_tokens(flat: VllmFlatTeacher, monkeypatch: pytest.MonkeyPatch) -> None:
    generate = flat._engine.generate
    monkeypatch.setattr(flat._engine, "generate", lambda *prompts, **options: generate(*prompts, **options)[::-1])
    first, *others = sequences(3)
    with pytest.raises(UserError, match=f"row {first.row_id}: vLLM scored other tokens"):
        list(flat.score([first, *others], CaptureSettings(top_k=4)))


def test_the_flat_route_refuses_what_would_end_the_engine(flat: VllmFlatTeacher) -> None:
    foreign = TokenSequence(np.array([1, 512], np.int32), np.array([False, True]))
    with pytest.raises(UserError, match=f"row {foreign.row_id}: token ids 1…512"):
        list(flat.score([foreign], CaptureSettings(top_k=4)))

"""kill -9 at any moment of a build costs the shards in flight and nothing else."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import logitcache
from tests.helpers.processes import FORKED
from tests.helpers.underway import num_finished_shards

KILLS = 4


def settings(out: Path) -> dict[str, Any]:
    return {
        "out": out,
        "backend": "transformers",
        "top_k": 16,
        "precision": "exact",
        "tail_groups": 4,
        "tail_rank": 4,
        "shard_positions": 60,
    }


def run_build(teacher: str, corpus: str, out: Path) -> None:
    import torch

    torch.set_num_threads(1)
    logitcache.build(teacher, corpus, **settings(out))


@pytest.mark.slow
def test_kills_and_then_the_same_rows_as_an_uninterrupted_build(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    whole = logitcache.build(str(teacher), str(corpus), **settings(tmp_path / "whole"))
    out, moments = tmp_path / "killed", random.Random(0)
    kills = 0
    while kills < KILLS:
        process = FORKED.Process(target=run_build, args=(str(teacher), str(corpus), out))
        process.start()
        wanted = num_finished_shards(out) + moments.randint(0, 2)
        while process.is_alive() and num_finished_shards(out) < wanted:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.05))
        finished = (out / "logitcache.json").exists()
        process.kill()  # SIGKILL
        process.join()
        kills += not finished
        if (out / "logitcache.json").exists():
            assert logitcache.open(out).num_positions == whole.num_positions
            shutil.rmtree(out)  # a fast machine: begin another one
    cache = logitcache.build(str(teacher), str(corpus), **settings(out))
    assert not list(out.rglob("*.tmp"))
    for ours, theirs in zip(cache, whole, strict=True):
        assert ours.row_id == theirs.row_id
        assert np.array_equal(ours.input_ids, theirs.input_ids)
        assert np.array_equal(ours.loss_mask, theirs.loss_mask)
        assert np.array_equal(ours.targets.token_ids, theirs.targets.token_ids)
        assert np.allclose(ours.targets.tail_logprob, theirs.targets.tail_logprob, atol=1e-4)
        assert np.allclose(ours.targets.logprobs, theirs.targets.logprobs, atol=1e-4)
        assert ours.targets.tail_coefficients is not None and theirs.targets.tail_coefficients is not None
        assert np.allclose(ours.targets.tail_coefficients, theirs.targets.tail_coefficients, atol=0.01)

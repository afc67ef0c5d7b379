"""Slow, independent computations that captures are compared with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from logitcache import LogitCache


def full_logprobs(teacher: Path, input_ids: np.ndarray) -> torch.Tensor:
    """Every row's full log-distribution from transformers in float32, one sequence at a time, normalised in float64 [T, V]."""
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor(input_ids).long()[None]).logits[0]
    return logits.double().log_softmax(dim=-1)


def assert_scores_agree(cache: LogitCache, teacher: Path, rows: list[int]) -> None:
    """|Δ log p| ≤ 1e-4, the same ids but for ties, the tail mass within 1e-5."""
    for row in rows:
        sequence = cache[row]
        expected = full_logprobs(teacher, sequence.input_ids)[sequence.positions.astype(np.int64)]
        targets = sequence.targets
        ids = torch.from_numpy(targets.token_ids.astype(np.int64))
        logprobs = torch.tensor(targets.logprobs).double()
        assert (expected.gather(1, ids) - logprobs).abs().max() <= 1e-4
        best = expected.topk(ids.shape[1], dim=-1)
        differing = best.indices != ids
        assert ((best.values - expected.gather(1, ids)).abs()[differing] <= 1e-4).all(), "ids differ beyond ties"
        tail = 1 - expected.gather(1, ids).exp().sum(dim=-1)
        assert (tail - torch.tensor(targets.tail_logprob).double().exp()).abs().max() <= 1e-5

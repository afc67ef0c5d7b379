"""Slow, independent computations that captures are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from logitcache import CachedSequence, LogitCache


def full_logprobs(teacher: Path, input_ids: np.ndarray) -> torch.Tensor:
    """Every row's full log-distribution from transformers in float32, one sequence at a time, normalised in float64 [T, V]."""
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor(input_ids).long()[None]).logits[0]
    return logits.double().log_softmax(dim=-1)


def assert_scores_agree(cache: Sequence[CachedSequence], teacher: Path, rows: list[int]) -> None:
    """|Δ log p| ≤ 1e-4 beyond the declared rounding, the same ids but for ties, the tail mass within 1e-5."""
    quantization = cache.manifest.layout.quantization if isinstance(cache, LogitCache) else None
    for row in rows:
        sequence = cache[row]
        expected = full_logprobs(teacher, sequence.input_ids)[sequence.positions.astype(np.int64)]
        targets = sequence.targets
        stored = expected.gather(1, torch.from_numpy(targets.token_ids.astype(np.int64))).numpy()
        allowed = 1e-4 + (quantization.bound(stored) if quantization else 0)
        assert (np.abs(stored - targets.logprobs) <= allowed).all()
        best = expected.topk(stored.shape[1], dim=-1).values.numpy()
        assert np.abs(best + np.sort(-stored, axis=1)).max() <= 1e-4, "ids differ beyond ties"
        tail = 1 - np.exp(stored).sum(axis=1)
        assert np.abs(tail - np.exp(targets.tail_logprob, dtype=np.float64)).max() <= (5e-5 if quantization else 1e-5)

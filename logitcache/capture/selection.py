"""Logits → SparseTargets on the logits' device: entries, tail mass, tail groups, tempered tails, samples."""

from __future__ import annotations

import numpy as np
import torch

from logitcache.capture.settings import CaptureSettings
from logitcache.format.targets import PAD_ID, SparseTargets


def select(
    logits: torch.Tensor,
    settings: CaptureSettings,
    tail_groups: torch.Tensor | None = None,
    uniforms: torch.Tensor | None = None,
) -> SparseTargets:
    """The stored part of softmax(logits).

    logits: [N, V], any float dtype, padding columns already cut off; reduced in float32.
    tail_groups: int64 [V], group of each id, when `settings.tail_groups`.
    uniforms: float64 [N, s] in [0, 1), when `settings.tail_samples`: the samples are the tail's inverse distribution
    function at these numbers, so that the caller's seed decides them on every device.
    """
    logprobs = logits.float().log_softmax(dim=-1)
    top = logprobs.topk(settings.top_k, dim=-1)
    held = _held(top.values, settings)
    tail = logprobs.clone()
    tail.scatter_(1, top.indices, torch.where(held, float("-inf"), top.values))
    tail_logprob = tail.logsumexp(dim=-1)
    k = int(held.sum(dim=-1).max()) if len(held) else settings.top_k

    group_logprobs = tail_entropy = samples = sample_logprobs = None
    if settings.tail_groups:
        assert tail_groups is not None
        sizes = tail_groups.bincount(minlength=settings.tail_groups).tolist()
        bands = tail[:, tail_groups.argsort()].split(sizes, dim=1)
        group_logprobs = _numpy(torch.stack([band.logsumexp(dim=-1) for band in bands], dim=1))
    if settings.tail_entropy:
        # Σ (p / t) log p over the tail (LOSSES: s′(1)); an empty tail has none.
        share = (tail - tail_logprob[:, None]).exp()
        tail_entropy = _numpy(torch.where(tail.isinf(), 0.0, share * tail).sum(dim=-1))
    if settings.tail_samples:
        assert uniforms is not None
        cumulative = tail.double().exp().cumsum(dim=-1)
        drawn = torch.searchsorted(cumulative, uniforms * cumulative[:, -1:], right=True).clamp_(max=tail.shape[1] - 1)
        sample_logprobs = _numpy(tail.gather(1, drawn))
        samples = np.where(np.isinf(sample_logprobs), PAD_ID, drawn.cpu().numpy()).astype(np.int32)
    return SparseTargets(
        token_ids=torch.where(held, top.indices, PAD_ID)[:, :k].int().cpu().numpy(),
        logprobs=_numpy(torch.where(held, top.values, float("-inf"))[:, :k]),
        tail_logprob=_numpy(tail_logprob),
        group_logprobs=group_logprobs,
        tempered_tail={t: _numpy((tail / t).logsumexp(dim=-1)) for t in settings.temperatures},
        tail_entropy=tail_entropy,
        sample_ids=samples,
        sample_logprobs=sample_logprobs,
    )


def select_from_top_k(
    token_ids: np.ndarray, logprobs: np.ndarray, settings: CaptureSettings, vocab_size: int
) -> SparseTargets:
    """The same from an engine's top-k alone: the tail is log(1 − Σp), and nothing else of it can be known.

    token_ids: int [N, ≥ top_k].  logprobs: float32 [N, ≥ top_k], descending. Padding columns are left to the tail.
    """
    is_padding = token_ids >= vocab_size
    order = np.argsort(is_padding, axis=1, kind="stable")[:, : settings.top_k]
    token_ids = np.take_along_axis(token_ids, order, axis=1)
    logprobs = np.take_along_axis(np.where(is_padding, -np.inf, logprobs).astype(np.float32), order, axis=1)
    held = _held(torch.from_numpy(logprobs), settings).numpy()
    mass = np.where(held, np.exp(logprobs, dtype=np.float64), 0.0).sum(axis=1)
    k = int(held.sum(axis=1).max(initial=0))
    return SparseTargets(
        token_ids=np.where(held, token_ids, PAD_ID)[:, :k].astype(np.int32),
        logprobs=np.where(held, logprobs, -np.inf)[:, :k],
        # Below float32's resolution of 1 the complement is rounding noise.
        tail_logprob=np.log(np.maximum(1.0 - mass, 2.0**-24)).astype(np.float32),
    )


def _held(descending: torch.Tensor, settings: CaptureSettings) -> torch.Tensor:
    """Which of the top-k log-probabilities [N, k] become entries: bool [N, k], a prefix of each row, without −inf."""
    possible = ~descending.isneginf()
    if settings.top_p >= 1:
        return possible
    mass_before = descending.exp().cumsum(dim=-1) - descending.exp()
    rank = torch.arange(descending.shape[1], device=descending.device)
    return possible & ((mass_before < settings.top_p) | (rank < settings.min_k))


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.float().cpu().numpy()

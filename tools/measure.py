"""What the benchmarks share: peak memory, the machine's name, a synthetic cache and a synthetic training step.

Torch is imported where it is used: benchmarks that need none measure memory without it.
"""

from __future__ import annotations

import ctypes
import platform
import resource
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import inf, log, log1p, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from logitcache.format.layout import Layout
from logitcache.format.manifest import Manifest
from logitcache.format.sequences import TokenSequence
from logitcache.format.shards import ShardWriter, shard_name
from logitcache.format.targets import SparseTargets
from logitcache.storage.folder import Folder

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TOKENS_PER_SEQUENCE = 257
# Ids of rank below this come up about equally often.
RANK_OFFSET = 16
NUM_SAMPLES = 16
NUM_PROBES = 2
# Correlation of the teacher's logits with the student's; with the sharpness below KL is about one nat.
AGREEMENT = 0.97
# Standard deviation of the logits over √(2 ln V): the entropy is then about 1.5 nats, whatever V is.
SHARPNESS = 1.5


def peak_mib() -> float:
    """Largest resident memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def resident_mib() -> float:
    """Resident memory of this process now."""
    return _status_bytes("VmRSS") / 2**20


def peak_of_tree_mib(process: subprocess.Popen[str]) -> float:
    """Waits for a process; the most resident memory that it and all below it had together, looked at ten times a second.

    Pages that several of them share, such as libraries, count in each.
    """
    import psutil

    peak = 0
    while process.poll() is None:
        held = 0
        with suppress(psutil.NoSuchProcess):
            top = psutil.Process(process.pid)
            for member in [top, *top.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):
                    held += member.memory_info().rss
        peak = max(peak, held)
        time.sleep(0.1)
    return peak / 2**20


def peak_beyond(run: Callable[[], None], device: str) -> int:
    """Bytes that a call holds at its peak beyond what was held before; on a CPU resident, on CUDA allocated ones."""
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # what was freed would serve the call unseen; large blocks go back by themselves
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _status_bytes("VmRSS")
    run()
    return _status_bytes("VmHWM") - before


def available_bytes(device: str) -> int:
    """Memory that a new process can take."""
    if device == "cuda":
        import torch

        return torch.cuda.mem_get_info()[0]
    return _kilobytes("/proc/meminfo", "MemAvailable")


def _status_bytes(field: str) -> int:
    return _kilobytes("/proc/self/status", field)


def _kilobytes(path: str, field: str) -> int:
    """A field of a file of `field: 123 kB` lines, in bytes."""
    (line,) = [line for line in Path(path).read_text().splitlines() if line.startswith(f"{field}:")]
    return int(line.split()[1]) * 1024


def machine() -> str:
    """Processor and kernel architecture, for the head of a table."""
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    return f"{models[0] if models else platform.processor()}, {len(models)} cores"


def synthetic_rows(
    positions: int, k: int, vocab_size: int, tokens_per_sequence: int = TOKENS_PER_SEQUENCE
) -> list[tuple[TokenSequence, SparseTargets]]:
    """Sequences whose distributions have the shapes of real ones: Zipf-like ids and log-probabilities, in any order."""
    random = np.random.default_rng(0)
    per_sequence = tokens_per_sequence - 1
    ids_by_rank = random.permutation(vocab_size).astype(np.int32)
    # One id from each of k bands of rank, a band's width growing with its rank: no id twice.
    edges = RANK_OFFSET * np.expm1(np.linspace(0, log1p((vocab_size - k) / RANK_OFFSET), k + 1))
    bands = np.rint(edges).astype(np.int64) + np.arange(k + 1)
    rows = []
    for _ in range(-(-positions // per_sequence)):
        ranks = random.integers(bands[:-1], bands[1:], (per_sequence, k))
        weights = -random.uniform(1, 2, (per_sequence, 1)) * np.log(1 + np.arange(k))
        weights -= random.uniform(0, 0.1, (per_sequence, k))
        weights[:, ::-1].sort(axis=1)
        logprobs = weights - np.log(np.exp(weights).sum(axis=1, keepdims=True)) - 0.1
        tail = np.full(per_sequence, np.log1p(-np.exp(-0.1)), dtype=np.float32)
        targets = SparseTargets(ids_by_rank[random.permuted(ranks, axis=1)], logprobs.astype(np.float32), tail)
        ids = random.integers(0, vocab_size, tokens_per_sequence, dtype=np.int32)
        rows.append((TokenSequence(ids, np.arange(tokens_per_sequence) > 0), targets))
    return rows


def write_synthetic_cache(
    root: Path, rows: Sequence[tuple[TokenSequence, SparseTargets]], layout: Layout, copies: int
) -> None:
    """A cache whose shards all hold the same rows: one file under many names (hard links), so that size costs nothing."""
    names = [shard_name(index, copies) for index in range(copies)]
    with ShardWriter(Folder(root), names[0], layout) as writer:
        for sequence, targets in rows:
            writer.write(sequence, targets)
    for name in names[1:]:
        (root / name).hardlink_to(root / names[0])
    shards = tuple(replace(writer.info, name=name) for name in names)
    k = rows[0][1].token_ids.shape[1]
    teacher = {"name": "synthetic", "architecture": "none", "dtype": "float32", "engine": "none", "engine_version": "0"}
    fingerprint = {"teacher": teacher, "corpus": {"sources": []}, "capture": {"top_k": k}}
    Manifest(layout, fingerprint, shards, {}, "tools/measure.py").write(Folder(root))


@dataclass(frozen=True)
class TrainingStep:
    """What the loss of a training step is given, and a teacher whose outputs are known in full."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D], student's and teacher's
    labels: Tensor  # [N] int64, drawn from the teacher
    teacher_hidden: Tensor  # [N, D]
    tail_groups: Tensor  # [V] int64
    basis: tuple[Tensor, ...]  # offset [V], directions [V, R] and weights [V] of a low-rank tail
    teacher: dict[int, dict[str, Tensor]]  # k → what is stored of the teacher, as the losses name it

    def first(self, positions: int) -> TrainingStep:
        """Its first positions, with gradients of their own."""
        hidden, weight = (tensor.detach().requires_grad_() for tensor in (self.hidden[:positions], self.weight))
        teacher = {k: {name: tensor[:positions] for name, tensor in held.items()} for k, held in self.teacher.items()}
        return TrainingStep(
            *(hidden, weight, self.labels[:positions], self.teacher_hidden[:positions]),
            *(self.tail_groups, self.basis, teacher),
        )

    def stored(self, k: int, *more: str) -> dict[str, Any]:
        """What every loss needs of the teacher, and what some do, by their arguments' names."""
        from trainer import TailBasis

        held: dict[str, Any] = self.teacher[k] | {"tail_groups": self.tail_groups, "tail_basis": TailBasis(*self.basis)}
        return {name: held[name] for name in ("token_ids", "logprobs", "tail_logprob", *more)}


def synthetic_step(
    shape: tuple[int, int, int],
    *,
    entries: Sequence[int],
    num_groups: int,
    rank: int,
    temperature: float,
    dtype: torch.dtype,
    device: str,
) -> tuple[TrainingStep, float]:
    """A student and a teacher near it with peaked distributions, shape (V, N, D); and the teacher's mean entropy, nats.

    What is stored of the teacher is exact, float32; its tempered tail is that of `temperature`. The low-rank tail has
    directions at random.
    """
    import torch

    from trainer import TailBasis

    vocab_size, positions, hidden_size = shape
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    hidden = normal(positions, hidden_size)
    teacher_hidden = (AGREEMENT * hidden + sqrt(1 - AGREEMENT**2) * normal(positions, hidden_size)).to(dtype)
    weight = normal(vocab_size, hidden_size).mul_(SHARPNESS * sqrt(2 * log(vocab_size) / hidden_size)).to(dtype)
    rows = max(1, 2**25 // vocab_size)
    mean = (teacher_hidden[:rows] @ weight.t()).float().softmax(1).mean(0)
    tail_groups = torch.from_numpy(rank_bands(mean.cpu().numpy(), num_groups)).long().to(device)

    directions = torch.linalg.qr(normal(vocab_size, rank + 1)).Q
    directions = vocab_size**0.5 * (directions[:, 1:] - directions[:, 1:].mean(0))
    basis = mean.log(), directions, torch.full_like(mean, 1 / vocab_size)

    def stored(log_p: Tensor, k: int) -> dict[str, Tensor]:
        logprobs, token_ids = log_p.topk(k)
        rest = log_p.scatter(1, token_ids, -inf)
        probabilities = rest.exp()
        sample_ids = torch.multinomial(probabilities, NUM_SAMPLES, replacement=True, generator=generator)
        probe_ids = torch.randint(vocab_size, (len(rest), NUM_PROBES), generator=generator, device=device)
        group_masses = probabilities.new_zeros(len(rest), num_groups).index_add_(1, tail_groups, probabilities)
        return {
            "token_ids": token_ids,
            "logprobs": logprobs,
            "tail_logprob": probabilities.sum(1).log(),
            "tempered_tail": (rest / temperature).exp().sum(1).log(),
            "group_logprobs": group_masses.log(),
            "sample_ids": sample_ids,
            "sample_logprobs": log_p.gather(1, sample_ids),
            "tail_coefficients": TailBasis(*basis).project(log_p),
            "probe_ids": probe_ids,
            "probe_residuals": (log_p - basis[0]).gather(1, probe_ids),
        }

    labels, entropies, parts = [], [], []
    for teacher_rows in teacher_hidden.split(rows):
        log_p = (teacher_rows @ weight.t()).float().log_softmax(1)
        entropies.append(-(log_p.exp() * log_p).sum(1))
        labels.append(torch.multinomial(log_p.exp(), 1, replacement=True, generator=generator)[:, 0])
        parts.append({k: stored(log_p, k) for k in entries})
    teacher = {k: {name: torch.cat([part[k][name] for part in parts]) for name in parts[0][k]} for k in entries}
    step = TrainingStep(hidden.to(dtype), weight, torch.cat(labels), teacher_hidden, tail_groups, basis, teacher)
    return step, float(torch.cat(entropies).mean())


def rank_bands(mean_probability: np.ndarray, num_groups: int) -> np.ndarray:
    """Tail groups for benchmarks, bands of rank that hold about the same mass under Zipf's law: int32 [V]."""
    vocab_size = len(mean_probability)
    edges = np.geomspace(1, vocab_size, num_groups + 1)[1:-1]
    groups = np.empty(vocab_size, dtype=np.int32)
    groups[np.argsort(-mean_probability, kind="stable")] = np.searchsorted(edges, np.arange(vocab_size), side="right")
    return groups

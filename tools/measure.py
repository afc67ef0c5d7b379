"""What the benchmarks share: peak memory, a synthetic cache, and the machine's name."""

from __future__ import annotations

import platform
import resource
from pathlib import Path

import numpy as np

from logitcache.format.codec import Layout
from logitcache.format.manifest import Manifest
from logitcache.format.sequences import TokenSequence
from logitcache.format.shards import ShardWriter, shard_name
from logitcache.format.targets import SparseTargets

POSITIONS_PER_SHARD = 1 << 17
TOKENS_PER_SEQUENCE = 257


def peak_mib() -> float:
    """Largest resident memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def machine() -> str:
    """Processor and kernel architecture, for the head of a table."""
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    return f"{models[0] if models else platform.processor()}, {len(models)} cores"


def synthetic_cache(root: Path, positions: int, k: int, vocab_size: int) -> None:
    """A cache of Zipf-like distributions over shuffled ids: the bytes and shapes of a real one, made in seconds."""
    random = np.random.default_rng(0)
    per_sequence = TOKENS_PER_SEQUENCE - 1
    layout = Layout(vocab_size)
    sequences = -(-positions // per_sequence)
    per_shard = POSITIONS_PER_SHARD // per_sequence
    count = -(-sequences // per_shard)
    shards = []
    for index in range(count):
        with ShardWriter(root, shard_name(index, count), layout) as writer:
            for _ in range(min(per_shard, sequences - index * per_shard)):
                ids = random.integers(0, vocab_size, TOKENS_PER_SEQUENCE, dtype=np.int32)
                mask = np.arange(TOKENS_PER_SEQUENCE) > 0
                first = random.integers(0, vocab_size, (per_sequence, 1))
                token_ids = ((first + 7919 * np.arange(k)) % vocab_size).astype(np.int32)
                weights = -random.uniform(1, 2, (per_sequence, 1)) * np.log(1 + np.arange(k)) - random.uniform(
                    0, 0.1, (per_sequence, k)
                )
                weights = -np.sort(-weights, axis=1)
                logprobs = weights - np.log(np.exp(weights).sum(axis=1, keepdims=True)) - 0.1
                tail = np.full(per_sequence, np.log1p(-np.exp(-0.1)), dtype=np.float32)
                writer.write(TokenSequence(ids, mask), SparseTargets(token_ids, logprobs.astype(np.float32), tail))
        shards.append(writer.info)
    Manifest(layout, {}, tuple(shards), {}, "tools/measure.py").write(root)

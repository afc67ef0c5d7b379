"""Reading a cache into numpy: positions per second on one core, against `datasets` and polars on the same Parquet files.

    python tools/bench_read.py

Each reader runs in a process of its own with one thread and ends with the same arrays of every row: token ids and
log-probabilities [M, k] and the tail [M]. Median of three passes; the cache is in the page cache.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from measure import machine, peak_mib, synthetic_cache

from logitcache.table import aligned

K = 64
PASSES = 3


def read_logitcache(root: Path) -> Iterator[np.ndarray]:
    import logitcache

    for sequence in logitcache.open(root):
        yield sequence.targets.logprobs


def read_logitcache_shuffled(root: Path) -> Iterator[np.ndarray]:
    import logitcache

    for sequence in logitcache.open(root).iter_sequences(shuffle=True):
        yield sequence.targets.logprobs


def read_datasets(root: Path) -> Iterator[np.ndarray]:
    from datasets import load_dataset

    rows: Any = load_dataset("parquet", data_files=str(root / "data/*.parquet"), split="train", streaming=True)
    for row in rows.with_format("numpy"):
        yield _padded(row["token_ids"], row["logprobs"], row["tail_logprob"])


def read_polars(root: Path) -> Iterator[np.ndarray]:
    import polars

    for path in sorted(root.glob("data/*.parquet")):
        frame = polars.read_parquet(path)
        columns = zip(frame["token_ids"], frame["logprobs"], frame["tail_logprob"], strict=True)
        for ids, logprobs, tail in columns:
            yield _padded(ids.to_numpy(), logprobs.to_numpy(), tail.to_numpy())


def _padded(ids: np.ndarray, logprobs: np.ndarray, tail: np.ndarray) -> np.ndarray:
    """[M, k] arrays of one row; here all positions have equally many entries."""
    ids.reshape(len(tail), -1)
    return logprobs.reshape(len(tail), -1)


READERS: dict[str, Callable[[Path], Iterator[np.ndarray]]] = {
    "logitcache": read_logitcache,
    "logitcache, shuffled": read_logitcache_shuffled,
    "datasets, streaming, numpy format": read_datasets,
    "polars": read_polars,
}


def measure(name: str, root: Path) -> None:
    times = []
    for _ in range(PASSES):
        began = time.perf_counter()
        positions = sum(len(logprobs) for logprobs in READERS[name](root))
        times.append(time.perf_counter() - began)
    print(positions / statistics.median(times), peak_mib())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=500_000)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure[0], Path(options.measure[1]))
        return
    one_thread = {"OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"}
    with tempfile.TemporaryDirectory() as folder:
        synthetic_cache(Path(folder), options.positions, K, vocab_size=128_000)
        rows = [["", "positions/s", "ratio", "peak MiB"]]
        ours = 0.0
        for name in READERS:
            command = ["taskset", "-c", "0", sys.executable, __file__, "--measure", name, folder]
            result = subprocess.run(command, env=os.environ | one_thread, check=True, capture_output=True, text=True)
            rate, peak = map(float, result.stdout.split()[-2:])
            ours = ours or rate
            rows.append([name, f"{rate:,.0f}", f"{rate / ours:.3f}", f"{peak:,.0f}"])
    print(f"{options.positions:,} positions, k = {K}, one core ({machine()})")
    print(aligned(rows))


if __name__ == "__main__":
    main()

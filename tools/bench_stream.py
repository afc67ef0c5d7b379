"""A cache of 100 million positions, streamed once: time until the first batch, and resident memory on the way.

    python tools/bench_stream.py [--positions 100000000] [--precision balanced]

The cache is synthetic: one shard of 262 144 positions, as many as a build's have, under many names (hard links), for to write
100 million takes minutes and tells nothing more. So the disk is not measured, the shard stays in the page cache; every shard
is opened, hashed, checked and decoded for itself. Each order runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import machine, peak_mib, resident_mib, synthetic_rows, write_synthetic_cache

from logitcache.format.layout import Layout
from logitcache.format.quantization import DEFAULT_PRECISION, PRESETS
from logitcache.table import aligned

K = 64
VOCAB = 128_000
POSITIONS_PER_SHARD = 1 << 18
BATCH = 32
SHARES = [1, 5, 10, 25, 50, 75, 100]
ORDERS = ["in order", "shuffled"]


def measure(root: Path, order: str) -> None:
    """Prints what a pass takes, as JSON."""
    import logitcache

    logitcache.open(root.parent / "warm")[0]  # imports and the first allocations
    before_mib = resident_mib()
    began = time.perf_counter()
    cache = logitcache.open(root)
    opened_s = time.perf_counter() - began
    stream = cache.iter_sequences(shuffle=order == "shuffled")
    batch = [next(stream) for _ in range(BATCH)]
    first_batch_s = time.perf_counter() - began
    positions = sum(len(row.targets) for row in batch)
    marks = [share * cache.num_positions // 100 for share in SHARES]
    on_the_way: list[float] = []
    for row in stream:
        positions += len(row.targets)
        if positions >= marks[len(on_the_way)]:
            on_the_way.append(resident_mib())
    result = {
        "positions": positions,
        "opened_s": opened_s,
        "first_batch_s": first_batch_s,
        "rate": positions / (time.perf_counter() - began),
        "before_mib": before_mib,
        "on_the_way_mib": on_the_way,
        "peak_mib": peak_mib(),
    }
    print(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=100_000_000)
    parser.add_argument("--precision", choices=list(PRESETS), default=DEFAULT_PRECISION)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(Path(options.measure[0]), options.measure[1])
        return
    copies = -(-options.positions // POSITIONS_PER_SHARD)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        rows = synthetic_rows(POSITIONS_PER_SHARD, K, VOCAB)
        layout = Layout(VOCAB, precision=options.precision)
        write_synthetic_cache(Path(folder) / "cache", rows, layout, copies)
        write_synthetic_cache(Path(folder) / "warm", rows[:1], layout, 1)
        shard_mib = next((Path(folder) / "cache/data").iterdir()).stat().st_size / 2**20
        for order in ORDERS:
            command = [sys.executable, __file__, "--measure", f"{folder}/cache", order]
            results[order] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    print(
        f"{results[ORDERS[0]]['positions']:,} positions, k = {K}, {options.precision}: {copies} shards of "
        f"{shard_mib:.0f} MiB, all of them one file under many names, in the page cache ({machine()})"
    )
    shares = [f"resident MiB after {share} %" for share in SHARES]
    times = ["until open, s", f"until the first {BATCH} rows, s", "positions/s"]
    columns = [["", *times, "resident MiB before", *shares, "peak MiB"]]
    for order, result in results.items():
        memory = [result["before_mib"], *result["on_the_way_mib"], result["peak_mib"]]
        times = [f"{result['opened_s']:.3f}", f"{result['first_batch_s']:.3f}", f"{result['rate']:,.0f}"]
        columns.append([order, *times, *(f"{mib:,.0f}" for mib in memory)])
    print(aligned(list(zip(*columns, strict=True))))


if __name__ == "__main__":
    main()

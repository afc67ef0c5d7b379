"""A rewrite by one process, and by workers on Ray: whole commands, Ray's start and end included.

    python tools/bench_workers.py [--shards 16] [--workers 1 2]

The cache is synthetic: one shard of 262 144 positions with 64 entries under many names, recoded to 16 entries. Memory is the most
that the command and all below it hold together; pages that they share count in each.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import machine, peak_of_tree_mib, synthetic_rows, write_synthetic_cache

from logitcache.format.layout import Layout
from logitcache.format.manifest import MANIFEST_NAME
from logitcache.table import aligned

K, FEWER, VOCAB, POSITIONS_PER_SHARD = 64, 16, 32_000, 1 << 18


def timed(cache: Path, out: Path, options: list[str]) -> tuple[float, float, str]:
    """Runs the command; seconds, MiB, and the SHA-256 of the manifest that it writes."""
    command = [sys.executable, "-m", "logitcache", "recode", str(cache), "--out", str(out), "--top-k", str(FEWER)]
    began = time.perf_counter()
    process = subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    peak = peak_of_tree_mib(process)
    seconds = time.perf_counter() - began
    if process.returncode:
        raise SystemExit(process.stderr.read() if process.stderr else "")
    return seconds, peak, hashlib.sha256((out / MANIFEST_NAME).read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=16)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    ways: dict[str, list[str]] = {"this process": []} | {
        f"Ray, {n} worker{'s' * (n > 1)}": ["--executor", "ray", "--workers", str(n)] for n in options.workers
    }
    rows = [["", "s", "positions/s", "times the first", "peak MiB"]]
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        write_synthetic_cache(cache, synthetic_rows(POSITIONS_PER_SHARD, K, VOCAB), Layout(VOCAB), options.shards)
        positions = options.shards * POSITIONS_PER_SHARD
        first, digests = 0.0, set()
        for number, (name, given) in enumerate(ways.items()):
            seconds, peak, digest = timed(cache, Path(folder) / str(number), given)
            first = first or seconds
            digests.add(digest)
            rows.append(
                [name, f"{seconds:.1f}", f"{positions / seconds:,.0f}", f"{first / seconds:.2f}", f"{peak:,.0f}"]
            )
    print(f"{positions:,} positions, {K} → {FEWER} entries, {options.shards} shards ({machine()})")
    print(aligned(rows))
    print("the same manifest from all" if len(digests) == 1 else "DIFFERENT manifests")


if __name__ == "__main__":
    main()

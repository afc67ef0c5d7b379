"""Writing and reading a cache on one core: positions per second of CPU time, by precision, and against other readers.

    python tools/bench_read.py

Encoding ends with a shard on disk, checksum included; decoding with numpy arrays of every row: token ids and
log-probabilities [M, k] and the tail [M], all rows of a row group at once under "row groups"; in the row with a rank R,
coefficients and residuals with their tokens as well. `datasets` and polars read
the same files at precision exact: of the other precisions they give the columns, from which the values are still to be
computed. "checks" is the time that the checks of a decoded row group take (ids, masks, masses), by that of reading and decoding
it, best of 30. Each other measurement runs in a process of its own with one thread beside ours that read ahead, all on one
core; median of three passes; the cache is in the page cache.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from measure import machine, peak_mib, synthetic_rows, write_synthetic_cache

from logitcache.format.layout import Layout
from logitcache.format.quantization import PRESETS
from logitcache.format.sequences import TokenSequence
from logitcache.format.tail_parts import TailParts
from logitcache.format.targets import SparseTargets
from logitcache.format.truncation import truncate
from logitcache.table import aligned

K = 64
VOCAB = 128_000
LOW_RANK_K, RANK, PROBES, COEFFICIENT_STEP = 16, 64, 2, 0.125
POSITIONS_PER_SHARD = 1 << 17
PASSES = 3
CHECKED = 30


def low_rank_rows(rows: Sequence[tuple[TokenSequence, SparseTargets]]) -> list[tuple[TokenSequence, SparseTargets]]:
    """The same rows with the first entries, and with coefficients and residuals at random, as a falling spectrum has them."""
    random = np.random.default_rng(1)
    deviations = 16 * COEFFICIENT_STEP / 6 * np.sqrt(RANK / np.arange(1, RANK + 1) / np.log(RANK))
    few = []
    for sequence, targets in rows:
        coefficients = random.normal(scale=deviations, size=(len(targets), RANK)).astype(np.float32)
        residuals = random.normal(scale=0.5, size=(len(targets), PROBES)).astype(np.float32)
        cut = truncate(targets, np.full(len(targets), LOW_RANK_K))
        few.append((sequence, replace(cut, tail_coefficients=coefficients, probe_residuals=residuals)))
    return few


def write(root: Path) -> Iterator[int]:
    """Writes one shard of the cache again, with its precision."""
    import logitcache

    rows = synthetic_rows(POSITIONS_PER_SHARD, K, VOCAB)
    layout = logitcache.open(root).manifest.layout
    if layout.tail_parts.rank:
        rows = low_rank_rows(rows)
    with tempfile.TemporaryDirectory() as folder:
        yield 0  # the clock starts
        write_synthetic_cache(Path(folder), rows, layout, copies=1)
        yield POSITIONS_PER_SHARD


def read_rows(root: Path) -> Iterator[int]:
    import logitcache

    for sequence in logitcache.open(root):
        yield len(sequence.targets)


def read_rows_shuffled(root: Path) -> Iterator[int]:
    import logitcache

    for sequence in logitcache.open(root).iter_sequences(shuffle=True):
        yield len(sequence.targets)


def read_row_groups(root: Path) -> Iterator[int]:
    import logitcache

    for rows in logitcache.open(root).iter_row_groups():
        yield len(rows.targets)


def read_datasets(root: Path) -> Iterator[int]:
    from datasets import load_dataset

    rows: Any = load_dataset("parquet", data_files=str(root / "data/*.parquet"), split="train", streaming=True)
    for row in rows.with_format("numpy"):
        yield _positions(row["token_ids"], row["logprobs"], row["tail_logprob"])


def read_polars(root: Path) -> Iterator[int]:
    import polars

    for path in sorted(root.glob("data/*.parquet")):
        frame = polars.read_parquet(path)
        columns = zip(frame["token_ids"], frame["logprobs"], frame["tail_logprob"], strict=True)
        for ids, logprobs, tail in columns:
            yield _positions(ids.to_numpy(), logprobs.to_numpy(), tail.to_numpy())


def _positions(ids: np.ndarray, logprobs: np.ndarray, tail: np.ndarray) -> int:
    """Positions of a row, once it is in [M, k] arrays; here all positions have equally many entries."""
    ids.reshape(len(tail), -1)
    return len(logprobs.reshape(len(tail), -1))


WAYS: dict[str, Callable[[Path], Iterator[int]]] = {
    "encode": write,
    "decode": read_rows,
    "shuffled": read_rows_shuffled,
    "row groups": read_row_groups,
}
OTHERS: dict[str, Callable[[Path], Iterator[int]]] = {
    "datasets, streaming, numpy format": read_datasets,
    "polars": read_polars,
}


def measure(name: str, root: Path) -> None:
    """Prints positions per second and peak resident MiB."""
    rates = []
    for _ in range(PASSES):
        began = time.process_time()
        positions = 0
        for number in (WAYS | OTHERS)[name](root):
            if number == 0:
                began = time.process_time()
            positions += number
        rates.append(positions / (time.process_time() - began))
    print(statistics.median(rates), peak_mib())


def measured(name: str, root: Path) -> tuple[float, float]:
    """`measure` in a process of its own, on one core."""
    one_thread = {"OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1"}
    command = ["taskset", "-c", "0", sys.executable, __file__, "--measure", name, str(root)]
    result = subprocess.run(command, env=os.environ | one_thread, check=True, capture_output=True, text=True)
    rate, peak = map(float, result.stdout.split()[-2:])
    return rate, peak


def share_of_checks(root: Path) -> float:
    """Time of the checks of the first row group by the time that reading and decoding it takes."""
    import logitcache
    from logitcache.format.codec import DecodedRows
    from logitcache.format.soundness import check_rows

    cache = logitcache.open(root)
    layout, [shard, *_] = cache.manifest.layout, cache._shards
    seconds: dict[str, list[float]] = {"decode": [], "check": []}
    for _ in range(CHECKED):
        began = time.process_time()
        rows = DecodedRows(shard.read_columns(0), layout)
        decoded = time.process_time()
        check_rows(rows, layout)
        seconds["decode"].append(decoded - began)
        seconds["check"].append(time.process_time() - decoded)
    return min(seconds["check"]) / min(seconds["decode"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=4, help=f"of {POSITIONS_PER_SHARD:,} positions each (default 4)")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure[0], Path(options.measure[1]))
        return
    rows = synthetic_rows(POSITIONS_PER_SHARD, K, VOCAB)
    by_precision = [["precision", "bytes per position", *WAYS, "peak MiB, shuffled", "checks"]]
    by_reader = [["reader, precision exact", "positions/s", "ratio", "peak MiB"]]
    with tempfile.TemporaryDirectory() as folder:
        layouts = {precision: Layout(VOCAB, precision=precision) for precision in PRESETS}
        low_rank = Layout(VOCAB, TailParts(rank=RANK, probes=PROBES)).with_coefficient_step(COEFFICIENT_STEP)
        layouts[f"{low_rank.precision}, k = {LOW_RANK_K}, R = {RANK}"] = low_rank
        for precision, layout in layouts.items():
            root = Path(folder) / precision
            stored = low_rank_rows(rows) if layout is low_rank else rows
            write_synthetic_cache(root, stored, layout, options.shards)
            num_bytes = sum(path.stat().st_size for path in root.glob("data/*")) / options.shards
            figures = {name: measured(name, root) for name in WAYS}
            rates = [f"{rate:,.0f}" for rate, _ in figures.values()]
            peak = figures["shuffled"][1]
            checks = f"{share_of_checks(root):.1%}"
            by_precision.append([precision, f"{num_bytes / POSITIONS_PER_SHARD:.1f}", *rates, f"{peak:,.0f}", checks])
        root = Path(folder) / "exact"
        readers = {"logitcache": measured("decode", root)} | {name: measured(name, root) for name in OTHERS}
        ours = readers["logitcache"][0]
        by_reader += [[name, f"{r:,.0f}", f"{r / ours:.3f}", f"{peak:,.0f}"] for name, (r, peak) in readers.items()]
    positions = options.shards * POSITIONS_PER_SHARD
    print(f"{positions:,} synthetic positions, k = {K}, per second of CPU time ({machine()})")
    print(aligned(by_precision), aligned(by_reader), sep="\n\n")


if __name__ == "__main__":
    main()

"""What selection costs beside the lm_head that makes the logits: milliseconds and memory per 1024 rows.

    python tools/bench_selection.py [--vocab 151936] [--entries 64 16 256] [--dtype float32 bfloat16] [--threads 1]

On CUDA where there is one. The logits are random, as peaked as a language model's. The first number of
entries is also measured with everything else that can be captured. The least of several runs counts; on a CPU it is processor
time, all threads together, which other programs disturb least.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from math import log, sqrt
from typing import Any

import numpy as np
import torch
from measure import SHARPNESS, machine, peak_beyond, rank_bands
from torch import Tensor

from logitcache.capture.projection import DeviceBasis
from logitcache.capture.selection import TailGroups, select, top_k
from logitcache.capture.settings import CaptureSettings
from logitcache.table import aligned

ROWS = 1024
NUM_GROUPS = 32
NUM_SAMPLES = 16
RANK, NUM_PROBES = 64, 2
MORE: dict[str, dict[str, Any]] = {
    f"{NUM_GROUPS} tail groups": {"tail_groups": NUM_GROUPS},
    "one temperature": {"temperatures": (2.0,)},
    "tail entropy": {"tail_entropy": True},
    f"{NUM_SAMPLES} tail samples": {"tail_samples": NUM_SAMPLES},
    f"rank {RANK}, {NUM_PROBES} probes": {"tail_rank": RANK, "tail_probes": NUM_PROBES},
}
Call = Callable[[Tensor], object]


def entries_alone(k: int) -> dict[str, Call]:
    """The k most probable tokens, and what else every position gets, by their names in the table."""
    return {
        f"torch.topk, k = {k}": lambda logits: logits.topk(k),
        f"two stages, k = {k}": lambda logits: top_k(logits, k),
        f"select, k = {k}": lambda logits: select(logits, CaptureSettings(k)),
    }


def with_more(k: int, vocab_size: int, device: str) -> dict[str, Call]:
    """The other quantities, each on top of the entries, and all together."""
    group_of = rank_bands(np.random.default_rng(0).random(vocab_size), NUM_GROUPS)
    tail_groups = TailGroups(group_of, device)
    uniforms = torch.rand(ROWS, NUM_SAMPLES, dtype=torch.float64, device=device)
    weights = np.full(vocab_size, 1 / vocab_size, np.float32)
    directions = np.random.default_rng(0).standard_normal((vocab_size, RANK), np.float32)
    tail_basis = DeviceBasis(directions, weights, weights, device)
    probes = torch.randint(vocab_size, (ROWS, NUM_PROBES), device=device)

    def selecting(settings: dict[str, Any]) -> Call:
        drawn = uniforms if "tail_samples" in settings else None
        asked = CaptureSettings.from_json(CaptureSettings(k).to_json() | settings)
        return lambda logits: select(logits, asked, tail_groups, drawn, tail_basis, probes)

    everything = {name: value for settings in MORE.values() for name, value in settings.items()}
    more = {**MORE, "all of these": everything, "cut at top_p": {"top_p": 0.95}}
    return {f"  and {name}, k = {k}": selecting(settings) for name, settings in more.items()}


def cost(call: Call, make_input: Callable[[], Tensor], repeats: int, device: str) -> tuple[float, int]:
    """(Least milliseconds, peak bytes beyond the input) of a call, which may overwrite its input."""
    times, peaks = [], []
    for _ in range(repeats):
        data = make_input()

        def run(data: Tensor = data) -> None:
            began = _seconds(device)
            call(data)
            times.append(_seconds(device) - began)

        peaks.append(peak_beyond(run, device))
    return 1e3 * min(times), max(peaks)


def table(vocab_size: int, entries: list[int], hidden_sizes: list[int], dtype: torch.dtype, repeats: int) -> str:
    """One vocabulary and dtype."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    random = partial(torch.randn, device=device)
    costs: dict[str, tuple[float, int]] = {}
    for size in hidden_sizes:
        hidden, weight = random(ROWS, size).to(dtype), random(vocab_size, size).to(dtype)
        # Long enough for two runs to do.
        costs[f"lm_head, D = {size:,}"] = cost(partial(torch.matmul, other=weight.t()), hidden.clone, 2, device)
        del hidden, weight
    heads = [ms for ms, _ in costs.values()]
    logits = random(ROWS, vocab_size).mul_(SHARPNESS * sqrt(2 * log(vocab_size))).to(dtype)
    measured = entries_alone(entries[0]) | with_more(entries[0], vocab_size, device)
    for k in entries[1:]:
        measured |= entries_alone(k)
    for name, call in measured.items():
        costs[name] = cost(call, logits.clone, repeats, device)
    rows = [["", f"ms / {ROWS} rows", *(f"× lm_head D = {size:,}" for size in hidden_sizes), "peak MiB"]]
    for name, (ms, peak) in costs.items():
        rows.append([name, f"{ms:,.1f}", *(f"{ms / head:.3f}" for head in heads), f"{peak / 2**20:,.0f}"])
    return aligned(rows)


def _seconds(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, nargs="+", default=[151_936])
    parser.add_argument("--entries", type=int, nargs="+", default=[64, 16, 256])
    parser.add_argument("--hidden", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{machine()}, {options.threads} thread(s)"
    for vocab_size in options.vocab:
        for dtype in options.dtype:
            print(f"V = {vocab_size:,}, {dtype} ({where})")
            print(table(vocab_size, options.entries, options.hidden, getattr(torch, dtype), options.repeats))
            print(flush=True)


if __name__ == "__main__":
    main()

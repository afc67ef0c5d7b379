"""The studies' task: the demo's teacher, its student after a start on hard labels, and caches with all that a study asks for.

All is made once, under studies/ in the current folder, by the commands that anyone would type; they are printed.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from rebuilding import noisy
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import logitcache
from logitcache import LogitCache
from logitcache.format.quantization import COEFFICIENT_BITS

DEMO = Path(__file__).resolve().parent.parent / "demo"
TEACHER, STUDENT = DEMO / "teacher", DEMO / "student"
FOLDER = Path("studies")
PAIRS, CACHES, START = FOLDER / "pairs", FOLDER / "caches", FOLDER / "start"

# What the widest caches hold; every other one is recoded from them.
WIDEST = (
    "--precision exact --top-k 256 --tail-groups 32 --temperatures 2 --tail-entropy --tail-samples 16 --tail-rank 128"
)
EXTRAS = ("tail_groups", "temperatures", "tail_entropy", "tail_samples", "tail_rank")
PRECISION = "balanced"
BITS = COEFFICIENT_BITS[PRECISION]
NARROWEST = "k8"
SUBSET_ROWS = 150

TRAINED = "trained"
"""Begins with the demo's student after 400 steps on hard labels, from random weights."""
RANDOM = "random"
"""Begins with the demo's student with random weights."""
DAMAGED = "damaged"
"""Begins with the teacher itself, but with noise in its weights, which puts it a quarter of a nat from itself."""
DAMAGE = 0.24
START_OPTIONS = """--from_scratch true --kd_weight 0 --max_steps 400 --per_device_train_batch_size 8 --learning_rate 3e-3
--lr_scheduler_type cosine --warmup_steps 20 --save_strategy no --logging_steps 100"""


@dataclass(frozen=True)
class Stored:
    """What a cache keeps of a position.

    options: of `logitcache.recode`.  keeps: which of EXTRAS.  bits: of a coefficient; None for those of PRECISION.
    """

    options: dict[str, Any]
    keeps: tuple[str, ...] = ()
    bits: int | None = None


def _low_rank(k: int, rank: int, bits: int | None = None) -> Stored:
    return Stored({"top_k": k, "tail_rank": rank}, ("tail_rank",), bits)


LOW_RANK = {
    **{f"k16+{rank}r": _low_rank(16, rank) for rank in (8, 16, 32, 64, 128)},
    **{f"k16+64r{bits}": _low_rank(16, 64, bits) for bits in (2, 3, 5, 6)},
    **{f"k{k}+64r": _low_rank(k, 64) for k in (4, 8, 32, 64)},
    **{f"k8+{rank}r": _low_rank(8, rank) for rank in (96, 128)},
    **{f"k{k}+128r3": _low_rank(k, 128, 3) for k in (4, 8)},
}
STORED = {
    **{f"k{k}": Stored({"top_k": k}) for k in (8, 16, 32, 64, 128, 256)},
    **LOW_RANK,
    "k16+32g": Stored({"top_k": 16}, ("tail_groups",)),
    "k16+16s": Stored({"top_k": 16}, ("tail_samples",)),
    "p.8≥8": Stored({"top_p": 0.8, "min_k": 8}),
    "k32,T=2": Stored({"top_k": 32}, ("temperatures",)),
    "k32,entropy": Stored({"top_k": 32}, ("tail_entropy",)),
}


def prepare(rows: str, names: Iterable[str]) -> None:
    """Makes the caches of `rows` (train or subset) that are named in STORED, and what they and students begin with.

    What is there is left as it is.
    """
    if not (PAIRS / "train.jsonl").exists() or not (PAIRS / "heldout.jsonl").exists():
        run(str(DEMO / "extract_pairs.py"), "--out", str(PAIRS))
    for split in ("train", "heldout"):
        if not finished(CACHES / split):
            source = ["--teacher", str(TEACHER), "--data", str(PAIRS / f"{split}.jsonl"), "--out", str(CACHES / split)]
            run(
                "-m", "logitcache", "build", "--backend", "transformers", "--dtype", "float32", *source, *WIDEST.split()
            )
    if not (START / "model.safetensors").exists():
        source = ["--cache", str(_narrowed("train", NARROWEST)), "--student", str(STUDENT), "--output_dir", str(START)]
        run("-m", "trainer", "fit", *source, *START_OPTIONS.split())
    if rows == "subset" and not finished(CACHES / rows):
        taken = ["--rows", f"0:{SUBSET_ROWS}", "--out", str(CACHES / rows)]
        run("-m", "logitcache", "slice", str(CACHES / "train"), *taken)
    for name in names:
        _narrowed(rows, name)


def cache(rows: str, name: str | None = None) -> LogitCache:
    """Train, heldout or subset, the widest caches, or what one of STORED keeps of them."""
    return logitcache.open(CACHES / (rows if name is None else f"{rows},{name}"))


def bytes_per_position(name: str) -> float:
    """Of the shards, everything in them counted: ids, token ids, row ids, checksums."""
    manifest = cache("train", name).manifest
    return sum(shard.num_bytes for shard in manifest.shards) / manifest.num_positions


def entries_per_position(name: str) -> float:
    """Mean number of stored entries."""
    manifest = cache("train", name).manifest
    return manifest.num_entries / manifest.num_positions


def teacher() -> PreTrainedModel:
    """The demo's teacher in float32, as the caches were made, for nothing but forward passes."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
    model.eval().requires_grad_(False)
    return model


def student(start: str) -> PreTrainedModel:
    """A student as a run begins with it. start: TRAINED, RANDOM or DAMAGED."""
    if start == DAMAGED:
        damaged = noisy(teacher(), DAMAGE)
        damaged.requires_grad_(True)
        return damaged
    if start == RANDOM:
        drawn: PreTrainedModel = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(STUDENT), dtype=torch.float32
        )
        return drawn
    return AutoModelForCausalLM.from_pretrained(START, dtype=torch.float32)


def _narrowed(rows: str, name: str) -> Path:
    out = CACHES / f"{rows},{name}"
    if not finished(out):
        stored, widest = STORED[name], cache(rows)
        print(f"{CACHES / rows} → {out}", flush=True)
        bits = (stored.bits or BITS) - _bits_of_a_smaller_step(widest, stored.options.get("tail_rank"))
        with patch.dict(COEFFICIENT_BITS, {PRECISION: bits}):
            dropped = [extra for extra in EXTRAS if extra not in stored.keeps]
            logitcache.recode(widest, out, precision=PRECISION, drop=dropped, **stored.options)
    return out


def _bits_of_a_smaller_step(cache: LogitCache, rank: int | None) -> float:
    """By which the step of the cache's own rank is smaller than that of a build of the first coefficients alone."""
    assert cache.tail_basis is not None
    variances = cache.tail_basis.variances
    return float(np.log2(variances[:rank].mean() / variances.mean()) / 2)


def finished(path: Path) -> bool:
    """Whether a cache is there and complete."""
    return (path / "logitcache.json").exists()


def run(*arguments: str) -> None:
    """Prints a command of Python and runs it."""
    print("$ python", *arguments, flush=True)
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)

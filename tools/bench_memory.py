"""Peak memory of `logitcache build` and `trainer fit` as the corpus grows: it must not.

    python tools/bench_memory.py [--positions 10000 100000 1000000] [--backend transformers|vllm] [--commands build fit]

A tiny teacher and student, so that a million positions take minutes; whole commands with all the processes that they start:
with vLLM the engine is one by itself.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from measure import machine, peak_of_tree_mib

from logitcache.table import aligned

DEMO = Path(__file__).parent / "demo"
LENGTH = 257


def write_corpus(path: Path, positions: int, vocab_size: int) -> None:
    random = np.random.default_rng(0)
    with path.open("w") as file:
        for _ in range(-(-positions // (LENGTH - 1))):
            file.write(json.dumps({"input_ids": random.integers(0, vocab_size, LENGTH).tolist()}) + "\n")


def write_model(path: Path) -> int:
    """A one-layer Llama with random weights and the demo's tokenizer; returns its vocabulary."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(DEMO / "teacher")
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "head_dim": 32,
    }
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=512, tie_word_embeddings=True, **shape)
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return len(tokenizer)


def run(command: list[str]) -> tuple[float, float]:
    """Seconds and peak MiB of a command and the processes below it."""
    with tempfile.TemporaryFile("w+") as errors:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, text=True)
        peak = peak_of_tree_mib(process)
        seconds = time.perf_counter() - began
        if process.returncode:
            errors.seek(0)
            sys.exit(errors.read())
    return seconds, peak


def fit_command(cache: Path, folder: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "trainer", "fit", "--cache", str(cache), "--student", str(folder / "model")),
        *("--output_dir", str(folder / "run"), "--num_train_epochs", "1", "--save_strategy", "no"),
        *("--per_device_train_batch_size", "8"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--backend", default="transformers")
    parser.add_argument("--commands", nargs="+", choices=["build", "fit"], default=["build", "fit"])
    options = parser.parse_args()
    rows = [
        [
            "positions",
            "build: peak MiB",
            "s",
            "cache MiB",
            *(["fit: peak MiB", "s"] if "fit" in options.commands else []),
        ]
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        vocab_size = write_model(folder / "model")
        for positions in options.positions:
            write_corpus(folder / "corpus.jsonl", positions, vocab_size)
            cache = folder / "cache"
            build_s, build_mib = run(
                [
                    *(sys.executable, "-m", "logitcache", "build", "--backend", options.backend, "--out", str(cache)),
                    *("--teacher", str(folder / "model"), "--data", str(folder / "corpus.jsonl")),
                    *("--top-k", "64", "--tail-rank", "0"),
                ]
            )
            cache_mib = sum(path.stat().st_size for path in cache.rglob("*.parquet")) / 2**20
            figures = [build_mib, build_s, cache_mib]
            if "fit" in options.commands:
                fit_s, fit_mib = run(fit_command(cache, folder))
                figures += [fit_mib, fit_s]
            rows.append([f"{positions:,}", *(f"{figure:,.0f}" for figure in figures)])
            shutil.rmtree(cache)
    print(f"teacher on {options.backend}, k = 64, vocabulary {vocab_size:,} ({machine()})")
    print(aligned(rows))


if __name__ == "__main__":
    main()

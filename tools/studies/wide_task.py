"""The task of wide_teacher.py: a wide teacher, a student after a start on hard labels, and their caches, under studies/wide."""

from __future__ import annotations

import shutil

import torch
from task import DEMO, START_OPTIONS, finished, run
from task import FOLDER as STUDIES
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import logitcache
from logitcache import LogitCache

FOLDER = STUDIES / "wide"
TEACHER, STUDENT, START, CACHES = (FOLDER / name for name in ("teacher", "student", "start", "caches"))
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
CALIBRATION_ROWS = 150
WIDEST_RANK = 256
BUILT = {
    "calibration": f"--top-k 1 --tail-rank {WIDEST_RANK}",
    "train": "--top-k 64 --tail-rank 64",
    "heldout": "--top-k 1 --tail-rank 0",
}
"""By the name of their rows."""
RECODED = {"k64": "--top-k 64 --drop tail_rank", "k16": "--top-k 16 --drop tail_rank", "k16,R64": "--top-k 16"}
"""Of the train rows."""


def prepare() -> None:
    """Makes what is missing."""
    if not (TEACHER / "training.json").exists():
        run(str(DEMO / "train_wide_teacher.py"), "--out", str(FOLDER))
    rows = (FOLDER / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (FOLDER / "calibration.jsonl").write_text("".join(rows[:CALIBRATION_ROWS]), encoding="utf-8")
    for name, stored in BUILT.items():
        if not finished(CACHES / name):
            source = ["--teacher", str(TEACHER), "--data", str(FOLDER / f"{name}.jsonl"), "--out", str(CACHES / name)]
            run(
                "-m", "logitcache", "build", "--backend", "transformers", "--dtype", "float32", *source, *stored.split()
            )
    for name, options in RECODED.items():
        if not finished(CACHES / name):
            run("-m", "logitcache", "recode", str(CACHES / "train"), *options.split(), "--out", str(CACHES / name))
    if not (START / "model.safetensors").exists():
        _write_student()
        source = ["--cache", str(CACHES / "k16"), "--student", str(STUDENT), "--output_dir", str(START)]
        run("-m", "trainer", "fit", *source, *START_OPTIONS.split())


def cache(name: str) -> LogitCache:
    """One of BUILT or of RECODED."""
    return logitcache.open(CACHES / name)


def bytes_per_position(name: str) -> float:
    """Of the shards, everything in them counted."""
    manifest = cache(name).manifest
    return sum(shard.num_bytes for shard in manifest.shards) / manifest.num_positions


def teacher() -> PreTrainedModel:
    """In float32, for nothing but forward passes."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
    model.eval().requires_grad_(False)
    return model


def student() -> PreTrainedModel:
    """As every run begins with it."""
    return AutoModelForCausalLM.from_pretrained(START, dtype=torch.float32)


def _write_student() -> None:
    """The demo's student, but with the wide teacher's vocabulary."""
    LlamaConfig.from_pretrained(DEMO / "student", vocab_size=teacher().config.vocab_size).save_pretrained(STUDENT)
    for name in TOKENIZER_FILES:
        shutil.copy(TEACHER / name, STUDENT / name)

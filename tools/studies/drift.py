"""What is the basis of the low-rank tail worth for texts of another kind than those it was made from?

    python tools/studies/drift.py

Asked: a build makes the basis from its first positions. If a corpus goes over from Python to English, how much of the rebuilt
tail is lost on the English part, against a basis of both kinds, or of English alone?

Measured: the teacher of wide_teacher.py. Python is rows of modeling files that it has read, and held-out ones; English is what
the installed packages say of themselves (the descriptions in their metadata), which it has not read, a fifth of them held out.
Bases from equally many positions. KL(true ‖ rebuilt) of the tail beyond 16 entries, unrounded, its mean over held-out positions.

Takes 5 minutes on one core after wide_teacher.py.
"""

from __future__ import annotations

import json
from email.message import Message
from importlib.metadata import distributions
from typing import cast

import torch
import wide_task
from rebuilding import KnownTeacher, Stored, explained, tail_divergence
from task import finished, run
from wide_task import CACHES, FOLDER, TEACHER

from logitcache.table import aligned

BASIS_ROWS, ROWS, PIECE_CHARS, LEAST_CHARS = 40, 8, 1000, 400
K, RANKS = 16, (0, 16, 32, 64)
RANK = RANKS[-1]
BASES = ("Python", "English", "both")


def descriptions() -> list[str]:
    """Of the installed packages, in order of name, each once, whole lines of `PIECE_CHARS` characters or a few more at most."""
    texts = {}
    for distribution in distributions():
        text = cast(Message, distribution.metadata).get_payload()
        piece = ""
        for line in str(text).splitlines(keepends=True):
            piece += line if len(piece) < PIECE_CHARS else ""
        if len(piece) >= LEAST_CHARS:
            texts[distribution.metadata["Name"].lower()] = piece
    return [texts[name] for name in sorted(texts)]


def prepare() -> None:
    """Makes the rows and the bases."""
    wide_task.prepare()
    python = (FOLDER / "calibration.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:BASIS_ROWS]
    english = [json.dumps({"text": text}) + "\n" for text in descriptions()]
    heldout, english = english[::5], [text for number, text in enumerate(english) if number % 5][:BASIS_ROWS]
    both = [row for pair in zip(python, english, strict=False) for row in pair][:BASIS_ROWS]
    rows = {"Python": python, "English": english, "both": both, "English,heldout": heldout[:ROWS]}
    for name, texts in rows.items():
        path = FOLDER / f"drift-{name}.jsonl"
        if not finished(CACHES / path.stem):
            path.write_text("".join(texts), encoding="utf-8")
            stored = ["--top-k", "1", "--tail-rank", str(RANK if name in BASES else 0)]
            source = ["--teacher", str(TEACHER), "--data", str(path), "--out", str(CACHES / path.stem)]
            run("-m", "logitcache", "build", "--backend", "transformers", "--dtype", "float32", *source, *stored)


def main() -> None:
    torch.set_num_threads(1)
    prepare()
    teacher = wide_task.teacher()
    for kind, name in (("Python", "heldout"), ("English", "drift-English,heldout")):
        cache = wide_task.cache(name)
        rows = [["basis from", "variance", *(f"R = {rank}" for rank in RANKS)]]
        for basis_name in BASES:
            basis = wide_task.cache(f"drift-{basis_name}").tail_basis
            assert basis is not None
            known = KnownTeacher(teacher, [cache[number] for number in range(ROWS)], basis)
            values = (f"{tail_divergence(known, Stored(K, rank))[0]:.3f}" for rank in RANKS)
            rows.append([basis_name, f"{explained(known, RANK):.1%}", *values])
        mass = known.targets(Stored(K)).tail_logprob.exp().mean()
        print(
            f"\nKL of the rebuilt tail on {kind}, {len(known.logits)} positions, tail mass {mass:.3f}\n{aligned(rows)}"
        )


if __name__ == "__main__":
    main()

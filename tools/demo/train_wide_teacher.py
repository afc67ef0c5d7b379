"""A wider teacher than the demo's, for tools/studies/wide_teacher.py: D = 640, V = 16,384, on transformers' own sources.

    python tools/demo/train_wide_teacher.py --out studies/wide

The text is the modeling files of the causal language models in the transformers that is installed, which repeat each other so
that a model of this size becomes sure of much of it. Whole architectures are held out. It writes `teacher/` (float32), and
`train.jsonl` and `heldout.jsonl`: some pieces of the files, a row of `text` each, for caches. Training ends after --minutes, its
learning rate with it, so what is learned depends on the machine; the teacher so far is written every few minutes.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from extract_pairs import is_heldout
from train_teacher import (
    CHECKPOINT_S,
    HISTORY,
    REPORT_STEPS,
    SEED,
    Stage,
    encode_sources,
    heldout_cross_entropy,
    new_model,
    source_batches,
    train,
    train_tokenizer,
)

VOCAB_SIZE = 16_384
SHAPE: dict[str, Any] = {
    "hidden_size": 640,
    "intermediate_size": 1600,
    "num_hidden_layers": 2,
    "num_attention_heads": 10,
    "num_key_value_heads": 10,
    "head_dim": 64,
}
TOKENS_PER_STEP, EPOCHS, PEAK_LR, WARMUP_STEPS = 2048, 4, 1.5e-3, 100
JUDGED_BATCHES = 16
PIECE_CHARS = 1000
ROWS = {"train": 900, "heldout": 100}


def causal_models() -> dict[str, str]:
    """Name → source text of the modeling files with a causal language model, in order of name."""
    folder = Path(transformers.__file__).parent / "models"
    sources = {path.parent.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*/modeling_*.py"))}
    return {name: source for name, source in sources.items() if "ForCausalLM(" in source}


def pieces(name: str, source: str) -> list[dict[str, str]]:
    """Rows of whole lines, of `PIECE_CHARS` characters or a few more."""
    rows: list[dict[str, str]] = []
    piece = ""
    for line in source.splitlines(keepends=True):
        piece += line
        if len(piece) >= PIECE_CHARS:
            rows.append({"id": f"{name}:{len(rows)}", "text": piece})
            piece = ""
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the teacher and the rows")
    parser.add_argument("--minutes", type=float, default=45, help="of training (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    arguments.out.mkdir(parents=True, exist_ok=True)

    split: dict[str, dict[str, str]] = {"train": {}, "heldout": {}}
    for name, source in causal_models().items():
        split["heldout" if is_heldout(name) else "train"][name] = source
    for part, sources in split.items():
        rows = [row for name, source in sources.items() for row in pieces(name, source)]
        rng.shuffle(rows)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[: ROWS[part]])
        (arguments.out / f"{part}.jsonl").write_text(text, encoding="utf-8")
        print(f"{part}: {len(sources)} models, {len(rows)} rows", flush=True)

    tokenizer = train_tokenizer(list(split["train"].values()), VOCAB_SIZE)
    model = new_model(tokenizer, SHAPE)
    files, heldout_files = (encode_sources(list(sources.values()), tokenizer) for sources in split.values())
    batches = source_batches(files, EPOCHS, rng, TOKENS_PER_STEP)
    heldout = source_batches(heldout_files, 1, rng, TOKENS_PER_STEP)[:JUDGED_BATCHES]
    print(f"{model.num_parameters() / 1e6:.1f} M parameters, {sum(map(len, files)) / 1e6:.2f} M tokens", flush=True)

    def save(steps: int) -> None:
        nats = heldout_cross_entropy(model, heldout)
        model.save_pretrained(arguments.out / "teacher")
        tokenizer.save_pretrained(arguments.out / "teacher")
        stage = Stage("source", steps, len(batches), steps * TOKENS_PER_STEP, round(time.monotonic() - started, 1))
        history = [stage._asdict() | {"heldout_nats": round(nats, 4)}]
        (arguments.out / "teacher" / HISTORY).write_text(json.dumps(history, indent=2) + "\n")
        print(f"step {steps}: held-out cross-entropy {nats:.3f}, perplexity {math.exp(nats):.1f}", flush=True)

    started = saved = time.monotonic()
    step = 0
    for step, progress in enumerate(train(model, batches, PEAK_LR, WARMUP_STEPS, 60 * arguments.minutes), start=1):
        if step % REPORT_STEPS == 0:
            print(progress, flush=True)
        if time.monotonic() - saved > CHECKPOINT_S:
            save(step)
            saved = time.monotonic()
    save(step)


if __name__ == "__main__":
    main()

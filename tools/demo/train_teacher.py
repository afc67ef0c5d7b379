"""The demo's teacher: a small Llama for Python, trained on the standard library's training modules.

    python tools/demo/train_teacher.py

First a byte-level BPE tokenizer, then the model on whole source files, then on the instruction pairs in the
layout of the demo: prompt tokens, completion tokens, end of text, with the loss on the completion only. Modules
that `extract_pairs` holds out are never read. The teacher so far is written every few minutes; one whose first
stage was interrupted learns the pairs with

    python tools/demo/train_teacher.py --pairs-only
"""

import argparse
import json
import math
import platform
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from extract_pairs import Pair, is_heldout, modules, split_pairs
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

OUT = Path(__file__).parent / "teacher"
SEED = 0
VOCAB_SIZE = 4096
MAX_LENGTH = 512
END, PAD = "<|endoftext|>", "<|pad|>"
SHAPE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 480,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
TOKENS_PER_STEP = 4096
SOURCE_EPOCHS, SOURCE_LR, SOURCE_WARMUP_STEPS = 4, 2e-3, 100
PAIR_EPOCHS, PAIR_LR, PAIR_WARMUP_STEPS = 3, 7e-4, 30
FINAL_LR_SHARE = 0.05
WEIGHT_DECAY, BETAS, CLIP_NORM = 0.1, (0.9, 0.95), 1.0
REPORT_STEPS, CHECKPOINT_S = 50, 240
IGNORED = -100
HISTORY = "training.json"

Batch = tuple[torch.Tensor, torch.Tensor]  # input ids and labels, both [B, T]; labels already shifted


class Stage(NamedTuple):
    """How far one stage of training came."""

    name: str
    steps: int
    planned_steps: int
    tokens: int
    wall_s: float


def train_tokenizer(texts: list[str], vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """A byte-level BPE without any normalisation, so that every text survives the round trip."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: PreTrainedTokenizerFast, shape: dict[str, Any]) -> LlamaForCausalLM:
    """Random weights for the tokenizer's vocabulary, embeddings tied."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=MAX_LENGTH,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **shape,
        )
    )


def encode_sources(sources: list[str], tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """Token ids of each file, end of text included."""
    return [[*tokenizer(source, verbose=False).input_ids, tokenizer.eos_token_id] for source in sources]


def source_batches(
    files: list[list[int]], epochs: int, rng: random.Random, tokens_per_step: int = TOKENS_PER_STEP
) -> list[Batch]:
    """Whole files in random order, packed into blocks of `MAX_LENGTH` tokens."""
    blocks: list[torch.Tensor] = []
    for _ in range(epochs):
        rng.shuffle(files)
        stream = torch.tensor([token for file in files for token in file])[rng.randrange(MAX_LENGTH) :]
        epoch = list(stream.unfold(0, MAX_LENGTH + 1, MAX_LENGTH))
        rng.shuffle(epoch)
        blocks += epoch
    rows = tokens_per_step // MAX_LENGTH
    stacked = [torch.stack(blocks[i : i + rows]) for i in range(0, len(blocks) - rows + 1, rows)]
    return [(block[:, :-1], block[:, 1:]) for block in stacked]


def encode_pairs(pairs: list[Pair], tokenizer: PreTrainedTokenizerFast) -> list[tuple[list[int], int]]:
    """Token ids of prompt, completion and end, with the length of the prompt."""
    encoded = []
    for pair in pairs:
        prompt, completion = tokenizer(pair.prompt).input_ids, tokenizer(pair.completion).input_ids
        encoded.append(([*prompt, *completion, tokenizer.eos_token_id], len(prompt)))
    return encoded


def pair_batches(encoded: list[tuple[list[int], int]], epochs: int, rng: random.Random) -> list[Batch]:
    """Pairs of similar length together, padded; labels on completion and end only."""
    batches: list[Batch] = []
    for _ in range(epochs):
        rng.shuffle(encoded)
        epoch, rows = [], sorted(encoded, key=lambda row: len(row[0]))
        while rows:
            count = max(1, TOKENS_PER_STEP // len(rows[-1][0]))
            rows, taken = rows[:-count], rows[-count:]
            ids = torch.zeros(len(taken), len(taken[-1][0]), dtype=torch.long)
            labels = torch.full_like(ids, IGNORED)
            for row, (tokens, prompt_length) in enumerate(taken):
                ids[row, : len(tokens)] = torch.tensor(tokens)
                labels[row, prompt_length - 1 : len(tokens) - 1] = torch.tensor(tokens[prompt_length:])
            epoch.append((ids, labels))
        rng.shuffle(epoch)
        batches += epoch
    return batches


def loss_sum(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """Cross-entropy in nats, summed over the labelled positions. Right padding needs no mask under causal attention."""
    ids, labels = batch
    with torch.autocast("cpu", torch.bfloat16, enabled=torch.is_grad_enabled()):
        logits = model(ids, use_cache=False).logits
    return cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")


@torch.no_grad()
def heldout_cross_entropy(model: LlamaForCausalLM, batches: list[Batch]) -> float:
    """Nats per completion token (end included), in float32."""
    total = sum(loss_sum(model, batch).item() for batch in batches)
    return total / count_labels(batches)


def count_labels(batches: list[Batch]) -> int:
    return sum(int((labels != IGNORED).sum()) for _, labels in batches)


def train(
    model: LlamaForCausalLM, batches: list[Batch], peak_lr: float, warmup_steps: int, limit_s: float = math.inf
) -> Iterator[str]:
    """One stage of AdamW with warm-up and cosine; yields a line of progress after every step.

    limit_s: wall time at which it ends with the batches it has seen, the cosine at its end by then.
    """
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak_lr, betas=BETAS)
    started, tokens = time.monotonic(), 0
    for step, batch in enumerate(batches):
        done = max(step / len(batches), (time.monotonic() - started) / limit_s)
        if done >= 1:
            return
        cosine = 0.5 * (1 + math.cos(math.pi * done))
        lr = peak_lr * min(1.0, (step + 1) / warmup_steps) * (FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * cosine)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = loss_sum(model, batch) / count_labels([batch])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        tokens += batch[0].numel()
        rate = tokens / (time.monotonic() - started)
        yield f"step {step + 1}/{len(batches)}  loss {loss.item():.3f}  {rate:.0f} tokens/s"


def save(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, history: list[Stage], heldout_nats: float, out: Path
) -> None:
    """Write the teacher in bfloat16, its history and its README; each file appears whole."""
    out.mkdir(parents=True, exist_ok=True)
    in_bf16 = LlamaForCausalLM(model.config).bfloat16()
    in_bf16.load_state_dict(model.state_dict())
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        folder = Path(scratch)
        in_bf16.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / HISTORY).write_text(json.dumps([stage._asdict() for stage in history], indent=2) + "\n")
        (folder / "README.md").write_text(card(model, history, heldout_nats), encoding="utf-8")
        for file in folder.iterdir():
            file.chmod(0o644)
            file.replace(out / file.name)


def load_history(folder: Path) -> list[Stage]:
    return [Stage(**stage) for stage in json.loads((folder / HISTORY).read_text())]


def card(model: LlamaForCausalLM, history: list[Stage], heldout_nats: float) -> str:
    """The README that lies beside the weights."""
    stages = "\n".join(
        f"| {stage.name} | {stage.steps} of {stage.planned_steps} "
        f"| {stage.tokens / 1e6:.2f} M | {stage.wall_s / 60:.0f} min |"
        for stage in history
    )
    return f"""# The demo's teacher

A Llama of {model.num_parameters() / 1e6:.2f} M parameters (tied embeddings included) that writes docstrings for
Python signatures, made from the standard library of Python {platform.python_version()} and nothing else by

    python tools/demo/train_teacher.py

(with `--pairs-only` for the second stage if the first was interrupted).

| stage | steps | tokens | wall time, {torch.get_num_threads()} CPU threads |
|---|---|---|---|
{stages}

Held-out completions: cross-entropy {heldout_nats:.3f} nats per token, perplexity {math.exp(heldout_nats):.1f}.

The modules of the held-out split of `extract_pairs.py` were seen by neither the tokenizer nor the model. Weights are
bfloat16; the standard library is © Python Software Foundation, PSF License.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the teacher (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument("--pairs-only", action="store_true", help="start from the teacher in --out, skip the source")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    rng = random.Random(SEED)

    train_pairs, heldout_pairs = split_pairs()
    history: list[Stage] = []
    stages: list[tuple[str, list[Batch], float, int]] = []
    if args.pairs_only:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.out)
        model = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32)
        history = load_history(args.out)
        if any(stage.name == "pairs" for stage in history):
            parser.error(f"--pairs-only: the teacher in {args.out} has learned pairs already; train anew without it")
    else:
        sources = [source for module, source in modules().items() if not is_heldout(module)]
        tokenizer = train_tokenizer(sources)
        model = new_model(tokenizer, SHAPE)
        files = encode_sources(sources, tokenizer)
        stages.append(("source", source_batches(files, SOURCE_EPOCHS, rng), SOURCE_LR, SOURCE_WARMUP_STEPS))
    batches = pair_batches(encode_pairs(train_pairs, tokenizer), PAIR_EPOCHS, rng)
    stages.append(("pairs", batches, PAIR_LR, PAIR_WARMUP_STEPS))
    heldout = pair_batches(encode_pairs(heldout_pairs, tokenizer), 1, rng)
    print(f"{model.num_parameters() / 1e6:.2f} M parameters")
    print(f"held out: {len(heldout_pairs)} pairs, {count_labels(heldout)} completion tokens", flush=True)

    for name, batches, peak_lr, warmup_steps in stages:
        started = saved = time.monotonic()
        tokens = 0
        for step, progress in enumerate(train(model, batches, peak_lr, warmup_steps), start=1):
            tokens += batches[step - 1][0].numel()
            if step % REPORT_STEPS == 0:
                print(name, progress, flush=True)
            if time.monotonic() - saved > CHECKPOINT_S or step == len(batches):
                saved = time.monotonic()
                nats = heldout_cross_entropy(model, heldout)
                stage = Stage(name, step, len(batches), tokens, round(saved - started, 1))
                save(model, tokenizer, [*history, stage], nats, args.out)
                print(f"{name} step {step}: held-out cross-entropy {nats:.3f}", flush=True)
        history.append(stage)


if __name__ == "__main__":
    main()

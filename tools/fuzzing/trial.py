"""What every input is made of: a folder, random choices, and a teacher, caches and a run to damage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

Command = list[str]
"""A program and its arguments: ["logitcache", "info", "cache"]."""


@dataclass
class Trial:
    """One input.

    folder: empty, for its files.  material: what `make_material` made.  trains: whether `trainer fit` goes beyond its checks.
    """

    folder: Path
    random: Random
    material: Path
    trains: bool = False
    _numbers: list[int] = field(default_factory=lambda: [0])

    def choose(self, options: Sequence[Any]) -> Any:
        """One of the options."""
        return self.random.choice(options)

    def maybe(self, share: float) -> bool:
        """True in that share of the trials."""
        return self.random.random() < share

    def path(self, suffix: str = "") -> Path:
        """A new name in the folder."""
        self._numbers[0] += 1
        return self.folder / f"{self._numbers[0]}{suffix}"

    def write(self, content: bytes | str, suffix: str = "") -> str:
        """The path of a new file."""
        path = self.path(suffix)
        path.write_bytes(content if isinstance(content, bytes) else content.encode(errors="surrogatepass"))
        return str(path)

    def copy(self, path: Path) -> Path:
        """A copy of a file or folder of the material."""
        copy = self.path(path.suffix)
        shutil.copytree(path, copy) if path.is_dir() else shutil.copy(path, copy)
        return copy


Kind = Callable[[Trial], list[Command]]
"""Writes the files of an input and returns the command lines that read them."""

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FIT = "--use_cpu --max_steps 2 --save_steps 1 --per_device_train_batch_size 2 --report_to none".split()  # noqa: SIM905


def make_material(root: Path) -> None:
    """Makes the good files that trials copy and damage, in some seconds.

    teacher, student: models with tokenizer and chat template.  documents.jsonl.  cache: of all that a cache can hold, in three
    shards.  exact: of plain columns.  run: of `trainer fit`, with checkpoints.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    import logitcache
    from trainer.cli import main as trainer

    special = ["<|eos|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*special, *alphabet, "Ġt", "he", "Ġthe", "in", "an"]
    backend = Tokenizer(
        models.BPE(
            vocab={token: number for number, token in enumerate(tokens)},
            merges=[("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("i", "n"), ("a", "n")],
        )
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=special[0], chat_template=TEMPLATE)
    for number, (name, width) in enumerate({"teacher": 32, "student": 16}.items()):
        torch.manual_seed(number)
        sizes: dict[str, Any] = {
            "hidden_size": width,
            "intermediate_size": width,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }
        config = LlamaConfig(
            vocab_size=len(tokens), max_position_embeddings=256, eos_token_id=0, bos_token_id=None, **sizes
        )
        LlamaForCausalLM(config).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    documents = root / "documents.jsonl"
    lines = [{"text": f"the {number} thin hens " * (1 + number % 3), "id": number} for number in range(24)]
    documents.write_text("".join(json.dumps(line) + "\n" for line in lines))
    common: dict[str, Any] = {"backend": "transformers", "top_k": 6, "keep": ["id"]}
    rich: dict[str, Any] = {
        "tail_groups": 3,
        "temperatures": (2.0,),
        "tail_entropy": True,
        "tail_samples": 2,
        "tail_rank": 4,
        "shard_positions": 300,
    }
    logitcache.build(str(root / "teacher"), str(documents), root / "cache", **common, **rich)
    logitcache.build(str(root / "teacher"), str(documents), root / "exact", **common, tail_rank=0, precision="exact")
    caches = ["--cache", str(root / "cache"), "--eval_cache", str(root / "exact"), "--student", str(root / "student")]
    if trainer(["fit", *caches, *FIT, "--output_dir", str(root / "run")]):
        raise SystemExit("the run that the others are damaged copies of did not end")

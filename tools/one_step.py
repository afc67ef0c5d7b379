"""Program: one way to train a student, a step at a time, each when a line comes on standard input.

    python tools/one_step.py ROW FOLDER

FOLDER is what bench_fit.py made. For every step one line of JSON goes to standard output: seconds, cpu_s since the last
one (of all threads, waiting included) and peak_mib so far.
Nothing is imported but what the row needs: its memory is counted, and TRL may be in an environment of its own.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import skip_first_batches
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers import default_data_collator as stacked

KD_WEIGHT = 0.5
HEAD_SIZE = 64
ROWS_BEFORE = 512  # of an epoch


def one_step(row: str, folder: Path) -> None:
    """Trains as a row says, until standard input ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no reply
    shape = json.loads((folder / "shape.json").read_text(encoding="utf-8"))
    torch.set_num_threads(shape["threads"])
    cuda = shape["device"] == "cuda"
    common = {
        "output_dir": str(folder / "out"),
        "use_cpu": not cuda,
        "bf16": cuda,
        "per_device_train_batch_size": shape["batch"],
        "max_steps": shape["steps"] + 1,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }
    way, _, loss = row.partition(", ")
    student = model(shape, 1.0)
    trainer = WAYS[way](student, lambda: model(shape, 1.5), folder, common, loss)
    trainer.add_callback(_OnDemand(replies, cuda))
    trainer.train()


def model(shape: dict[str, Any], size: float) -> PreTrainedModel:
    """A Qwen3 with random weights. size: its width and depth, relative to the student's."""
    width = int(shape["hidden"] * size)
    config = Qwen3Config(
        vocab_size=shape["vocab"],
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=int(shape["layers"] * size),
        num_attention_heads=width // HEAD_SIZE,
        num_key_value_heads=width // HEAD_SIZE // 2,
        head_dim=HEAD_SIZE,
        max_position_embeddings=shape["tokens"],
        use_cache=False,
    )
    torch.manual_seed(0)
    return Qwen3ForCausalLM(config)


class _OnDemand(TrainerCallback):
    """Ends each step with a reply, and begins the next when it is asked for. Time in between is no step's."""

    def __init__(self, replies: Any, cuda: bool) -> None:
        self._replies, self._cuda = replies, cuda

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        sys.stdin.readline()
        self._began, self._cpu_s = time.perf_counter(), time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if self._cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._began
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        peak_mib = torch.cuda.max_memory_allocated() / 2**20 if self._cuda else resident
        cpu_s, self._cpu_s = time.process_time() - self._cpu_s, time.process_time()
        reply = {"seconds": seconds, "cpu_s": cpu_s, "peak_mib": peak_mib}
        print(json.dumps(reply), file=self._replies, flush=True)
        if not sys.stdin.readline():
            control.should_training_stop = True
        self._began = time.perf_counter()


def tokens(folder: Path) -> Dataset:
    """The cache's sequences, every token a label."""
    ids: Tensor = torch.load(folder / "tokens.pt")  # int64 [rows, T]
    columns = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    return Dataset.from_dict({name: column.numpy() for name, column in columns.items()}).with_format("torch")


Teacher = Callable[[], PreTrainedModel]


def hard_labels(student: PreTrainedModel, teacher: Teacher, folder: Path, common: dict[str, Any], loss: str) -> Trainer:
    """The model's own cross-entropy: what one runs without a teacher."""
    return Trainer(student, TrainingArguments(**common), stacked, tokens(folder))


def from_cache(student: PreTrainedModel, teacher: Teacher, folder: Path, common: dict[str, Any], loss: str) -> Trainer:
    """DistillTrainer with a divergence, or with λ = 0 and none, in the midst of an epoch.

    There the reader holds all the row groups that it mixes, to which it comes by and by from an epoch's beginning.
    """
    import logitcache
    from trainer import DistillConfig, DistillTrainer

    class InTheMidst(DistillTrainer):
        def get_train_dataloader(self) -> Any:
            return skip_first_batches(super().get_train_dataloader(), ROWS_BEFORE // self.args.train_batch_size)

    settings: dict[str, Any] = {"kd_weight": 0.0} if loss == "λ = 0" else {"kd_weight": KD_WEIGHT, "loss": loss}
    return InTheMidst(student, logitcache.open(folder / "cache"), DistillConfig(**common, **settings))


class _OnlineTrainer(Trainer):
    """(1−λ)·CE + λ·KL(teacher ‖ student) over the whole vocabulary, as one writes it first."""

    def __init__(self, teacher: PreTrainedModel, *given: Any) -> None:
        super().__init__(*given)
        self._teacher = nn.Module.to(teacher, self.args.device).eval()

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *given: Any, **more: Any) -> Any:
        labels = inputs.pop("labels")[:, 1:]
        kept = labels != -100
        with torch.no_grad():
            log_p = self._teacher(**inputs).logits[:, :-1][kept].float().log_softmax(-1)
        log_q = model(**inputs).logits[:, :-1][kept].float().log_softmax(-1)
        ce = F.nll_loss(log_q, labels[kept])
        return (1 - KD_WEIGHT) * ce + KD_WEIGHT * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def online(student: PreTrainedModel, teacher: Teacher, folder: Path, common: dict[str, Any], loss: str) -> Trainer:
    """The teacher beside the student, in bfloat16 on CUDA."""
    return _OnlineTrainer(_in_half(teacher(), common), student, TrainingArguments(**common), stacked, tokens(folder))


def trl_gkd(student: PreTrainedModel, teacher: Teacher, folder: Path, common: dict[str, Any], loss: str) -> Trainer:
    """GKD on given completions only: λ = 0 never generates, β = 0 is forward KL; it adds no cross-entropy."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    words = Tokenizer(models.WordLevel({"<eos>": 0}, unk_token="<eos>"))
    distilling: Trainer = GKDTrainer(
        student,
        _in_half(teacher(), common),
        GKDConfig(**common, lmbda=0.0, beta=0.0, temperature=1.0),
        data_collator=stacked,
        train_dataset=tokens(folder),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>"),
    )
    return distilling


def _in_half(teacher: PreTrainedModel, common: dict[str, Any]) -> PreTrainedModel:
    return teacher.bfloat16() if common["bf16"] else teacher


WAYS = {"hard labels": hard_labels, "from a cache": from_cache, "online KD": online, "TRL GKD": trl_gkd}


if __name__ == "__main__":
    one_step(sys.argv[1], Path(sys.argv[2]))

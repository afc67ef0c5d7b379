"""Training one student in this process: from a cache, or online, from the teacher itself."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from definitions import divergence
from task import TRAINED
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, set_seed

from logitcache import LogitCache
from trainer import DistillConfig, DistillTrainer
from trainer.data.collator import Batch, Collator
from trainer.run.callbacks import ResidualWeight

ONLINE = "online"
HARD = "hard labels"

Judgement = dict[str, float]
Judging = Callable[[PreTrainedModel], Judgement]


@dataclass(frozen=True)
class Student:
    """One student to train.

    source: a cache of task.STORED, ONLINE or HARD.  rows: train or subset, which it learns from.  tail: as of
    `trainer fit`.  power_tail: the teacher's tail at T is taken for t^(1/T), wrong on purpose.  start: of `task.student`.
    kd_weight: λ of what is not HARD.  residual_weight: ρ of the low-rank tail in place of that of the probes.  judged_at:
    steps after which it is judged, 0 before the first; by default after the last.  The seed draws the order of the rows.
    """

    source: str
    seed: int
    loss: str = "fkl"
    rows: str = "train"
    tail: str = "bucket"
    temperature: float = 1.0
    power_tail: bool = False
    steps: int = 100
    batch_size: int = 8
    learning_rate: float = 2e-3
    warmup_steps: int = 10
    schedule: str = "cosine"
    start: str = TRAINED
    kd_weight: float = 1.0
    residual_weight: float | None = None
    judged_at: tuple[int, ...] = ()


def trainer_of(student: Student, model: PreTrainedModel, cache: LogitCache, teacher: PreTrainedModel) -> StudyTrainer:
    """The trainer of a student. cache: what it learns from; an online student takes the rows alone from it."""
    cached = student.source not in (ONLINE, HARD)
    config = DistillConfig(
        output_dir=tempfile.gettempdir(),  # nothing is written
        loss=student.loss,
        kd_weight=0.0 if student.source == HARD else student.kd_weight,
        tail=student.tail if cached else "bucket",
        ablation=True,
        temperature=student.temperature if cached else 1.0,
        approximate_temperature=True,
        max_steps=student.steps,
        per_device_train_batch_size=student.batch_size,
        learning_rate=student.learning_rate,
        warmup_steps=student.warmup_steps,
        lr_scheduler_type=student.schedule,
        seed=student.seed,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    if student.source == ONLINE:
        return OnlineTrainer(model, cache, config, teacher=teacher, loss=student.loss, temperature=student.temperature)
    trainer = (PowerTailTrainer if student.power_tail else StudyTrainer)(model, cache, config)
    if student.residual_weight is not None:
        trainer._residuals = FixedResidualWeight(student.residual_weight)
    return trainer


class StudyTrainer(DistillTrainer):
    """Takes rows in an order that the seed alone draws: in a stream of a cache it depends on what the cache stores, too."""

    def get_train_dataloader(self) -> DataLoader[Batch]:  # type: ignore[override]
        """One epoch of all steps."""
        args = self.args
        [cache] = self._data.caches
        collator = Collator(self._needed_tail_parts())
        batches = BatchesOfRows(cache, args.max_steps, args.per_device_train_batch_size, args.seed, collator)
        return DataLoader(batches, batch_size=None)

    def num_examples(self, dataloader: DataLoader[Any]) -> int:
        """Of the epoch."""
        return self.args.max_steps * self.args.per_device_train_batch_size


class BatchesOfRows(Dataset[Batch]):
    """The rows of each step: all rows of a cache in an order drawn from the seed, and again in others while steps are left."""

    def __init__(self, cache: LogitCache, steps: int, batch_size: int, seed: int, collator: Collator) -> None:
        self._collator = collator
        random = np.random.default_rng(seed)
        epochs = -(-steps * batch_size // len(cache))
        drawn = np.concatenate([random.permutation(len(cache)) for _ in range(epochs)])
        self._rows = drawn[: steps * batch_size].reshape(steps, batch_size)
        self._sequences = {row: cache[row] for row in np.unique(self._rows).tolist()}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, step: int) -> Batch:
        return self._collator([self._sequences[row] for row in self._rows[step].tolist()])


class OnlineTrainer(StudyTrainer):
    """Runs the teacher on every batch and takes the divergence over the whole vocabulary, by definitions.py."""

    def __init__(self, *args: Any, teacher: PreTrainedModel, loss: str, temperature: float, **options: Any) -> None:
        super().__init__(*args, **options)
        self._teacher, self._loss, self._temperature = teacher, loss, temperature

    def compute_loss(  # type: ignore[override]
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """T²·KD over the batch's positions, on one device."""
        with torch.no_grad():
            log_p = (_stored_logits(self._teacher, inputs) / self._temperature).log_softmax(1)
        log_q = (_stored_logits(model, inputs) / self._temperature).log_softmax(1)
        positions = inputs.num_positions if num_items_in_batch is None else num_items_in_batch
        kd = self._temperature**2 * divergence(self._loss, log_p, log_q)
        ce = cross_entropy(log_q, inputs.labels, reduction="none")
        loss = (self.args.kd_weight * kd + (1 - self.args.kd_weight) * ce).sum() / positions
        return (loss, None) if return_outputs else loss


class PowerTailTrainer(StudyTrainer):
    """Takes the tail at T for one token of the mass t, so t^(1/T) before both parts are normalised."""

    def compute_loss(  # type: ignore[override]
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """DistillTrainer's, with the wrong tail."""
        one_token = inputs.targets.tail_logprob / self.args.temperature
        wrong = replace(inputs, tempered_tail=dict.fromkeys(inputs.tempered_tail, one_token))
        return super().compute_loss(model, wrong, return_outputs, num_items_in_batch)


class FixedResidualWeight(ResidualWeight):
    """ρ as it is given, whatever the probes say."""

    def __init__(self, weight: float) -> None:
        super().__init__(lambda sums: sums)
        self._weight = weight

    @property
    def weight(self) -> float:
        """ρ of every step."""
        return self._weight

    def add(self, products: Tensor | None) -> None:
        """Takes no note of a batch."""


class _JudgeAtSteps(TrainerCallback):
    def __init__(self, steps: tuple[int, ...], judge: Callable[[int], None]) -> None:
        self._steps, self._judge = steps, judge

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self._steps:
            self._judge(state.global_step)


def judged(
    student: Student,
    new_model: Callable[[], PreTrainedModel],
    cache: LogitCache,
    teacher: PreTrainedModel,
    judges: Mapping[str, Judging],
) -> dict[str, Any]:
    """Trains a student and judges it: {"training_s": …, "judged": [{"step": …, judge's name: its judgement, …}]}."""
    set_seed(student.seed)
    model = new_model()
    trainer = trainer_of(student, model, cache, teacher)
    trainer.remove_callback(PrinterCallback)
    records: list[dict[str, Any]] = []
    judging_s = 0.0

    def judge(step: int) -> None:
        nonlocal judging_s
        began = time.perf_counter()
        records.append({"step": step} | {name: judging(model) for name, judging in judges.items()})
        judging_s += time.perf_counter() - began

    steps = student.judged_at or (student.steps,)
    if 0 in steps:
        judge(0)
        judging_s = 0.0
    trainer.add_callback(_JudgeAtSteps(steps, judge))
    began = time.perf_counter()
    trainer.train()
    return {"training_s": time.perf_counter() - began - judging_s, "judged": records}


def _stored_logits(model: nn.Module, inputs: Batch) -> Tensor:
    """[N, V] float32. Padding is on the right, where causal models do not look."""
    logits: Tensor = model(input_ids=inputs.input_ids, logits_to_keep=inputs.logits_to_keep).logits
    return inputs.at_stored_positions(logits, kept_logits=True).float()

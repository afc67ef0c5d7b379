"""A run of `trainer fit`: checked, trained, saved, evaluated."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedTokenizerBase, TrainerCallback, set_seed
from transformers.trainer_utils import IntervalStrategy

import logitcache
from logitcache import LogitCache, UserError
from logitcache.format.atomic import write_json
from trainer.config import DistillConfig, choose_tail
from trainer.description import describe_run
from trainer.distill import DistillTrainer
from trainer.evaluation.evaluate import write_evaluation
from trainer.files import EVALUATION_NAME, RUN_NAME, STATE_NAME
from trainer.progress import use_short_lines
from trainer.resume import cache_record, check_same_run, find_checkpoint
from trainer.student import check_student, load_student, student_config
from trainer.tokenizers import cache_tokenizer, check_tokenizer, student_tokenizer


@dataclass(frozen=True)
class Run:
    """A run whose settings, caches and tokenizers agree; the student's weights are not loaded yet.

    choices: what was settled, for people.  warnings: what does not stop it.  checkpoint: where it continues from.
    """

    config: DistillConfig
    cache: LogitCache
    eval_cache: LogitCache | None
    student_config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase | None
    choices: dict[str, str]
    warnings: list[str]
    checkpoint: str | None


@dataclass(frozen=True)
class Outcome:
    """What a run came to. metrics: of the held-out cache.  stopped_at: checkpoint written on Ctrl-C, or None."""

    steps: int
    metrics: dict[str, float] | None
    stopped_at: str | None


def prepare(config: DistillConfig) -> Run:
    """Opens and compares everything that a run needs, but the student's weights.

    Raises UserError for a missing setting, a cache or checkpoint that is not there, and whatever does not agree.
    """
    if not config.cache:
        raise UserError("--cache is missing: name the cache to learn from")
    if not config.student:
        raise UserError("--student is missing: name a model folder or a model on the Hub")
    if config.eval_strategy != "no" and not config.eval_cache:
        raise UserError(
            f"--eval_strategy {IntervalStrategy(config.eval_strategy).value}: name the held-out cache with --eval_cache"
        )
    cache = logitcache.open(config.cache[0])
    eval_cache = logitcache.open(config.eval_cache) if config.eval_cache else None
    caches = [cache] if eval_cache is None else [cache, eval_cache]
    for opened in caches:
        if not len(opened):
            raise UserError(f"{opened.path} is an empty cache")
    tail = choose_tail(config, cache)
    checkpoint = find_checkpoint(config)
    warnings = check_same_run(checkpoint, config, cache, tail) if checkpoint else []
    model_config = student_config(config.student)
    for opened in caches:
        check_student(model_config, opened, config.student)
    tokenizer, whose_tokenizer, where = student_tokenizer(config.student), "the student's", config.student
    if tokenizer is None:
        tokenizer = cache_tokenizer(cache)
        whose_tokenizer = "the cache's (the student has none)" if tokenizer else "none"
        where = cache.tokenizer_path
    if tokenizer is not None:
        for opened in caches:
            warnings += check_tokenizer(tokenizer, opened, where)
    if eval_cache is not None and eval_cache.vocab_size != cache.vocab_size:
        raise UserError(
            f"--eval_cache {eval_cache.path}: its teacher has {eval_cache.vocab_size} tokens, that of {cache.path} has "
            f"{cache.vocab_size}. Both must come from one teacher"
        )
    warnings += [
        f"{opened.path}: the mass of its tail is {about}; losses that weigh the tail, RKL above all, learn from that"
        for opened in caches
        if (about := opened.manifest.fingerprint.get("capture", {}).get("tail"))
    ]
    choices = describe_run(config, cache, eval_cache, tail, whose_tokenizer, checkpoint)
    return Run(config, cache, eval_cache, model_config, tokenizer, choices, warnings, checkpoint)


def fit(run: Run, tell: Callable[[dict[str, str]], None]) -> Outcome:
    """Trains, saves model, tokenizer and run.json in --output_dir, evaluates into eval.json beside them.

    tell: is given the one choice that waits for the model.
    """
    config = run.config
    assert config.student and config.output_dir
    set_seed(config.seed)
    model = load_student(config.student, run.student_config, from_scratch=config.from_scratch, dtype=torch.float32)
    interrupt = StopOnInterrupt()
    trainer = DistillTrainer(
        model,
        run.cache,
        config,
        eval_cache=run.eval_cache,
        processing_class=run.tokenizer,
        callbacks=[interrupt] if config.world_size == 1 else [],
    )
    use_short_lines(trainer)
    computed = {"computed": trainer.objective.description}
    tell(computed)
    output = Path(config.output_dir)
    if config.should_save:
        output.mkdir(parents=True, exist_ok=True)
        if run.checkpoint is None:
            for name in (EVALUATION_NAME, STATE_NAME):  # of a former run in this folder
                (output / name).unlink(missing_ok=True)
        write_json(output / RUN_NAME, _record(run, trainer.tail, model.num_parameters(), computed))
    trainer.train(resume_from_checkpoint=run.checkpoint)
    steps = trainer.state.global_step
    if interrupt.requested and steps < trainer.state.max_steps:
        return Outcome(steps, None, str(output / f"checkpoint-{steps}"))
    trainer.save_model()
    metrics = None
    if run.eval_cache is not None:
        prefixed = {name: value for name, value in trainer.evaluate().items() if name.startswith("eval_")}
        metrics = {name.removeprefix("eval_"): value for name, value in prefixed.items()}
        if config.should_save:
            write_evaluation(output / EVALUATION_NAME, str(output), run.eval_cache, metrics)
    trainer.save_state()
    trainer.accelerator.end_training()
    return Outcome(steps, metrics, None)


class StopOnInterrupt(TrainerCallback):
    """On Ctrl-C: finishes the step, writes a checkpoint and stops. A second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.requested = False
        self._before: Callable[[int, FrameType | None], Any] | int | None = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Listens for Ctrl-C."""
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._handle)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Asks the trainer to save and stop."""
        if self.requested:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keeps a run that was asked to stop from evaluating first."""
        control.should_evaluate = control.should_evaluate and not self.requested

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Listens no more."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)


def _record(run: Run, tail: str, num_parameters: int, computed: dict[str, str]) -> dict[str, Any]:
    return {
        "settings": json.loads(run.config.to_json_string()),
        "tail": tail,
        "cache": cache_record(run.cache),
        "student": {"name": run.config.student, "num_parameters": num_parameters},
        "choices": run.choices | computed,
        "warnings": run.warnings,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__}
        | {"logitcache": logitcache.__version__},
    }

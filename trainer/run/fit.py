"""A run of `trainer fit`: trained, saved, evaluated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import TrainerCallback, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

import logitcache
from logitcache import UserError
from logitcache.errors import is_out_of_memory, one_line
from logitcache.storage.atomic import write_json
from trainer.data.loader import BatchLoader
from trainer.evaluation.evaluate import write_evaluation
from trainer.model.adapters import add_adapters, describe_adapters, weights_dtype
from trainer.model.student import load_student, num_parameters
from trainer.run.callbacks import EarlyStopping, GracefulStop, use_short_lines
from trainer.run.distill_trainer import DistillTrainer
from trainer.run.files import EVALUATION_NAME, MODEL_FILES, RUN_NAME, STATE_NAME
from trainer.run.output_folder import whole_or_removed
from trainer.run.prepare import PreparedRun
from trainer.run.ranks import check_ranks, end_ranks
from trainer.run.resume import RunMark, check_scheduler, checkpoint_read, checkpoint_state, data_record, run_id, step_of

CONTINUE = "make room, then `--resume_from_checkpoint true` continues from the last checkpoint, if there is one"


@dataclass(frozen=True)
class Outcome:
    """The result of a run.

    Attributes:
        steps: optimizer steps that the run has made.
        metrics: metrics on the held-out cache, None without one.
        stopped_at: the checkpoint written on Ctrl-C, otherwise None.
        early: a sentence for the user if the run stopped early or if the saved model is not the last one but the best
            checkpoint; otherwise None.
        trained: False if the run had already ended, so that no step was left.
    """

    steps: int
    metrics: dict[str, float] | None
    stopped_at: str | None = None
    early: str | None = None
    trained: bool = True


@contextmanager
def settings_taken() -> Iterator[None]:
    """Turn errors of transformers and PEFT about the values of settings into UserError, while the block runs."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"the settings cannot be used: {one_line(error)}") from error


class _Trainer(DistillTrainer):
    """Continues from files that may hold anything, and leaves no checkpoint that a full disk cut off.

    It makes no step after the last checkpoint of a run; transformers would make one before it looks.
    """

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with checkpoint_read(resume_from_checkpoint, "its weights"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        numbers = max_steps, num_update_steps_per_epoch, num_train_epochs
        with checkpoint_read(resume_from_checkpoint, f"its {STATE_NAME}"):
            return super()._init_training_state(*numbers, resume_from_checkpoint, trial)

    def get_train_dataloader(self) -> BatchLoader:
        """Return this rank's batches."""
        with settings_taken():
            return super().get_train_dataloader()

    def _prepare_for_training(self, *args: Any) -> Any:
        with settings_taken():
            return super()._prepare_for_training(*args)  # type: ignore[no-untyped-call]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with checkpoint_read(checkpoint, "its optimizer or scheduler"):
            super()._load_optimizer_and_scheduler(checkpoint)
            check_scheduler(self.lr_scheduler)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with checkpoint_read(checkpoint, "its gradient scaler"):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with checkpoint_read(checkpoint, "its random numbers"):
            super()._load_rng_state(checkpoint)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        output, name = Path(str(self.args.output_dir)), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            (output / name / STATE_NAME).unlink(
                missing_ok=True
            )  # written last: a checkpoint that is overwritten is whole no more
        with whole_or_removed(output, [name], CONTINUE, lambda: checkpoint_state(output / name) is not None):
            super()._save_checkpoint(*args, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().push_to_hub(*args, **kwargs)
        except Exception as error:
            raise UserError(f"--push_to_hub: {one_line(error)}; the model is in {self.args.output_dir}") from error

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)  # type: ignore[no-untyped-call]


def fit(run: PreparedRun, tell: Callable[[dict[str, str]], None]) -> Outcome:
    """Train, save model, tokenizer and run.json in --output_dir, and evaluate into eval.json beside them.

    Args:
        run: the prepared run.
        tell: called with the choices that depend on the loaded model.
    """
    config = run.config
    assert config.student and config.output_dir
    check_ranks(config)
    set_seed(config.seed)
    model = load_student(
        config.student, run.student_config, from_scratch=config.from_scratch, dtype=weights_dtype(config)
    )
    if config.lora_r:
        with settings_taken():
            model = add_adapters(model, config)
    interrupt = GracefulStop()
    identity = run_id(run.checkpoint)
    callbacks: list[TrainerCallback] = [RunMark(identity), interrupt]
    if config.early_stopping_patience is not None:
        callbacks.append(EarlyStopping(config.early_stopping_patience, config.early_stopping_threshold))
    with settings_taken():
        trainer = _Trainer(
            model, run.data, config, eval_cache=run.eval_cache, processing_class=run.tokenizer, callbacks=callbacks
        )
    use_short_lines(trainer)
    computed = {"computed": trainer.objective.description}
    if hasattr(model, "peft_config"):
        computed["adapters"] = describe_adapters(model)
    tell(computed)
    output = Path(config.output_dir)
    if config.should_save:
        output.mkdir(parents=True, exist_ok=True)
        if run.checkpoint is None:
            for name in (EVALUATION_NAME, STATE_NAME):  # of a former run in this folder
                (output / name).unlink(missing_ok=True)
        write_json(output / RUN_NAME, _record(run, identity, trainer.tail, num_parameters(model), computed))
    begun_at = step_of(run.checkpoint)
    trainer.train(resume_from_checkpoint=run.checkpoint)
    steps = trainer.state.global_step
    if interrupt.stopped:
        end_ranks(trainer)
        return Outcome(steps, None, stopped_at=str(output / f"checkpoint-{steps}"))
    if config.should_save and not hasattr(model, "peft_config"):
        for stale in output.glob("adapter_*"):  # of a former run: the folder would pass for that adapter
            stale.unlink()
    with whole_or_removed(output, MODEL_FILES, CONTINUE):
        trainer.save_model()
    metrics = None
    if run.eval_cache is not None:
        logged = trainer.evaluate().items()
        metrics = {name.removeprefix("eval_"): value for name, value in logged if name.startswith("eval_")}
        if config.should_save:
            write_evaluation(output / EVALUATION_NAME, str(output), run.eval_cache, metrics)
    trainer.save_state()
    end_ranks(trainer)
    return Outcome(steps, metrics, early=_best(trainer), trained=steps > begun_at)


def _best(trainer: DistillTrainer) -> str | None:
    """Say which checkpoint the result of a run is, if it is not the last state of the run."""
    state, args = trainer.state, trainer.args
    if not args.load_best_model_at_end or state.best_global_step is None:
        return None
    early = f"stopped early at step {state.global_step} of {state.max_steps}; " * (state.global_step < state.max_steps)
    return f"{early}the best held-out {args.metric_for_best_model}, {state.best_metric:.4g}, was at step {state.best_global_step}"


def _record(run: PreparedRun, identity: str, tail: str, size: int, computed: dict[str, str]) -> dict[str, Any]:
    return {
        "run_id": identity,
        "world_size": run.config.world_size,
        "settings": run.config.recorded(),
        "tail": tail,
        "cache": data_record(run.data),
        "student": {"name": run.config.student, "num_parameters": size},
        "choices": run.choices | computed,
        "warnings": run.warnings,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__}
        | {"logitcache": logitcache.__version__},
    }

"""The measurement of a run while it trains: when it ends early, and which checkpoint is its result."""

from dataclasses import dataclass

from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from logitcache import UserError
from trainer.config.fields import DecidesRun, setting
from trainer.config.metrics import HIGHER, JUDGED, METRICS

JUDGING = ("loss", *JUDGED)
EVALUATIONS_PER_RUN = 10
SAVE_STEPS = 500  # TrainingArguments' default


@dataclass
class EvaluationSettings(TrainingArguments):
    """The held-out cache; early stopping and the best checkpoint, by any of its metrics."""

    eval_cache: str | None = setting(
        None, "A held-out cache, evaluated during training and at the end.", decides_run=DecidesRun.COMPARED
    )
    eval_strategy: IntervalStrategy | str = setting(
        "auto",
        f"When to evaluate on --eval_cache: no, steps or epoch. Default: {EVALUATIONS_PER_RUN} times a run where "
        "--eval_cache is given.",
        decides_run=DecidesRun.IF_JUDGED,
    )
    early_stopping_patience: int | None = setting(
        None,
        "Stop after so many evaluations in a row without a better --metric_for_best_model "
        f"({', '.join(JUDGING)}), and keep the best checkpoint's weights.",
        decides_run=DecidesRun.IF_JUDGED,
    )
    early_stopping_threshold: float = setting(
        0.0, "By how much a metric must improve to count as better.", decides_run=DecidesRun.IF_JUDGED
    )

    def check_evaluation(self) -> None:
        """Sets evaluation, metric and checkpoints to suit each other. Raises UserError for contradictions."""
        if self.eval_steps is not None and not self.eval_steps > 0:
            raise UserError(
                f"--eval_steps {self.eval_steps:g}: steps, or a share of the run between 0 and 1, are expected"
            )
        if self.eval_strategy == "auto":
            self.eval_strategy = "steps" if self.eval_cache else "no"
            self.eval_steps = self.eval_steps or 1 / EVALUATIONS_PER_RUN
        if self.early_stopping_patience is not None:
            if self.early_stopping_patience < 1:
                raise UserError(f"--early_stopping_patience {self.early_stopping_patience}: it must be at least 1")
            if not self.early_stopping_threshold >= 0:
                raise UserError(f"--early_stopping_threshold {self.early_stopping_threshold:g}: it must be at least 0")
            self.load_best_model_at_end = True
        elif self.early_stopping_threshold:
            raise UserError("--early_stopping_threshold without --early_stopping_patience: add that, or leave it out")
        if not self.load_best_model_at_end and self.metric_for_best_model is None:
            return
        if self.eval_cache is None or self.eval_strategy == IntervalStrategy.NO:
            raise UserError(
                "--load_best_model_at_end, --metric_for_best_model and --early_stopping_patience go by evaluations: name the "
                "held-out cache with --eval_cache"
            )
        metric = (self.metric_for_best_model or "loss").removeprefix("eval_")
        if metric not in JUDGING:
            raise UserError(f"--metric_for_best_model {metric}: accepted are {', '.join(JUDGING)}")
        self.metric_for_best_model = metric
        self.greater_is_better = metric in METRICS and METRICS[metric].better == HIGHER
        if self.load_best_model_at_end and self.save_strategy == IntervalStrategy.NO:
            raise UserError("--save_strategy no: the best checkpoint cannot be kept. Leave it out, or take best")
        if (
            self.load_best_model_at_end
            and self.save_steps == SAVE_STEPS
            and self.save_strategy == IntervalStrategy.STEPS
        ):
            self.save_strategy, self.save_steps = self.eval_strategy, self.eval_steps or SAVE_STEPS

"""What a run is: every field of transformers.TrainingArguments, and what distillation adds. Contradictions end here."""

import dataclasses
import math
import sys
from dataclasses import dataclass

from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from logitcache import LogitCache, UserError
from trainer.losses.divergences import DIVERGENCES
from trainer.losses.registry import check_divergence, divergence_names, options_of
from trainer.losses.tail import TAILS
from trainer.settings.adapters import AdapterSettings
from trainer.settings.batching import BatchingSettings
from trainer.settings.fields import redefault, setting
from trainer.settings.loss_args import parse_loss_args
from trainer.settings.schedules import ScheduleSettings
from trainer.settings.stopping import StoppingSettings

ABLATION_TAILS = ("ignore", "renormalise", "uniform")
EVALUATIONS_PER_RUN = 10


def _options_by_divergence() -> str:
    options = {name: [f"{key}={value}" for key, value in options_of(name).items()] for name in DIVERGENCES}
    return "; ".join(f"{name}: {', '.join(pairs)}" for name, pairs in options.items() if pairs)


@dataclass
class DistillConfig(StoppingSettings, AdapterSettings, ScheduleSettings, BatchingSettings, TrainingArguments):
    """Settings of a run; their help texts say what each is.

    Raises UserError for values and combinations that cannot be meant. What depends on a cache is refused by
    `choose_tail`.
    """

    eval_cache: str | None = setting(None, "A held-out cache, evaluated during training and at the end.")
    student: str | None = setting(None, "The student: a model folder or a name on the Hub.")
    from_scratch: bool = setting(False, "Draw the student's weights at random instead of loading them.")
    loss: str = setting(
        "todi", f"The divergence from the teacher: {', '.join(DIVERGENCES)}, or a registered one (Python only)."
    )
    loss_args: dict | str | None = dataclasses.field(
        default=None, metadata={"help": f"Options of the divergence, key=value,key=value: {_options_by_divergence()}."}
    )
    kd_weight: float = setting(
        0.5, "λ in (1−λ)·CE + λ·KD: 0 learns from the hard labels only, 1 from the teacher only."
    )
    temperature: float = setting(
        1.0, "T of both distributions in KD; the cache must hold the tail at this T, see --approximate_temperature."
    )
    approximate_temperature: bool = setting(
        False,
        "Allow a T that the cache does not hold: its tail is estimated from the tail's entropy, which it must hold.",
    )
    tail: str | None = setting(
        None,
        "What becomes of the teacher's mass outside the stored entries. Default: groups where the cache has them and "
        f"T is 1, else bucket. {', '.join(ABLATION_TAILS)} are ablations.",
        list(TAILS),
    )
    ablation: bool = setting(False, f"Allow --tail {', --tail '.join(ABLATION_TAILS)}.")
    t_squared: bool = setting(True, "Multiply KD by T², so that its gradient keeps its size as T grows.")

    logging_steps: float = redefault("logging_steps", 10)
    remove_unused_columns: bool = redefault("remove_unused_columns", False)
    eval_strategy: IntervalStrategy | str = dataclasses.field(
        default="auto",
        metadata={
            "help": f"When to evaluate on --eval_cache: no, steps or epoch. Default: {EVALUATIONS_PER_RUN} times a run "
            "where --eval_cache is given."
        },
    )

    def __post_init__(self) -> None:
        self._check()
        if self.eval_strategy == "auto":
            self.eval_strategy = "steps" if self.eval_cache else "no"
            self.eval_steps = self.eval_steps or 1 / EVALUATIONS_PER_RUN
        if self.disable_tqdm is None:
            self.disable_tqdm = not sys.stderr.isatty()
        super().__post_init__()

    def _check(self) -> None:
        for name, value, accepted in (
            ("loss", self.loss, divergence_names()),
            ("tail", self.tail or "bucket", TAILS),
        ):
            if value not in accepted:
                raise UserError(f"--{name} {value}: accepted are {', '.join(accepted)}")
        self.check_batching(self.train_sampling_strategy)
        self.check_schedules()
        self.check_adapters()
        self.check_stopping()
        self.loss_args = parse_loss_args(self.loss, self.loss_args)
        try:
            check_divergence(self.loss, self.loss_args)
        except ValueError as error:
            raise UserError(f"--loss {self.loss}{' --loss_args' if self.loss_args else ''}: {error}") from error
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: it must be at least 1")
        if not 0 <= self.kd_weight <= 1:
            raise UserError(
                f"--kd_weight {self.kd_weight:g}: it must lie between 0 (hard labels only) and 1 (the teacher only)"
            )
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise UserError(f"--temperature {self.temperature:g}: it must be a positive number")
        if self.tail in ABLATION_TAILS and not self.ablation:
            raise UserError(
                f"--loss {self.loss} --tail {self.tail}: with this tail the loss does not vanish where the student "
                "equals the teacher, and rkl is destroyed. Take --tail bucket, or add --ablation to study that"
            )
        if self.tail == "groups" and self.temperature != 1:
            raise UserError(
                f"--tail groups --temperature {self.temperature:g}: at T ≠ 1 a cache holds the tail's total only, not "
                "its groups. Take --tail bucket, or --temperature 1"
            )
        if self.label_smoothing_factor:
            raise UserError(
                f"--label_smoothing_factor {self.label_smoothing_factor:g} has no place in this loss: the teacher is "
                "what smooths the labels. Leave it at 0 and raise --kd_weight"
            )


def choose_tail(config: DistillConfig, cache: LogitCache) -> str:
    """The tail treatment of a run. Raises UserError where the cache does not hold what --tail and --temperature need."""
    layout = cache.manifest.layout
    if approximates_tail(config, cache) and not (config.approximate_temperature and layout.tail_entropy):
        _refuse_temperature(config, cache)
    for name, held in (("groups", layout.num_tail_groups), ("samples", layout.num_tail_samples)):
        if config.tail == name and not held:
            raise UserError(
                f"--tail {name}: {cache.path} holds no tail {name}. Take --tail bucket, or build the cache with "
                f"`logitcache build --tail-{name} 32`"
            )
    if config.tail is not None:
        return config.tail
    return "groups" if layout.num_tail_groups and config.temperature == 1 else "bucket"


def approximates_tail(config: DistillConfig, cache: LogitCache) -> bool:
    """Whether the cache does not hold the tail at the temperature of a run, though the run needs it."""
    return config.temperature not in (1, *cache.manifest.layout.temperatures) and config.tail != "renormalise"


def _refuse_temperature(config: DistillConfig, cache: LogitCache) -> None:
    T, layout = config.temperature, cache.manifest.layout
    held = ", ".join(f"{t:g}" for t in sorted({1.0, *layout.temperatures}))
    build = f"build the cache with `logitcache build --temperatures {T:g}`"
    if layout.tail_entropy:
        ways = f"add --approximate_temperature (it holds the tail's entropy), or {build}"
    else:
        ways = f"or {build}, or with `--tail-entropy`, which is enough for --approximate_temperature"
    raise UserError(
        f"--temperature {T:g}: {cache.path} holds the teacher's tail at T = {held} only. Take one of these, {ways}"
    )

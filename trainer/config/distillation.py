"""The settings of the loss: divergence, weight, temperature, tail."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from logitcache import UserError
from trainer.config.fields import DecidesRun, setting
from trainer.config.loss_args import parse_loss_args
from trainer.config.schedules import SCHEDULED, ScheduleSettings
from trainer.losses.divergences import DIVERGENCES
from trainer.losses.fused import Mixture
from trainer.losses.registry import check_divergence, divergence_names, options_of
from trainer.losses.settings import LossSettings
from trainer.losses.validation import TAIL_NAMES

ABLATION_TAILS = ("ignore", "renormalise", "uniform")


def _options_by_divergence() -> str:
    options = {name: [f"{key}={value}" for key, value in options_of(name).items()] for name in DIVERGENCES}
    return "; ".join(f"{name}: {', '.join(pairs)}" for name, pairs in options.items() if pairs)


@dataclass
class DistillationSettings(ScheduleSettings):
    """The loss of a run, and what becomes of the teacher's tail in it."""

    loss: str = setting(
        "todi", f"The divergence from the teacher: {', '.join(DIVERGENCES)}, or a registered one (Python only)."
    )
    loss_args: dict[str, Any] | str | None = setting(
        None, f"Options of the divergence, key=value,key=value: {_options_by_divergence()}."
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
        decides_run=DecidesRun.COMPARED,
    )
    tail: str | None = setting(
        None,
        "What becomes of the teacher's mass outside the stored entries. Default: low_rank where the cache has its "
        "coefficients, else groups where it has them and T is 1, else bucket. "
        f"{', '.join(ABLATION_TAILS)} are ablations.",
        list(TAIL_NAMES),
        decides_run=DecidesRun.COMPARED,
    )
    ablation: bool = setting(
        False, f"Allow --tail {', --tail '.join(ABLATION_TAILS)}.", decides_run=DecidesRun.COMPARED
    )
    t_squared: bool = setting(True, "Multiply KD by T², so that its gradient keeps its size as T grows.")

    @property
    def losses(self) -> tuple[str, ...]:
        """The divergences of the run, in order."""
        return tuple(loss for _, loss in self.points("loss")) or (self.loss,)

    @property
    def temperatures(self) -> tuple[float, ...]:
        """The temperatures of the run, in order, each once."""
        return tuple(dict.fromkeys(T for _, T in self.points("temperature"))) or (self.temperature,)

    @property
    def kd_weights(self) -> tuple[float, ...]:
        """λ at every point of its schedule."""
        return tuple(weight for _, weight in self.points("kd_weight")) or (self.kd_weight,)

    def settings_at(
        self, progress: float, *, tail: str, temperature: float | None = None, approximated: Collection[float] = ()
    ) -> tuple[LossSettings, Mixture]:
        """Return the loss at a moment of the run, and its mixture with the cross-entropy.

        Args:
            progress: the share of the run's steps that are done, 0 … 1.
            tail: the tail treatment.
            temperature: in place of the temperature that the run has at this moment.
            approximated: temperatures at which the tail is estimated.
        """
        assert isinstance(self.loss_args, dict)
        loss, kd_weight = self.value_at("loss", progress), self.value_at("kd_weight", progress)
        if temperature is None:
            temperature = self.value_at("temperature", progress)
        known = options_of(loss)
        loss_args = {name: value for name, value in self.loss_args.items() if name in known}
        factor = temperature**2 if self.t_squared else 1.0
        return (
            LossSettings(loss, tail, temperature, temperature in approximated, loss_args),
            Mixture(kd_weight * factor, 1 - kd_weight),
        )

    def check_distillation(self) -> None:
        """Settles the divergence's options and where schedules end. Raises UserError for what cannot be meant."""
        self.check_schedules()
        named = {name: f"{name}_schedule" if self.points(name) else name for name in SCHEDULED}
        for name, values, accepted in (
            (named["loss"], self.losses, divergence_names()),
            ("tail", [self.tail or "bucket"], TAIL_NAMES),
        ):
            for value in values:
                if value not in accepted:
                    raise UserError(f"--{name} {value}: accepted are {', '.join(accepted)}")
        self._check_loss_args()
        for weight in self.kd_weights:
            if not 0 <= weight <= 1:
                raise UserError(
                    f"--{named['kd_weight']} {weight:g}: it must lie between 0 (hard labels only) and 1 (the teacher only)"
                )
        for temperature in self.temperatures:
            if not (math.isfinite(temperature) and temperature > 0):
                raise UserError(f"--{named['temperature']} {temperature:g}: it must be a positive number")
            if self.tail == "groups" and temperature != 1:
                raise UserError(
                    f"--tail groups --{named['temperature']} {temperature:g}: at T ≠ 1 a cache holds the tail's total only, not "
                    "its groups. Take --tail bucket, or --temperature 1"
                )
        if self.tail in ABLATION_TAILS and not self.ablation:
            raise UserError(
                f"--loss {self.loss} --tail {self.tail}: with this tail the loss does not vanish where the student "
                "equals the teacher, and rkl is destroyed. Take --tail bucket, or add --ablation to study that"
            )

    def _check_loss_args(self) -> None:
        """Checks the options of each of a schedule's losses. An option may be of any of them."""
        self.loss_args = parse_loss_args(self.losses, self.loss_args)
        known = {name for loss in self.losses for name in options_of(loss)}
        for loss in self.losses:
            own = {
                name: value for name, value in self.loss_args.items() if name in options_of(loss) or name not in known
            }
            try:
                check_divergence(loss, own)
            except ValueError as error:
                raise UserError(f"--loss {loss}{' --loss_args' if self.loss_args else ''}: {error}") from error

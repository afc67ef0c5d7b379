"""All settings of a run: the fields of transformers.TrainingArguments, and distillation's. Contradictions end here."""

import dataclasses
import json
import math
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments

from logitcache import UserError
from logitcache.errors import one_line
from logitcache.urls import public_url
from trainer.config.adapters import AdapterSettings
from trainer.config.batching import BatchingSettings
from trainer.config.distillation import DistillationSettings
from trainer.config.evaluation import EvaluationSettings
from trainer.config.fields import NEVER_PREFIXES, OF_TRANSFORMERS, DecidesRun, redefault, setting

UNBOUNDED = ("max_grad_norm",)
"""Settings that may be infinite: gradients of any norm are then left as they are."""


def public_places(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings that name caches, URLs without their secrets, for records and reports."""

    def public(value: Any) -> Any:
        if isinstance(value, list):
            return [public(item) for item in value]
        return public_url(value) if isinstance(value, str) else value

    return {name: public(settings.get(name)) for name in ("cache", "average_with", "eval_cache")}


@dataclass
class DistillConfig(AdapterSettings, DistillationSettings, BatchingSettings, EvaluationSettings):
    """Settings of a run; their help texts say what each is.

    Raises UserError for values and combinations that cannot be meant. What depends on a cache is refused by
    `tail_choice`.
    """

    student: str | None = setting(
        None, "The student: a model folder or a name on the Hub.", decides_run=DecidesRun.COMPARED
    )
    from_scratch: bool = setting(
        False, "Draw the student's weights at random instead of loading them.", decides_run=DecidesRun.COMPARED
    )
    attn_implementation: str | None = setting(
        None,
        "The student's attention: sdpa, eager, flash_attention_2, … Default: sdpa, or eager where sdpa leaves out a part of "
        "the model's configuration.",
        decides_run=DecidesRun.COMPARED,
    )

    logging_steps: float = redefault("logging_steps", 10)
    remove_unused_columns: bool = redefault("remove_unused_columns", False)
    ddp_find_unused_parameters: bool | None = redefault("ddp_find_unused_parameters", False)

    def __post_init__(self) -> None:
        self._check()
        self.check_evaluation()
        if self.disable_tqdm is None:
            self.disable_tqdm = not sys.stderr.isatty()
        try:
            super().__post_init__()  # type: ignore[no-untyped-call]
        except UserError:
            raise
        except Exception as error:  # of whatever kind transformers, accelerate and what they load raise for a value
            refused = "".join(f"--{name} {value}: " for name, value in self._refused().items())
            raise UserError(f"{refused}{one_line(error) or type(error).__name__}") from error
        started = int(os.environ.get("WORLD_SIZE", 1))
        if started != self.world_size:
            raise UserError(
                f"{started} processes were started, and each would train by itself, since no GPU is found. Add --use_cpu "
                "to train on CPUs together"
            )

    def _refused(self) -> dict[str, Any]:
        """Returns the setting, if it is only one, because of which transformers refuses them all."""
        fields = {field.name: field.default for field in dataclasses.fields(TrainingArguments) if field.init}
        given = {name: getattr(self, name) for name, default in fields.items() if getattr(self, name) != default}
        for name, value in given.items():
            with suppress(Exception):
                TrainingArguments(**{other: given[other] for other in given if other != name})
                return {name: value}
        return {}

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings for run.json and trackers: URLs of caches without their secrets."""
        settings: dict[str, Any] = super().to_dict()  # type: ignore[no-untyped-call]
        return settings | public_places(self.__dict__)

    def recorded(self) -> dict[str, Any]:
        """Returns the settings as run.json holds them."""
        settings: dict[str, Any] = json.loads(self.to_json_string())  # type: ignore[no-untyped-call]
        return settings

    def __getstate__(self) -> dict[str, Any]:
        """Keeps secrets of URLs out of a checkpoint's training_args.bin too."""
        return self.__dict__ | public_places(self.__dict__)

    def _check(self) -> None:
        self.check_batching(self.train_sampling_strategy)
        self.check_distillation()
        self.check_adapters()
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: it must be at least 1")
        if self.max_steps <= 0 and not (math.isfinite(self.num_train_epochs) and self.num_train_epochs > 0):
            raise UserError(f"--num_train_epochs {self.num_train_epochs:g}: it must be a positive number")
        if self.label_smoothing_factor:
            raise UserError(
                f"--label_smoothing_factor {self.label_smoothing_factor:g} has no place in this loss: the teacher is "
                "what smooths the labels. Leave it at 0 and raise --kd_weight"
            )
        for field in dataclasses.fields(self):
            value = getattr(self, field.name, None)
            if isinstance(value, float) and not math.isfinite(value) and field.name not in UNBOUNDED:
                raise UserError(f"--{field.name} {value:g}: a finite number is expected")


def decides_run(name: str) -> DecidesRun:
    """Return what the setting `name` decides of a run, also a setting that only another version has."""
    field = DistillConfig.__dataclass_fields__.get(name)
    by_prefix = DecidesRun.NEVER if name.startswith(NEVER_PREFIXES) else DecidesRun.COMPARED
    said: DecidesRun = getattr(
        field and field.metadata.get("help"), "decides_run", OF_TRANSFORMERS.get(name, by_prefix)
    )
    return said

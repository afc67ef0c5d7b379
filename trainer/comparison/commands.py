"""The commands that a run of a recipe consists of."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from trainer.comparison.launch import Launcher
from trainer.comparison.recipe import PlannedRun
from trainer.evaluation.generation_settings import GenerationSettings

TRAINER = ("-m", "trainer")


def fit_command(run: PlannedRun, checkpoint: Path | None, launch: Launcher | None) -> list[str]:
    """`trainer fit`, from a checkpoint where there is one."""
    resume = [] if checkpoint is None else ["--resume_from_checkpoint", str(checkpoint)]
    return [*(launch.command if launch else [sys.executable]), *TRAINER, "fit", *run.arguments, *resume]


def generate_command(folder: Path, settings: GenerationSettings) -> list[str]:
    """`trainer eval --generate` of a finished student."""
    options: list[str] = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.name == "columns":
            options += ["--columns=" + ",".join(f"{ours}={theirs}" for ours, theirs in value.items())] if value else []
        elif field.name == "prompt_template":
            options += [f"--prompt_template={template}" for template in value]
        elif field.name in ("data", "seeds"):
            options += [f"--{field.name}", *map(str, value)]
        elif value is not None:
            options.append(f"--{field.name}={value}")
    return [sys.executable, *TRAINER, "eval", str(folder), "--generate", *options]

"""What a run prints while it trains: short lines, and on a terminal a bar below them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

TRAINING: tuple[str, ...] = (
    "loss",
    "ce",
    "fkl",
    "rkl",
    "aux_loss",
    "teacher_tail",
    "student_tail",
    "grad_norm",
    "learning_rate",
)
HELD_OUT: tuple[str, ...] = ("ce", "perplexity", "fkl", "rkl", "agreement", "ece")


def use_short_lines(trainer: Trainer) -> None:
    """Replaces the callback that prints every number of every log."""
    if trainer.args.disable_tqdm:
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_Lines())
    else:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(_Bar())


def log_line(logs: Mapping[str, float], step: int, steps: int, seconds_left: float | None = None) -> str | None:
    """One line for a log of training or evaluation, None for any other log."""
    if "loss" not in logs and "eval_ce" not in logs:
        return None
    prefix, names = ("", TRAINING) if "loss" in logs else ("eval_", HELD_OUT)
    numbers = [f"{name} {logs[prefix + name]:.4g}" for name in names if prefix + name in logs]
    pace = [] if prefix or "tokens_per_second" not in logs else _pace(logs)
    left = [] if seconds_left is None or prefix else [f"{seconds_left:.0f} s left"]
    return "  ".join([f"step {step}/{steps}{'  held out:' if prefix else ''}", *numbers, *pace, *left])


def _pace(logs: Mapping[str, float]) -> list[str]:
    rate = f"{logs['tokens_per_second']:,.0f} tokens/s"
    return [
        rate,
        *(f"{name} {logs[key]:.1%}" for key, name in (("padding", "padding"), ("data_wait", "waiting for data"))),
    ]


class _Lines(TrainerCallback):
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began, self._first_step = time.monotonic(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        done = state.global_step - self._first_step
        left = (time.monotonic() - self._began) / done * (state.max_steps - state.global_step) if done else None
        line = log_line(logs, state.global_step, state.max_steps, left)
        if line and state.is_world_process_zero:
            print(line, flush=True)


class _Bar(ProgressCallback):
    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        line = log_line(logs, state.global_step, state.max_steps)
        if line and self.training_bar is not None:
            self.training_bar.write(line)

"""The callbacks of a run: its lines, Ctrl-C, early stopping, and how fast it is."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from logitcache import UserError
from trainer.config.metrics import JUDGED

TRAINING = (
    *("loss", "ce", "fkl", "rkl", "aux_loss", "teacher_tail", "student_tail", "residual_weight"),
    *("grad_norm", "learning_rate"),
)
RESIDUALS = "residual_weight"
RESIDUALS_KEPT = 0.95  # of the sums over the probes, from one optimizer step to the next


def use_short_lines(trainer: Trainer) -> None:
    """Replace the callback that prints every number of every log."""
    if trainer.args.disable_tqdm:
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_Lines())
    else:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(_Bar())


def log_line(logs: Mapping[str, float], step: int, steps: int, seconds_left: float | None = None) -> str | None:
    """Write one line for a log of training or evaluation; None for any other log."""
    if "loss" not in logs and "eval_ce" not in logs:
        return None
    prefix, names = ("", TRAINING) if "loss" in logs else ("eval_", JUDGED)
    numbers = [f"{name} {logs[prefix + name]:.4g}" for name in names if prefix + name in logs]
    pace = []
    if not prefix and "tokens_per_second" in logs:
        pace = [f"{logs['tokens_per_second']:,.0f} tokens/s", f"padding {logs['padding']:.1%}"]
        pace.append(f"waiting for data {logs['data_wait']:.1%}")
    left = [] if seconds_left is None or prefix else [f"{seconds_left:.0f} s left"]
    return "  ".join([f"step {step}/{steps}{'  held out:' if prefix else ''}", *numbers, *pace, *left])


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


class GracefulStop(TrainerCallback):
    """Stops a run on Ctrl-C after its current step, with a checkpoint. A second Ctrl-C stops at once.

    All ranks stop after the same step, whichever rank received the signal. `stopped` tells whether Ctrl-C ended the run
    before its last step.
    """

    def __init__(self) -> None:
        self.requested = False
        self.stopped = False
        self._before: Callable[[int, FrameType | None], Any] | int | None = None
        self._ranks: dist.ProcessGroup | None = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to listen for Ctrl-C."""
        if args.world_size > 1:
            self._ranks = dist.new_group(backend="gloo")  # on the host: the devices are not waited for
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._handle)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask the trainer to save and stop.

        The trainer must not load the best weights then: under a limit of one checkpoint it would keep no other.
        """
        if self._requested_anywhere() and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True
            control.should_evaluate = False
            args.save_total_limit, args.load_best_model_at_end = None, False

    def _requested_anywhere(self) -> bool:
        if self._ranks is None:
            return self.requested
        requested = torch.tensor(int(self.requested))
        dist.all_reduce(requested, dist.ReduceOp.MAX, self._ranks)
        return bool(requested)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep a run that was asked to stop from evaluating first."""
        control.should_evaluate = control.should_evaluate and not self.stopped

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give Ctrl-C back to the handler of before."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)


class EarlyStopping(EarlyStoppingCallback):
    """transformers' callback, whose count an interrupted run takes from its checkpoint."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore the count; stop at once if the run had already stopped early at the checkpoint's step."""
        super().on_train_begin(args, state, control, **kwargs)  # type: ignore[no-untyped-call]
        saved = state.stateful_callbacks
        count = saved.get(EarlyStoppingCallback.__name__, self.state())  # the name in checkpoints of earlier versions
        count = saved.setdefault(type(self).__name__, count)["attributes"]["early_stopping_patience_counter"]
        self.early_stopping_patience_counter = count
        control.should_training_stop = count >= self.early_stopping_patience


class ResidualWeight(TrainerCallback):
    """Estimates ρ of the low-rank tail from the residuals at the probes of the steps so far, the same on all ranks.

    ρ = Σ ε_p ε_q / Σ ε_q² within 0 … 1, and 0 before the first step. Both sums forget: after a step RESIDUALS_KEPT of
    them is left, and that of the step is added. The states of checkpoints hold them under RESIDUALS.
    """

    def __init__(self, over_ranks: Callable[[Tensor], Tensor]) -> None:
        self._over_ranks = over_ranks
        self._shared = self._own = 0.0
        self._of_step: list[Tensor] = []

    @property
    def weight(self) -> float:
        """ρ for the step to come."""
        return min(max(self._shared / self._own, 0.0), 1.0) if self._own > 0 else 0.0

    def add(self, products: Tensor | None) -> None:
        """Note the products of a batch of the step, [N, 2]; None without probes or positions."""
        if products is not None:
            self._of_step.append(products.sum(0))  # which stays on the device until the step ends

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin with the sums of the checkpoint. Raises UserError if it holds none."""
        self._shared = self._own = 0.0
        self._of_step.clear()
        if not state.global_step:
            return
        try:
            self._shared, self._own = map(float, state.stateful_callbacks[RESIDUALS]["sums"])
        except (LookupError, TypeError, ValueError) as error:
            raise UserError(
                "the checkpoint does not hold the sums of the low-rank tail's residuals: continue from another one"
            ) from error

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the step's products in."""
        sums = torch.zeros(2, dtype=torch.float64)
        if self._of_step:
            sums = torch.stack(self._of_step).cpu().double().sum(0)
        shared, own = self._over_ranks(sums).tolist()
        self._shared = RESIDUALS_KEPT * self._shared + shared
        self._own = RESIDUALS_KEPT * self._own + own
        self._of_step.clear()
        state.stateful_callbacks[RESIDUALS] = {"sums": [self._shared, self._own]}


class ThroughputCallback(TrainerCallback):
    """Counts tokens and seconds of training steps; the time of evaluating and saving a model does not count."""

    def __init__(self) -> None:
        self._begun = 0.0
        self.reset()

    def reset(self) -> None:
        """Begin to count anew."""
        self.seconds = self.waited_s = 0.0
        self.tokens = self.padded_tokens = 0

    def wait_begins(self) -> None:
        """Note that a step asks for its batches."""
        self._begun = time.perf_counter()

    def wait_ends(self, tokens: int, padded_tokens: int) -> None:
        """Note that the batches of a step are there. tokens: of the sequences.  padded_tokens: with padding."""
        self.waited_s += time.perf_counter() - self._begun
        self.tokens += tokens
        self.padded_tokens += padded_tokens

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note that the optimizer has made its step."""
        self.seconds += time.perf_counter() - self._begun

"""Ctrl-C during a run."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback


class StopOnInterrupt(TrainerCallback):
    """On Ctrl-C: finishes the step, writes a checkpoint and stops. A second Ctrl-C stops at once.

    Ranks stop after the same step, whichever of them heard of it first.

    requested: Ctrl-C was pressed.  stopped: and ended the run, which had more steps to do.
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
        """Listens for Ctrl-C."""
        if args.world_size > 1:
            self._ranks = dist.new_group(backend="gloo")  # on the host: the devices are not waited for
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._handle)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Asks the trainer to save and stop.

        And not to end with the best weights: under a limit of one checkpoint it would keep no other.
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
        """Keeps a run that was asked to stop from evaluating first."""
        control.should_evaluate = control.should_evaluate and not self.stopped

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Listens no more."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

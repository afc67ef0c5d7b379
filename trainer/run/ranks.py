"""A run of several processes: their number, and their end."""

from __future__ import annotations

import os

from transformers import Trainer, TrainingArguments
from transformers.training_args import ParallelMode

from logitcache import UserError

RANKS_VARIABLE = "TRAINER_RANKS"
"""The environment variable that says how many ranks are meant to train, whatever a launcher started."""


def check_ranks(args: TrainingArguments) -> None:
    """Raises UserError if the number of ranks is not the number that was asked for, or FSDP has one rank only."""
    asked = os.environ.get(RANKS_VARIABLE, str(args.world_size))
    if asked != str(args.world_size):
        raise UserError(
            f"{asked} ranks were asked for and the launcher started {args.world_size}: it may have found no more devices"
        )
    if args.fsdp and args.parallel_mode != ParallelMode.DISTRIBUTED:
        raise UserError(
            "--fsdp shards a model over ranks, and this is one: torchrun --no-python --nproc-per-node 8 trainer fit … starts "
            "eight"
        )


def end_ranks(trainer: Trainer) -> None:
    """End trackers and the process group; the trainer trains no more.

    The wrapper of the model for several ranks is dropped first. DDP's reducer holds a reference to the group; if its
    reference were the last, it would join the back end's threads while it has the interpreter's lock, for which they may
    wait.
    """
    assert trainer.model is not None
    accelerator = trainer.accelerator
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    trainer.model_wrapped = trainer.model
    accelerator.end_training()

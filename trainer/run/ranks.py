"""A run of several processes: what needs them, and their end."""

from __future__ import annotations

import os

from transformers import Trainer, TrainingArguments
from transformers.training_args import ParallelMode

from logitcache import UserError

RANKS_VARIABLE = "TRAINER_RANKS"
"""Of the environment: as many ranks are meant to train, whatever a launcher started."""


def check_ranks(args: TrainingArguments) -> None:
    """Raises UserError where there are fewer or more ranks than asked for, or a model is to be sharded over one."""
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
    """Ends trackers and the process group; the trainer trains no more.

    What wraps the model for several ranks goes first. DDP's reducer holds the group and, were it the last to, would join
    the back end's threads without giving up the interpreter's lock, which they may be waiting for.
    """
    assert trainer.model is not None
    accelerator = trainer.accelerator
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    trainer.model_wrapped = trainer.model
    accelerator.end_training()

"""The end of a run of several processes."""

from __future__ import annotations

from transformers import Trainer


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

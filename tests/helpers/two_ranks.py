"""What each of two processes runs: one optimizer step over the whole cache, of Llama or of a mixture of experts."""

from pathlib import Path

import torch

import logitcache
from tests.helpers.cachemaking import llama
from tests.helpers.distilling import CatchGradient, config
from tests.helpers.experts import SIZES, model_of
from trainer.run.distill_trainer import DistillTrainer


def train_one_step(cache: str, folder: Path, mixture: bool = False) -> None:
    catch = CatchGradient()
    student = model_of("Mixtral", SIZES) if mixture else llama(seed=7)
    hard_labels = {"kd_weight": 0.0} if mixture else {}
    settings = config(
        folder,
        **hard_labels,
        max_steps=1,
        logging_steps=1,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=12,
    )
    trainer = DistillTrainer(student, logitcache.open(cache), settings, callbacks=[catch])
    trainer.train()
    if settings.process_index == 0:
        gradient = {name.removeprefix("module."): value for name, value in catch.gradient.items()}
        torch.save({"gradient": gradient, "logged": trainer.state.log_history[0]}, folder / "gradient.pt")
    torch.distributed.barrier()
    trainer.accelerator.end_training()

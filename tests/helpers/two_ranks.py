"""What each of two processes runs: optimizer steps over the whole cache, of Llama or of a mixture of experts."""

import json
from pathlib import Path

import torch

import logitcache
from tests.helpers.cachemaking import llama
from tests.helpers.distilling import CatchGradient, config, near_teacher
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


def train_three_steps(cache: str, folder: Path) -> None:
    """Each step is an epoch, of 12 micro-batches a rank."""
    settings = config(folder, max_steps=3, logging_steps=1, learning_rate=1e-2, loss="rkl")
    settings.per_device_train_batch_size, settings.gradient_accumulation_steps = 1, 12
    trainer = DistillTrainer(near_teacher(), logitcache.open(cache), settings)
    trainer.train()
    if settings.process_index == 0:
        (folder / "log.json").write_text(json.dumps(trainer.state.log_history[:3]))
    torch.distributed.barrier()
    trainer.accelerator.end_training()

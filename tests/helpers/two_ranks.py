"""What each of two processes runs: one optimizer step over the whole cache, of Llama or of a mixture of experts."""

import sys
from pathlib import Path

import torch

import logitcache
from tests.helpers.cachemaking import llama
from tests.helpers.distilling import CatchGradient, config
from tests.helpers.experts import SIZES, model_of
from trainer.run.distill_trainer import DistillTrainer

if __name__ == "__main__":
    torch.set_num_threads(1)
    cache, folder = logitcache.open(sys.argv[1]), Path(sys.argv[2])
    catch = CatchGradient()
    mixture = sys.argv[3:] == ["Mixtral"]
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
    trainer = DistillTrainer(student, cache, settings, callbacks=[catch])
    trainer.train()
    if settings.process_index == 0:
        gradient = {name.removeprefix("module."): value for name, value in catch.gradient.items()}
        torch.save({"gradient": gradient, "logged": trainer.state.log_history[0]}, folder / "gradient.pt")
    torch.distributed.barrier()
    trainer.accelerator.end_training()

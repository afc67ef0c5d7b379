"""What each of two processes runs in test_head: the fused loss of half a batch on a model sharded by FSDP."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import logitcache
from tests.helpers.heads import call, fused, model_of
from trainer.data.collator import Collator


def take_gradient(cache_path: str, folder: Path, version: str, *options: str) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    cache = logitcache.open(cache_path)
    model: Any = model_of("Gemma2", tie_word_embeddings="tied" in options)
    objective = fused(model)
    units = [*model.model.layers, *([model.lm_head] if "head" in options else [])]
    wrapped: nn.Module
    if version == "fsdp2":
        mesh = init_device_mesh("cpu", (2,))
        for unit in units:
            fully_shard(unit, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    else:
        wrapped = FullyShardedDataParallel(
            model,
            auto_wrap_policy=lambda module, recurse, nonwrapped_numel: recurse or module in units,
            device_id=torch.device("cpu"),
            use_orig_params=True,
        )
    batch = Collator()([cache[i] for i in range(rank, 6, 2)])
    for _ in range(2):  # the second time as in training, where everything is set up
        wrapped.zero_grad()
        call(objective, wrapped, batch)[0].backward()
        parameters: Any = wrapped.named_parameters
        if version == "fsdp2":
            gradient = {name: p.grad.full_tensor() for name, p in parameters()}
        else:
            with FullyShardedDataParallel.summon_full_params(wrapped, with_grads=True):
                gradient = {name: p.grad.clone() for name, p in parameters()}
    if rank == 0:  # FSDP averages over the ranks
        clean = {name.replace("_fsdp_wrapped_module.", ""): 2 * value for name, value in gradient.items()}
        torch.save(clean, folder / "gradient.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # a thread of the back end may still run, at which the interpreter's own end sometimes aborts

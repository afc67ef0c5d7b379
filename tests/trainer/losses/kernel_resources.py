"""Registers and memory of every kernel, by NVIDIA's compiler, which needs no GPU.

    python -m tests.trainer.losses.kernel_resources

Spilled bytes are of a thread's registers that had to go to memory. A multiprocessor has 65,536 registers.
"""

import re
import subprocess
import tempfile

import torch
from triton.backends.nvidia.compiler import get_ptxas

from logitcache.table import aligned
from tests.helpers.kernels import Launch, compiled
from tests.trainer.losses import test_kernels, test_low_rank_kernels
from trainer.losses.transform import LogitTransform

CAPABILITIES = (80, 90, 100)
VOCABULARY = 151_936


def all_launches(capability: int) -> dict[str, Launch]:
    """Each kernel at the sizes of training: bfloat16, a large vocabulary, and 32 groups or a rank of 64."""
    block = torch.zeros(2, VOCABULARY, dtype=torch.bfloat16)
    bucket = test_kernels.launches(block, None, (1.0,), None)
    groups = test_kernels.launches(block, None, (1.0,), 32)
    low_rank = {
        loss: test_low_rank_kernels.launches(torch.bfloat16, loss, 1.0, 64, LogitTransform(), capability)
        for loss in ("fkl", "todi")
    }
    return {
        "bucket: read": bucket[0],
        "bucket: write": bucket[1],
        "groups: read": groups[0],
        "groups: write": groups[1],
        "low rank: read": low_rank["todi"][0],
        "low rank: sum, todi": low_rank["todi"][1],
        "low rank: write, fkl": low_rank["fkl"][2],
        "low rank: write, todi": low_rank["todi"][2],
    }


def row(name: str, launch: Launch, capability: int) -> list[str]:
    """A line of the table."""
    made = compiled(launch, capability)
    target = re.search(r"\.target (\w+)", made["ptx"])
    assert target
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(made["ptx"])
        file.flush()
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={target[1]}", "-o", "/dev/null", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spilled = re.search(r"Used (\d+) registers", said), re.search(r"(\d+) bytes spill stores", said)
    assert registers and spilled
    return [name, target[1], str(launch[2]["num_warps"]), registers[1], spilled[1], f"{made['shared']:,}"]


if __name__ == "__main__":
    rows = [["", "for", "warps", "registers a thread", "spilled bytes", "shared bytes a program"]]
    for capability in CAPABILITIES:
        rows += [row(name, launch, capability) for name, launch in all_launches(capability).items()]
    print(aligned(rows))

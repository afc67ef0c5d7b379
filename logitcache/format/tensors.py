"""numpy arrays as torch tensors, without a copy. torch is imported when it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch


class _Writable:
    """The memory of an array whose owner, here Arrow, lets nobody write; torch has no tensors that cannot be written."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array  # lives as long as what looks into it
        pointer, _ = array.__array_interface__["data"]
        self.__array_interface__ = {**array.__array_interface__, "data": (pointer, False)}


def tensor(array: np.ndarray, device: Any = None) -> torch.Tensor:
    """The array as a tensor of the same dtype and shape.

    device: what `torch.device` takes, by default the CPU, where the tensor shares the array's memory, which belongs to
    a whole row group: do not write into it. To CUDA the copy goes through pinned memory and is not waited for.
    """
    import torch

    shared = torch.from_numpy(array if array.flags.writeable else np.asarray(_Writable(array)))
    if device is None:
        return shared
    if torch.device(device).type == "cuda":
        return shared.pin_memory().to(device, non_blocking=True)
    return shared.to(device)

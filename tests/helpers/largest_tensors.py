"""Counts large allocations."""

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class LargestTensors(TorchDispatchMode):
    """Counts the operations that allocate a result of at least `elements` elements."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.allocations = elements, 0
        self.storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.untyped_storage().nbytes() >= self.elements * result.element_size():
            pointer = result.untyped_storage().data_ptr()
            self.allocations += pointer not in given and pointer not in self.storages
            self.storages.add(pointer)
        return result

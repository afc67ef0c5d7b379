"""Kernels in the tests: where they run, and their passage through the real compiler, which needs no GPU."""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA and not INTERPRETED else "cpu"
HAS_TRITON = importlib.util.find_spec("triton") is not None

runs_kernels = pytest.mark.skipif(
    not (CUDA or INTERPRETED), reason="run in the interpreter's own process, see test_kernels"
)
compiles = pytest.mark.skipif(INTERPRETED, reason="compiles in the main process")

Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]
"""A kernel, its arguments and its options."""


@contextmanager
def recorded(module: ModuleType, *kernels: str) -> Iterator[list[Launch]]:
    """Records the launches of a module's kernels instead of running them."""
    made: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *arguments, **options: made.append((self.kernel, arguments, options))

    with pytest.MonkeyPatch.context() as patch:
        for name in kernels:
            patch.setattr(module, name, Recorder(getattr(module, name)))
        yield made


def compiled(launch: Launch, capability: int = 90) -> dict[str, Any]:
    """Compiles a launch as Triton would: an int of 1 or None is a constant, a multiple of 16 is known to be one.

    Returns its code in each of the compiler's languages, and the bytes of shared memory that a program takes.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    element = {
        torch.bfloat16: "*bf16",
        torch.float16: "*fp16",
        torch.float32: "*fp32",
        torch.float64: "*fp64",
        torch.int64: "*i64",
        torch.int32: "*i32",
    }
    kernel, arguments, options = launch
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        value = arguments[index] if index < len(arguments) else options[name]
        if index >= len(arguments) or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[(index,)] = "constexpr", value
            continue
        if isinstance(value, float):
            signature[name] = "fp32"
            continue
        signature[name] = element[value.dtype] if isinstance(value, Tensor) else "i32"
        if (value.data_ptr() if isinstance(value, Tensor) else value) % 16 == 0:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
    target = GPUTarget("cuda", capability, 32)
    made = triton.compile(source, target=target, options={"num_warps": options["num_warps"]})
    return {**made.asm, "shared": made.metadata.shared}

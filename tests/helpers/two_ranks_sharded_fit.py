"""What each process runs in test_launch: `trainer fit` with FSDP, which accelerate does not do on CPUs."""

import sys
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from trainer.cli import main


class CalledGpus(AcceleratorState):  # type: ignore[misc]
    """Takes CPU ranks for GPU ranks."""

    def __init__(self, *args: Any, **options: Any) -> None:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        super().__init__(*args, **options)


def fit_sharded(arguments: list[str]) -> None:
    accelerator: Any = sys.modules["accelerate.accelerator"]
    accelerator.AcceleratorState = CalledGpus
    sys.exit(main(["fit", *arguments]))


if __name__ == "__main__":
    fit_sharded(sys.argv[1:])

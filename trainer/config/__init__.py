"""The settings of a run, group by group; `trainer.config.config` puts them together."""

from typing import Any


def __getattr__(name: str) -> Any:
    """Finds `DistillConfig` here, where training_args.bin of earlier checkpoints names it."""
    if name != "DistillConfig":
        raise AttributeError(f"module 'trainer.config' has no attribute {name!r}")
    from trainer.config.config import DistillConfig

    return DistillConfig

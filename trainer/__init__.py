"""Train a student from a cache of teacher log-probabilities; the teacher itself is never loaded."""

from importlib import import_module
from typing import Any

# Public name → the module that defines it, imported on first use: `trainer --help` needs no torch.
_EXPORTS = {
    "DistillConfig": "trainer.config.config",
    "DistillTrainer": "trainer.run.distill_trainer",
    "fused_linear_divergence": "trainer.losses.fused",
    "register_divergence": "trainer.losses.registry",
    "sparse_divergence": "trainer.losses.sparse",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'trainer' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})

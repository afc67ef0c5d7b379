"""Train a student from a cache of teacher log-probabilities; the teacher itself is never loaded."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.comparison.compare import compare as compare
    from trainer.config.config import DistillConfig as DistillConfig
    from trainer.data.training_data import open_training_data as open_training_data
    from trainer.evaluation.evaluate import evaluate as evaluate
    from trainer.losses.fused import fused_linear_divergence as fused_linear_divergence
    from trainer.losses.registry import register_divergence as register_divergence
    from trainer.losses.settings import LossSettings as LossSettings
    from trainer.losses.sparse import sparse_divergence as sparse_divergence
    from trainer.losses.targets import TailBasis as TailBasis
    from trainer.losses.targets import TeacherTargets as TeacherTargets
    from trainer.run.distill_trainer import DistillTrainer as DistillTrainer

# Public name → the module that defines it, imported on first use: `trainer --help` needs no torch.
_EXPORTS = {
    "DistillConfig": "trainer.config.config",
    "DistillTrainer": "trainer.run.distill_trainer",
    "LossSettings": "trainer.losses.settings",
    "TailBasis": "trainer.losses.targets",
    "TeacherTargets": "trainer.losses.targets",
    "compare": "trainer.comparison.compare",
    "evaluate": "trainer.evaluation.evaluate",
    "fused_linear_divergence": "trainer.losses.fused",
    "open_training_data": "trainer.data.training_data",
    "register_divergence": "trainer.losses.registry",
    "sparse_divergence": "trainer.losses.sparse",
}

__all__ = [*_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'trainer' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})

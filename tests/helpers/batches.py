"""Batches compared to the bit."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from trainer.data.collator import Batch
from trainer.losses.targets import TeacherTargets


def equal(left: Any, right: Any) -> bool:
    """Whether two batches, or lists of them, hold the same tensors."""
    if isinstance(left, Tensor):
        return left.dtype == right.dtype and left.equal(right)
    if isinstance(left, (Batch, TeacherTargets)):
        return equal(vars(left), vars(right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[name], right[name]) for name in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(equal(a, b) for a, b in zip(left, right, strict=True))
    return bool(left == right)

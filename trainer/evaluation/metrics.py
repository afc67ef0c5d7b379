"""Quantities of single positions that are watched beside the loss, summed over many batches."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from trainer.losses.targets import TeacherTargets
from trainer.losses.terms import DistillationTerms

CALIBRATION_BINS = 15
LOG_HALF = math.log(0.5)
FOLD_AFTER = 64


class Sums:
    """Running sums of named vectors. They stay on the device until `totals` (or every 64th batch) fetches them."""

    def __init__(self) -> None:
        self._sizes: dict[str, int] = {}
        self._pending: list[Tensor] = []
        self._folded: np.ndarray | float = 0.0

    def add(self, parts: dict[str, Tensor]) -> None:
        """Adds a vector to each sum; all batches give the same names and sizes."""
        self._sizes = {name: part.numel() for name, part in parts.items()}
        self._pending.append(torch.cat([part.detach().reshape(-1).float() for part in parts.values()]))
        if len(self._pending) >= FOLD_AFTER:
            self._fold()

    def totals(self, reduce: Callable[[Tensor], Tensor] | None = None) -> dict[str, np.ndarray]:
        """Returns the sums in float64. reduce: adds up a float64 tensor over the ranks."""
        self._fold()
        total = torch.as_tensor(self._folded, dtype=torch.float64)
        array = (total if reduce is None else reduce(total)).cpu().numpy()
        ends = np.cumsum(list(self._sizes.values()))
        return dict(zip(self._sizes, np.split(array, ends[:-1]), strict=True))

    def _fold(self) -> None:
        if self._pending:
            self._folded = self._folded + torch.stack(self._pending).cpu().numpy().sum(0, dtype=np.float64)
            self._pending.clear()


def position_sums(terms: DistillationTerms, targets: TeacherTargets) -> dict[str, Tensor]:
    """Sums the logged quantities of a batch, whatever the loss."""
    assert terms.cross_entropy is not None
    tail_logprob = targets.tail_logprob
    return {
        "positions": torch.full((), len(tail_logprob), device=tail_logprob.device),
        "ce": terms.cross_entropy.sum(),
        "fkl": terms.fkl.sum(),
        "rkl": terms.rkl.sum(),
        "teacher_tail": tail_logprob.exp().sum(),
        "student_tail": terms.student_tail_mass.sum(),
        "half_mass_missing": (tail_logprob > LOG_HALF).sum(),
    }


def position_means(totals: dict[str, np.ndarray]) -> dict[str, float]:
    """Computes means over positions, of divergences and cross-entropy in nats.

    ce: of the next token.  fkl, rkl: at T = 1, from the teacher that tail low_rank rebuilds, with another tail from the
    bucketed one.  teacher_tail, student_tail: mass outside the entries.  half_mass_missing: share of positions whose
    entries hold less than half of the teacher's mass; only there is AKL's head not exact.
    """
    positions = max(float(totals["positions"][0]), 1.0)
    return {
        name: float(total[0]) / positions for name, total in totals.items() if name != "positions" and len(total) == 1
    }


def evaluation_sums(terms: DistillationTerms, targets: TeacherTargets) -> dict[str, Tensor]:
    """Computes `position_sums`, agreement and calibration of a batch."""
    assert terms.top1_correct is not None
    confidence, correct = terms.confidence.float(), terms.top1_correct.float()
    calibration_bin = (confidence * CALIBRATION_BINS).ceil().long().clamp(1, CALIBRATION_BINS) - 1

    def per_bin(values: Tensor) -> Tensor:
        return values.new_zeros(CALIBRATION_BINS).scatter_add_(0, calibration_bin, values)

    return {
        **position_sums(terms, targets),
        "agreement": terms.top1_agrees.sum(),
        "bin_confidence": per_bin(confidence),
        "bin_correct": per_bin(correct),
    }


def evaluation_metrics(totals: dict[str, np.ndarray]) -> dict[str, float]:
    """Computes `position_means` and further metrics of a cache.

    perplexity: exp(ce).  agreement: share of positions where no token is more probable to the student than the
    teacher's first.  ece: expected calibration error of the student's most probable token against the token that
    follows, Σ_b (n_b/N)·|accuracy_b − mean confidence_b| over 15 bins of equal width (Guo et al. 2017,
    arXiv 1706.04599).  positions: N.
    """
    positions = float(totals["positions"][0])
    means = position_means(totals)
    gaps = np.abs(totals["bin_correct"] - totals["bin_confidence"])
    return {
        "ce": means.pop("ce"),
        "perplexity": float(np.exp(totals["ce"][0] / positions)),
        **means,
        "ece": float(gaps.sum() / positions),
        "positions": int(positions),
    }

"""The teacher at fixed positions: what storing less of it makes of its tail, and of the gradient of a batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from definitions import LOSSES, NAMES, divergence
from torch import Tensor
from transformers import PreTrainedModel

from logitcache import CachedSequence
from logitcache.capture.calibration import coefficient_step
from logitcache.capture.estimate.estimate import stored_bytes
from logitcache.format.layout import Layout
from logitcache.format.probes import probe_ids
from logitcache.format.sequences import TokenSequence
from logitcache.format.tail_basis import TailBasis as StoredBasis
from logitcache.format.tail_parts import TailParts
from logitcache.format.targets import SparseTargets
from logitcache.table import aligned
from trainer.data.collator import basis_tensors
from trainer.losses.settings import LossSettings
from trainer.losses.sparse import distillation_terms
from trainer.losses.targets import TailBasis, TeacherTargets

WIDEST_K, PROBES, PROBE_STEP = 64, 2, 0.25
POSITIONS_AT_A_TIME = 256
NOISE_ROWS = 2


@dataclass(frozen=True)
class Stored:
    """What is known of a position.

    rank: None for the bucket.  bits: of a coefficient of ±3 standard deviations, None if it is not rounded.  residual_weight: ρ,
    None for that of the probes.
    """

    k: int
    rank: int | None = None
    bits: int | None = None
    residual_weight: float | None = None

    @property
    def name(self) -> str:
        """As in a table."""
        if self.rank is None:
            return f"k = {self.k}, bucket"
        weight = "" if self.residual_weight is None else f", ρ = {self.residual_weight:g}"
        return f"k = {self.k}, R = {self.rank}" + (f", {self.bits} bits" if self.bits else "") + weight


class KnownTeacher:
    """The teacher at the stored positions of some rows, its coefficients in a basis of other rows."""

    def __init__(self, teacher: PreTrainedModel, rows: Sequence[CachedSequence], basis: StoredBasis) -> None:
        self.rows, self.variances = rows, basis.variances
        self.basis = basis_tensors(basis, "cpu")
        self.logits = self.of(teacher)  # [N, V]
        self.log_p = self.logits.log_softmax(1)
        moments = self.basis.moments(self.logits)
        self.coefficients, self._mean = moments[:, :-1], moments[:, -1]  # [N, R]
        self.vocab_size = self.logits.shape[1]
        drawn = [probe_ids(row.row_id, np.array(row.positions), PROBES, self.vocab_size) for row in self.rows]
        self._probes = torch.from_numpy(np.concatenate(drawn)).long()

    @torch.no_grad()
    def of(self, model: PreTrainedModel, num_rows: int | None = None) -> Tensor:
        """Logits of a model at the positions of the first rows, by default of all, float32 [N, V]."""
        logits = []
        for row in self.rows[:num_rows]:
            every = model(input_ids=torch.tensor(row.input_ids)[None].long()).logits[0]
            logits.append(every[torch.tensor(row.positions).long()])
        return torch.cat(logits)

    def first(self, rank: int) -> TailBasis:
        """The basis of so many directions."""
        return TailBasis(self.basis.offset, self.basis.directions[:, :rank].contiguous(), self.basis.weights)

    def step(self, rank: int, bits: int) -> float:
        """Of the coefficients, as a build has it."""
        return coefficient_step(self.variances[:rank], bits)

    @cached_property
    def _entries(self) -> tuple[Tensor, Tensor]:
        return self.log_p.topk(WIDEST_K, 1)

    def targets(self, stored: Stored) -> TeacherTargets:
        """What is stored of all positions."""
        logprobs, ids = (values[:, : stored.k] for values in self._entries)
        tail = self.log_p.scatter(1, ids, -math.inf).logsumexp(1)
        targets = TeacherTargets(ids, logprobs, tail)
        if stored.rank is None:
            return targets
        basis, coefficients = self.first(stored.rank), self.coefficients[:, : stored.rank]
        own = self.logits - basis.offset
        explained = (basis.directions[self._probes] * coefficients[:, None]).sum(2)
        residuals = own.gather(1, self._probes) - explained - self._mean[:, None]
        if stored.bits:
            step = self.step(stored.rank, stored.bits)
            coefficients = (coefficients / step).round() * step
        return replace(
            targets,
            tail_coefficients=coefficients,
            tail_basis=basis,
            probe_ids=self._probes,
            probe_residuals=(residuals / PROBE_STEP).round() * PROBE_STEP,
        )

    def bytes_per_position(self, stored: Stored) -> float:
        """Really encoded and compressed."""
        targets, layout = self.targets(stored), Layout(self.vocab_size)
        known = SparseTargets(targets.token_ids.int().numpy(), targets.logprobs.numpy(), targets.tail_logprob.numpy())
        coefficients, residuals = targets.tail_coefficients, targets.probe_residuals
        if stored.rank and stored.bits and coefficients is not None and residuals is not None:
            parts = TailParts(rank=stored.rank, probes=PROBES)
            layout = replace(layout, tail_parts=parts).with_coefficient_step(self.step(stored.rank, stored.bits))
            known = replace(known, tail_coefficients=coefficients.numpy(), probe_residuals=residuals.numpy())
        sequences, of_rows, start = [], [], 0
        for row in self.rows:
            sequences.append(TokenSequence(row.input_ids, row.loss_mask))
            of_rows.append(known[start : start + len(row.positions)])
            start += len(row.positions)
        return stored_bytes(sequences, of_rows, layout) / start


def noisy(teacher: PreTrainedModel, deviation: float) -> PreTrainedModel:
    """The teacher with noise in each weight, of so many standard deviations of its matrix."""
    model, random = deepcopy(teacher), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weights in model.parameters():
            weights.add_(torch.randn(weights.shape, generator=random), alpha=deviation * float(weights.std()))
    return model


def blocks(num_positions: int) -> Iterator[slice]:
    """Few positions at a time."""
    for start in range(0, num_positions, POSITIONS_AT_A_TIME):
        yield slice(start, start + POSITIONS_AT_A_TIME)


def explained(known: KnownTeacher, rank: int) -> float:
    """The share of the logits' variance around the offset, under the weights, that coefficients hold."""
    basis = known.first(rank)
    total = 0.0
    for rows in blocks(len(known.logits)):
        own = known.logits[rows] - basis.offset
        own -= (own @ basis.weights)[:, None]
        total += float((own.square() @ basis.weights).double().sum())
    return float(known.coefficients[:, :rank].double().square().sum()) / total


def tail_divergence(known: KnownTeacher, stored: Stored) -> tuple[float, float]:
    """KL of the rebuilt tail from the true one: its mean over positions, and the mean of its product with the tail's mass."""
    targets, kl = known.targets(stored), []
    basis, coefficients = targets.tail_basis, targets.tail_coefficients
    assert basis is not None and coefficients is not None
    for rows in blocks(len(known.logits)):
        ids = targets.token_ids[rows]
        true = known.log_p[rows].scatter(1, ids, -math.inf).log_softmax(1)
        rebuilt = (basis.offset + coefficients[rows] @ basis.directions.T).scatter(1, ids, -math.inf).log_softmax(1)
        kl.append(torch.where(true.isneginf(), 0.0, true.exp() * (true - rebuilt)).sum(1).double())
    every = torch.cat(kl)
    return float(every.mean()), float((every * targets.tail_logprob.double().exp()).mean())


def summed_gradient(loss: Callable[[slice, Tensor], Tensor], student: Tensor) -> Tensor:
    """The gradient with respect to the logits, summed over all positions, float64 [V].  loss: of some rows' logits."""
    total = torch.zeros(student.shape[1], dtype=torch.float64)
    for rows in blocks(len(student)):
        logits = student[rows].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(rows, logits).sum(), logits)
        total += gradient.double().sum(0)
    return total


def of_probes(targets: TeacherTargets, student: Tensor) -> float:
    """ρ from the probes of all positions."""
    settings = LossSettings("fkl", "low_rank")
    products = torch.zeros(2, dtype=torch.float64)
    for rows in blocks(len(student)):
        terms = distillation_terms(student[rows].clone(), targets[rows], settings=settings, validate=False)
        assert terms.residual_products is not None
        products += terms.residual_products.double().sum(0)
    return float((products[0] / products[1]).clamp(0, 1))


def residual_weight(targets: TeacherTargets, student: Tensor, stored: Stored) -> float:
    """ρ: as it is wanted, or of the probes; 0 of the bucket, which has none."""
    if stored.rank is None:
        return 0.0
    return of_probes(targets, student) if stored.residual_weight is None else stored.residual_weight


def gradient_errors(
    known: KnownTeacher, student: Tensor, full: Mapping[str, Tensor], stored: Stored
) -> tuple[list[float], float]:
    """‖Σ g_stored − Σ g_full‖ / ‖Σ g_full‖ of each loss, and ρ.  student: logits [N, V].  full: of full_gradients."""
    targets = known.targets(stored)
    weight = residual_weight(targets, student, stored)
    errors = []
    for loss, expected in full.items():
        settings = LossSettings(loss, "bucket" if stored.rank is None else "low_rank", residual_weight=weight)

        def of_stored(rows: slice, logits: Tensor, settings: LossSettings = settings) -> Tensor:
            return distillation_terms(logits, targets[rows], settings=settings, validate=False).kd

        errors.append(float((summed_gradient(of_stored, student) - expected).norm() / expected.norm()))
    return errors, weight


def full_gradients(known: KnownTeacher, student: Tensor) -> dict[str, Tensor]:
    """The summed gradient of each loss over the whole vocabulary, by definitions.py."""
    full = {}
    for loss in LOSSES:

        def of_teacher(rows: slice, logits: Tensor, loss: str = loss) -> Tensor:
            return divergence(loss, known.log_p[rows], logits.log_softmax(1))

        full[loss] = summed_gradient(of_teacher, student)
    return full


def forward_kl(known: KnownTeacher, student: Tensor) -> float:
    """Over the whole vocabulary, its mean over the student's positions."""
    values = [
        divergence("fkl", known.log_p[: len(student)][rows], student[rows].log_softmax(1))
        for rows in blocks(len(student))
    ]
    return float(torch.cat(values).mean())


def gradient_table(known: KnownTeacher, student: Tensor, every: Sequence[Stored]) -> str:
    """The errors of a student's gradients, a row for each of what is stored.  student: logits [N, V]."""
    full = full_gradients(known, student)
    rows = [["stored", "bytes", *(NAMES[loss] for loss in full), "ρ"]]
    for stored in every:
        errors, weight = gradient_errors(known, student, full, stored)
        num_bytes = f"{known.bytes_per_position(stored):.0f}" if stored.rank is None or stored.bits else ""
        shown = "" if stored.rank is None else f"{weight:.2f}"
        rows.append([stored.name, num_bytes, *(f"{error:.3f}" for error in errors), shown])
    return aligned(rows)


def with_noise(known: KnownTeacher, teacher: PreTrainedModel, fkl: float) -> Tensor:
    """Logits of the teacher with as much noise as puts it so far from itself: float32 [N, V]."""
    low, high = 1e-3, 1.0
    while high / low > 1.02:
        middle = math.sqrt(low * high)
        near = forward_kl(known, known.of(noisy(teacher, middle), NOISE_ROWS)) < fkl
        low, high = (middle, high) if near else (low, middle)
    return known.of(noisy(teacher, low))

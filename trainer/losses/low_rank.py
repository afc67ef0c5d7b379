"""The low-rank tail: the teacher's whole distribution, rebuilt from exact entries, the exact tail mass and R coefficients.

The basis (m, U, w) of the cache has U orthonormal and centred under w. With the student's logits s, their coefficients
z_q = Uᵀ diag(w) (s − m) and residual e = s − m − U z_q, the teacher's logits outside the entries are taken to be

    T = m + U z + ρ·e,   without a gradient through T.

So a share ρ of what the R directions do not hold is the student's own: at ρ = 1 and q = p the gradient is 0, and ρ = 1
with R = 0 is the bucket. ρ = E[ε_p ε_q] / E[ε_q²] over probe tokens, of whom the teacher's residual ε_p is stored. All
logits are those of the softmax, after a scale or a cap, and matter up to a shift.
"""

from dataclasses import replace
from math import inf

import torch
from torch import Tensor

from trainer.losses.blocks import cached_rows
from trainer.losses.coarse import Coarse
from trainer.losses.registry import evaluate_divergence
from trainer.losses.settings import LossSettings
from trainer.losses.tail import LOG_TAIL_FLOOR
from trainer.losses.targets import TailBasis, TeacherTargets, mask_tokens_
from trainer.losses.temperature import tempered
from trainer.losses.transform import LogitTransform

LOW_RANK = "low_rank"
"""The name of this treatment of the tail."""


class LowRankBlock:
    """A `terms.Block` whose outcomes are all V tokens.

    It holds one more tensor like the logits: the teacher's logits, which become the gradient of the divergence. Products
    with the basis are of the whole block; all else is of few rows at a time, so that it stays in a CPU's cache.
    """

    def __init__(
        self,
        raw: Tensor,
        targets: TeacherTargets,
        labels: Tensor | None,
        settings: LossSettings,
        transform: LogitTransform,
    ) -> None:
        """See `terms.distillation_block`."""
        self._raw, self._labels, self._settings, self._transform = raw, labels, settings, transform
        with torch.autocast(raw.device.type, enabled=False):
            self._compute(targets)

    def _compute(self, targets: TeacherTargets) -> None:
        basis, coefficients = targets.tail_basis, targets.tail_coefficients
        residual_weight = self._settings.residual_weight
        assert basis is not None and coefficients is not None
        self._logits = logits = _transformed(self._raw, self._transform)
        self.own_terms: dict[str, Tensor] = {}
        if residual_weight or targets.probe_ids is not None:
            of_student = basis.project(logits)
            coefficients = coefficients - residual_weight * of_student
            if targets.probe_ids is not None and targets.probe_residuals is not None:
                self.own_terms["residual_products"] = _residual_products(
                    logits, of_student, basis, targets.probe_ids, targets.probe_residuals
                )
        self._teacher = coefficients @ basis.directions.t()  # to which _diverge adds (1 − ρ)·m + ρ·s
        self._offset = basis.offset * (1 - residual_weight)
        self.label_logits = None if self._labels is None else logits.gather(1, self._labels[:, None])[:, 0]
        self._entries = logits.gather(1, targets.token_ids.clamp_min(0)).masked_fill_(targets.token_ids < 0, -inf)
        self.kd, self.largest, self._log_normaliser, fkl, rkl, tail_mass = logits.new_empty(6, len(logits))
        for rows in cached_rows(logits):
            student = _Softmax(logits[rows])
            self.largest[rows], self._log_normaliser[rows] = student.largest, student.log_normaliser
            at_one = self._diverge(rows, student, targets[rows])
            fkl[rows], rkl[rows] = at_one.fkl, at_one.rkl
            tail_mass[rows] = _write_(at_one.q, targets.token_ids[rows], torch.zeros_like(self._entries[rows])).sum(1)
        self._tail = (tail_mass.log() + self._log_normaliser)[:, None]
        self.own_terms |= {"fkl": fkl, "rkl": rkl}

    def _diverge(self, rows: slice, student: "_Softmax", targets: TeacherTargets) -> Coarse:
        """Compute the divergence of some rows, and its gradient in place of the teacher; return the coarse pair at T = 1."""
        logits, teacher, temperature = self._logits[rows], self._teacher[rows], self._settings.temperature
        teacher.add_(self._offset)
        if self._settings.residual_weight:
            teacher.add_(logits, alpha=self._settings.residual_weight)
        mask_tokens_(teacher, targets.token_ids)
        tail = _Softmax(teacher)
        at_one = coarse = _every_token(tail, student, targets, 1.0)
        if temperature != 1.0:
            hot = _Softmax(teacher / temperature)
            if targets.tempered_tail is None:
                estimate = (targets.tail_logprob - tail.log_normaliser) / temperature + hot.log_normaliser
                targets = replace(targets, tempered_tail=estimate.masked_fill(tail.largest == -inf, -inf))
            coarse = _every_token(hot, _Softmax(logits / temperature), targets, temperature)
        self.kd[rows], slope = evaluate_divergence(self._settings.loss, coarse, self._settings.loss_args)
        torch.addcmul(slope, coarse.q, slope.sum(1, keepdim=True), value=-1, out=teacher)
        return at_one

    def bucket_log_masses(self, num_entries: int) -> Tensor:
        """See `terms.Block`."""
        return torch.cat([self._entries, self._tail], 1)

    def write_gradient_(self, kd_weights: Tensor | None, ce_weights: Tensor | None) -> None:
        """See `terms.Block`."""
        for rows in cached_rows(self._logits):
            logits, grad = self._logits[rows], self._teacher[rows]
            if kd_weights is None:
                grad.zero_()
            else:
                grad.mul_((kd_weights[rows, None] / self._settings.temperature).to(grad.dtype))
            if ce_weights is not None and self._labels is not None:
                weights = ce_weights[rows, None].to(grad.dtype)
                grad.addcmul_((logits - self._log_normaliser[rows, None]).exp_(), weights)
                grad.scatter_add_(1, self._labels[rows, None], -weights)
            if self._transform != LogitTransform():
                grad.mul_(self._transform.slope(logits))
            self._raw[rows] = grad


def _transformed(raw: Tensor, transform: LogitTransform) -> Tensor:
    """Return the logits of the softmax, float32 or wider; in place where the raw logits are."""
    dtype = torch.promote_types(raw.dtype, torch.float32)
    if raw.dtype != dtype:
        return transform.apply(raw.to(dtype))
    if transform != LogitTransform():
        for rows in cached_rows(raw):
            raw[rows] = transform.apply(raw[rows])
    return raw


def _residual_products(
    student: Tensor, coefficients: Tensor, basis: TailBasis, probe_ids: Tensor, probe_residuals: Tensor
) -> Tensor:
    """Multiply the residuals of teacher and student at the probes [n, P], where an id is not −1, and sum them: [n, 2]."""
    ids = probe_ids.clamp_min(0)
    explained = (basis.directions[ids] * coefficients[:, None, :]).sum(2)
    own = student.gather(1, ids) - basis.offset[ids] - explained - basis.mean(student)[:, None]
    own = own.masked_fill(probe_ids < 0, 0.0)
    return torch.stack([(own * probe_residuals).sum(1), own.square().sum(1)], 1)


class _Softmax:
    """The softmax of logits [n, V], and its logarithm; not numbers in a row that is −inf throughout."""

    def __init__(self, logits: Tensor) -> None:
        self.largest = logits.amax(1)
        self.log_p = logits - self.largest[:, None]
        self.p = self.log_p.exp()
        total = self.p.sum(1)
        self.p.div_(total[:, None])
        self.log_p.sub_(total.log()[:, None])
        self.log_normaliser = self.largest + total.log()


def _every_token(teacher: _Softmax, student: _Softmax, targets: TeacherTargets, temperature: float) -> Coarse:
    """Return both distributions over all V tokens at T. teacher: over the tail alone; becomes that over all tokens."""
    entries, tail, _ = tempered(targets, temperature)
    tail = tail.clamp_min(LOG_TAIL_FLOOR)[:, None]
    _write_(teacher.log_p.add_(tail), targets.token_ids, entries)
    _write_(teacher.p.mul_(tail.exp()), targets.token_ids, entries.exp())
    counted = torch.ones(1, 1, dtype=torch.bool, device=tail.device).expand_as(teacher.p)
    return Coarse(teacher.log_p, student.log_p, counted, counted.shape[1], whole=(teacher.p, student.p))


def _write_(values: Tensor, token_ids: Tensor, new: Tensor) -> Tensor:
    """Set the values [n, V] of some tokens. token_ids: [n, k] int64, −1 pads.  new: [n, k]."""
    # Padding writes to token 0 what token 0 holds then, which may itself be one of them.
    is_first = token_ids == 0
    first = torch.where(is_first.any(1), new.masked_fill(~is_first, 0.0).sum(1), values[:, 0])
    return values.scatter_(1, token_ids.clamp_min(0), torch.where(token_ids < 0, first[:, None], new))

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

from trainer.losses.coarse import Coarse
from trainer.losses.divergences import forward_kl, reverse_kl
from trainer.losses.registry import evaluate_divergence
from trainer.losses.settings import LossSettings
from trainer.losses.tail import LOG_TAIL_FLOOR
from trainer.losses.targets import TailBasis, TeacherTargets, mask_tokens_
from trainer.losses.temperature import tempered
from trainer.losses.transform import LogitTransform

LOW_RANK = "low_rank"
"""The name of this treatment of the tail."""


class LowRankBlock:
    """A `terms.Block` whose outcomes are all V tokens."""

    def __init__(
        self,
        raw: Tensor,
        targets: TeacherTargets,
        labels: Tensor | None,
        settings: LossSettings,
        transform: LogitTransform,
    ) -> None:
        """See `terms.distillation_block`."""
        assert targets.tail_basis is not None and targets.tail_coefficients is not None
        self._raw, self._labels = raw, labels
        logits = transform.apply(raw.to(torch.promote_types(raw.dtype, torch.float32)))
        teacher, products = rebuild(logits, targets.tail_basis, targets, settings.residual_weight)
        self._slope = transform.slope(logits)
        self.largest = logits.amax(1)
        self.label_logits = None if labels is None else logits.gather(1, labels[:, None])[:, 0]
        self._entries = logits.gather(1, targets.token_ids.clamp_min(0)).masked_fill_(targets.token_ids < 0, -inf)
        self._tail = _tail_log_mass(logits, targets)

        mask_tokens_(teacher, targets.token_ids)
        self._log_q = logits.log_softmax(1)
        at_one = _every_token(teacher, self._log_q, targets, 1.0)
        self.own_terms = {"fkl": forward_kl(at_one)[0], "rkl": reverse_kl(at_one)[0]}
        if products is not None:
            self.own_terms["residual_products"] = products
        self._temperature = temperature = settings.temperature
        coarse = at_one
        if temperature != 1.0:
            coarse = _every_token(teacher, (logits / temperature).log_softmax(1), targets, temperature)
        self.kd, slope = evaluate_divergence(settings.loss, coarse, settings.loss_args)
        self._kd_grad = (slope - coarse.log_q.exp() * slope.sum(1, keepdim=True)) / temperature

    def bucket_log_masses(self, num_entries: int) -> Tensor:
        """See `terms.Block`."""
        return torch.cat([self._entries, self._tail], 1)

    def write_gradient_(self, kd_weights: Tensor | None, ce_weights: Tensor | None) -> None:
        """See `terms.Block`."""
        grad = self._kd_grad.mul_(0.0 if kd_weights is None else kd_weights[:, None])
        if ce_weights is not None and self._labels is not None:
            grad.addcmul_(self._log_q.exp_(), ce_weights[:, None].to(grad.dtype))
            grad.scatter_add_(1, self._labels[:, None], -ce_weights[:, None].to(grad.dtype))
        self._raw.copy_(grad.mul_(self._slope))


def rebuild(
    student: Tensor, basis: TailBasis, targets: TeacherTargets, residual_weight: float
) -> tuple[Tensor, Tensor | None]:
    """Return the teacher's logits m + U z + ρ·e, [n, V] up to a shift per row, and the products of the residuals.

    student: its logits, [n, V].
    """
    coefficients = targets.tail_coefficients
    assert coefficients is not None
    products = None
    if residual_weight or targets.probe_ids is not None:
        of_student = basis.project(student)
        coefficients = coefficients - residual_weight * of_student
        if targets.probe_ids is not None and targets.probe_residuals is not None:
            products = _residual_products(student, of_student, basis, targets.probe_ids, targets.probe_residuals)
    offset = basis.offset if not residual_weight else torch.lerp(basis.offset, student, residual_weight)
    return torch.addmm(offset, coefficients, basis.directions.t()), products


def _residual_products(
    student: Tensor, coefficients: Tensor, basis: TailBasis, probe_ids: Tensor, probe_residuals: Tensor
) -> Tensor:
    """Multiply the residuals of teacher and student at the probes [n, P], where an id is not −1, and sum them: [n, 2]."""
    ids = probe_ids.clamp_min(0)
    explained = (basis.directions[ids] * coefficients[:, None, :]).sum(2)
    own = student.gather(1, ids) - basis.offset[ids] - explained - basis.mean(student)[:, None]
    own = own.masked_fill(probe_ids < 0, 0.0)
    return torch.stack([(own * probe_residuals).sum(1), own.square().sum(1)], 1)


def _tail_log_mass(logits: Tensor, targets: TeacherTargets) -> Tensor:
    """Return the student's log mass outside the entries, up to the row's normaliser, [n, 1]."""
    others = logits.clone()
    mask_tokens_(others, targets.token_ids)
    return others.logsumexp(1, keepdim=True)


def _every_token(teacher: Tensor, log_q: Tensor, targets: TeacherTargets, temperature: float) -> Coarse:
    """Return both distributions over all V tokens at T.  teacher: its rebuilt logits, [n, V], −inf at the entries."""
    log_mass = teacher.logsumexp(1)
    tail_logits, log_mass_at_t = teacher, log_mass
    if temperature != 1.0:
        tail_logits = teacher / temperature
        log_mass_at_t = tail_logits.logsumexp(1)
        if targets.tempered_tail is None:
            estimate = (targets.tail_logprob - log_mass) / temperature + log_mass_at_t
            targets = replace(targets, tempered_tail=estimate.masked_fill(log_mass == -inf, -inf))
    entries, tail, _ = tempered(targets, temperature)
    shift = tail.clamp_min(LOG_TAIL_FLOOR) - log_mass_at_t
    log_p = tail_logits + shift.masked_fill(log_mass == -inf, 0.0)[:, None]
    _write_entries_(log_p, targets.token_ids, entries)
    return Coarse(log_p, log_q, torch.ones(1, 1, dtype=torch.bool, device=log_p.device), log_p.shape[1])


def _write_entries_(log_p: Tensor, token_ids: Tensor, entries: Tensor) -> None:
    """Set the log-probabilities [n, V] of some tokens.  token_ids: [n, k] int64, −1 pads."""
    # Padding writes to token 0 what token 0 holds anyhow, which may itself be an entry.
    is_first = token_ids == 0
    first = torch.where(is_first.any(1), entries.masked_fill(~is_first, -inf).logsumexp(1), log_p[:, 0])
    log_p.scatter_(1, token_ids.clamp_min(0), torch.where(token_ids < 0, first[:, None], entries))

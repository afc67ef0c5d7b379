"""The low-rank tail: the teacher's whole distribution, rebuilt from exact entries, the exact tail mass and R coefficients.

The basis (m, U, w) of the cache has U orthonormal and centred under w. With the student's logits s, their coefficients
z_q = Uᵀ diag(w) (s − m) and residual e = s − m − U z_q, the teacher's logits outside the entries are taken to be

    T = m + U z + ρ·e,   without a gradient through T.

So a share ρ of what the R directions do not hold is the student's own: at ρ = 1 and q = p the gradient is 0, and ρ = 1
with R = 0 is the bucket. ρ = E[ε_p ε_q] / E[ε_q²] over probe tokens, of whom the teacher's residual ε_p is stored. All
logits are those of the softmax, after a scale or a cap, and matter up to a shift.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from math import inf
from types import ModuleType

import torch
from torch import Tensor

from trainer.losses.blocks import BlockTerms, TermWeights, cached_rows, dense_rows
from trainer.losses.coarse import EveryToken
from trainer.losses.registry import evaluate_divergence
from trainer.losses.settings import LossSettings
from trainer.losses.tail import LOG_TAIL_FLOOR
from trainer.losses.targets import TeacherTargets, mask_tokens_
from trainer.losses.temperature import tempered, with_rebuilt_tail
from trainer.losses.transform import LogitTransform

LOW_RANK = "low_rank"
"""The name of this treatment of the tail."""


@cache
def low_rank_kernels(device_type: str) -> ModuleType | None:
    """Return the module of the Triton kernels for a kind of device, where they run."""
    if device_type == "cuda" and find_spec("triton"):
        from trainer.losses import low_rank_triton, tail_triton

        if tail_triton.SUPPORTED:
            return low_rank_triton
    return None


def low_rank_block(
    raw: Tensor,
    targets: TeacherTargets,
    labels: Tensor | None,
    settings: LossSettings,
    transform: LogitTransform,
    weights: TermWeights | None,
    moments: Tensor | None,
    memory: Tensor | None,
) -> BlockTerms:
    """Compute a `terms.distillation_block` whose outcomes are all V tokens.

    In plain torch it holds one more tensor like the logits, the teacher's. The products with the basis are of the whole block;
    all else is of few rows at a time, which stay in a CPU's cache until their gradient is written.
    """
    basis, kernels = targets.tail_basis, low_rank_kernels(raw.device.type)
    assert basis is not None
    with torch.autocast(raw.device.type, enabled=False):
        if kernels and kernels.has_kernels(raw, targets, settings.loss):
            if moments is None and _needs_moments(targets, settings):
                moments = torch.cat([basis.moments(transform.apply(raw[rows].float())) for rows in dense_rows(raw)])
            at_probes = transform.apply(raw.gather(1, _probes(targets)).float())
            coefficients, own_terms = _without_student(targets, settings, at_probes, moments)
            block: BlockTerms | None = kernels.low_rank_block(
                raw, coefficients, targets, labels, settings, transform, weights
            )
            if block is not None:
                return replace(block, own_terms=block.own_terms | own_terms)

        logits = _transformed(raw, transform)
        if moments is None and _needs_moments(targets, settings):
            moments = basis.moments(logits)
        coefficients, own_terms = _without_student(targets, settings, logits.gather(1, _probes(targets)), moments)
        teacher = torch.mm(coefficients, basis.directions.t(), out=memory)
        label_logits = None if labels is None else logits.gather(1, labels[:, None])[:, 0]
        kd, largest, tail, fkl, rkl = logits.new_empty(5, len(logits))
        entries = logits.gather(1, targets.token_ids.clamp_min(0)).masked_fill_(targets.token_ids < 0, -inf)
        for rows in cached_rows(logits):
            teacher[rows].add_(basis.offset, alpha=1 - settings.residual_weight)
            if settings.residual_weight:
                teacher[rows].add_(logits[rows], alpha=settings.residual_weight)
            at_one, at_temperature = _distributions(logits[rows], teacher[rows], targets[rows], settings.temperature)
            fkl[rows], rkl[rows], largest[rows] = at_one.fkl, at_one.rkl, at_one.largest
            tail[rows] = _tail_log_mass(at_one, targets.token_ids[rows])
            kd[rows], slope = evaluate_divergence(settings.loss, at_temperature, settings.loss_args)
            if weights is not None:
                of_kd, of_ce = (None if weight is None else weight[rows, None].to(slope.dtype) for weight in weights)
                of_kd = None if of_kd is None else of_kd / settings.temperature
                label = None if labels is None else labels[rows]
                grad = _gradient(at_one, at_temperature, slope, label, (of_kd, of_ce))
                if transform != LogitTransform():
                    grad.mul_(transform.slope(logits[rows]))
                raw[rows] = grad
    own_terms |= {"fkl": fkl, "rkl": rkl}
    return BlockTerms(kd, torch.cat([entries, tail[:, None]], 1), largest, label_logits, own_terms)


def student_moments(
    hiddens: Sequence[Tensor],
    weights: Sequence[Tensor],
    bias: Tensor | None,
    targets: TeacherTargets,
    settings: LossSettings,
    transform: LogitTransform,
) -> Tensor | None:
    """Return the moments [N, R + 1] of the student's logits where they cost less through its hidden states, or else None."""
    basis, fewer = targets.tail_basis, len(hiddens[0]) >= sum(hidden.shape[1] for hidden in hiddens)
    if settings.tail != LOW_RANK or not _needs_moments(targets, settings) or not fewer or transform != LogitTransform():
        return None
    assert basis is not None
    return basis.moments_of_maps(hiddens, weights, bias)


def _needs_moments(targets: TeacherTargets, settings: LossSettings) -> bool:
    return settings.residual_weight > 0 or targets.probe_ids is not None


def _probes(targets: TeacherTargets) -> Tensor:
    """Return the probes' columns, [n, P]."""
    return targets.token_ids[:, :0] if targets.probe_ids is None else targets.probe_ids.clamp_min(0)


def _without_student(
    targets: TeacherTargets, settings: LossSettings, at_probes: Tensor, moments: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return z less ρ times the student's, [n, R], and the term of the probes.

    That term is the sum over the probes of the teacher's residual times the student's, and of the student's squared: [n, 2].
    at_probes: the student's logits there, [n, P].  moments: [n, R + 1], of all its logits.
    """
    basis, coefficients, of_teacher = targets.tail_basis, targets.tail_coefficients, targets.probe_residuals
    assert basis is not None and coefficients is not None
    if moments is None:
        return coefficients, {}
    of_student, mean = moments[:, :-1], moments[:, -1:]
    own_terms = {}
    if targets.probe_ids is not None and of_teacher is not None:
        probes = _probes(targets)
        explained = (basis.directions[probes] * of_student[:, None]).sum(2)
        own = (at_probes - basis.offset[probes] - explained - mean).masked_fill(targets.probe_ids < 0, 0.0)
        own_terms["residual_products"] = torch.stack([(own * of_teacher).sum(1), own.square().sum(1)], 1)
    return coefficients - settings.residual_weight * of_student, own_terms


def _transformed(raw: Tensor, transform: LogitTransform) -> Tensor:
    """Return the logits of the softmax, float32 or wider; in place where the raw logits are."""
    dtype = torch.promote_types(raw.dtype, torch.float32)
    if raw.dtype != dtype:
        return transform.apply(raw.to(dtype))
    if transform != LogitTransform():
        for rows in cached_rows(raw):
            raw[rows] = transform.apply(raw[rows])
    return raw


def _distributions(
    student: Tensor, teacher: Tensor, targets: TeacherTargets, temperature: float
) -> tuple[EveryToken, EveryToken]:
    """Return teacher and student over all V tokens at T = 1 and at T, from logits [n, V]; the teacher's become scratch."""
    mask_tokens_(teacher, targets.token_ids)
    at_temperature = None
    if temperature != 1.0:
        if targets.tempered_tail is None:
            log_mass, tempered_log_mass = teacher.logsumexp(1), (teacher / temperature).logsumexp(1)
            targets = with_rebuilt_tail(targets, log_mass, tempered_log_mass, temperature)
        at_temperature = _every_token(student / temperature, teacher / temperature, targets, temperature)
    at_one = _every_token(student, teacher, targets, 1.0)
    return at_one, at_temperature or at_one


def _every_token(student: Tensor, teacher: Tensor, targets: TeacherTargets, temperature: float) -> EveryToken:
    """Return both distributions at T, of logits [n, V] divided by it.

    teacher: −inf at the entries; its memory becomes that of p.
    """
    entries, tail, _ = tempered(targets, temperature)
    tail = tail.clamp_min(LOG_TAIL_FLOOR)
    ids = targets.token_ids
    q, largest = torch.softmax(student, 1), student.amax(1)
    log_normaliser = largest - q.amax(1).log()
    log_ratio = student - teacher
    largest_of_tail = teacher.amax(1)
    p = torch.softmax(teacher, 1, out=teacher)
    log_ratio.add_((largest_of_tail - p.amax(1).log() - tail - log_normaliser)[:, None])
    p.mul_(tail.exp()[:, None])
    of_entries = student.gather(1, ids.clamp_min(0)) - log_normaliser[:, None]
    _write_(log_ratio, ids, of_entries - entries)
    _write_(p, ids, entries.exp())
    return EveryToken(p, q, log_ratio, student, largest, log_normaliser)


def _gradient(
    at_one: EveryToken, at_temperature: EveryToken, slope: Tensor, labels: Tensor | None, weights: TermWeights
) -> Tensor:
    """Return the gradient [n, V] in the logits of the weighted terms; the memory of q at T = 1 becomes its own.

    slope: that of the divergence, at T.  weights: [n, 1] each, that of the divergence divided by T.
    """
    kd_weights, ce_weights = weights
    zero = slope.new_zeros(len(slope), 1)
    of_q, of_q_at_temperature = (zero if ce_weights is None else ce_weights), zero
    if kd_weights is not None:
        of_q_at_temperature = -kd_weights * slope.sum(1, keepdim=True)
    if at_temperature is at_one:
        of_q = of_q + of_q_at_temperature
    grad = at_one.q.mul_(of_q)
    if at_temperature is not at_one:
        grad.addcmul_(at_temperature.q, of_q_at_temperature)
    if kd_weights is not None:
        grad.addcmul_(slope, kd_weights)
    if labels is not None and ce_weights is not None:
        grad.scatter_add_(1, labels[:, None], -ce_weights)
    return grad


def _tail_log_mass(pair: EveryToken, token_ids: Tensor) -> Tensor:
    """Return the log of the student's mass outside some tokens, up to its normaliser, [n]."""
    of_tokens = pair.q.gather(1, token_ids.clamp_min(0))
    _write_(pair.q, token_ids, torch.zeros_like(of_tokens))
    mass = pair.q.sum(1)
    _write_(pair.q, token_ids, of_tokens)
    return mass.log() + pair.log_normaliser


def _write_(values: Tensor, token_ids: Tensor, new: Tensor) -> Tensor:
    """Set the values [n, V] of some tokens. token_ids: [n, k] int64, −1 pads.  new: [n, k]."""
    # Padding writes to token 0 what token 0 holds then, which may itself be one of them.
    is_first = token_ids == 0
    first = torch.where(is_first.any(1), new.masked_fill(~is_first, 0.0).sum(1), values[:, 0])
    return values.scatter_(1, token_ids.clamp_min(0), torch.where(token_ids < 0, first[:, None], new))

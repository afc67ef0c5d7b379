"""Logits → per-position loss against a partly known teacher, with the gradient in closed form."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer.losses.blocks import BlockTerms, TermWeights, row_blocks
from trainer.losses.settings import LossSettings
from trainer.losses.targets import TailBasis, TeacherTargets
from trainer.losses.terms import DistillationTerms, TermBuffers, distillation_block
from trainer.losses.transform import LogitTransform
from trainer.losses.validation import check_settings, check_targets


def sparse_divergence(
    logits: Tensor,
    token_ids: Tensor | None = None,
    logprobs: Tensor | None = None,
    tail_logprob: Tensor | None = None,
    *,
    targets: TeacherTargets | None = None,
    loss: str = "todi",
    tail: str = "bucket",
    temperature: float = 1.0,
    tempered_tail: Tensor | None = None,
    tail_entropy: Tensor | None = None,
    approximate_temperature: bool = False,
    tail_groups: Tensor | None = None,
    group_logprobs: Tensor | None = None,
    sample_ids: Tensor | None = None,
    sample_logprobs: Tensor | None = None,
    tail_coefficients: Tensor | None = None,
    tail_basis: TailBasis | None = None,
    probe_ids: Tensor | None = None,
    probe_residuals: Tensor | None = None,
    residual_weight: float = 0.0,
    vocab_size: int | None = None,
    validate: bool = True,
    **loss_args: Any,
) -> Tensor:
    """Compute the divergence of the student from a teacher known on k tokens per position and in total elsewhere.

    Differentiable once, in `logits` only. Reductions run in float32 (float64 for float64 logits); backward allocates
    one tensor like `logits` and nothing else of that size. NOT multiplied by T². Where the logits come from an output
    projection, `fused_linear_divergence` needs none of that size at all.

    Args:
        logits: [N, V] floating; V may exceed the teacher's vocabulary, see `vocab_size`.
        token_ids: [N, k] integer, the teacher's stored tokens, −1 where a row has fewer than k.
        logprobs: [N, k] their log-probabilities in nats at T = 1 over the whole vocabulary, −inf for padding.
        tail_logprob: [N] log of the teacher's mass outside the entries, in nats; below −16 it counts as −16.
        targets: all that is known of the teacher, in place of `token_ids` and every other argument named like one of
            its fields.
        loss: a divergence of divergences.py, which names the sources, or a registered one.
        tail: "bucket", "groups", "cap", "samples" or "low_rank" (low_rank.py); "ignore", "renormalise" and "uniform" are
            ablations, see tail.py.
        temperature: T of both distributions.
        tempered_tail: [N] log Σ p^(1/T) over the tokens outside the entries; needed at T ≠ 1.
        tail_entropy: [N] Σ p log p over the tail / its mass; with `approximate_temperature` it estimates a
            `tempered_tail` that is not given.
        tail_groups: [vocabulary] integer, the group of each token id; needed by tail="groups".
        group_logprobs: [N, G] log of the teacher's mass of each group outside the entries; likewise.
        sample_ids: [N, s] integer, tokens drawn from the tail with replacement, −1 pads; needed by tail="samples".
        sample_logprobs: [N, s] their log-probabilities; likewise.
        tail_coefficients: [N, R] the coefficients of the teacher's logits; needed by tail="low_rank".
        tail_basis: their basis; likewise.
        probe_ids, probe_residuals: [N, P] tokens and the teacher's residuals there, from which `distillation_terms` tells
            how to choose `residual_weight`.
        residual_weight: ρ, the share of the student's own residual in the teacher that tail="low_rank" rebuilds, 0 to 1.
        vocab_size: the teacher's vocabulary; logits beyond it are left out and get zero gradient.
        validate: check the values of the targets too, not just names and shapes; waits for an accelerator.
        loss_args: options of the divergence, such as beta of "todi" and "jsd" or akl_split of "akl".

    Returns:
        [N] loss of each position in nats, float32 (float64 for float64 logits).

    Raises:
        ValueError: an unknown name, shapes that do not agree, ids out of range or repeated, log-probabilities that
            are NaN, positive or sum to more than 1, or a temperature whose tail is missing.
        TypeError: neither `targets` nor the three tensors of the entries and the tail, or both.
    """
    targets = TeacherTargets.of_call(targets, locals())
    settings = LossSettings(loss, tail, temperature, approximate_temperature, loss_args, residual_weight)
    return distillation_terms(logits, targets, settings=settings, vocab_size=vocab_size, validate=validate).kd


def distillation_terms(
    logits: Tensor,
    targets: TeacherTargets,
    labels: Tensor | None = None,
    *,
    settings: LossSettings,
    vocab_size: int | None = None,
    validate: bool = True,
) -> DistillationTerms:
    """Compute the divergence, the labels' cross-entropy and the logged quantities in one pass over logits [N, V].

    `kd` and `cross_entropy` are differentiable in the logits; both gradients are written in one pass. Without labels
    [N] `cross_entropy` is None. `vocab_size`, `validate` and the errors are those of `sparse_divergence`.
    """
    check_settings(settings)
    if logits.ndim != 2 or not logits.is_floating_point():
        raise ValueError(f"logits must be floating point [N, V], got {logits.dtype} {list(logits.shape)}")
    vocabulary = check_targets(
        targets, labels, settings, logits, logits.shape[1], vocab_size=vocab_size, validate=validate
    )
    terms = _SparseTerms.apply(logits, targets, labels, settings, vocabulary)  # type: ignore[no-untyped-call]
    return DistillationTerms(*terms)


class _SparseTerms(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: TeacherTargets,
        labels: Tensor | None,
        settings: LossSettings,
        vocabulary: int,
    ) -> tuple[Tensor | None, ...]:
        ctx.targets = targets.for_arithmetic(torch.promote_types(logits.dtype, torch.float32))
        ctx.labels = None if labels is None else labels.long()
        ctx.settings, ctx.vocabulary = settings, vocabulary
        ctx.save_for_backward(logits)
        ctx.set_materialize_grads(False)
        buffers = TermBuffers(ctx.targets, labels is not None)
        for rows in row_blocks(logits, settings.tail):
            buffers.write(rows, _block(ctx, logits, rows, None)[1])
        terms = buffers.terms()
        ctx.mark_non_differentiable(*(term for term in terms[2:] if term is not None))
        return tuple(terms)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, kd_weights: Tensor | None, ce_weights: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        (logits,) = ctx.saved_tensors
        grad = torch.empty_like(logits)
        grad[:, ctx.vocabulary :] = 0
        for rows in row_blocks(logits, ctx.settings.tail):
            kd, cross_entropy = (None if w is None else w[rows] for w in (kd_weights, ce_weights))
            grad[rows, : ctx.vocabulary] = _block(ctx, logits, rows, (kd, cross_entropy))[0]
        return grad, None, None, None, None


def _block(ctx: Any, logits: Tensor, rows: slice, weights: TermWeights | None) -> tuple[Tensor, BlockTerms]:
    raw = logits[rows, : ctx.vocabulary].clone(memory_format=torch.contiguous_format)
    labels = None if ctx.labels is None else ctx.labels[rows]
    return raw, distillation_block(raw, ctx.targets[rows], labels, ctx.settings, LogitTransform(), weights)

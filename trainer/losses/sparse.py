"""Logits → per-position loss against a partly known teacher, with the gradient in closed form."""

from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer.losses.divergences import (
    DIVERGENCES,
    Coarse,
    DivergenceOptions,
    forward_kl,
    reverse_kl,
)
from trainer.losses.masses import log_masses_, row_chunks, spread_gradient_
from trainer.losses.tail import TAILS, TeacherTargets, bucket
from trainer.losses.validation import check_settings, check_shapes, check_values


class DistillationTerms(NamedTuple):
    """What one pass over the logits gives for each position; only the first two are differentiable."""

    kd: Tensor  # [N] nats, the chosen divergence at the chosen temperature, not multiplied by T²
    cross_entropy: Tensor | None  # [N] nats, of the labels at T = 1
    fkl: Tensor  # [N] nats, with the bucket at T = 1, whatever the loss is
    rkl: Tensor  # [N] nats, likewise
    student_tail_mass: Tensor  # [N] student's mass outside the entries at T = 1
    top1_agrees: Tensor  # [N] bool, no token is more probable to the student than the teacher's first


def sparse_divergence(
    logits: Tensor,
    token_ids: Tensor,
    logprobs: Tensor,
    tail_logprob: Tensor,
    *,
    loss: str = "todi",
    tail: str = "bucket",
    temperature: float = 1.0,
    tempered_tail: Tensor | None = None,
    tail_groups: Tensor | None = None,
    group_logprobs: Tensor | None = None,
    akl_split: str = "official",
    beta: float = 1.0,
    vocab_size: int | None = None,
    validate: bool = True,
) -> Tensor:
    """Divergence of the student from a teacher known on k tokens per position and in total elsewhere.

    Differentiable once, in `logits` only. Reductions run in float32 (float64 for float64 logits); backward allocates
    one tensor like `logits` and nothing else of that size. NOT multiplied by T².

    Args:
        logits: [N, V] floating; V may exceed the teacher's vocabulary, see `vocab_size`.
        token_ids: [N, k] integer, the teacher's stored tokens, −1 where a row has fewer than k.
        logprobs: [N, k] their log-probabilities in nats at T = 1 over the whole vocabulary, −inf for padding.
        tail_logprob: [N] log of the teacher's mass outside the entries, in nats; below −16 it counts as −16.
        loss: "fkl", "rkl", "akl" or "todi", see divergences.py for their sources.
        tail: "bucket" or "groups"; "ignore" and "renormalise" are ablations, see tail.py.
        temperature: T of both distributions.
        tempered_tail: [N] log Σ p^(1/T) over the tokens outside the entries; needed at T ≠ 1.
        tail_groups: [vocabulary] integer, the group of each token id; needed by tail="groups".
        group_logprobs: [N, G] log of the teacher's mass of each group outside the entries; likewise.
        akl_split: AKL: put the token that crosses half of the mass in the tail ("official") or the head ("todi").
        beta: ToDi: steepness of its weight.
        vocab_size: the teacher's vocabulary; logits beyond it are left out and get zero gradient.
        validate: check the values of the targets too, not just names and shapes; waits for an accelerator.

    Returns:
        [N] loss of each position in nats, float32 (float64 for float64 logits).

    Raises:
        ValueError: an unknown name, shapes that do not agree, ids out of range or repeated, log-probabilities that
            are NaN, positive or sum to more than 1, or a temperature whose tail is missing.
    """
    targets = TeacherTargets(token_ids, logprobs, tail_logprob, tempered_tail, tail_groups, group_logprobs)
    return distillation_terms(
        logits,
        targets,
        loss=loss,
        tail=tail,
        temperature=temperature,
        akl_split=akl_split,
        beta=beta,
        vocab_size=vocab_size,
        validate=validate,
    ).kd


def distillation_terms(
    logits: Tensor,
    targets: TeacherTargets,
    labels: Tensor | None = None,
    *,
    loss: str = "todi",
    tail: str = "bucket",
    temperature: float = 1.0,
    akl_split: str = "official",
    beta: float = 1.0,
    vocab_size: int | None = None,
    validate: bool = True,
) -> DistillationTerms:
    """Divergence, cross-entropy of the labels and what is logged beside them, from one pass over the logits.

    labels: [N] integer, the next token of each position; without them `cross_entropy` is None. The other arguments
    and the errors are those of `sparse_divergence`. Both gradients are written in one pass.
    """
    options = DivergenceOptions(akl_split, beta)
    check_settings(loss, tail, temperature, options)
    check_shapes(logits, targets, labels, vocab_size)
    vocabulary = vocab_size or logits.shape[1]
    if validate:
        check_values(targets, labels, vocabulary)
    return DistillationTerms(
        *_DistillationTerms.apply(logits, targets, labels, loss, tail, temperature, options, vocabulary)
    )


class _DistillationTerms(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: TeacherTargets,
        labels: Tensor | None,
        loss: str,
        tail: str,
        temperature: float,
        options: DivergenceOptions,
        vocabulary: int,
    ) -> tuple[Tensor | None, ...]:
        targets = _for_arithmetic(targets, torch.float64 if logits.dtype == torch.float64 else torch.float32)
        ids, stored, k = targets.token_ids, targets.stored, targets.token_ids.shape[1]
        log_p, counted = TAILS[tail](targets, temperature)
        tail_groups = targets.tail_groups if tail == "groups" else None
        num_groups = log_p.shape[1] - k

        log_masses = torch.empty_like(log_p)  # [N, k + G] at T = 1
        tempered_log_masses = log_masses if temperature == 1.0 else torch.empty_like(log_p)
        largest_tail_logit = log_p.new_empty(len(log_p))  # [N]
        for rows in row_chunks(logits):
            chunk = logits[rows, :vocabulary].to(log_p.dtype, copy=True)
            log_masses[rows], largest_tail_logit[rows] = log_masses_(
                chunk, ids[rows], stored[rows], tail_groups, num_groups
            )
            if temperature != 1.0:
                chunk.copy_(logits[rows, :vocabulary]).div_(temperature)
                tempered_log_masses[rows], _ = log_masses_(chunk, ids[rows], stored[rows], None, num_groups)

        coarse = _coarse(log_p, counted, tempered_log_masses, k)
        kd, slope = DIVERGENCES[loss](coarse, options)
        # D = u − q·Σu, with the student's tail in q even where the treatment does not count it.
        kd_grad = (slope - coarse.log_q.exp() * slope.sum(1, keepdim=True)) / temperature
        cross_entropy = None
        if labels is not None:
            label_logits = logits.gather(1, labels[:, None].long())[:, 0].to(log_p.dtype)
            cross_entropy = log_masses.logsumexp(1) - label_logits

        bucket_log_masses = torch.cat([log_masses[:, :k], log_masses[:, k:].logsumexp(1, keepdim=True)], dim=1)
        coarse = _coarse(*bucket(targets), bucket_log_masses, k)
        fkl, _ = forward_kl(coarse, options)
        rkl, _ = reverse_kl(coarse, options)
        student_tail_mass = coarse.log_q[:, k].exp()
        top1_agrees = _top1_agrees(targets, log_masses[:, :k], largest_tail_logit)

        ctx.save_for_backward(logits, labels, ids, stored, tail_groups, log_masses, tempered_log_masses, kd_grad)
        ctx.temperature, ctx.vocabulary = temperature, vocabulary
        ctx.mark_non_differentiable(fkl, rkl, student_tail_mass, top1_agrees)
        ctx.set_materialize_grads(False)
        return kd, cross_entropy, fkl, rkl, student_tail_mass, top1_agrees

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, kd_weight: Tensor | None, ce_weight: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        logits, labels, ids, stored, tail_groups, log_masses, tempered_log_masses, kd_grad = ctx.saved_tensors
        k, temperature, vocabulary = ids.shape[1], ctx.temperature, ctx.vocabulary

        # Each pass over the logits: T, the tail's log masses at T, and the gradient in all log masses at T. At T = 1
        # the cross-entropy joins the divergence's pass; its label is subtracted at the end.
        passes = []
        if kd_weight is not None:
            passes.append((temperature, tempered_log_masses[:, k:], kd_grad * kd_weight[:, None]))
        if ce_weight is not None:
            ce_grad = log_masses.softmax(1) * ce_weight[:, None]
            if passes and temperature == 1.0:
                passes = [(1.0, log_masses[:, k:], passes[0][2] + ce_grad)]
            else:
                passes.append((1.0, log_masses[:, k:], ce_grad))

        if not passes:
            return (None,) * 8
        grad = torch.empty_like(logits)
        grad[:, vocabulary:] = 0
        for rows in row_chunks(logits):
            chunks = []
            for pass_temperature, tail_log_masses, outcome_grad in passes:
                chunk = logits[rows, :vocabulary].to(log_masses.dtype, copy=True)
                if pass_temperature != 1.0:
                    chunk.div_(pass_temperature)
                spread_gradient_(chunk, ids[rows], stored[rows], tail_groups, tail_log_masses[rows], outcome_grad[rows])
                chunks.append(chunk)
            total = chunks[0].add_(chunks[1]) if len(chunks) == 2 else chunks[0]
            if ce_weight is not None:
                total.scatter_add_(1, labels[rows, None].long(), -ce_weight[rows, None])
            grad[rows, :vocabulary] = total
        return grad, *(None,) * 7


def _coarse(log_p: Tensor, counted: Tensor, log_masses: Tensor, num_entries: int) -> Coarse:
    """Both distributions; a part of the tail that no token of the vocabulary is in does not count."""
    occupied = log_masses != -inf
    occupied[:, :num_entries] = True
    return Coarse(log_p, log_masses.log_softmax(1), counted & occupied, num_entries)


def _for_arithmetic(targets: TeacherTargets, dtype: torch.dtype) -> TeacherTargets:
    """Convert the masses to `dtype` and the indices to int64."""
    return TeacherTargets(
        targets.token_ids.long(),
        targets.logprobs.to(dtype),
        targets.tail_logprob.to(dtype),
        None if targets.tempered_tail is None else targets.tempered_tail.to(dtype),
        None if targets.tail_groups is None else targets.tail_groups.long(),
        None if targets.group_logprobs is None else targets.group_logprobs.to(dtype),
    )


def _top1_agrees(targets: TeacherTargets, entry_logits: Tensor, largest_tail_logit: Tensor) -> Tensor:
    """Whether the student's largest logit is that of the teacher's first entry, [N] bool; False without entries."""
    no_entry = torch.full_like(largest_tail_logit, -inf)[:, None]
    first = torch.cat([targets.logprobs, no_entry], dim=1).argmax(1, keepdim=True)
    candidates = torch.cat([entry_logits, largest_tail_logit[:, None]], dim=1)
    return (candidates.gather(1, first)[:, 0] >= candidates.amax(1)) & targets.stored.any(1)

"""The engine: a block of logits and the teacher's targets there → the loss of each position, and its gradient.

A logsumexp and a gather make k + G numbers of a row (blocks.py), any function of those is a divergence (registry.py),
and one pass in place spreads its gradient over the row.
"""

from dataclasses import replace
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.losses.blocks import BlockTerms, LogitBlock, TermWeights
from trainer.losses.coarse import Coarse
from trainer.losses.divergences import LINEAR_IN_P, forward_kl, reverse_kl
from trainer.losses.low_rank import LOW_RANK, low_rank_block
from trainer.losses.registry import evaluate_divergence
from trainer.losses.settings import LossSettings
from trainer.losses.tail import LOG_TAIL_FLOOR, TAILS, StudentRows
from trainer.losses.targets import TeacherTargets
from trainer.losses.temperature import approximate_tempered_tail
from trainer.losses.transform import LogitTransform


class DistillationTerms(NamedTuple):
    """The quantities that one pass over the logits gives for each position."""

    kd: Tensor  # [N] nats, the chosen divergence at the chosen temperature, not multiplied by T²
    cross_entropy: Tensor | None  # [N] nats, of the labels at T = 1
    fkl: Tensor  # [N] nats at T = 1, whatever the loss is: with the bucket, or from the teacher that is rebuilt
    rkl: Tensor  # [N] nats, likewise
    student_tail_mass: Tensor  # [N] student's mass outside the entries at T = 1
    top1_agrees: Tensor  # [N] bool, no token is more probable to the student than the teacher's first
    confidence: Tensor  # [N] probability of the student's first token at T = 1
    top1_correct: Tensor | None  # [N] bool, no token is more probable to the student than the label
    residual_products: Tensor | None  # [N, 2] Σ ε_p ε_q and Σ ε_q² over the probes of the low-rank tail


class TermBuffers:
    """The numbers [N, k + 1] that the blocks of N positions leave behind; all terms follow from them at once."""

    def __init__(self, targets: TeacherTargets, with_labels: bool) -> None:
        """Allocate the buffers in the dtype and on the device of `targets`, which `for_arithmetic` gave."""
        self._targets = targets
        num_positions, k = targets.token_ids.shape
        self.kd = torch.empty_like(targets.tail_logprob)
        self._log_masses = self.kd.new_empty(num_positions, k + 1)  # of the entries and the whole tail, at T = 1
        self._largest = torch.empty_like(self.kd)
        self._label_logits = torch.empty_like(self.kd) if with_labels else None
        self._own_terms: dict[str, list[Tensor]] = {}

    def write(self, rows: slice, block: BlockTerms) -> None:
        """Fill in the numbers of some positions."""
        self.kd[rows] = block.kd
        self._log_masses[rows] = block.log_masses
        self._largest[rows] = block.largest
        if self._label_logits is not None and block.label_logits is not None:
            self._label_logits[rows] = block.label_logits
        for name, values in block.own_terms.items():
            self._own_terms.setdefault(name, []).append(values)

    def terms(self) -> DistillationTerms:
        """Return the terms of all positions."""
        targets, log_masses, k = self._targets, self._log_masses, self._targets.token_ids.shape[1]
        log_normaliser, label_logits = log_masses.logsumexp(1), self._label_logits
        log_p = torch.cat([targets.logprobs, targets.tail_logprob[:, None].clamp_min(LOG_TAIL_FLOOR)], dim=1)
        counted = torch.cat([targets.token_ids >= 0, log_masses[:, k:] != -inf], dim=1)
        bucket = Coarse(log_p, log_masses.log_softmax(1), counted, k)
        top1_agrees = torch.zeros_like(targets.tail_logprob, dtype=torch.bool)
        if k:
            first = targets.logprobs.argmax(1, keepdim=True)
            first_logits = log_masses.gather(1, first)[:, 0]
            top1_agrees = (first_logits >= self._largest) & (targets.token_ids >= 0).any(1)
        terms = DistillationTerms(
            kd=self.kd,
            cross_entropy=None if label_logits is None else log_normaliser - label_logits,
            fkl=forward_kl(bucket)[0],
            rkl=reverse_kl(bucket)[0],
            student_tail_mass=bucket.log_q[:, k].exp(),
            top1_agrees=top1_agrees,
            confidence=(self._largest - log_normaliser).exp(),
            top1_correct=None if label_logits is None else label_logits >= self._largest,
            residual_products=None,
        )
        return terms._replace(**{name: torch.cat(values) for name, values in self._own_terms.items()})


def distillation_block(
    raw: Tensor,
    targets: TeacherTargets,
    labels: Tensor | None,
    settings: LossSettings,
    transform: LogitTransform,
    weights: TermWeights | None,
    moments: Tensor | None = None,
    memory: Tensor | None = None,
) -> BlockTerms:
    """Compute the divergence of raw logits, and overwrite these with their gradient.

    Args:
        raw: [n, V] floating; scratch memory if no gradient is wanted.
        targets: the teacher there, as `for_arithmetic` gives it.
        labels: [n] int64, or None.
        settings: the loss.
        transform: what follows before the softmax.
        weights: of kd and cross-entropy in the scalar whose gradient is wanted; None for no gradient.
        moments: of the low-rank tail, if `low_rank.student_moments` knows them.
        memory: for the teacher's logits of a low-rank tail, [n, V] as wide as its arithmetic; None to allocate it.
    """
    if settings.tail == LOW_RANK:
        return low_rank_block(raw, targets, labels, settings, transform, weights, moments, memory)
    return _coarse_block(raw, targets, labels, settings, transform, weights)


def _coarse_block(
    raw: Tensor,
    targets: TeacherTargets,
    labels: Tensor | None,
    settings: LossSettings,
    transform: LogitTransform,
    weights: TermWeights | None,
) -> BlockTerms:
    """Do so where the outcomes are tokens and parts of the tail, as a treatment of tail.py makes them."""
    temperature = settings.temperature
    if temperature != 1.0 and targets.tempered_tail is None and targets.tail_entropy is not None:
        estimate = approximate_tempered_tail(targets, temperature, raw.shape[1])
        targets = replace(targets, tempered_tail=estimate)
    outcomes = TAILS[settings.tail](targets, temperature, StudentRows(raw, transform))
    ids, num_tokens = outcomes.token_ids, outcomes.token_ids.shape[1]
    num_groups = outcomes.log_p.shape[1] - num_tokens
    temperatures = (1.0,) if temperature == 1.0 else (1.0, temperature)
    block = LogitBlock(raw, ids, labels, transform, temperatures, outcomes.tail_groups, num_groups)
    log_q_at_one = block.log_masses[0].log_softmax(1)  # [n, K + G]
    log_q = log_q_at_one if temperature == 1.0 else block.log_masses[1].log_softmax(1)

    # A part of the tail that no token of the vocabulary is in does not count.
    occupied = block.log_masses[-1] != -inf
    occupied[:, :num_tokens] = True
    estimated_p = outcomes.estimated_p if settings.loss in LINEAR_IN_P else None
    coarse = Coarse(outcomes.log_p, log_q, outcomes.counted & occupied, num_tokens, estimated_p)
    kd, slope = evaluate_divergence(settings.loss, coarse, settings.loss_args)
    if weights is not None:
        kd_weights, ce_weights = weights
        grads: list[Tensor | None] = [None if ce_weights is None else log_q_at_one.exp() * ce_weights[:, None]]
        if temperature != 1.0:
            grads.append(None)
        if kd_weights is not None:
            # With the student's tail in q even where the treatment does not count it.
            kd_grad = (slope - log_q.exp() * slope.sum(1, keepdim=True)) / temperature * kd_weights[:, None]
            grads[-1] = kd_grad if grads[-1] is None else grads[-1] + kd_grad
        block.write_gradient_(grads, ce_weights)
    k, log_masses = targets.token_ids.shape[1], block.log_masses[0]
    if log_masses.shape[1] > k + 1:
        log_masses = torch.cat([log_masses[:, :k], log_masses[:, k:].logsumexp(1, keepdim=True)], dim=1)
    return BlockTerms(kd, log_masses, block.largest, block.label_logits)

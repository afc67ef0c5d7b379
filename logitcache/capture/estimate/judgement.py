"""What several ways to store the tail leave of the gradient, judged at some positions with (almost) all of the vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from logitcache.capture.calibration import make_tail_groups
from logitcache.capture.estimate.fidelity import (
    SLOPES,
    STUDENTS,
    Outcomes,
    gradient_errors,
    known_residual,
    rebuilt_outcomes,
    stand_in,
    tail_divergence,
)
from logitcache.capture.settings import LOW_RANK_PROBES, CaptureSettings
from logitcache.capture.teachers.base import LogitTeacher
from logitcache.format.layout import Layout
from logitcache.format.probes import probe_ids
from logitcache.format.quantization import rounded
from logitcache.format.sequences import TokenSequence
from logitcache.format.tail_basis import TailBasis, with_rank
from logitcache.format.tail_parts import TailParts
from logitcache.format.targets import SparseTargets, concatenate

JUDGED_POSITIONS = 512
"""The most positions that are scored with `JUDGED_ENTRIES` entries each, 32 KiB."""
JUDGED_ENTRIES = 4096

Errors = Mapping[tuple[str, str], float]
"""(loss, stage) → relative error of the summed gradient."""


class Judgement(NamedTuple):
    """The errors and divergences of choices.

    tail_groups: int [V].  gradient_error: of (k, groups, rank).  variance_captured: of a rank.  tail_divergence: of (k, rank).
    not_told_apart: mean probability beyond the entries that are judged.
    """

    tail_groups: np.ndarray
    gradient_error: Mapping[tuple[int, int, int], Errors]
    variance_captured: Mapping[int, float]
    tail_divergence: Mapping[tuple[int, int], float]
    not_told_apart: float


def judge(
    teacher: LogitTeacher,
    priced: Sequence[TokenSequence],
    parts: TailParts,
    layout: Layout,
    basis: TailBasis | None,
    ks: Sequence[int],
    ranks: Sequence[int],
) -> Judgement:
    """Judges, at some of the positions, every k with one bucket, with groups, and with so many first directions of a basis.

    The teacher's tail groups are replaced; its basis is this one.
    """
    mean_probability = teacher.mean_probability(priced)
    tail_groups = make_tail_groups(teacher, priced, parts.groups)
    teacher.set_tail_groups(tail_groups)
    probes = parts.probes or LOW_RANK_PROBES if parts.rank else 0
    top_k = max(min(layout.vocab_size, JUDGED_ENTRIES), ks[-1])
    sequences = thinned(priced, JUDGED_POSITIONS)
    scored = list(teacher.score(sequences, CaptureSettings(top_k=top_k, tail_parts=replace(parts, probes=probes))))
    targets = concatenate(with_probe_ids(sequences, scored, layout.vocab_size))
    outcomes = Outcomes.of_targets(targets, mean_probability, tail_groups)
    students = {stage: stand_in(outcomes, stage) for stage in STUDENTS}
    found: dict[tuple[int, int, int], dict[tuple[str, str], float]] = {}

    def add(stage: str, groups: int, rank: int, rebuilt: np.ndarray | None = None) -> None:
        errors = gradient_errors(outcomes, students[stage], ks, grouped=bool(groups), rebuilt=rebuilt)
        for k, of_loss in zip(ks, errors, strict=True):
            found.setdefault((k, groups, rank), {}).update({(loss, stage): of_loss[loss] for loss in SLOPES})

    for stage in STUDENTS:
        add(stage, 0, 0)
        add(stage, parts.groups, 0)
    captured: dict[int, float] = {}
    divergences: dict[tuple[int, int], float] = {}
    for rank in ranks if basis else ():
        assert basis is not None
        first, step = basis.first(rank), layout.quantization.coefficient_step if layout.quantization else None
        held = with_rank(targets, basis, rank)
        assert held.tail_coefficients is not None
        coefficients = rounded(held.tail_coefficients, step)
        rebuilt = rebuilt_outcomes(outcomes, first, coefficients, tail_groups)
        captured[rank] = _captured(targets, held, basis)
        divergences |= {(k, rank): tail_divergence(outcomes, rebuilt, k) for k in ks}
        for stage in STUDENTS:
            own = np.zeros(())
            if parts.probes:
                own = known_residual(
                    outcomes, students[stage], stage, first, coefficients, held, mean_probability, tail_groups
                )
            add(stage, 0, rank, rebuilt + own)
    by_loss = {
        choice: {(loss, stage): errors[loss, stage] for loss in SLOPES for stage in STUDENTS}
        for choice, errors in found.items()
    }
    not_told_apart = float(np.exp(targets.tail_logprob, dtype=np.float64).mean())
    return Judgement(tail_groups, by_loss, captured, divergences, not_told_apart)


def _captured(targets: SparseTargets, held: SparseTargets, basis: TailBasis) -> float:
    """Returns the share of the logits' mean square at the probe tokens, less the offset, that the coefficients held take away."""
    whole = with_rank(targets, basis, 0).probe_residuals
    assert whole is not None and held.probe_residuals is not None
    return 1 - float(
        np.square(held.probe_residuals, dtype=np.float64).mean() / np.square(whole, dtype=np.float64).mean()
    )


def with_probe_ids(
    sequences: Sequence[TokenSequence], scored: Sequence[SparseTargets], vocab_size: int
) -> list[SparseTargets]:
    """Returns what a teacher gave with the probe tokens of its residuals."""
    return [
        targets
        if targets.probe_residuals is None
        else replace(
            targets,
            probe_ids=probe_ids(sequence.row_id, sequence.positions, targets.probe_residuals.shape[1], vocab_size),
        )
        for sequence, targets in zip(sequences, scored, strict=True)
    ]


def thinned(sequences: Sequence[TokenSequence], num_positions: int) -> list[TokenSequence]:
    """Returns the sequences with at most `num_positions` stored positions in all, drawn at random.

    Sequences without any are left out.
    """
    owners = np.repeat(np.arange(len(sequences)), [len(sequence.positions) for sequence in sequences])
    positions = np.concatenate([sequence.positions for sequence in sequences])
    drawn = np.random.default_rng(0).permutation(len(owners))[:num_positions]
    result = []
    for index in np.unique(owners[drawn]):
        mask = np.zeros_like(sequences[index].loss_mask)
        mask[positions[drawn[owners[drawn] == index]] + 1] = True
        result.append(TokenSequence(sequences[index].input_ids, mask))
    return result

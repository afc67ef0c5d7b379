"""What k entries and G tail groups cost on disk, and what they leave of the gradient's error.

    python tools/bench_fidelity.py FULL.npz TOPK.npz

FULL.npz: `teacher_logits`, `student_early_logits`, `student_late_logits`, float [N, V], of the same positions: what errors are
measured on.  TOPK.npz: `token_ids`, `logprobs` [M, ≥ 256], `tail_logprob` [M] and `input_ids` [M] of the same teacher at many
consecutive positions: what bytes are measured on. Their tail is spread over groups as at positions of FULL.npz drawn at
random, independently for each group, since it is not stored there.

Bytes are of a shard's columns, per position, in sequences of 128 tokens. The error is ‖Σ g_stored − Σ g_full‖ / ‖Σ g_full‖, g the
gradient with respect to the logits, summed over the positions. Groups are bands of rank of the mean probability.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from logitcache.capture.estimate import narrowed, stored_bytes
from logitcache.capture.fidelity import SLOPES, STUDENTS, Outcomes, gradient_errors, group_sums, stand_in
from logitcache.capture.partition import rank_bands
from logitcache.format.codec import GROUP_STEP, Layout
from logitcache.format.sequences import TokenSequence
from logitcache.format.targets import SparseTargets
from logitcache.table import aligned

KS = (16, 32, 48, 64, 96, 128, 256)
NUM_GROUPS = (0, 16, 32, 64, 128)
STEPS_NATS = (GROUP_STEP, 2.0**-4, 2.0**-3, 2.0**-2, 2.0**-1)  # the codec itself rounds to the first
ROUNDED = ((32, 32), (48, 32), (64, 32))
"""(k, G) whose group masses are rounded more and more coarsely."""
CONTEXT = 128
WIDEST = max(KS)


class Sample:
    """Both files: the teacher, its students, and many positions of which only the most probable tokens are known."""

    def __init__(self, full: Path, topk: Path) -> None:
        with np.load(full) as file:
            teacher, *students = (
                normalised(file[f"{name}_logits"]) for name in ("teacher", "student_early", "student_late")
            )
        with np.load(topk) as file:
            self.input_ids = file["input_ids"]
            self.targets = SparseTargets(
                token_ids=file["token_ids"][:, :WIDEST].astype(np.int32),
                logprobs=file["logprobs"][:, :WIDEST],
                tail_logprob=file["tail_logprob"],
            )
        assert self.targets.token_ids.shape[1] == WIDEST, f"{topk} holds fewer than {WIDEST} entries"
        self.order = np.argsort(-teacher, axis=1, kind="stable")
        self.teacher, self.students = teacher, dict(zip(STUDENTS, students, strict=True))
        self.mean = self._mean_probability()

    def _mean_probability(self) -> np.ndarray:
        """Of the many positions [V]; their tail as it is on average in the full distributions."""
        mean = np.zeros(self.teacher.shape[1])
        np.add.at(mean, self.targets.token_ids, np.exp(self.targets.logprobs, dtype=np.float64))
        rest = np.exp(self.teacher)
        np.put_along_axis(rest, self.order[:, :WIDEST], 0.0, axis=1)
        mean += np.exp(self.targets.tail_logprob, dtype=np.float64).sum() * rest.sum(axis=0) / rest.sum()
        return mean / mean.sum()

    def partition(self, num_groups: int) -> np.ndarray:
        """Group of each id, int [V]; one group for G = 0."""
        return rank_bands(self.mean, max(num_groups, 1))

    def errors(self, num_groups: int, step_nats: float = 0.0, stand_ins: bool = False) -> list[list[float]]:
        """For each of KS, the error of each loss with the early student, then with the late one."""
        outcomes = Outcomes.of_logprobs(self.teacher, self.mean, self.partition(num_groups))
        columns: list[Sequence[Mapping[str, float]]] = []
        for stage, student in self.students.items():
            q = stand_in(outcomes, stage) if stand_ins else np.take_along_axis(student, outcomes.ids, axis=1)
            columns.append(gradient_errors(outcomes, q, KS, grouped=num_groups > 0, group_step_nats=step_nats))
        return [[found[i][loss] for found in columns for loss in SLOPES] for i in range(len(KS))]

    def bytes_per_position(self, k: int, num_groups: int, step_nats: float = 0.0) -> float:
        """Really encoded and compressed."""
        targets, tail_groups = self.targets, None
        if num_groups:
            tail_groups = self.partition(num_groups)
            targets = replace(targets, group_logprobs=self._spread_tail(tail_groups))
        targets = narrowed(targets, k, tail_groups)
        if step_nats and targets.group_logprobs is not None:
            rounded = (np.rint(targets.group_logprobs / step_nats) * step_nats).astype(np.float32)
            targets = replace(targets, group_logprobs=rounded)
        mask = np.arange(CONTEXT + 1) > 0
        starts = range(0, len(self.input_ids) - CONTEXT, CONTEXT)
        sequences = [TokenSequence(self.input_ids[start : start + CONTEXT + 1], mask) for start in starts]
        parts = [targets[start : start + CONTEXT] for start in starts]
        layout = Layout(self.teacher.shape[1], num_tail_groups=num_groups)
        return stored_bytes(sequences, parts, layout) / (CONTEXT * len(starts))

    def _spread_tail(self, tail_groups: np.ndarray) -> np.ndarray:
        """Log masses of the groups beyond the known entries, float32 [M, G]."""
        rest = np.exp(self.teacher)
        np.put_along_axis(rest, self.order[:, :WIDEST], 0.0, axis=1)
        num_groups = int(tail_groups.max()) + 1
        shares = group_sums(rest, np.broadcast_to(tail_groups, rest.shape), num_groups)  # [N, G]
        drawn = np.random.default_rng(0).integers(len(shares), size=(len(self.input_ids), num_groups))
        spread = np.take_along_axis(shares, drawn, axis=0)
        spread *= np.exp(self.targets.tail_logprob, dtype=np.float64)[:, None] / spread.sum(axis=1, keepdims=True)
        with np.errstate(divide="ignore"):
            return np.log(spread).astype(np.float32)


def normalised(logits: np.ndarray) -> np.ndarray:
    """log_softmax in float64."""
    logits = logits.astype(np.float64)
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


def cells(errors: Sequence[float]) -> list[str]:
    return [f"{error:.3f}" for error in errors]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("full", type=Path)
    parser.add_argument("topk", type=Path)
    options = parser.parse_args()
    sample = Sample(options.full, options.topk)
    heading = ["bytes", *(f"{loss} {stage}" for stage in STUDENTS for loss in SLOPES)]

    table = [["stored", *heading]]
    for i, rows in enumerate(zip(*(sample.errors(num_groups) for num_groups in NUM_GROUPS), strict=True)):
        for num_groups, row in zip(NUM_GROUPS, rows, strict=True):
            name = f"k = {KS[i]}" + (f" + {num_groups} groups" if num_groups else "")
            table.append([name, f"{sample.bytes_per_position(KS[i], num_groups):.0f}", *cells(row)])
    print(aligned(table))

    print("\nGroup masses rounded to multiples of a step, in nats:")
    table = [["stored", "step", *heading]]
    for k, num_groups in ROUNDED:
        for step in STEPS_NATS:
            row = sample.errors(num_groups, step)[KS.index(k)]
            size = sample.bytes_per_position(k, num_groups, step)
            table.append([f"k = {k} + {num_groups} groups", f"{step:.2g}", f"{size:.0f}", *cells(row)])
    print(aligned(table))

    print("\nThe students that stand in for these two before training:")
    table = [["stored", *heading[1:]]]
    for i, rows in enumerate(zip(*(sample.errors(num_groups, stand_ins=True) for num_groups in (0, 32)), strict=True)):
        table += [[f"k = {KS[i]}{tail}", *cells(row)] for tail, row in zip(("", " + 32 groups"), rows, strict=True)]
    print(aligned(table))


if __name__ == "__main__":
    main()

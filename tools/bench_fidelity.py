"""Where the bytes go: what is stored of a distribution, by bytes per position and by what is left of the gradient's error.

    python tools/bench_fidelity.py FULL.npz TOPK.npz [--all] [--precision balanced] [--plot PICTURE.png]

FULL.npz: `teacher_logits`, `student_early_logits`, `student_late_logits`, float [N, V], of the same positions: what errors are
measured on.  TOPK.npz: `token_ids`, `logprobs` [M, ≥ 256], `tail_logprob` [M] and `input_ids` [M] of the same teacher at many
consecutive positions: what bytes are measured on. Their tail is spread over groups as at positions of FULL.npz drawn at
random, independently for each group, since it is not stored there.

Bytes are of a shard's columns, per position, in sequences of 128 tokens, all at one precision. The error is
‖Σ g_stored − Σ g_full‖ / ‖Σ g_full‖, g the gradient with respect to the logits, summed over the positions; in it entries are
exact and groups rounded. Clusters are made from one half of FULL.npz and used in the other, both ways: no position is judged by
groups that have seen it. Bands (of rank of the mean probability, or of token id) know all positions.
Tail samples join the entries; FKL takes them as its unbiased estimate of the tail instead.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from logitcache.capture.calibration import profile_clusters
from logitcache.capture.estimate.estimate import stored_bytes
from logitcache.capture.estimate.fidelity import SLOPES, STUDENTS, Outcomes, gradient_errors, group_sums
from logitcache.format.layout import Layout
from logitcache.format.quantization import DEFAULT_PRECISION, PRESETS
from logitcache.format.sequences import TokenSequence
from logitcache.format.targets import SparseTargets
from logitcache.format.truncation import truncate
from logitcache.table import aligned

CONTEXT = 128
WIDEST = 256
PLAIN = "k = 64"
"""What the table's last lines compare with."""


@dataclass(frozen=True)
class Stored:
    """What is kept of a position.

    k: most entries.  least, floor: entries below the probability `floor` are kept only up to `least`.
    groups: their number, 0 for one bucket.  partition: clusters, bands or ids.  step: of their log shares, nats; 0 for the
    precision's own.  samples: tail samples.
    """

    k: int
    least: int = 0
    floor: float = 0.0
    groups: int = 0
    partition: str = "clusters"
    step: float = 0.0
    samples: int = 0

    @property
    def name(self) -> str:
        """As in a table."""
        entries = f"k = {self.k}" if not self.floor else f"p ≥ {self.floor:g}, {self.least} ≤ k ≤ {self.k}"
        groups = f" + {self.groups} {self.partition}" if self.groups else ""
        step = f", {self.step:g} nat" if self.step else ""
        return entries + groups + step + (f" + {self.samples} samples" if self.samples else "")

    def counts(self, logprobs: np.ndarray) -> np.ndarray:
        """Entries of each position, int [N]. logprobs: [N, ≥ k], descending."""
        with np.errstate(divide="ignore"):
            above = (logprobs[:, : self.k] >= np.log(self.floor)).sum(axis=1)
        counts: np.ndarray = np.clip(above, self.least, self.k)
        return counts


SHOWN = [
    *(Stored(k) for k in (16, 24, 32, 48, 64, 128)),
    Stored(64, least=16, floor=1e-3),
    Stored(32, samples=16),
    *(Stored(k, groups=32, partition="bands") for k in (16, 32, 48)),
    Stored(16, groups=16),
    Stored(20, groups=8),
    *(Stored(k, groups=32) for k in (16, 32, 48, 64)),
    Stored(48, groups=64),
]
EVERYTHING = [
    *(Stored(k) for k in (8, 16, 24, 32, 48, 64, 96, 128, 256)),
    *(
        Stored(k, groups=groups, partition=partition)
        for partition in ("clusters", "bands", "ids")
        for k in (8, 16, 20, 24, 32, 48, 64)
        for groups in (8, 16, 32, 64, 128)
    ),
    *(Stored(k, groups=32, step=step) for k in (16, 48) for step in (2.0**-4, 2.0**-3, 2.0**-2, 2.0**-1, 1.0, 2.0)),
    *(Stored(64, least, floor) for least in (8, 16, 32) for floor in (1e-2, 1e-3, 1e-4)),
    *(Stored(64, least, floor, groups=32) for least in (8, 16) for floor in (1e-2, 1e-3)),
    *(Stored(k, samples=samples) for k in (16, 32, 64) for samples in (8, 16, 32)),
]


class Sample:
    """Both files: the teacher, its students, and many positions of which only the most probable tokens are known."""

    def __init__(self, full: Path, topk: Path, precision: str) -> None:
        with np.load(full) as file:
            teacher, *students = (
                normalised(file[f"{name}_logits"]) for name in ("teacher", "student_early", "student_late")
            )
        with np.load(topk) as file:
            assert file["token_ids"].shape[1] >= WIDEST, f"{topk} holds fewer than {WIDEST} entries"
            self.input_ids = np.append(file["input_ids"], file["input_ids"][:1])  # the last position's next token
            self.targets = SparseTargets(
                token_ids=file["token_ids"][:, :WIDEST].astype(np.int32),
                logprobs=file["logprobs"][:, :WIDEST],
                tail_logprob=file["tail_logprob"],
            )
        self.layout = Layout(teacher.shape[1], precision=precision)
        self.teacher = teacher
        self.outcomes = Outcomes.of_logprobs(teacher, np.exp(teacher).mean(axis=0), np.zeros(teacher.shape[1], int))
        self.students = [np.take_along_axis(student, self.outcomes.ids, axis=1) for student in students]
        self.folds = np.arange(len(teacher)) * 2 // len(teacher)  # [N]

    @lru_cache(maxsize=4)  # noqa: B019  # one sample for the whole run
    def partitions(self, kind: str, num_groups: int) -> list[np.ndarray]:
        """Groups, int [V], for the positions of each fold."""
        if kind == "clusters":
            return [profile_clusters(self.teacher[self.folds != fold], num_groups) for fold in (0, 1)]
        ids = np.arange(self.teacher.shape[1])
        order = np.argsort(-np.exp(self.teacher).mean(axis=0), kind="stable") if kind == "bands" else ids
        return [bands(order, num_groups)] * 2

    def step(self, stored: Stored) -> float:
        """Of the groups' log shares, nats; 0 where they are not rounded."""
        return stored.step or (self.layout.quantization.group_step if self.layout.quantization else 0.0)

    def errors(self, stored: Stored) -> list[float]:
        """Of each loss with the early student, then with the late one."""
        outcomes = self.outcomes
        held = np.arange(outcomes.ids.shape[1]) < stored.counts(outcomes.logprobs)[:, None]
        drawn = None
        if stored.samples:
            tails = np.where(held, 0.0, np.exp(outcomes.logprobs))
            drawn = np.stack([multinomial(tail, stored.samples, seed) for seed, tail in enumerate(tails)])
        if stored.groups:
            partitions = np.stack(self.partitions(stored.partition, stored.groups))  # [2, V]
            outcomes = replace(outcomes, groups=partitions[self.folds[:, None], outcomes.ids])
        found = []
        for student in self.students:
            entries = held if drawn is None else held | (drawn > 0)
            (errors,) = gradient_errors(
                outcomes, student, [entries], grouped=stored.groups > 0, group_step_nats=self.step(stored)
            )
            if drawn is not None:
                errors["fkl"] = self._unbiased_error(student, held, drawn / stored.samples)
            found += list(errors.values())
        return found

    def _unbiased_error(self, student: np.ndarray, held: np.ndarray, shares: np.ndarray) -> float:
        """FKL's, where the tail is known as shares [N, V] of its samples: the gradient is q − p."""
        p = np.exp(self.outcomes.logprobs)
        estimate = np.where(held, p, shares * np.where(held, 0.0, p).sum(axis=1, keepdims=True))
        ids = self.outcomes.ids.ravel()
        wrong, full = (np.bincount(ids, x.ravel()) for x in (estimate - p, np.exp(student) - p))
        return float(np.linalg.norm(wrong) / np.linalg.norm(full))

    def bytes_per_position(self, stored: Stored) -> float:
        """Really encoded and compressed."""
        targets, tail_groups, layout = self.targets, None, self.layout
        random = np.random.default_rng(0)
        if stored.groups:
            tail_groups = self.partitions(stored.partition, stored.groups)[0]
            targets = replace(targets, group_logprobs=self._spread_tail(tail_groups))
            layout = replace(layout, tail_parts=replace(layout.tail_parts, groups=stored.groups))
            if layout.quantization:
                layout = replace(layout, quantization=replace(layout.quantization, group_step=self.step(stored)))
        if stored.samples:
            targets = self._with_samples(targets, stored.samples)
            layout = replace(layout, tail_parts=replace(layout.tail_parts, samples=stored.samples))
        targets = truncate(targets, stored.counts(targets.logprobs), tail_groups, random)
        mask = np.arange(CONTEXT + 1) > 0
        starts = range(0, len(self.input_ids) - CONTEXT, CONTEXT)
        sequences = [TokenSequence(self.input_ids[start : start + CONTEXT + 1], mask) for start in starts]
        parts = [targets[start : start + CONTEXT] for start in starts]
        return stored_bytes(sequences, parts, layout) / (CONTEXT * len(starts))

    def _rest(self) -> np.ndarray:
        """Probabilities beyond the first WIDEST, [N, V]."""
        rest: np.ndarray = np.exp(self.teacher)
        np.put_along_axis(rest, self.outcomes.ids[:, :WIDEST], 0.0, axis=1)
        return rest

    def _spread_tail(self, tail_groups: np.ndarray) -> np.ndarray:
        """Log masses of the groups beyond the known entries, float32 [M, G]."""
        rest, num_groups = self._rest(), int(tail_groups.max()) + 1
        shares = group_sums(rest, np.broadcast_to(tail_groups, rest.shape), num_groups)  # [N, G]
        drawn = np.random.default_rng(0).integers(len(shares), size=(len(self.targets), num_groups))
        spread = np.take_along_axis(shares, drawn, axis=0)
        spread *= np.exp(self.targets.tail_logprob, dtype=np.float64)[:, None] / spread.sum(axis=1, keepdims=True)
        with np.errstate(divide="ignore"):
            logprobs: np.ndarray = np.log(spread).astype(np.float32)
        return logprobs

    def _with_samples(self, targets: SparseTargets, num_samples: int) -> SparseTargets:
        """Samples from beyond the known entries, drawn at positions of the full distributions."""
        rest, random = self._rest(), np.random.default_rng(0)
        rest /= rest.sum(axis=1, keepdims=True)
        rows = random.integers(len(rest), size=len(targets))
        ids = np.stack([random.choice(rest.shape[1], num_samples, p=rest[row]) for row in rows])
        with np.errstate(divide="ignore"):
            logprobs = np.log(np.take_along_axis(rest[rows], ids, axis=1)) + targets.tail_logprob[:, None]
        return replace(targets, sample_ids=ids.astype(np.int32), sample_logprobs=logprobs.astype(np.float32))


def bands(order: np.ndarray, num_groups: int) -> np.ndarray:
    """Group of each id, int [V]: runs of `order`, ids [V], whose ends grow geometrically, each of at least one id."""
    ends = np.geomspace(1, len(order), num_groups)
    ends = np.maximum(np.rint(ends), np.arange(1, num_groups + 1)).astype(int)
    groups = np.empty(len(order), dtype=np.int32)
    groups[order] = np.searchsorted(ends, np.arange(len(order)), side="right")
    return groups


def multinomial(masses: np.ndarray, count: int, seed: int) -> np.ndarray:
    """How often each outcome is drawn, int [E]. masses: [E], of any sum."""
    drawn: np.ndarray = np.random.default_rng(seed).multinomial(count, masses / masses.sum())
    return drawn


def normalised(logits: np.ndarray) -> np.ndarray:
    """log_softmax in float64."""
    logits = logits.astype(np.float64)
    logits -= np.logaddexp.reduce(logits, axis=1, keepdims=True)
    return logits


@dataclass(frozen=True)
class Row:
    """A line of the table. errors: of each loss with the early student, then with the late one."""

    stored: Stored
    num_bytes: float
    errors: list[float]

    def cells(self) -> list[str]:
        """As the table shows them."""
        return [self.stored.name, f"{self.num_bytes:.1f}", *(f"{error:.4f}" for error in self.errors)]


JUDGED = [loss for loss in SLOPES if loss != "fkl"]


def verdicts(rows: Sequence[Row]) -> Iterator[str]:
    """Which rows reach PLAIN's early errors with half of its bytes, and how they stand late to plain entries of equal bytes."""
    plain = sorted((row for row in rows if row.stored == Stored(row.stored.k)), key=lambda row: row.num_bytes)
    (reference,) = [row for row in plain if row.stored.name == PLAIN]
    early = [list(SLOPES).index(loss) for loss in JUDGED]
    late = [len(SLOPES) + column for column in early]
    for row in sorted(rows, key=lambda row: row.num_bytes):
        if 2 * row.num_bytes <= reference.num_bytes and all(row.errors[i] <= reference.errors[i] for i in early):
            sizes = np.log([entry.num_bytes for entry in plain])
            equal = [
                np.interp(np.log(row.num_bytes), sizes, np.log([entry.errors[i] for entry in plain])) for i in late
            ]
            worst = max(row.errors[i] / np.exp(error) for i, error in zip(late, equal, strict=True))
            yield (
                f"{row.stored.name}: {row.num_bytes / reference.num_bytes:.0%} of the bytes of {PLAIN}; {', '.join(JUDGED)} "
                f"early no worse, late {worst:.2f} times plain entries of equal bytes at most"
            )


def draw(rows: Sequence[Row], file: Path) -> None:
    """Bytes against the early and the late error of RKL, one line or cloud per kind of row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds: dict[str, Callable[[Stored], bool]] = {
        "k entries": lambda s: s == Stored(s.k),
        "entries + 32 clusters": lambda s: s == Stored(s.k, groups=32),
        "entries + other numbers of clusters": lambda s: (
            s.partition == "clusters" and s.groups not in (0, 32) and not s.floor and not s.step
        ),
        "entries + 32 bands of probability": lambda s: s == Stored(s.k, groups=32, partition="bands"),
        "entries + 32 bands of token id": lambda s: s == Stored(s.k, groups=32, partition="ids"),
        "entries by a probability floor": lambda s: s.floor > 0 and not s.groups,
        "entries + tail samples": lambda s: s.samples > 0,
    }
    markers = "oD.s^xd"
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), sharex=True)
    for axis, stage, first in zip(axes, STUDENTS, (0, len(SLOPES)), strict=True):
        column = first + list(SLOPES).index("rkl")
        for (kind, belongs), marker in zip(kinds.items(), markers, strict=True):
            points = sorted((row.num_bytes, row.errors[column]) for row in rows if belongs(row.stored))
            if points:
                line = "none" if marker in ".xd" else "-"
                axis.plot(
                    *zip(*points, strict=True), linestyle=line, marker=marker, markersize=5, linewidth=1.2, label=kind
                )
        axis.set(xscale="log", yscale="log", xlabel="bytes per position", title=f"{stage} student")
        ticks = [20, 40, 60, 80, 120, 200, 300]
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        errors = [0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4]
        low, high = min(row.errors[column] for row in rows), max(row.errors[column] for row in rows)
        shown = [error for error in errors if low * 0.9 <= error <= high * 1.1]
        axis.set_yticks(shown, [f"{error:g}" for error in shown])
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("relative error of the summed gradient, RKL")
    axes[1].legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(file, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("full", type=Path)
    parser.add_argument("topk", type=Path)
    parser.add_argument("--all", action="store_true", help="every combination, not only the instructive ones")
    parser.add_argument("--precision", choices=list(PRESETS), default=DEFAULT_PRECISION)
    parser.add_argument("--plot", type=Path, help="a picture of RKL's errors")
    options = parser.parse_args()
    sample = Sample(options.full, options.topk, options.precision)
    rows = [
        Row(stored, sample.bytes_per_position(stored), sample.errors(stored))
        for stored in (EVERYTHING if options.all else SHOWN)
    ]
    heading = [f"{loss} {stage}" for stage in STUDENTS for loss in SLOPES]
    print(aligned([["stored", "bytes", *heading], *(row.cells() for row in rows)]))
    print(*verdicts(rows), sep="\n")
    if options.plot:
        draw(rows, options.plot)


if __name__ == "__main__":
    main()

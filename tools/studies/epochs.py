"""FKL, RKL, AKL and ToDi over many epochs on few rows: who is ahead early, and do they meet late?

    python tools/studies/epochs.py [--seeds 1 2 3] [--jobs 2] [--epochs 24] [--sources k64 online]

Asked: whether what the papers say of full vocabularies shows from a truncated cache: early on FKL attends to the
teacher's head and RKL to its tail, AKL and then ToDi are ahead of both, and after enough epochs FKL and RKL come to the same
(Wu et al., arXiv 2404.02657; Jung et al., arXiv 2505.16297).

Measured: the demo's student after 400 steps on hard labels goes on with 150 rows alone, KD alone at T = 1 from 64 entries
per position with the tail in one bucket, batches of 8, a constant learning rate, so that every epoch is the end of a run
of that length. At some epochs it is held against the teacher's whole distribution on 128 of the rows it learns from and on
128 held-out rows: FKL, RKL, and Σ|p−q| over the fewest tokens that make up half of the teacher's mass (head) and over all
others (tail). Mean over the seeds, which draw the order of the rows, with a 95 % t-interval. The same with the teacher in
memory and its whole distribution (online) tells what is the truncation's doing.

Takes 24 students, some 20 minutes on two cores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from common import COLOURS, MARKERS, finish, options
from definitions import LOSSES, NAMES
from results import Results, cell, mean_and_interval
from students import ONLINE, Student
from task import FOLDER, SUBSET_ROWS

from logitcache.table import aligned

JUDGED_EPOCHS = (0, 1, 2, 4, 8, 16, 24, 32, 48, 64)
SHOWN_EPOCHS = (1, 2, 4, 8, 16, 24, 32, 64)
METRICS = {
    "fkl": "FKL (nats)",
    "rkl": "RKL (nats)",
    "head_error": "head error Σ|p−q|",
    "tail_error": "tail error Σ|p−q|",
}
JUDGES = {"subset": "rows it learns from", "heldout": "held-out rows"}
STYLES = ("-", "--", ":")
STEPS_PER_EPOCH = math.ceil(SUBSET_ROWS / Student.batch_size)


def student(loss: str, seed: int, epochs: int, source: str) -> Student:
    """One of the study's students."""
    return Student(
        source,
        seed,
        loss,
        rows="subset",
        steps=epochs * STEPS_PER_EPOCH,
        learning_rate=1e-3,
        schedule="constant_with_warmup",
        judged_at=tuple(epoch * STEPS_PER_EPOCH for epoch in JUDGED_EPOCHS if epoch <= epochs),
    )


class Curves:
    """Judgements of the four losses' students, by epoch."""

    def __init__(self, results: Results, students: Mapping[str, Sequence[Student]]) -> None:
        self._judged = {loss: [results.judged(one) for one in seeds] for loss, seeds in students.items()}
        steps = [record["step"] for record in self._judged[LOSSES[0]][0]]
        self.epochs = [step // STEPS_PER_EPOCH for step in steps]

    def of(self, loss: str, judge: str, metric: str, epoch: int) -> list[float]:
        """A metric of each seed."""
        place = self.epochs.index(epoch)
        return [records[place][judge][metric] for records in self._judged[loss]]


def table(curves: Curves, judge: str) -> str:
    """Every metric at some epochs, a row for each loss."""
    epochs = [epoch for epoch in SHOWN_EPOCHS if epoch in curves.epochs]
    rows = [["", *(f"epoch {epoch}" for epoch in epochs)]]
    for metric, name in METRICS.items():
        rows.append([name, *[""] * len(epochs)])
        for loss in LOSSES:
            cells = [cell(curves.of(loss, judge, metric, epoch)) for epoch in epochs]
            rows.append([f"  {NAMES[loss]}", *cells])
    return aligned(rows)


def draw(curves: Mapping[str, Curves], picture: Path) -> None:
    """A panel for each metric: on the rows that are learnt above, on held-out rows below. curves: of each source."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(METRICS), figsize=(16, 7.5), sharex=True, layout="constrained")
    epochs = [epoch for epoch in next(iter(curves.values())).epochs if epoch]
    for row, (judge, where) in zip(axes, JUDGES.items(), strict=True):
        for axis, (metric, name) in zip(row, METRICS.items(), strict=True):
            for (source, of_source), style in zip(curves.items(), cycle(STYLES), strict=False):
                for loss in LOSSES:
                    values = [of_source.of(loss, judge, metric, epoch) for epoch in epochs]
                    _line(axis, epochs, values, loss, style, f"{NAMES[loss]}, {source}")
            axis.set(xscale="log", ylabel=f"{name}, {where}")
            axis.set_xticks(epochs, [str(epoch) for epoch in epochs])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("epoch")
    axes[0, 0].legend(ncols=len(curves), fontsize="small")
    figure.suptitle("line: mean over seeds; band: 95 % interval", fontsize="small")
    figure.savefig(picture, dpi=130)
    pyplot.close(figure)


def _line(
    axis: Any, epochs: Sequence[int], values: Sequence[Sequence[float]], loss: str, style: str, label: str
) -> None:
    points = [mean_and_interval(of_seeds) for of_seeds in values]
    means = [mean for mean, _ in points]
    axis.plot(epochs, means, style, color=COLOURS[loss], marker=MARKERS[loss], markersize=3, label=label)
    low, high = ([mean + sign * half for mean, half in points] for sign in (-1, 1))
    axis.fill_between(epochs, low, high, color=COLOURS[loss], alpha=0.12, lw=0)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--epochs", type=int, default=24, help="(default: 24)")
    parser.add_argument(
        "--sources",
        nargs="+",
        default=["k64", ONLINE],
        help="caches of tools/studies/task.py, and online (default: k64 online)",
    )
    parser.add_argument("--picture", type=Path, default=FOLDER / "epochs.png", help="(default: studies/epochs.png)")
    arguments = parser.parse_args()
    students = {
        source: {loss: [student(loss, seed, arguments.epochs, source) for seed in arguments.seeds] for loss in LOSSES}
        for source in arguments.sources
    }
    every = [one for of_source in students.values() for group in zip(*of_source.values(), strict=True) for one in group]
    results = finish(every, arguments.jobs)
    curves = {source: Curves(results, of_source) for source, of_source in students.items()}
    for source, of_source in curves.items():
        for judge, where in JUDGES.items():
            print(f"\n{source}, {where}\n" + table(of_source, judge))
    draw(curves, arguments.picture)
    print(f"\npicture: {arguments.picture}")


if __name__ == "__main__":
    main()

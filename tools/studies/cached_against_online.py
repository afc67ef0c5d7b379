"""How much of what online distillation gains over hard labels remains when it is trained from a cache?

    python tools/studies/cached_against_online.py [--seeds 1 2 3] [--jobs 2]

Asked: for FKL, RKL, AKL and ToDi, what 8 … 256 entries with the tail in one bucket leave of the gain; what a low-rank tail of
8 … 128 coefficients in 2 … 6 bits beside 4 … 64 entries leaves; and what a capped tail, 32 tail groups, 16 tail samples or a
ragged number of entries (mass 0.8, 8 at least) change, per byte.

Measured: the demo's student after 400 steps on hard labels goes on for 100 steps of 8 sequences, on hard labels or with KD
alone (λ = 1) at T = 1. Online runs the teacher on every batch and takes the divergence over the whole vocabulary. The
seed draws the order of the rows; all students of a seed see the same. Each is held against the teacher's whole
distribution on 128 held-out rows. The share of the gain is (hard − cached) / (hard − online) within a seed, its mean over
the seeds with a 95 % t-interval. Bytes are of the cache's shards, everything counted.

Takes 339 students, after the caches; a second run goes on where the first stopped (studies/students.jsonl). Delete studies/ to
begin anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import task
from common import COLOURS, MARKERS, finish, options
from definitions import LOSSES, NAMES
from results import Results, cell, mean_and_interval
from students import HARD, ONLINE, Student
from task import FOLDER

from logitcache.table import aligned

BUCKETS = [("bucket", f"k{k}") for k in (8, 16, 32, 64, 128, 256)]
RANKS = [("low_rank", f"k16+{rank}r") for rank in (8, 16, 32, 64, 128)]
LOW_RANK = [*RANKS, *(("low_rank", name) for name in task.LOW_RANK if ("low_rank", name) not in RANKS)]
OTHERS = [("cap", "k16"), ("groups", "k16+32g"), ("samples", "k16+16s"), ("bucket", "p.8≥8")]
WAYS = [*BUCKETS, *LOW_RANK, *OTHERS]
RAGGED = "p.8≥8"
METRICS = {"fkl": "FKL", "rkl": "RKL", "ce": "CE", "agreement": "agreement"}

NO_GAIN = "–"
TICKS_BYTES = (25, 50, 100, 200, 400)


def students(seeds: Sequence[int], ways: Sequence[tuple[str, str]] = WAYS) -> list[Student]:
    """Every student of the study. ways: (tail, what is stored), beside hard labels and online."""
    chosen = []
    for seed in seeds:
        chosen.append(Student(HARD, seed))
        for loss in LOSSES:
            chosen.append(Student(ONLINE, seed, loss))
            chosen += [Student(source, seed, loss, tail=tail) for tail, source in ways]
    return chosen


class Gains:
    """What is left of online's gain over hard labels. metric: of a Judge; None is the loss's own."""

    def __init__(self, results: Results, seeds: Sequence[int]) -> None:
        self._results, self._seeds = results, seeds

    def shares(self, loss: str, source: str, tail: str, metric: str | None = None) -> list[float]:
        """Of each seed: (hard − cached) / (hard − online)."""
        cached = [Student(source, seed, loss, tail=tail) for seed in self._seeds]
        gains = zip(self._over_hard_labels(cached, metric or loss), self._online(loss, metric or loss), strict=True)
        return [gain / online for gain, online in gains]

    def cell(self, loss: str, source: str, tail: str, metric: str | None = None) -> str:
        """In %, or NO_GAIN where online's own gain is not surely above 0."""
        mean, half = mean_and_interval(self._online(loss, metric or loss))
        surely = mean > 0 and not half >= mean  # half is NaN of one seed
        return cell(self.shares(loss, source, tail, metric), 0, 100) if surely else NO_GAIN

    def _online(self, loss: str, metric: str) -> list[float]:
        return self._over_hard_labels([Student(ONLINE, seed, loss) for seed in self._seeds], metric)

    def _over_hard_labels(self, students: Sequence[Student], metric: str) -> list[float]:
        hard = [self._results.final(Student(HARD, seed))[metric] for seed in self._seeds]
        reached = [self._results.final(student)[metric] for student in students]
        return [before - after for before, after in zip(hard, reached, strict=True)]


def share_table(gains: Gains, metric: str | None) -> str:
    """Share of the gain in %, a row for what is stored."""
    rows = [["stored", "entries", "bytes/position", *(NAMES[loss] for loss in LOSSES)]]
    for tail, source in WAYS:
        size = [f"{task.entries_per_position(source):.1f}", f"{task.bytes_per_position(source):.1f}"]
        rows.append([_name(source, tail), *size, *(gains.cell(loss, source, tail, metric) for loss in LOSSES)])
    return aligned(rows)


def metric_table(results: Results, seeds: Sequence[int]) -> str:
    """What the students came to, in nats."""
    groups = {HARD: [Student(HARD, seed) for seed in seeds]}
    for loss in LOSSES:
        groups[f"{NAMES[loss]}, online"] = [Student(ONLINE, seed, loss) for seed in seeds]
        for tail, source in WAYS:
            name = f"{NAMES[loss]}, {_name(source, tail)}"
            groups[name] = [Student(source, seed, loss, tail=tail) for seed in seeds]
    rows = [["trained with", *METRICS.values()]]
    for name, group in groups.items():
        rows.append([name, *results.cells(group, METRICS)])
    return aligned(rows)


def draw(gains: Gains, picture: Path) -> None:
    """Share of the gain over bytes: lines for the bucket, single marks for what else was stored."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(LOSSES), figsize=(16, 4.5), sharey=True, layout="constrained")
    for axis, loss in zip(axes, LOSSES, strict=True):
        for ways, style, name in ((BUCKETS, "--", "entries, bucket"), (RANKS, "-", "16 entries, R = 8 … 128")):
            sizes = [task.bytes_per_position(source) for _, source in ways]
            points = [
                mean_and_interval([100 * value for value in gains.shares(loss, source, tail)]) for tail, source in ways
            ]
            means, halves = zip(*points, strict=True)
            axis.errorbar(
                sizes, means, halves, color=COLOURS[loss], marker=MARKERS[loss], linestyle=style, capsize=3, label=name
            )
        for number, (tail, source) in enumerate(OTHERS):
            mean = 100 * mean_and_interval(gains.shares(loss, source, tail))[0]
            x = task.bytes_per_position(source)
            axis.plot(x, mean, linestyle="", marker="xP*+d"[number], color="black", label=_name(source, tail))
        axis.axhline(100, color="grey", linewidth=1, linestyle=":")
        axis.set(title=NAMES[loss], xlabel="bytes per position", xscale="log")
        axis.set_xticks(TICKS_BYTES, [str(tick) for tick in TICKS_BYTES])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("% of online's gain over hard labels,\nin the loss's own divergence")
    axes[0].legend(fontsize="small")
    figure.savefig(picture, dpi=150)
    pyplot.close(figure)


def _name(source: str, tail: str) -> str:
    if source == RAGGED:
        return "mass 0.8, k ≥ 8, bucket"
    k, _, extra = source.removeprefix("k").partition("+")
    if tail == "low_rank":
        rank, _, bits = extra.partition("r")
        return f"k = {k}, R = {rank}, {bits or task.BITS} bits"
    count = extra[:-1] + " " if extra else ""
    return f"k = {k}, {count}{tail}"


def main() -> None:
    parser = options(__doc__)
    picture = FOLDER / "cached-against-online.png"
    parser.add_argument("--picture", type=Path, default=picture, help=f"(default: {picture})")
    arguments = parser.parse_args()
    results = finish(students(arguments.seeds), arguments.jobs)
    gains = Gains(results, arguments.seeds)
    for metric, name in ((None, "the loss's own divergence"), ("fkl", "FKL"), ("rkl", "RKL"), ("ce", "CE")):
        print(f"\n% of online's gain over hard labels in {name} ({NO_GAIN}: online gains nothing)")
        print(share_table(gains, metric))
    print("\nheld out, against the whole teacher (nats)\n" + metric_table(results, arguments.seeds))
    draw(gains, arguments.picture)
    print(f"\npicture: {arguments.picture}")


if __name__ == "__main__":
    main()

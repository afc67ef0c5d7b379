"""Does distillation from random weights want the teacher's whole tail?

    python tools/studies/from_random_weights.py [--seeds 1 2 3] [--jobs 2]

Asked: what students that begin with random weights come to from 64 entries and the bucket, from 16 entries and a low-rank
tail, and online.

Measured: 300 steps of 8 sequences, λ = 0.9, T = 1; held out, against the teacher's whole distribution, mean over the seeds with
a 95 % t-interval. The seed draws the weights and the order of the rows.

Takes 39 students beside the caches of cached_against_online.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from common import finish, options
from definitions import LOSSES, NAMES
from results import Results
from students import HARD, ONLINE, Student
from task import RANDOM

from logitcache.table import aligned

WAYS = [(ONLINE, "bucket"), ("k64", "bucket"), ("k16+64r", "low_rank")]
METRICS = {"fkl": "FKL", "rkl": "RKL", "ce": "CE", "agreement": "agreement"}


def student(source: str, seed: int, loss: str = "fkl", tail: str = "bucket") -> Student:
    """One of the study's students."""
    return Student(
        source, seed, loss, tail=tail, steps=300, learning_rate=3e-3, warmup_steps=20, start=RANDOM, kd_weight=0.9
    )


def students(seeds: Sequence[int]) -> list[Student]:
    """Every student of the study."""
    cached = [student(source, seed, loss, tail) for seed in seeds for loss in LOSSES for source, tail in WAYS]
    return [student(HARD, seed) for seed in seeds] + cached


def table(results: Results, seeds: Sequence[int]) -> str:
    """A row for hard labels and for each loss from each source."""
    rows = [["trained with", *METRICS.values()]]
    groups = {HARD: [student(HARD, seed) for seed in seeds]}
    for loss in LOSSES:
        groups |= {
            f"{NAMES[loss]}, {source}": [student(source, seed, loss, tail) for seed in seeds] for source, tail in WAYS
        }
    for name, group in groups.items():
        rows.append([name, *results.cells(group, METRICS)])
    return aligned(rows)


def main() -> None:
    arguments = options(__doc__).parse_args()
    results = finish(students(arguments.seeds), arguments.jobs)
    print(f"\nheld out, against the whole teacher (nats)\n{table(results, arguments.seeds)}")


if __name__ == "__main__":
    main()

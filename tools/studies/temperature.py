"""Temperature 2 from a cache: done right, estimated, and done as t^(1/T).

    python tools/studies/temperature.py [--seeds 1 2 3] [--jobs 2]

Asked: what FKL, RKL and ToDi at T = 2 learn from 32 entries per position where the cache holds the tail's total at T = 2
(exact), where it is estimated from the tail's entropy, and where the tail is taken for one token, so that its mass goes
as t^(1/T), what a reader of plain top-k files would do.

Measured: as in cached_against_online.py: 100 steps, KD alone (times T²), against the same online at T = 2; held-out rows, the
teacher's whole distribution, at T = 2, which is what was trained, and at T = 1, mean over the seeds with a 95 %
t-interval.

Takes 36 students, about 4 minutes on two cores.
"""

from __future__ import annotations

from collections.abc import Sequence

from common import finish, options
from definitions import NAMES
from results import Results
from students import ONLINE, Student

from logitcache.table import aligned

T = 2.0
LOSSES = ("fkl", "rkl", "todi")
WAYS = {"online": ONLINE, "exact tail": "k32,T=2", "tail from entropy": "k32,entropy", "t^(1/T)": "k32,T=2"}
METRICS = {f"fkl@{T:g}": "FKL at T = 2", f"rkl@{T:g}": "RKL at T = 2", "fkl": "FKL", "rkl": "RKL", "ce": "CE"}


def student(way: str, loss: str, seed: int) -> Student:
    """One of the study's students."""
    return Student(WAYS[way], seed, loss, temperature=T, power_tail=way == "t^(1/T)")


def table(results: Results, seeds: Sequence[int]) -> str:
    """A row for every loss and way."""
    rows = [["trained with", *METRICS.values(), "agreement"]]
    for loss in LOSSES:
        for way in WAYS:
            group = [student(way, loss, seed) for seed in seeds]
            rows.append([f"{NAMES[loss]}, {way}", *results.cells(group, (*METRICS, "agreement"))])
    return aligned(rows)


def main() -> None:
    arguments = options(__doc__).parse_args()
    wanted = [student(way, loss, seed) for seed in arguments.seeds for loss in LOSSES for way in WAYS]
    results = finish(wanted, arguments.jobs, temperatures=(1.0, T))
    print("\nheld out, against the whole teacher (nats); 32 entries per position\n" + table(results, arguments.seeds))


if __name__ == "__main__":
    main()

"""What does it cost to ignore the teacher's tail, to renormalise it away or to spread it evenly?

    python tools/studies/tail_left_out.py [--seeds 1 2 3] [--jobs 2]

Asked: of 32 entries per position, for FKL, RKL, AKL and ToDi, the ablations `ignore` (the sums end at the entries),
`renormalise` (p / Σ p over the entries, what most top-k tools do) and `uniform` (every other token t / (V − k)) against
the bucket.

Measured: as in cached_against_online.py, with its students for hard labels, online and bucket: 100 steps, KD alone, T = 1,
held-out rows, the teacher's whole distribution, mean over the seeds with a 95 % t-interval. The gain is that over hard
labels in the loss's own divergence, in % of online's.

Takes 36 students beside those, about 4 minutes on two cores.
"""

from __future__ import annotations

from collections.abc import Sequence

import cached_against_online
from cached_against_online import Gains
from common import finish, options
from definitions import LOSSES, NAMES
from results import Results
from students import HARD, ONLINE, Student

from logitcache.table import aligned

SOURCE = "k32"
TAILS = ("bucket", "uniform", "renormalise", "ignore")
METRICS = {"fkl": "FKL", "rkl": "RKL", "ce": "CE", "head_error": "head error", "tail_error": "tail error"}


def students(seeds: Sequence[int]) -> list[Student]:
    """Every student of the study."""
    return cached_against_online.students(seeds, [(tail, SOURCE) for tail in TAILS])


def table(results: Results, seeds: Sequence[int]) -> str:
    """A row for every loss and treatment."""
    rows = [["trained with", "gain, %", *METRICS.values()]]

    def add(name: str, gain: str, group: Sequence[Student]) -> None:
        rows.append([name, gain, *results.cells(group, METRICS)])

    gains = Gains(results, seeds)
    add(HARD, "0", [Student(HARD, seed) for seed in seeds])
    for loss in LOSSES:
        add(f"{NAMES[loss]}, online", "100", [Student(ONLINE, seed, loss) for seed in seeds])
        for tail in TAILS:
            gain = gains.cell(loss, SOURCE, tail)
            add(f"{NAMES[loss]}, {tail}", gain, [Student(SOURCE, seed, loss, tail=tail) for seed in seeds])
    return aligned(rows)


def main() -> None:
    arguments = options(__doc__).parse_args()
    results = finish(students(arguments.seeds), arguments.jobs)
    print("\nheld out, against the whole teacher; 32 entries per position\n" + table(results, arguments.seeds))


if __name__ == "__main__":
    main()

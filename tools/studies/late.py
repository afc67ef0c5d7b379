"""What do the ways of storing the teacher's tail do late in training, where the student is near the teacher?

    python tools/studies/late.py [--seeds 1 2 3] [--jobs 2]

Asked: whether the low-rank tail's residual weight ρ is needed, ρ = 0 and ρ = 1 beside that of the probes; how fine coefficients
must be; and what the students come to, beside online training and the bucket.

Measured: the student is the demo's teacher itself with noise in its weights. The gradient's error is
‖Σ g_stored − Σ g_full‖ / ‖Σ g_full‖ over the logits, g summed over the positions of 40 held-out rows, at noise that puts it
.25, .06 and .015 nats from the teacher, and after 300 steps of online training by FKL. Trained: 150 steps of KD alone by FKL or
RKL, from noise at .25, judged against the teacher's whole distribution on 128 held-out rows. Mean over the seeds, which draw the
order of the rows, with a 95 % t-interval.

Takes 42 students beside the caches of cached_against_online.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import task
from common import finish, options
from definitions import NAMES
from rebuilding import KnownTeacher, Stored, forward_kl, gradient_table, with_noise
from results import Results
from students import ONLINE, Student, judged
from task import DAMAGED
from transformers import PreTrainedModel

from logitcache.table import aligned

ROWS = 40
LATE_FKL = (0.25, 0.06, 0.015)
BITS = 4
STORED = [
    Stored(64),
    Stored(16),
    *(Stored(16, 64, BITS, weight) for weight in (0.0, 1.0)),
    *(Stored(16, 64, bits) for bits in (None, 6, 5, 4, 3, 2)),
    *(Stored(16, rank, BITS) for rank in (16, 32, 128)),
    *(Stored(k, 64, BITS) for k in (4, 8, 32)),
]
WAYS: list[tuple[str, str, float | None]] = [
    (ONLINE, "bucket", None),
    ("k64", "bucket", None),
    ("k16", "bucket", None),
    ("k16+64r", "low_rank", 0.0),
    ("k16+64r", "low_rank", 1.0),
    ("k16+64r", "low_rank", None),
    ("k16+64r6", "low_rank", None),
]
LOSSES = ("fkl", "rkl")


def student(source: str, seed: int, loss: str, tail: str, weight: float | None) -> Student:
    """One of the trained students."""
    return Student(source, seed, loss, tail=tail, start=DAMAGED, steps=150, learning_rate=5e-4, residual_weight=weight)


def table(results: Results, seeds: Sequence[int]) -> str:
    """What the trained students came to, in nats."""
    rows = [["trained with", "stored", "ρ", "FKL", "RKL"]]
    for loss in LOSSES:
        for source, tail, weight in WAYS:
            group = [student(source, seed, loss, tail, weight) for seed in seeds]
            shown = "probes" if tail == "low_rank" and weight is None else "" if weight is None else f"{weight:g}"
            rows.append([NAMES[loss], source, shown, *results.cells(group, LOSSES)])
    return aligned(rows)


def main() -> None:
    arguments = options(__doc__).parse_args()
    students = [
        student(source, seed, loss, tail, weight)
        for seed in arguments.seeds
        for loss in LOSSES
        for source, tail, weight in WAYS
    ]
    results = finish(students, arguments.jobs)
    print(f"\nheld out, against the whole teacher (nats)\n{table(results, arguments.seeds)}", flush=True)

    teacher, rows, basis = task.teacher(), task.cache("heldout"), task.cache("train").tail_basis
    assert basis is not None
    known = KnownTeacher(teacher, [rows[number] for number in range(ROWS)], basis)
    late = {f"noise at {fkl:g}": with_noise(known, teacher, fkl) for fkl in LATE_FKL}
    late["after 300 steps online"] = known.of(recovered(teacher))
    for name, logits in late.items():
        print(f"\nerror of the gradient, {name}: FKL {forward_kl(known, logits):.3f}")
        print(gradient_table(known, logits, STORED), flush=True)


def recovered(teacher: PreTrainedModel) -> PreTrainedModel:
    """The damaged teacher after online training by FKL."""
    models: list[PreTrainedModel] = []

    def damaged() -> PreTrainedModel:
        models.append(task.student(DAMAGED))
        return models[0]

    online = Student(ONLINE, 1, start=DAMAGED, steps=300, learning_rate=5e-4)
    judged(online, damaged, task.cache("train", task.NARROWEST), teacher, {})
    models[0].eval()
    return models[0]


if __name__ == "__main__":
    main()

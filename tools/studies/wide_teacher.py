"""What does the low-rank tail keep of a teacher that is wider than the demo's, and sure of much of what it reads?

    python tools/studies/wide_teacher.py [--seeds 1] [--losses rkl todi fkl]

Asked: how fast the rebuilt tail approaches the teacher's as R grows (D = 640, V = 16,384, tools/demo/train_wide_teacher.py);
what is wrong with the gradient of a batch early and late; and whether a student trained from 16 entries and 64 coefficients
comes to what online training gives, as one from 64 entries does not.

Measured: on rows of architectures that the teacher has not read, with a basis from rows that it has. The tail's divergence is
KL(true ‖ rebuilt) beyond k entries, its mean over positions; times the tail's mass it is what is lost in FKL. The gradient's
error is ‖Σ g_stored − Σ g_full‖ / ‖Σ g_full‖ over the logits, g summed over all positions, entries exact, residuals in quarter
nats; for a student early in training and for the teacher with noise in its weights. Bytes are of a shard's columns, those of two
probes included. Students as in cached_against_online.py, with its start, steps and share of the gain, but 4 sequences a step.

Takes 45 minutes for the teacher, 20 for the caches and the start, 30 for the errors, 60 for the students of a seed, on a core
of a busy machine. Delete studies/wide/ to begin anew.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import wide_task
from common import describe
from definitions import LOSSES, NAMES
from judging import Judge
from rebuilding import (
    WIDEST_K,
    KnownTeacher,
    Stored,
    explained,
    forward_kl,
    gradient_table,
    tail_divergence,
    with_noise,
)
from results import Results, cell
from students import HARD, ONLINE, Student, judged
from transformers import PreTrainedModel
from wide_task import FOLDER, WIDEST_RANK

from logitcache.table import aligned

ROWS, JUDGED_ROWS = 8, 16
RANKS = (0, 8, 16, 32, 64, 128, WIDEST_RANK)
BITS, ALL_BITS = 4, (2, 3, 4, 5, 6)
LATE_FKL = (0.25, 0.06, 0.015)
WAYS = [("bucket", "k64"), ("low_rank", "k16,R64")]
BATCH_SIZE = 4
STORED = [
    *(Stored(k) for k in (64, 32, 16)),
    *(Stored(16, 64, residual_weight=weight) for weight in (0.0, 1.0)),
    *(Stored(16, 64, bits) for bits in (None, 6, 5, 4, 3)),
    *(Stored(16, rank, BITS) for rank in (32, 128, WIDEST_RANK)),
    *(Stored(k, 64, BITS) for k in (8, 24, 32, 48)),
]


def tail_table(heldout: KnownTeacher, width: int) -> str:
    """A row for each R: how much of the logits it explains, and the rebuilt tail's divergence.  width: D of the teacher."""
    ks = (16, WIDEST_K)
    heading = [text for k in ks for text in (f"KL, k = {k}", f"× mass, k = {k}", f"{BITS} bits, k = {k}")]
    rows = [["R", "R/D", "variance", *heading]]
    for rank in RANKS:
        cells = [f"{rank}", f"{rank / width:.3f}", f"{explained(heldout, rank):.1%}"]
        for k in ks:
            exact = tail_divergence(heldout, Stored(k, rank))
            rounded = tail_divergence(heldout, Stored(k, rank, BITS))[0] if rank else exact[0]
            cells += [f"{exact[0]:.3f}", f"{exact[1]:.4f}", f"{rounded:.3f}"]
        rows.append(cells)
    return aligned(rows)


def rounding_table(heldout: KnownTeacher) -> str:
    """A row for each R, a column for each number of bits: bytes, and the divergence of the rebuilt tail beyond 16 entries."""
    rows = [["R", *(f"{bits} bits" for bits in ALL_BITS)]]
    for rank in RANKS[2:]:
        ways = [Stored(16, rank, bits) for bits in ALL_BITS]
        cells = (f"{heldout.bytes_per_position(way):.0f} B {tail_divergence(heldout, way)[0]:.3f}" for way in ways)
        rows.append([f"{rank}", *cells])
    return aligned(rows)


def of(source: str, seed: int, loss: str = "fkl", tail: str = "bucket") -> Student:
    """A student of the study."""
    return Student(source, seed, loss, tail=tail, batch_size=BATCH_SIZE)


def share(results: Results, seeds: Sequence[int], loss: str, source: str, tail: str) -> str:
    """Of online's gain over hard labels in the loss's own divergence, in %."""
    shares = []
    for seed in seeds:
        students = (of(HARD, seed), of(source, seed, loss, tail), of(ONLINE, seed, loss))
        hard, cached, online = (results.final(student)[loss] for student in students)
        shares.append((hard - cached) / (hard - online))
    return cell(shares, 0, 100)


def train(seeds: Sequence[int], losses: Sequence[str], teacher: PreTrainedModel) -> Results:
    """Trains and judges the students that are not in students.jsonl yet."""
    results = Results(FOLDER / "students.jsonl")
    judge = Judge(teacher, wide_task.cache("heldout"), JUDGED_ROWS)
    for seed in seeds:
        of_losses = [of(source, seed, loss, tail) for loss in losses for tail, source in (("bucket", ONLINE), *WAYS)]
        for student in [of(HARD, seed), *of_losses]:
            if student not in results:
                cache = wide_task.cache("k16" if student.source in (HARD, ONLINE) else student.source)
                results.add(student, judged(student, wide_task.student, cache, teacher, {"heldout": judge}))
                print(f"{describe(student)}: {results.training_s(student):.0f} s", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[1], help="of the trained students (default: 1)")
    parser.add_argument(
        "--losses", nargs="+", default=["rkl", "todi", "fkl"], choices=LOSSES, help="they are trained with"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    wide_task.prepare()
    teacher = wide_task.teacher()

    rows, basis = wide_task.cache("heldout"), wide_task.cache("calibration").tail_basis
    assert basis is not None
    heldout = KnownTeacher(teacher, [rows[number] for number in range(ROWS)], basis)
    p, tail = heldout.log_p.exp(), heldout.targets(Stored(16)).tail_logprob.exp().mean()
    print(f"\n{len(p)} held-out positions, D = {teacher.config.hidden_size}, V = {heldout.vocab_size}")
    print(f"entropy {-(p * heldout.log_p).sum(1).mean():.2f} nats, tail mass beyond 16 entries {tail:.3f}")
    print(f"\nthe rebuilt tail\n{tail_table(heldout, teacher.config.hidden_size)}")
    print(f"\nrounded, k = 16\n{rounding_table(heldout)}", flush=True)
    students = {"early": heldout.of(wide_task.student())}
    students |= {f"late, {fkl:g}": with_noise(heldout, teacher, fkl) for fkl in LATE_FKL}
    for name, student in students.items():
        print(f"\nerror of the gradient, {name}: FKL {forward_kl(heldout, student):.3f}", flush=True)
        print(gradient_table(heldout, student, STORED), flush=True)

    if arguments.seeds:
        results = train(arguments.seeds, arguments.losses, teacher)
        table = [["stored", "bytes/position", *(NAMES[loss] for loss in arguments.losses)]]
        for way, source in WAYS:
            shares = (share(results, arguments.seeds, loss, source, way) for loss in arguments.losses)
            table.append([f"{source}, {way}", f"{wide_task.bytes_per_position(source):.1f}", *shares])
        print(f"\n% of online's gain over hard labels in the loss's own divergence\n{aligned(table)}")


if __name__ == "__main__":
    main()

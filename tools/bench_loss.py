"""Time and peak memory of a training step's loss, from hidden states to their gradient and that of the output projection.

    python tools/bench_loss.py [--losses todi 'todi, *'] [--vocab 32000 --positions 2048 --hidden 1024 --k 64]

Every row is measured in a process of its own, on the same inputs. After a warm-up it takes turns with the yardstick:
the ratio is of the medians of that process, so that a machine's slow drift cancels. The yardstick is cross-entropy in
equal chunks, its gradient formed in place; on CUDA Liger's fused linear cross-entropy, where it is installed and runs.

"Extra peak" is memory beyond inputs and gradients, in a run with no other before it but the warm-up: the high-water
mark of resident memory (CUDA: of allocated memory), less what was held before and the gradients that are returned.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measure import TrainingStep, available_bytes, machine, peak_beyond, synthetic_step
from torch import Tensor

from logitcache.table import aligned
from trainer import fused_linear_divergence, register_divergence
from trainer.losses.coarse import Coarse
from trainer.losses.fused import accumulate_product, rows_per_chunk
from trainer.losses.registry import divergence_names

MIB, GIB = 2**20, 2**30
FAILED = "failed: "
KD_WEIGHT = 0.5
TEMPERATURE = 2.0
RANK = 64
NUM_ENTRIES = (16, 64, 256)
WARM_UP_POSITIONS = 64  # on a CPU; on CUDA the warm-up is a whole step, for which kernels are compiled and chosen

OWN = "own_rkl"  # a user's, whose slope autograd finds

Run = Callable[[], None]


@register_divergence(OWN)
def own_rkl(coarse: Coarse) -> Tensor:
    """RKL, as a user may write it."""
    return (coarse.q * coarse.log_ratio).sum(1)


@dataclass(frozen=True)
class Row:
    """A way to the gradients: `prepare` makes what it is given beside the step, outside of the measurement."""

    prepare: Callable[[TrainingStep], Run]
    full_tensors: int = 0  # how many float32 [N, V] it holds at a time, at most
    package: str | None = None  # that it needs, beside CUDA


@dataclass(frozen=True)
class Shape:
    """The size of a step, how often it is timed, and the rows to measure as shell patterns."""

    vocab_size: int
    positions: int
    hidden_size: int
    repeats: int
    losses: tuple[str, ...] = ("*",)


CORE = ("todi", "fkl", "rkl", "akl")
FULL_LOGITS = ("cross-entropy, full logits", "top-k KL, full logits", "full-vocabulary KL, full logits")
CPU_SHAPES = (
    Shape(151_936, 4096, 1024, 3, CORE),
    Shape(
        151_936,
        1024,
        1024,
        3,
        (
            "jsd",
            "jeffreys",
            "sfkl",
            "srkl",
            "tvd",
            "ab",
            "todi, groups*",
            "todi, T*",
            "todi, cap",
            "todi, s*",
            "todi, k*",
            *FULL_LOGITS,
        ),
    ),
    Shape(151_936, 2048, 1024, 3, ("*, low rank*",)),
    Shape(151_936, 2048, 2048, 3, ("*, low rank*",)),
    Shape(32_000, 1024, 1024, 3, (*CORE, "todi, groups*", *FULL_LOGITS)),
)
CUDA_SHAPES = (Shape(151_936, 8192, 4096, 10), Shape(151_936, 32_768, 4096, 10))


def chunked_cross_entropy(step: TrainingStep) -> Run:
    """Cross-entropy by hand, as fast as its three matrix products allow: the losses' chunks, no other tensor [C, V].

    The loss is −log of the label's softmax, which costs nothing more but underflows; the mean's 1/N is in the hidden
    states.
    """
    hidden, weight, labels = step.hidden.detach(), step.weight.detach(), step.labels
    positions, vocab_size = len(hidden), len(weight)

    def run() -> None:
        sums = torch.promote_types(weight.dtype, torch.float32)
        hidden_grad, weight_grad = torch.empty_like(hidden), torch.zeros_like(weight, dtype=sums)
        scaled = hidden / positions
        rows = rows_per_chunk(hidden, vocab_size)
        memory = hidden.new_empty(min(rows, positions), vocab_size)
        loss = torch.zeros((), dtype=sums, device=hidden.device)
        for start in range(0, positions, rows):
            chunk = slice(start, min(start + rows, positions))
            logits, chunk_labels = memory[: chunk.stop - start], labels[chunk, None]
            torch.mm(hidden[chunk], weight.t(), out=logits)
            torch.softmax(logits, 1, out=logits)
            loss -= logits.gather(1, chunk_labels).to(sums).log().sum()
            logits.scatter_add_(1, chunk_labels, logits.new_full(chunk_labels.shape, -1.0))
            torch.mm(logits, weight, out=hidden_grad[chunk])
            accumulate_product(weight_grad, logits, scaled[chunk])
        step.hidden.grad, step.weight.grad = hidden_grad.div_(positions), weight_grad.to(weight.dtype)

    return run


def ours(loss: str, k: int, *more: str, **settings: Any) -> Row:
    """more: what the loss is given of the teacher beside entries and tail."""

    def prepare(step: TrainingStep) -> Run:
        given: dict[str, Any] = {**step.stored(k, *more)}

        def run() -> None:
            fused_linear_divergence(
                step.hidden, step.weight, None, labels=step.labels, loss=loss, kd_weight=KD_WEIGHT, **given, **settings
            ).backward()

        return run

    return Row(prepare)


def cross_entropy(step: TrainingStep) -> Run:
    return lambda: F.cross_entropy(F.linear(step.hidden, step.weight).float(), step.labels).backward()


def top_k_kl(k: int) -> Row:
    def prepare(step: TrainingStep) -> Run:
        held = step.stored(k)
        p, tail_p = held["logprobs"].exp(), held["tail_logprob"].exp()

        def run() -> None:
            log_q = F.linear(step.hidden, step.weight).float().log_softmax(1)
            entries = log_q.gather(1, held["token_ids"])
            tail = torch.log1p(-entries.exp().sum(1).clamp(max=1 - 1e-6))
            kl = (p * (held["logprobs"] - entries)).sum(1) + tail_p * (held["tail_logprob"] - tail)
            _mixed(F.nll_loss(log_q, step.labels), kl.mean()).backward()

        return run

    return Row(prepare, full_tensors=3)


def full_vocabulary_kl(step: TrainingStep) -> Run:
    teacher_logits = _teacher_logits(step).float()

    def run() -> None:
        log_q = F.linear(step.hidden, step.weight).float().log_softmax(1)
        kl = F.kl_div(log_q, teacher_logits.log_softmax(1), reduction="batchmean", log_target=True)
        _mixed(F.nll_loss(log_q, step.labels), kl).backward()

    return run


def liger_cross_entropy(sums: torch.dtype | None) -> Callable[[TrainingStep], Run]:
    """sums: dtype of the sums for ∂W, by default that of W."""

    def prepare(step: TrainingStep) -> Run:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss(accum_dtype=sums)
        return lambda: loss(step.weight, step.hidden, step.labels).backward()

    return prepare


def liger_jsd(step: TrainingStep) -> Run:
    from liger_kernel.transformers import LigerFusedLinearJSD

    loss, teacher_weight = LigerFusedLinearJSD(jsd_beta=0.5), step.weight.detach()
    return lambda: loss(step.hidden, step.weight, step.teacher_hidden, teacher_weight, step.labels).backward()


def orda_precomputed(step: TrainingStep) -> Run:
    from orda_kernel import PrecomputedTeacher, distillation_loss

    teacher, weights = PrecomputedTeacher(logits=_teacher_logits(step)), (1 - KD_WEIGHT, KD_WEIGHT)

    def run() -> None:
        distillation_loss(
            step.hidden,
            step.weight,
            step.labels,
            teacher,
            student_ce_weight=weights[0],
            kl_weight=weights[1],
            backend="triton",
        ).loss.backward()

    return run


def _teacher_logits(step: TrainingStep) -> Tensor:
    with torch.no_grad():
        return F.linear(step.teacher_hidden, step.weight)


def _mixed(ce: Tensor, kd: Tensor) -> Tensor:
    return (1 - KD_WEIGHT) * ce + KD_WEIGHT * kd


CHUNKED, LIGER = "cross-entropy, chunked", "cross-entropy, Liger fused linear"


def rows_of(k: int, num_groups: int) -> dict[str, Row]:
    """Every row by name, the possible yardsticks first."""
    others = [entries for entries in NUM_ENTRIES if entries != k]
    return {
        LIGER: Row(liger_cross_entropy(None), package="liger_kernel"),
        CHUNKED: Row(chunked_cross_entropy),
        **{loss: ours(loss, k) for loss in divergence_names() if loss != OWN},
        f"todi, groups G={num_groups}": ours("todi", k, "tail_groups", "group_logprobs", tail="groups"),
        f"todi, T={TEMPERATURE:g}": ours("todi", k, "tempered_tail", temperature=TEMPERATURE),
        "todi, cap": ours("todi", k, tail="cap"),
        **{
            f"{loss}, low rank R={RANK}": ours(
                *(loss, k, "tail_coefficients", "tail_basis", "probe_ids", "probe_residuals"),
                tail="low_rank",
                residual_weight=0.5,
            )
            for loss in (*CORE, OWN)
        },
        "todi, samples": ours("todi", k, "sample_ids", "sample_logprobs", tail="samples"),
        **{f"todi, k={entries}": ours("todi", entries) for entries in others},
        "cross-entropy, full logits": Row(cross_entropy, full_tensors=3),
        "top-k KL, full logits": top_k_kl(k),
        "full-vocabulary KL, full logits": Row(full_vocabulary_kl, full_tensors=6),
        f"{LIGER}, ∂W summed in float32": Row(liger_cross_entropy(torch.float32), package="liger_kernel"),
        "jsd, Liger fused linear, projects the teacher too": Row(liger_jsd, package="liger_kernel"),
        "fkl, orda-kernel, teacher's full logits": Row(orda_precomputed, full_tensors=1, package="orda_kernel"),
    }


def yardstick_name(device: str) -> str:
    return LIGER if device == "cuda" and find_spec("liger_kernel") else CHUNKED


@dataclass(frozen=True)
class Measured:
    """What a row's process found."""

    seconds: float  # median of a step
    yardstick_s: float  # likewise, of the yardstick in between
    extra_bytes: int


def measure(name: str, yardstick: str, rows: dict[str, Row], folder: Path, device: str, repeats: int) -> Measured:
    """Measure one row in this process, on the inputs in a folder."""
    step = TrainingStep(**torch.load(folder / "step.pt", map_location=device))
    step = step.first(len(step.hidden))
    prepare, prepare_yardstick = rows[name].prepare, rows[yardstick].prepare
    warm_up = step.first(len(step.hidden) if device == "cuda" else WARM_UP_POSITIONS)
    prepare_yardstick(warm_up)()
    prepare(warm_up)()
    del warm_up
    run, run_yardstick = prepare(step), prepare_yardstick(step)

    def timed(run: Run) -> float:
        step.hidden.grad = step.weight.grad = None
        _synchronise(device)
        began = time.perf_counter()
        run()
        _synchronise(device)
        return time.perf_counter() - began

    times: list[float] = []
    yardstick_times: list[float] = []
    peak = peak_beyond(lambda: times.append(timed(run)), device)
    extra_bytes = peak - sum(tensor.grad.nbytes for tensor in (step.hidden, step.weight) if tensor.grad is not None)
    for repeat in range(repeats):
        if repeat > 0:  # the first was timed above
            times.append(timed(run))
        if name != yardstick:
            yardstick_times.append(timed(run_yardstick))
    seconds = statistics.median(times)
    return Measured(seconds, statistics.median(yardstick_times or [seconds]), extra_bytes)


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def why_not(row: Row, shape: Shape, device: str, held_bytes: int) -> str | None:
    """What keeps a row from being measured here. held_bytes: inputs and gradients."""
    if row.package and device != "cuda":
        return "needs CUDA"
    if row.package and not find_spec(row.package):
        return f"{row.package.replace('_', '-')} is not installed"
    needed = held_bytes + row.full_tensors * shape.positions * shape.vocab_size * 4
    available = available_bytes(device)
    if row.full_tensors and needed > available:
        return f"needs {needed / GIB:.1f} GiB, has {available / GIB:.1f} GiB"
    return None


def table(shape: Shape, options: argparse.Namespace, device: str) -> Iterator[str]:
    """Lines of a shape's table; nothing where it has no row of those asked for."""
    rows = rows_of(options.k, options.groups)
    yardstick = yardstick_name(device)
    asked = [
        name
        for name in rows
        if any(fnmatchcase(name, p) for p in shape.losses) and any(fnmatchcase(name, p) for p in options.losses)
    ]
    if not asked:
        return
    dtype = getattr(torch, options.dtype or ("bfloat16" if device == "cuda" else "float32"))
    full_bytes = shape.positions * shape.vocab_size * 4
    cells = [["", "ms", "ratio", "extra peak MiB", "of [N, V]"]]
    notes = []
    with tempfile.TemporaryDirectory() as folder:
        entries = sorted({options.k, *(int(name.partition("k=")[2]) for name in asked if "k=" in name)})
        step, entropy = synthetic_step(
            (shape.vocab_size, shape.positions, shape.hidden_size),
            entries=entries,
            num_groups=options.groups,
            rank=RANK,
            temperature=TEMPERATURE,
            dtype=dtype,
            device=device,
        )
        mass = float(step.teacher[options.k]["logprobs"].exp().sum(1).mean())
        held_bytes = 2 * (step.hidden.nbytes + step.weight.nbytes)
        torch.save(vars(step), Path(folder) / "step.pt")
        del step
        if device == "cuda":
            torch.cuda.empty_cache()
        for name in dict.fromkeys([yardstick, *asked]):
            problem = why_not(rows[name], shape, device, held_bytes)
            if problem is None:
                command = [sys.executable, __file__, "--measure", name, yardstick, folder, "--device", device]
                command += ["--k", str(options.k), "--groups", str(options.groups), "--repeats", str(shape.repeats)]
                result = subprocess.run(command, capture_output=True, text=True)
                if result.returncode == 0:
                    found = Measured(**json.loads(result.stdout.splitlines()[-1]))
                    figures = [f"{found.seconds * 1e3:,.1f}", f"{found.seconds / found.yardstick_s:.3f}"]
                    figures += [f"{found.extra_bytes / MIB:,.0f}", f"{found.extra_bytes / full_bytes:.3f}"]
                    cells.append([name, *figures])
                    print(*cells[-1], sep="  ", file=sys.stderr, flush=True)  # the table comes when all is measured
                    continue
                problem = f"{FAILED}{(result.stderr.splitlines() or [f'exit status {result.returncode}'])[-1]}"
            notes.append(f"not run: {name} ({problem})")
            if name == yardstick:
                yardstick = CHUNKED
    for row in cells:
        row[0] += " = 1" if row[0] == yardstick else ""
    yield (
        f"V = {shape.vocab_size:,}, N = {shape.positions:,}, D = {shape.hidden_size:,}, k = {options.k}, "
        f"{str(dtype).removeprefix('torch.')}, median of {shape.repeats}; one float32 [N, V] is "
        f"{full_bytes / MIB:,.0f} MiB; teacher: {entropy:.2f} nats, {mass:.1%} stored"
    )
    yield aligned(cells)
    yield from notes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, help="with one of these three a single shape is measured, with all rows")
    parser.add_argument("--positions", type=int)
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--groups", type=int, default=32)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--repeats", type=int, help="timed steps of each row, in turns with the yardstick")
    parser.add_argument("--losses", nargs="+", default=["*"], help="rows to measure, names or shell patterns")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = options.device
    if options.measure:
        name, yardstick, folder = options.measure
        found = measure(name, yardstick, rows_of(options.k, options.groups), Path(folder), device, options.repeats)
        print(json.dumps(vars(found)))
        return
    shapes: tuple[Shape, ...] = CUDA_SHAPES if device == "cuda" else CPU_SHAPES
    if options.vocab or options.positions or options.hidden:
        largest = shapes[0]
        shapes = (
            Shape(
                options.vocab or largest.vocab_size,
                options.positions or largest.positions,
                options.hidden or largest.hidden_size,
                largest.repeats,
            ),
        )
    names = list(rows_of(options.k, options.groups))
    for pattern in options.losses:
        if not any(fnmatchcase(name, pattern) for name in names):
            parser.error(f"--losses {pattern!r} matches no row; there are: {'; '.join(names)}")
    most = max(options.k, *NUM_ENTRIES)
    if any(shape.vocab_size <= most for shape in shapes):
        parser.error(f"--vocab must exceed the {most} entries that a row stores")
    where = torch.cuda.get_device_name() if device == "cuda" else f"{machine()}, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {where}; λ = {KD_WEIGHT}")
    failed = False
    for shape in shapes:
        for line in table(replace(shape, repeats=options.repeats or shape.repeats), options, device):
            print(line, flush=True)
            failed |= FAILED in line
    sys.exit(failed)


if __name__ == "__main__":
    main()

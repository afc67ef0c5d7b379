"""Time and peak memory of a training step from a cache, against hard labels, online KD and TRL's GKD.

    python tools/bench_fit.py [--losses todi fkl] [--trl-python PYTHON]

Every row is a trainer in a process of its own, on the same tokens and the same student with random weights; the teacher
is half as wide again and half as deep again. Steps are made in turns with the yardstick, which trains in a process of
its own too: transformers' Trainer with hard labels. Its row is of two of them: what is 1 but for noise. A step goes from
the end of the last one to its own: batch, forward, backward, clipping, AdamW, log. ms: the median; ratio: the median of
those of neighbouring turns, so that a machine's drift cancels. CPU: the same ratio of CPU seconds, those of background
threads included; on a shared machine they say more than time does (with --threads 1, since several also spin). Every
token but a sequence's first is learned: with prompts, of which DistillTrainer computes no logits, it would gain.

Peak MiB is the process's high-water mark of resident memory, libraries included; on CUDA of allocated memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import torch
from measure import machine, synthetic_rows, write_synthetic_cache
from one_step import ROWS_BEFORE

from logitcache.format.layout import Layout
from logitcache.table import aligned

YARDSTICK = "hard labels"
GKD = "TRL GKD"
TRL_VERSION = "import trl.experimental.gkd; print(trl.__version__)"
QUIET = {"TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false"}
DISTINCT_ROWS = 64
WARM_UP_STEPS = 2


@dataclass(frozen=True)
class Shape:
    """Models and batches of a measurement. hidden, layers: of the student."""

    vocab: int
    hidden: int
    layers: int
    batch: int
    tokens: int = 512
    k: int = 64


CPU_SHAPE = Shape(vocab=32_000, hidden=1024, layers=4, batch=2)
CUDA_SHAPE = Shape(vocab=151_936, hidden=1024, layers=28, batch=8)


def write_inputs(folder: Path, shape: Shape, device: str, steps: int, threads: int) -> None:
    """What one_step.py reads: the cache, its tokens, the shape."""
    rows = synthetic_rows(DISTINCT_ROWS * (shape.tokens - 1), shape.k, shape.vocab, shape.tokens)
    copies = -(-(ROWS_BEFORE + (steps + 1) * shape.batch) // len(rows))
    (folder / "cache").mkdir()
    write_synthetic_cache(folder / "cache", rows, Layout(shape.vocab), copies)
    ids = np.stack([sequence.input_ids for sequence, _ in rows] * copies)
    torch.save(torch.from_numpy(ids).long(), folder / "tokens.pt")
    settings = vars(shape) | {"device": device, "steps": steps, "threads": threads}
    (folder / "shape.json").write_text(json.dumps(settings), encoding="utf-8")


class RowError(Exception):
    """Why a row's process ended before its steps were made: its last line."""


class Steps:
    """A trainer in a process of its own that makes a step when asked to."""

    def __init__(self, process: subprocess.Popen[str], errors: Path) -> None:
        self._process, self._errors = process, errors
        self.seconds: list[float] = []
        self.cpu_s: list[float] = []
        self.peak_mib = 0.0

    def step(self) -> None:
        """One more. Raises RowError."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):  # there is no reply then
            print(file=self._process.stdin, flush=True)
        reply = self._process.stdout.readline()
        if not reply:
            lines = self._errors.read_text(encoding="utf-8").splitlines()
            raise RowError(lines[-1] if lines else f"exit status {self._process.wait()}")
        found = json.loads(reply)
        self.seconds.append(found["seconds"])
        self.cpu_s.append(found["cpu_s"])
        self.peak_mib = found["peak_mib"]


@contextmanager
def started(row: str, folder: Path, python: str) -> Iterator[Steps]:
    """A row's process, ended afterwards."""
    with tempfile.NamedTemporaryFile() as errors:
        process = subprocess.Popen(
            [python, str(Path(__file__).with_name("one_step.py")), row, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | QUIET,
        )
        try:
            yield Steps(process, Path(errors.name))
        finally:
            process.kill()
            process.communicate()


@dataclass(frozen=True)
class Measured:
    """What a row came to, and the same as ratios to the yardstick's."""

    seconds: float  # of a step
    time_ratio: float
    cpu_ratio: float
    peak_mib: float
    memory_ratio: float


def measure(row: str, folder: Path, python: str, repeats: int) -> Measured:
    """A row and the yardstick in turns. Raises RowError."""
    with started(row, folder, python) as own, started(YARDSTICK, folder, sys.executable) as yardstick:
        for _ in range(WARM_UP_STEPS + repeats):
            own.step()
            yardstick.step()
        return Measured(
            statistics.median(own.seconds[WARM_UP_STEPS:]),
            _ratio(own.seconds, yardstick.seconds),
            _ratio(own.cpu_s, yardstick.cpu_s),
            own.peak_mib,
            own.peak_mib / yardstick.peak_mib,
        )


def _ratio(own: list[float], yardstick: list[float]) -> float:
    """Median over the turns."""
    return statistics.median(mine / its for mine, its in list(zip(own, yardstick, strict=True))[WARM_UP_STEPS:])


def trl_version(python: str) -> str | None:
    """TRL's version in a Python's environment; None where its GKD cannot be imported."""
    found = subprocess.run([python, "-c", TRL_VERSION], capture_output=True, text=True, env=os.environ | QUIET)
    return found.stdout.strip() if found.returncode == 0 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", nargs="+", default=["todi"], help="divergences that the cache is learned with")
    parser.add_argument("--rows", nargs="+", default=["*"], help="rows to measure, names or shell patterns")
    parser.add_argument("--trl-python", default=sys.executable, help="a Python that has TRL (default: this one)")
    for field in fields(Shape):
        parser.add_argument(f"--{field.name}", type=int)
    parser.add_argument("--repeats", type=int, default=7, help="timed steps of each row, in turns with the yardstick")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each process on a CPU")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    given = {field.name: getattr(options, field.name) for field in fields(Shape)}
    shape = replace(
        CUDA_SHAPE if options.device == "cuda" else CPU_SHAPE, **{name: n for name, n in given.items() if n is not None}
    )
    rows = [YARDSTICK, "from a cache, λ = 0", *(f"from a cache, {loss}" for loss in options.losses), "online KD", GKD]
    asked = [row for row in rows if any(fnmatchcase(row, pattern) for pattern in options.rows)]
    version = trl_version(options.trl_python) if GKD in asked else None
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"{machine()}, {options.threads} threads"
    print(f"torch {torch.__version__}, {where}")
    print(
        f"V = {shape.vocab:,}, D = {shape.hidden:,}, {shape.layers} layers, {shape.batch} × {shape.tokens} tokens, "
        f"k = {shape.k}, {'bfloat16' if options.device == 'cuda' else 'float32'}, {options.repeats} steps",
        flush=True,
    )
    cells = [["", "ms/step", "ratio", "CPU", "tokens/s", "peak MiB", "ratio"]]
    notes, failed = [], False
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder), shape, options.device, WARM_UP_STEPS + options.repeats, options.threads)
        for row in asked:
            if row == GKD and version is None:
                notes.append(
                    f"not run: {row} ({options.trl_python} cannot import trl.experimental.gkd: see --trl-python)"
                )
                continue
            try:
                found = measure(
                    row, Path(folder), options.trl_python if row == GKD else sys.executable, options.repeats
                )
            except RowError as error:
                notes.append(f"not run: {row} (failed: {error})")
                failed = True
                continue
            figures = [f"{found.seconds * 1e3:,.0f}", f"{found.time_ratio:.3f}", f"{found.cpu_ratio:.3f}"]
            figures += [f"{shape.batch * shape.tokens / found.seconds:,.0f}"]
            figures += [f"{found.peak_mib:,.0f}", f"{found.memory_ratio:.3f}"]
            cells.append([f"{row} {version}" if row == GKD else row, *figures])
            print(*cells[-1], sep="  ", file=sys.stderr, flush=True)  # the table comes when all is measured
    print(aligned(cells))
    for note in notes:
        print(note)
    sys.exit(failed)


if __name__ == "__main__":
    main()

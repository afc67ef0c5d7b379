"""Runs what waits for a GPU: steps ordered by worth, each within its own time. `check.sh` calls it.

    python tools/gpu/check.py OUT [--device cpu] [--only STEP …] [--times N]

A run that is cut off still tells: OUT/results.json (versions, and of each step its state, seconds and output) and
OUT/summary.txt (a line a step) are replaced before and after every step, and OUT/log.txt takes all output as it comes.
The exit status is 1 if a step failed or ran out of time. A step is skipped if a package that it needs is not there, or if
all its tests are skipped. `--device cpu` is the dry run, at toy sizes.

Only Python's own library is imported here: whatever else is missing is reported, and the other steps go on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]
LONGEST_OUTPUT = 20_000
PACKAGES = ("torch", "triton", "transformers", "accelerate", "liger-kernel", "flash-attn-4", "vllm", "numpy", "pyarrow")
GPU = """import torch
gpu = torch.cuda.get_device_properties(0)
print(f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}")"""
# Without this, a GPU would be found, and Triton's kernels would not run.
ENVIRONMENTS = {"cuda": {}, "cpu": {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}}


@dataclass(frozen=True)
class Step:
    """A command of Python's, and what it needs."""

    name: str
    seconds: int
    """After which it is ended."""
    needs: str
    """Packages, as they are imported."""
    command: str
    toy: str
    """The command of the dry run; "" if it has none."""


PYTEST = "-m pytest -v -rs --tb short --durations 5 -p no:cacheprovider"
PARALLEL = "-n 8" if find_spec("xdist") else ""  # compilation takes longer than computation
BASE = "torch pytest hypothesis numpy pyarrow zstandard fsspec tqdm"
MODELS = f"{BASE} transformers accelerate datasets psutil"
CAPTURE, LOSSES = "tests/logitcache/capture", "tests/trainer/losses"
LOSS_ROWS = "'cross-entropy, chunked' fkl todi '[ft]*, low rank*' 'todi, groups*' jsd 'jsd, Liger*'"
# Together with the installation at most nine minutes. New tests of the kernels join by their names.
STEPS = [
    Step(
        "kernels against float64", 90, f"{BASE} triton",
        f"{PYTEST} {PARALLEL} {LOSSES} -k 'kernels and not compile'",
        f"{PYTEST} {LOSSES}/test_kernels.py {LOSSES}/test_low_rank_kernels.py -k 'without_weights or options'",
    ),
    Step(
        "losses on the kernels", 60, f"{MODELS} triton",
        f"{PYTEST} {PARALLEL} {LOSSES} -k '(kernel or gpu) and not kernels'", "",
    ),
    Step(
        "losses beside Liger's", 100, "torch triton numpy pyarrow zstandard",
        f"tools/bench_loss.py --vocab 151936 --positions 8192 --hidden 2048 --losses {LOSS_ROWS}",
        "tools/bench_loss.py --vocab 300 --positions 64 --hidden 16 --repeats 1 --losses 'todi, low rank*'",
    ),
    Step(
        "training steps", 75, f"{MODELS} triton",
        "tools/bench_fit.py --rows 'from a cache, *' --repeats 5",
        "tools/bench_fit.py --rows 'from a cache, todi' --vocab 300 --hidden 128 --layers 1 --tokens 32 --repeats 1",
    ),
    Step(
        "packing, flash attention", 35, MODELS,
        *[f"{PYTEST} -m gpu tests/trainer/model/test_packed_sequences.py"] * 2,
    ),
    Step(
        "tensors on the device", 15, BASE,
        *[f"{PYTEST} -m gpu tests/logitcache/reading/test_cache.py"] * 2,
    ),
    Step(
        "selection and capture", 40, MODELS,
        f"{PYTEST} -m gpu {CAPTURE}/test_selection.py {CAPTURE}/test_build.py",
        f"{PYTEST} -m gpu {CAPTURE}/test_selection.py {CAPTURE}/test_build.py -k 'whole_vocabulary or tempered_tails'",
    ),
    Step(
        "selection's cost", 15, "torch numpy pyarrow zstandard",
        "tools/bench_selection.py --entries 64 --dtype bfloat16",
        "tools/bench_selection.py --entries 8 --dtype bfloat16 --vocab 300 --hidden 16 --repeats 1",
    ),
    Step(
        "FSDP2 on one device", 30, MODELS,
        f"{PYTEST} -m gpu tests/trainer/run/test_launch.py", "",
    ),
    Step(
        "vLLM", 35, f"{MODELS} vllm",
        f"{PYTEST} -m engine {CAPTURE}/teachers/test_vllm_pooling.py -k everything_captured", "",
    ),
]  # fmt: skip


@dataclass
class Result:
    """What is known of a step."""

    name: str
    limit_s: int
    state: str = "waits"
    """Or: runs, passed, failed, out of time, skipped."""
    seconds: float = 0.0
    said: str = ""
    """Its last line, or why it was skipped."""
    output: str = ""


class Report:
    """The files of OUT."""

    def __init__(self, out: Path, device: str, machine: str, steps: list[Step]) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.log = out / "log.txt"
        self.log.write_bytes(b"")
        self.results = [Result(step.name, step.seconds) for step in steps]
        self._out = out
        self._head = {
            "device": device,
            "machine": machine,
            "python": platform.python_version(),
            "packages": {name: installed(name) for name in PACKAGES},
            "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        self.write()

    def write(self) -> None:
        """Replaces what is read while the run goes on."""
        content = self._head | {"steps": [asdict(result) for result in self.results]}
        self._replace("results.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        self._replace("summary.txt", self.summary() + "\n")

    def _replace(self, name: str, text: str) -> None:
        part = self._out / f"{name}.part"
        part.write_text(text, encoding="utf-8")
        part.replace(self._out / name)

    def summary(self) -> str:
        """A line a step, in columns."""
        rows = [("step", "state", "s", "of", "")]
        rows += [(r.name, r.state, f"{r.seconds:.0f}", str(r.limit_s), r.said[:100]) for r in self.results]
        width, states = (max(len(row[i]) for row in rows) for i in (0, 1))
        lines = [f"{row[0]:{width}}  {row[1]:{states}}  {row[2]:>4}  {row[3]:>4}  {row[4]}".rstrip() for row in rows]
        return "\n".join([f"{self._head['machine']}, torch {installed('torch')}", *lines])


def machine_of(device: str) -> str:
    """The GPU, or the processor. Raises RuntimeError if torch has no GPU: the steps would all run without one."""
    if device == "cpu":
        return f"{platform.machine()}, {os.cpu_count()} cores, no GPU asked for"
    done = subprocess.run([sys.executable, "-c", GPU], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.splitlines() or [f"exit status {done.returncode}"])[-1])
    return done.stdout.strip()


def installed(name: str) -> str | None:
    """A package's version; None if it is not there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def run(step: Step, device: str, report: Report, result: Result) -> None:
    """Runs a step, and says how it went. What it leaves running is ended."""
    command = step.command if device == "cuda" else step.toy
    missing = [name for name in step.needs.split() if find_spec(name) is None]
    if missing or not command:
        result.state, result.said = "skipped", f"lacks {', '.join(missing)}" if missing else "no part of the dry run"
        return
    result.state = "runs"
    report.write()
    before = report.log.stat().st_size
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    began = time.monotonic()
    with report.log.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, *shlex.split(command)],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT, start_new_session=True,
            env=os.environ | {"PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"} | ENVIRONMENTS[device],
        )  # fmt: skip
        try:
            status = process.wait(step.seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    result.seconds = round(time.monotonic() - began, 1)
    with report.log.open("rb") as log:
        log.seek(before)
        result.output = log.read().decode(errors="replace")[-LONGEST_OUTPUT:]
    lines = [line.strip(" =") for line in result.output.splitlines()]
    result.said = next(filter(None, reversed(lines)), "")
    result.state = "out of time" if status is None else "failed" if status else "passed"
    if status == 0 and "pytest" in command and not re.search(r"\d+ passed", result.said):
        result.state = "skipped"
        result.said = next((line for line in reversed(lines) if line.startswith("SKIPPED")), result.said)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="a folder for what is found")
    parser.add_argument("--device", choices=list(ENVIRONMENTS), default="cuda")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="steps whose names begin so", default=[""])
    parser.add_argument(
        "--times", type=float, default=1.0, metavar="N", help="give each step N times its time, for a slower machine"
    )
    options = parser.parse_args()
    steps = [
        replace(step, seconds=round(step.seconds * options.times))
        for step in STEPS
        if step.name.startswith(tuple(options.only))
    ]
    if not steps:
        parser.error(f"--only: no step begins so; there are: {', '.join(step.name for step in STEPS)}")
    try:
        machine = machine_of(options.device)
    except RuntimeError as error:
        parser.error(f"torch finds no GPU here ({error}); --device cpu is the dry run")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the step's processes are ended
    report = Report(options.out, options.device, machine, steps)
    for step, result in zip(steps, report.results, strict=True):
        run(step, options.device, report, result)
        report.write()
        print(f"{result.name}: {result.state} ({result.seconds:.0f} s) {result.said[:100]}", flush=True)
    print(f"\n{report.summary()}\nThe rest is in {options.out}/results.json and log.txt.")
    return int(any(result.state in ("failed", "out of time") for result in report.results))


if __name__ == "__main__":
    sys.exit(main())

"""Runs both programs on thousands of damaged, odd and hostile inputs.

python tools/fuzzing/fuzz.py [--seed 0] [--count 10000] [--kinds corpora,recipes] [--jobs 2]
python tools/fuzzing/fuzz.py --seed 0 --only shards:17

An input is some files, and one or two command lines that read them. Each must end with exit status 0 (`verify` and `compare`
also: 1), or with 2 and one line that says why. Findings are everything else: a traceback, 20 s, 2 GiB of memory. They are printed
with the command that runs their input again and keeps its files; exit status 1 where there are any. An input follows from seed,
kind and number alone. Linux only.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import pkgutil
import select
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "agg", "WANDB_MODE": "disabled"}
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

import torch  # noqa: E402
import tqdm  # noqa: E402
import transformers  # noqa: E402
from caches import manifests, shards, tokenizers  # noqa: E402
from command_lines import command_lines  # noqa: E402
from corpora import corpora, messages  # noqa: E402
from isolation import Ended, Running  # noqa: E402
from settings import checkpoints, configs, recipes, runs  # noqa: E402
from trial import Kind, Trial, make_material  # noqa: E402

import logitcache  # noqa: E402
import trainer  # noqa: E402
from logitcache.table import aligned  # noqa: E402

KINDS: dict[str, tuple[Kind, int]] = {
    "corpora": (corpora, 20),
    "messages": (messages, 15),
    "manifests": (manifests, 12),
    "shards": (shards, 12),
    "tokenizers": (tokenizers, 8),
    "recipes": (recipes, 6),
    "configs": (configs, 6),
    "runs": (runs, 4),
    "checkpoints": (checkpoints, 2),
    "command-lines": (command_lines, 15),
}
"""By name: what makes an input, and how many of a hundred are of it."""
SHOWN = 3
"""Findings of one place."""


def main() -> int:
    """Runs the inputs; returns 1 where something was found."""
    args = _parser().parse_args()
    numbers = _only(args.only) if args.only else list(_numbers(args.kinds, args.count))
    if args.only:
        folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
        print(f"files: {folder}")
        return _report(_ended(numbers, args.seed, 1, folder, keep=True), args.seed)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        return _report(_ended(numbers, args.seed, args.jobs, Path(name)), args.seed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=10_000, help="inputs of all kinds (default: 10000)")
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"of {', '.join(KINDS)} (default: all)")
    parser.add_argument("--jobs", type=int, default=2, help="inputs at a time (default: 2)")
    parser.add_argument("--only", metavar="KIND:NUMBER", help="one input, whose files are kept")
    return parser


def _numbers(kinds: str, count: int) -> Iterator[tuple[str, int]]:
    """(kind, number) of so many inputs, the kinds in turn by their shares."""
    chosen = kinds.split(",")
    total = sum(KINDS[kind][1] for kind in chosen)
    done: Counter[str] = Counter()
    for index in range(1, count + 1):
        kind = max(chosen, key=lambda kind: index * KINDS[kind][1] / total - done[kind])
        yield kind, done[kind]
        done[kind] += 1


def _only(text: str) -> list[tuple[str, int]]:
    kind, _, number = text.partition(":")
    return [(kind, int(number))]


def _ended(
    numbers: list[tuple[str, int]], seed: int, jobs: int, root: Path, *, keep: bool = False
) -> Iterator[tuple[str, Ended]]:
    """What became of each input, by KIND:NUMBER, as they end."""
    material = root / "material"
    material.mkdir()
    _prepare(material)
    waiting, running, began, done = list(reversed(numbers)), dict[int, tuple[str, Running]](), time.monotonic(), 0
    while waiting or running:
        while waiting and len(running) < jobs:
            kind, number = waiting.pop()
            folder = root / f"{kind}-{number}"
            folder.mkdir()
            new = Running(KINDS[kind][0], Trial(folder, Random(f"{seed}:{kind}:{number}"), material))
            running[new.end] = f"{kind}:{number}", new
        ended, _, _ = select.select(list(running), [], [], 0.05)
        for _, one in running.values():
            one.watch()
        for end in ended:
            label, one = running.pop(end)
            yield label, one.result()
            done += 1
            if not keep:
                shutil.rmtree(one.trial.folder, ignore_errors=True)
            if done % 500 == 0:
                seconds = time.monotonic() - began
                print(f"{done:,} of {len(numbers):,} inputs, {seconds:,.0f} s", file=sys.stderr, flush=True)


def _prepare(material: Path) -> None:
    """Makes the material, in a process of its own, and imports everything that inputs need, so that they only fork."""
    if not (child := os.fork()):
        status = 1
        try:
            said = os.open(material.parent / "material.txt", os.O_WRONLY | os.O_CREAT)
            os.dup2(said, 1)
            os.dup2(said, 2)
            make_material(material)
            status = 0
        finally:
            os._exit(status)
    if os.waitpid(child, 0)[1]:
        raise SystemExit((material.parent / "material.txt").read_text())
    for package in (logitcache, trainer):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if "vllm" not in module.name and not module.name.endswith(("__main__", "kernels")):
                importlib.import_module(module.name)
    for name in ("duckdb", "matplotlib.backends.backend_agg", "peft", "transformers.models.llama.modeling_llama"):
        importlib.import_module(name)
    tqdm.tqdm.monitor_interval = 0  # no thread where others are forked from
    torch.set_num_threads(1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(material / "teacher")
    tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    gc.freeze()


def _report(inputs: Iterator[tuple[str, Ended]], seed: int) -> int:
    """Prints the findings, and how the inputs of each kind ended."""
    found: Counter[str] = Counter()
    kinds: dict[str, Counter[str]] = {}
    for label, ended in inputs:
        counts = kinds.setdefault(label.partition(":")[0], Counter())
        counts.update({"inputs": 1, "findings": len(ended.findings), "ms": round(1000 * ended.seconds)})
        counts.update({"commands": len(ended.statuses), "ended with 0": ended.statuses.count(0)})
        for finding in ended.findings:
            found[finding.what] += 1
            if found[finding.what] <= SHOWN:
                again = f"python tools/fuzzing/fuzz.py --seed {seed} --only {label}"
                print(f"\n{finding.what}\n  again: {again}\n{finding.details}", flush=True)
    names = ("inputs", "commands", "ended with 0", "findings", "ms")
    print("\n" + aligned([["", *names], *([kind, *(f"{of[name]:,}" for name in names)] for kind, of in kinds.items())]))
    print(f"\n{sum(found.values()):,} findings")
    for what, number in found.most_common():
        print(f"  {number:5}  {what}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

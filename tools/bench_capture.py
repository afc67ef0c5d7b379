"""What capturing costs: routes side by side, a whole build against its engine alone, two Ray engines against one.

    python tools/bench_capture.py [--only routes build ray] [--top-k 16 64 256]

Routes: each in a process of its own, on the demo's teacher (3.6 M parameters: so fast that the front end is what counts).
CPU is processor time per token, user and system, of the process that feeds the engine and reads its answers (encoding and
writing are in the second table), and of the engine's processes (psutil); memory is the largest resident memory of either so
far, k ascending. Every route ends with numpy arrays of ids and log-probabilities; slow ones get fewer prompts.

Build: shards on disk against the same engine with its answers thrown away, in turns, on a Llama with random weights whose
forward pass costs what one would expect of the machine. Ray: the same teacher, one engine on one core against two on two.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from measure import machine, peak_mib

from logitcache.capture.engine import TransformersEngine, VllmEngine, start_teacher
from logitcache.capture.executors import capture_on_ray
from logitcache.capture.inputs import Inputs, resolve_inputs
from logitcache.capture.plan import BuildPlan, make_plan
from logitcache.capture.settings import CaptureSettings
from logitcache.capture.teachers.base import Teacher, TeacherModel
from logitcache.capture.worker import Job, ShardWorker
from logitcache.engines.vllm_process import set_environment
from logitcache.format.sequences import TokenSequence
from logitcache.format.tokenizer import save_tokenizer
from logitcache.progress import Progress
from logitcache.storage.folder import Folder
from logitcache.table import aligned

DEMO_TEACHER = Path(__file__).parent / "demo" / "teacher"
LENGTH = 256
PROMPTS = {"bare": 64, "pooling": 64, "flat": 32, "flat-text": 16, "default": 16, "transformers": 16}
BUILD_PROMPTS = 48
REPEATS = 3
ROUTES = {
    "bare": "bare prefill, nothing captured",
    "pooling": "logitcache: pooling",
    "flat": "logitcache: flat, not detokenised",
    "flat-text": "flat_logprobs, detokenised",
    "default": "prompt_logprobs, vLLM's default",
    "transformers": "logitcache: transformers",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=["routes", "build", "ray"], default=["routes", "build", "ray"])
    parser.add_argument("--top-k", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--part", help=argparse.SUPPRESS)  # how the benchmark calls itself
    options = parser.parse_args()
    set_environment()
    if options.part:
        name, _, argument = options.part.partition("=")
        print(json.dumps({"route": measure_route, "build": measure_build, "ray": measure_ray}[name](argument, options)))
        return
    if "routes" in options.only:
        print_routes(options.top_k)
    if "build" in options.only:
        print_build(options.top_k)
    if "ray" in options.only:
        print_ray()


def part(name: str, options: list[str], **environment: str) -> Any:
    """Runs a part of the benchmark in a process of its own and returns what it measured."""
    command = [sys.executable, __file__, "--part", name, *options]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | environment)
    return json.loads(run.stdout.splitlines()[-1])


def random_sequences(vocab_size: int, count: int) -> list[TokenSequence]:
    random = np.random.default_rng(0)
    mask = np.arange(LENGTH) > 0
    return [TokenSequence(random.integers(10, vocab_size, LENGTH, dtype=np.int32), mask) for _ in range(count)]


class Meter:
    """Seconds of wall clock, and of processor time of this process and of its children."""

    def __init__(self) -> None:
        self._engine = psutil.Process().children(recursive=True)

    def __call__(self, run: Callable[[], Any]) -> tuple[float, float, float]:
        """What a call takes."""
        before = time.perf_counter(), time.process_time(), _cpu_s(self._engine)
        run()
        after = time.perf_counter(), time.process_time(), _cpu_s(self._engine)
        wall, front, engine = (b - a for a, b in zip(before, after, strict=True))
        return wall, front, engine

    def engine_peak_mib(self) -> float:
        """Largest resident memory of the largest engine process so far."""
        peaks = [Path(f"/proc/{process.pid}/status").read_text() for process in self._engine]
        return max((int(text.partition("VmHWM:")[2].split()[0]) / 1024 for text in peaks), default=0.0)


def _cpu_s(processes: list[psutil.Process]) -> float:
    return sum(float(times.user + times.system) for times in (process.cpu_times() for process in processes))


# Routes ---------------------------------------------------------------------------------------------------------------


def measure_route(route: str, options: argparse.Namespace) -> list[dict[str, float]]:
    """Per k: tokens per second, µs of processor time per token, MiB."""
    model = TeacherModel.load(str(DEMO_TEACHER), None, "float32", False)
    sequences = random_sequences(model.vocab_size, PROMPTS[route])
    tokens = PROMPTS[route] * LENGTH
    found = []
    for k, run in _runs(route, model, sequences, options.top_k):
        meter = Meter()
        run()
        wall, front, engine = (
            statistics.median(times) for times in zip(*(meter(run) for _ in range(REPEATS)), strict=True)
        )
        found.append(
            {
                "k": k,
                "tokens/s": tokens / wall,
                "front": front / tokens * 1e6,
                "engine": engine / tokens * 1e6,
                "front MiB": peak_mib(),
                "engine MiB": meter.engine_peak_mib(),
            }
        )
    return found


def _exhaust(teacher: Teacher, sequences: Iterable[TokenSequence], settings: CaptureSettings) -> None:
    for _ in teacher.score(sequences, settings):
        pass


def _runs(
    route: str, model: TeacherModel, sequences: list[TokenSequence], ks: list[int]
) -> Iterator[tuple[int, Callable[[], Any]]]:
    if route in ("pooling", "flat", "transformers"):
        engine = TransformersEngine() if route == "transformers" else VllmEngine(route=route)
        teacher = start_teacher(model, engine, LENGTH, max(ks))
        for k in ks:
            settings = CaptureSettings(top_k=k)
            yield k, partial(_exhaust, teacher, sequences, settings)
        teacher.close()
        return
    from vllm import LLM, SamplingParams

    llm: Any = LLM(
        model.name, dtype="float32", max_model_len=LENGTH + 1, max_logprobs=max(ks), enforce_eager=True,
        enable_prefix_caching=False, disable_log_stats=True,
    )  # fmt: skip
    prompts: Any = [{"prompt_token_ids": sequence.input_ids.tolist()} for sequence in sequences]

    def generate(**settings: Any) -> list[Any]:
        outputs: list[Any] = llm.generate(
            prompts, SamplingParams(max_tokens=1, temperature=0, **settings), use_tqdm=False
        )
        return outputs

    def default(k: int) -> None:
        for output in generate(prompt_logprobs=k):
            rows = output.prompt_logprobs[1:]
            np.array([list(row)[-k:] for row in rows])
            np.array([[entry.logprob for entry in list(row.values())[-k:]] for row in rows])

    def flat(k: int) -> None:
        for output in generate(prompt_logprobs=k, flat_logprobs=True):
            np.array(output.prompt_logprobs.token_ids).reshape(-1, k + 1)
            np.array(output.prompt_logprobs.logprobs).reshape(-1, k + 1)

    asked = {"default": default, "flat-text": flat, "bare": lambda k: generate(detokenize=False)}[route]
    for k in ks[:1] if route == "bare" else ks:
        yield k, partial(asked, k)


def print_routes(ks: list[int]) -> None:
    rows = [["", "k", "tokens/s", "front-end CPU µs/token", "engine CPU µs/token", "front-end MiB", "engine MiB"]]
    for route, name in ROUTES.items():
        for found in part(f"route={route}", ["--top-k", *map(str, ks)]):
            rows.append(
                [
                    name,
                    "" if route == "bare" else str(found["k"]),
                    *(f"{found[column]:,.0f}" for column in ("tokens/s",)),
                    *(f"{found[column]:,.1f}" if found[column] else "" for column in ("front", "engine")),
                    *(f"{found[column]:,.0f}" if found[column] else "" for column in ("front MiB", "engine MiB")),
                ]
            )
            name = ""
    print(f"Prompts of {LENGTH} tokens, the demo's teacher in float32 ({machine()})")
    print(aligned(rows), flush=True)


# Whole build ----------------------------------------------------------------------------------------------------------


def write_teacher(folder: Path) -> None:
    """A Llama of 27 M parameters with random weights and the demo's tokenizer, its vocabulary padded to 32 000."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(DEMO_TEACHER)
    tokenizer.add_tokens([f"<extra {i}>" for i in range(32_000 - len(tokenizer))])
    shape: dict[str, Any] = {
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
    }
    config = LlamaConfig(
        vocab_size=32_000, max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.1, **shape
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def planned(folder: Path, k: int, sequences: int, shard_positions: int) -> tuple[Job, BuildPlan]:
    """A build in `folder` that only has to be scored."""
    write_teacher(folder / "teacher")
    corpus = folder / "corpus.jsonl"
    with corpus.open("w") as file:
        for sequence in random_sequences(4000, sequences):
            file.write(json.dumps({"input_ids": sequence.input_ids.tolist()}) + "\n")
    inputs: Inputs = resolve_inputs(str(folder / "teacher"), str(corpus), backend="vllm", top_k=k, tail_rank=0)
    out = Folder(folder / "cache")
    plan = make_plan(out, inputs.spec(shard_positions), inputs.corpus(), shard_positions)
    save_tokenizer(out, inputs.model.tokenizer)
    return Job(str(folder / "cache"), inputs.model, inputs.engine, inputs.settings), plan


def measure_build(k: str, options: argparse.Namespace) -> dict[str, float]:
    """Seconds of building and of scoring alone, and processor µs per token of the difference."""
    with tempfile.TemporaryDirectory() as name:
        job, plan = planned(Path(name), int(k), BUILD_PROMPTS, 1 << 13)
        worker = ShardWorker(job)
        worker.start()
        worker.calibrate()
        shards = range(len(plan.shards))

        def score() -> None:
            _exhaust(worker._teacher, (s for shard in shards for s in plan.sequences(shard)), job.settings)

        def build() -> None:
            worker.capture(shards)

        build()  # warms up
        score()
        meter = Meter()
        measured: dict[str, list[tuple[float, float, float]]] = {"build": [], "score": []}
        for _ in range(REPEATS):
            measured["score"].append(meter(score))
            measured["build"].append(meter(build))
        worker.close()
        middle = {
            name: [statistics.median(column) for column in zip(*times, strict=True)] for name, times in measured.items()
        }
        per_token = 1e6 / plan.num_tokens
        return {
            "build tokens/s": plan.num_tokens / middle["build"][0],
            "score tokens/s": plan.num_tokens / middle["score"][0],
            "front": middle["score"][1] * per_token,
            "writing": (middle["build"][1] - middle["score"][1]) * per_token,
            "engine": middle["score"][2] * per_token,
            "front MiB": peak_mib(),
        }


def print_build(ks: list[int]) -> None:
    rows = [
        ["k", "build tokens/s", "engine alone", "ratio", "µs/token: feeding", "encoding, writing", "engine", "peak MiB"]
    ]
    for k in ks:
        found = part(f"build={k}", [])
        ratio = found["build tokens/s"] / found["score tokens/s"]
        rows.append(
            [
                str(k),
                f"{found['build tokens/s']:,.0f}",
                f"{found['score tokens/s']:,.0f}",
                f"{ratio:.3f}",
                *(f"{found[column]:,.1f}" for column in ("front", "writing", "engine")),
                f"{found['front MiB']:,.0f}",
            ]
        )
    print(f"\nA whole build against its engine alone: {BUILD_PROMPTS} × {LENGTH} tokens, 27 M parameters, V = 32,000")
    print(aligned(rows), flush=True)


# Ray ------------------------------------------------------------------------------------------------------------------


class Stopwatch(Progress):
    """Knows when scoring began."""

    def start(self) -> None:
        """The engines are ready."""
        self.began = time.perf_counter()


def measure_ray(engines: str, options: argparse.Namespace) -> float:
    """Tokens per second of a number of engines on as many cores, from ready to the last shard."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(engines)])
    with tempfile.TemporaryDirectory() as name:
        job, plan = planned(Path(name), 64, 2 * BUILD_PROMPTS, 1 << 12)
        progress = Stopwatch("scoring", plan.num_tokens, 0, "tokens")
        shards = {index: shard.num_tokens for index, shard in enumerate(plan.shards)}
        capture_on_ray(job, plan, shards, progress, None, int(engines))
        return plan.num_tokens / (time.perf_counter() - progress.began)


def print_ray() -> None:
    one, two = (part(f"ray={engines}", []) for engines in (1, 2))
    rows = [["Ray engines", "cores", "tokens/s", "ratio"]]
    rows += [["1", "1", f"{one:,.0f}", "1.00"], ["2", "2", f"{two:,.0f}", f"{two / one:.2f}"]]
    print("\nThe same teacher, k = 64")
    print(aligned(rows))


if __name__ == "__main__":
    main()

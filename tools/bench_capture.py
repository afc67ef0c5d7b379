"""What a build costs on vLLM's front end, per token, against the ways in which log-probabilities are usually asked for.

    python tools/bench_capture.py [--top-k 64]

One engine, the same prompts, each route once to warm up and then three times. "Front-end CPU" is the processor time of this
process alone (`time.process_time`): the engine computes in another one. It is what caps a fast teacher, whatever its GPU.
Every route ends with numpy arrays of ids and log-probabilities.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from measure import machine, peak_mib

from logitcache.capture.settings import CaptureSettings
from logitcache.capture.teachers.base import TeacherModel
from logitcache.format.sequences import TokenSequence
from trainer.table import aligned

TEACHER = Path(__file__).parent / "demo" / "teacher"
PROMPTS, LENGTH = 64, 256
REPEATS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--teacher", default=str(TEACHER))
    options = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import SamplingParams

    from logitcache.capture.teachers.vllm_engine import VllmTeacher

    k = options.top_k
    model = TeacherModel.load(options.teacher, None, "auto", False)
    settings = CaptureSettings(top_k=k)
    teacher = VllmTeacher(model, settings, LENGTH, {"skip_tokenizer_init": False})
    random = np.random.default_rng(0)
    mask = np.arange(LENGTH) > 0
    sequences = [
        TokenSequence(random.integers(10, model.vocab_size, LENGTH, dtype=np.int32), mask) for _ in range(PROMPTS)
    ]
    prompts: Any = [{"prompt_token_ids": sequence.input_ids.tolist()} for sequence in sequences]

    def generate(**settings: Any) -> list[Any]:
        return teacher._engine.generate(
            prompts, SamplingParams(max_tokens=1, temperature=0, **settings), use_tqdm=False
        )

    def default_route() -> None:
        for output in generate(prompt_logprobs=k):
            rows = output.prompt_logprobs[1:]
            np.array([list(row)[-k:] for row in rows])
            np.array([[entry.logprob for entry in list(row.values())[-k:]] for row in rows])

    def flat_detokenised() -> None:
        for output in generate(prompt_logprobs=k, flat_logprobs=True):
            np.array(output.prompt_logprobs.token_ids).reshape(-1, k + 1)
            np.array(output.prompt_logprobs.logprobs).reshape(-1, k + 1)

    routes: dict[str, Callable[[], Any]] = {  # from light to heavy, so that the peak memory so far is each one's own
        "bare prefill, no log-probabilities": lambda: generate(detokenize=False),
        "logitcache build (flat, checked, selected)": lambda: teacher.score(sequences),
        "flat_logprobs, detokenised": flat_detokenised,
        "prompt_logprobs, vLLM's default": default_route,
    }
    tokens = PROMPTS * LENGTH
    measured: dict[str, tuple[float, float, float]] = {}
    for name, run in routes.items():
        run()
        cpu_us, wall_us = [], []
        for _ in range(REPEATS):
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            cpu_us.append((time.process_time() - cpu) / tokens * 1e6)
            wall_us.append((time.perf_counter() - wall) / tokens * 1e6)
        measured[name] = statistics.median(cpu_us), statistics.median(wall_us), peak_mib()
    default_us = measured["prompt_logprobs, vLLM's default"][0]
    rows = [["", "front-end CPU µs/token", "ratio", "wall µs/token", "peak MiB"]]
    for name, (cpu, wall, peak) in measured.items():
        rows.append([name, f"{cpu:.1f}", f"1/{default_us / cpu:.1f}", f"{wall:.1f}", f"{peak:,.0f}"])
    teacher.close()
    print(f"k = {k}, {PROMPTS} prompts of {LENGTH} tokens, vocabulary {model.vocab_size:,} ({machine()})")
    print(aligned(rows))


if __name__ == "__main__":
    main()

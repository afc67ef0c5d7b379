"""vLLM as teacher, through its flat prompt log-probabilities: public interface only, no detokenisation.

It gives top-k and the tail as 1 − Σp, at least 2⁻²⁴. vLLM's softmax runs over padding columns too: their mass falls into the
tail.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from logitcache.capture.selection import select_from_top_k
from logitcache.capture.settings import CaptureSettings
from logitcache.capture.teachers.base import TeacherModel
from logitcache.capture.teachers.vllm.engine import EngineProcesses, check_prompt, engine_arguments
from logitcache.engines.vllm_process import set_environment
from logitcache.errors import UserError
from logitcache.format.sequences import TokenSequence
from logitcache.format.targets import SparseTargets

SUBMITTED_ENTRIES = 1 << 20
"""Entries that one `LLM.generate` call may hold in the front end, about 85 bytes each."""
SCHEDULED_LOGITS = 1 << 28
"""Logits that vLLM may compute per step; its V1 runner holds them twice, unseen by its own memory profiling."""


class VllmFlatTeacher:
    """A vLLM engine in a process of its own, for sequences of up to `longest` tokens and a top_k of up to `most_entries`."""

    def __init__(self, model: TeacherModel, longest: int, most_entries: int, engine_options: Mapping[str, Any]) -> None:
        set_environment()
        from vllm import LLM

        self._model, self._longest = model, longest
        route_options = {
            "max_logprobs": most_entries,
            "max_num_batched_tokens": min(8192, max(512, SCHEDULED_LOGITS // model.num_logits)),
        }
        self._processes = EngineProcesses()
        with self._processes.starting():
            self._engine = LLM(**engine_arguments(model, longest, route_options, engine_options))
        self._processes.watch(self._engine.llm_engine)

    def score(self, sequences: Iterable[TokenSequence], settings: CaptureSettings) -> Iterator[SparseTargets]:
        """Yields the targets of each sequence, in order. Raises UserError if vLLM scored other tokens."""
        from vllm import SamplingParams

        sampling = SamplingParams(
            max_tokens=1, temperature=0, prompt_logprobs=settings.top_k, flat_logprobs=True, detokenize=False
        )
        for window in _windows(sequences, max(SUBMITTED_ENTRIES // (settings.top_k + 1), 1)):
            for sequence in window:
                check_prompt(sequence, self._longest, self._model.num_logits)
            prompts: list[Any] = [{"prompt_token_ids": sequence.input_ids.tolist()} for sequence in window]
            with self._processes.running():
                outputs = self._engine.generate(prompts, sampling, use_tqdm=False)
            for sequence, output in zip(window, outputs, strict=True):
                yield self._targets(sequence, output.prompt_logprobs, settings)

    def _targets(self, sequence: TokenSequence, flat: Any, settings: CaptureSettings) -> SparseTargets:
        """Returns targets from vLLM's log-probabilities: a line has the actual next token first, then the top-k, descending."""
        width = settings.top_k + 1
        token_ids = np.array(flat.token_ids, dtype=np.int32).reshape(-1, width)
        logprobs = np.array(flat.logprobs, dtype=np.float32).reshape(-1, width)
        if not np.array_equal(token_ids[:, 0], sequence.input_ids[1:]):
            raise UserError(
                f"row {sequence.row_id}: vLLM scored other tokens than it was sent; nothing of this shard is kept. "
                "Run with --backend transformers, and report this to vLLM with your version and settings"
            )
        stored = sequence.positions
        return select_from_top_k(token_ids[stored, 1:], logprobs[stored, 1:], settings, self._model.vocab_size)

    def close(self) -> None:
        """Ends the engine's process."""
        del self._engine


def _windows(sequences: Iterable[TokenSequence], tokens: int) -> Iterator[list[TokenSequence]]:
    """Yields consecutive sequences of about `tokens` tokens together, at least one."""
    window: list[TokenSequence] = []
    length = 0
    for sequence in sequences:
        if window and length + len(sequence.input_ids) > tokens:
            yield window
            window, length = [], 0
        window.append(sequence)
        length += len(sequence.input_ids)
    if window:
        yield window

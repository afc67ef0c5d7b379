"""vLLM as teacher, through its flat prompt log-probabilities: public interface only, no detokenisation.

Gives top-k and the tail as 1 − Σp, at least 2⁻²⁴. vLLM's softmax runs over padding columns too: what they hold falls into the
tail. Prefix caching stays off: rows that it serves have no log-probabilities.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from logitcache.capture.selection import select_from_top_k
from logitcache.capture.settings import CaptureSettings
from logitcache.capture.teachers.base import TeacherModel
from logitcache.capture.teachers.vllm_plugin import BUILD_PID
from logitcache.errors import UserError, one_line
from logitcache.format.sequences import TokenSequence
from logitcache.format.targets import SparseTargets

SUBMITTED_ENTRIES = 1 << 20
"""Entries that one `LLM.generate` call may hold in the front end, about 85 bytes each."""
SCHEDULED_LOGITS = 1 << 28
"""Logits that vLLM may compute per step; its runner holds them twice, unseen by its own memory profiling."""


class VllmTeacher:
    """A vLLM engine in a process of its own. engine_options: fields of vLLM's EngineArgs under their own names."""

    def __init__(
        self, model: TeacherModel, settings: CaptureSettings, longest: int, engine_options: Mapping[str, Any]
    ) -> None:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ[BUILD_PID] = str(os.getpid())
        from vllm import LLM, SamplingParams
        from vllm.platforms import current_platform

        self._settings = settings
        self._vocab_size = model.vocab_size
        self.window_tokens = max(SUBMITTED_ENTRIES // (settings.top_k + 1), 1)
        options: dict[str, Any] = {
            "model": model.name,
            "revision": model.revision,
            "dtype": model.dtype,
            "trust_remote_code": model.trust_remote_code,
            "skip_tokenizer_init": True,
            "max_model_len": longest + 1,
            "max_logprobs": settings.top_k,
            "enable_prefix_caching": False,
            "max_num_batched_tokens": min(8192, max(512, SCHEDULED_LOGITS // model.num_logits)),
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
        }
        if current_platform.is_cpu():
            options["enforce_eager"] = True
        options |= engine_options
        try:
            self._engine = LLM(**options)
        except (ValueError, OSError, TypeError, RuntimeError) as error:
            raise UserError(f"vLLM does not start with this teacher: {one_line(error)}") from error
        self._sampling = SamplingParams(
            max_tokens=1, temperature=0, prompt_logprobs=settings.top_k, flat_logprobs=True, detokenize=False
        )

    def score(self, sequences: Sequence[TokenSequence]) -> list[SparseTargets]:
        """SparseTargets of the stored positions of each sequence, in order. Raises UserError where vLLM's rows are wrong."""
        prompts: list[Any] = [{"prompt_token_ids": sequence.input_ids.tolist()} for sequence in sequences]
        outputs = self._engine.generate(prompts, self._sampling, use_tqdm=False)
        return [self._targets(s, output.prompt_logprobs) for s, output in zip(sequences, outputs, strict=True)]

    def _targets(self, sequence: TokenSequence, flat: Any) -> SparseTargets:
        """A flat row holds the actual token first, then the top-k descending; row i scores token i + 1."""
        width = self._settings.top_k + 1
        token_ids = np.array(flat.token_ids, dtype=np.int32).reshape(-1, width)
        logprobs = np.array(flat.logprobs, dtype=np.float32).reshape(-1, width)
        if not np.array_equal(token_ids[:, 0], sequence.input_ids[1:]):
            raise UserError(
                f"row {sequence.row_id}: vLLM scored other tokens than it was sent; nothing of this shard is kept. "
                "Run with --backend transformers, and report this to vLLM with your version and settings"
            )
        stored = sequence.positions
        return select_from_top_k(token_ids[stored, 1:], logprobs[stored, 1:], self._settings, self._vocab_size)

    def close(self) -> None:
        """Ends the engine's process."""
        del self._engine

"""vLLM as teacher, through a pooling model of our own: the engine sees the logits and sends packed positions."""

from __future__ import annotations

import itertools
import json
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib.metadata import entry_points
from typing import Any

import numpy as np

from logitcache.capture.settings import CaptureSettings
from logitcache.capture.teachers.base import TeacherModel
from logitcache.capture.teachers.vllm.engine import EngineProcesses, check_prompt, engine_arguments, hidden_log
from logitcache.capture.teachers.vllm.plugin import prepare_engine
from logitcache.capture.teachers.vllm.protocol import (
    COVARIANCE,
    PROBABILITIES,
    SCORE_LOGITS,
    TAIL_BASIS,
    TAIL_GROUPS,
    TASK,
    ScoringRequest,
    to_bytes,
)
from logitcache.capture.wire_format import unpack
from logitcache.engines.vllm_process import brief, environment, set_environment
from logitcache.errors import UserError
from logitcache.format.sequences import TokenSequence
from logitcache.format.tail_basis import TailBasis
from logitcache.format.targets import SparseTargets

COPIED_BY_RAY = "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"
TOKENS_IN_FLIGHT = 1 << 16
"""Tokens submitted and not yet yielded: several steps of the engine, so that it never waits for the build."""


class VllmPoolingTeacher:
    """A vLLM engine in a process of its own, for sequences of up to `longest` tokens."""

    def __init__(self, model: TeacherModel, longest: int, engine_options: Mapping[str, Any]) -> None:
        set_environment()
        from vllm import LLMEngine

        self._model, self._longest = model, longest
        self._processes = EngineProcesses()
        with self._processes.starting(), _scoring():
            self._engine = LLMEngine.from_engine_args(_arguments(model, longest, engine_options))
        self._processes.watch(self._engine)
        self._request_ids = map(str, itertools.count())
        self._arrived: dict[str, np.ndarray] = {}
        self._prepared: set[str] = set()

    def set_tail_groups(self, tail_groups: np.ndarray) -> None:
        """Sets the group of each id, int [V]. It comes before scoring with `settings.tail_parts.groups`."""
        self._prepare(TAIL_GROUPS, tail_groups.astype(np.int32).tobytes())

    def set_tail_basis(self, basis: TailBasis) -> None:
        """Sets the basis of the coefficients. It comes before scoring with `settings.tail_parts.rank`."""
        self._prepare(TAIL_BASIS, to_bytes(basis.directions, basis.offset, basis.weights))

    def _prepare(self, key: str, content: Any) -> np.ndarray:
        """Lets the engine know what later requests build on. Returns its answer."""
        self._prepared.add(key)
        return self._wait_for(self._submit([0], {key: content}))

    def score(self, sequences: Iterable[TokenSequence], settings: CaptureSettings) -> Iterator[SparseTargets]:
        """Yields the targets of each sequence, in order. Raises UserError if positions are missing."""
        assert TAIL_GROUPS in self._prepared or not settings.tail_parts.groups, "set_tail_groups comes first"
        assert TAIL_BASIS in self._prepared or not settings.tail_parts.rank, "set_tail_basis comes first"
        for sequence, rows in self._results(sequences, json.dumps(settings.to_json())):
            if len(rows) != len(sequence.positions):
                raise UserError(
                    f"row {sequence.row_id}: vLLM gave {len(rows)} of {len(sequence.positions)} positions; nothing of this "
                    "shard is kept. Run with --capture-route flat, and report this with your version of vLLM and settings"
                )
            yield unpack(rows, settings)

    def mean_probability(self, sequences: Iterable[TokenSequence]) -> np.ndarray:
        """Returns the mean over the stored positions of the full next-token distribution, float64 [V]; see `LogitTeacher`."""
        total = np.zeros(self._model.vocab_size)
        for _, summed in self._results(sequences, PROBABILITIES):
            total += summed
        with np.errstate(invalid="ignore"):
            mean: np.ndarray = total / total.sum()
        return mean

    def covariance_product(
        self, sequences: Iterable[TokenSequence], block: np.ndarray, offset: np.ndarray, weights: np.ndarray
    ) -> np.ndarray:
        """Returns the product of the logits' covariance and a block of directions, see `LogitTeacher`."""
        self._prepare(COVARIANCE, to_bytes(block, offset, weights))
        for _ in self._results(sequences, COVARIANCE):
            pass
        return self._prepare(COVARIANCE, [])

    def close(self) -> None:
        """Ends the engine's process."""
        del self._engine

    def _results(self, sequences: Iterable[TokenSequence], settings: str) -> Iterator[tuple[TokenSequence, np.ndarray]]:
        """Yields each sequence with the engine's result, in order, while later ones are being computed."""
        waiting: deque[tuple[str, TokenSequence]] = deque()
        tokens = 0
        try:
            for sequence in itertools.chain(sequences, [None]):
                if sequence is not None:
                    check_prompt(sequence, self._longest, self._model.num_logits)
                    stored = np.packbits(sequence.loss_mask[1:]).tobytes()  # position i predicts token i + 1
                    request = ScoringRequest(settings, self._model.vocab_size, stored, sequence.row_id)
                    request_id = self._submit(sequence.input_ids.tolist(), asdict(request))
                    waiting.append((request_id, sequence))
                    tokens += len(sequence.input_ids)
                while waiting and (sequence is None or tokens > TOKENS_IN_FLIGHT):
                    request_id, first = waiting[0]
                    result = self._wait_for(request_id)
                    waiting.popleft()
                    tokens -= len(first.input_ids)
                    yield first, result
        finally:
            left = [request_id for request_id, _ in waiting]
            if left and hasattr(self, "_engine"):  # left early, and not closed meanwhile
                with suppress(UserError), self._processes.running():
                    self._engine.abort_request(left)
            for request_id in left:
                self._arrived.pop(request_id, None)

    def _submit(self, token_ids: list[int], request: dict[str, Any]) -> str:
        from vllm import PoolingParams

        request_id = next(self._request_ids)
        prompt: Any = {"type": "token", "prompt_token_ids": token_ids}
        with self._processes.running():
            self._engine.add_request(request_id, prompt, PoolingParams(task=TASK, extra_kwargs=request))
        return request_id

    def _wait_for(self, request_id: str) -> np.ndarray:
        """Returns the result of a request; results of others that come meanwhile are kept until they are waited for."""
        while request_id not in self._arrived:
            with self._processes.running():
                outputs: list[Any] = self._engine.step()
            for output in outputs:
                self._arrived[output.request_id] = output.outputs.data.numpy()
        return self._arrived.pop(request_id)


def why_not_pooling(model: TeacherModel, engine_options: Mapping[str, Any]) -> str | None:
    """Returns why this teacher cannot be loaded as a pooling model, or None if it can. Loads no weights."""
    if entry_point := _missing_entry_point():
        return entry_point
    if engine_options.get("speculative_config"):
        return "speculative decoding, which a pooling model does not do"
    set_environment()
    with hidden_log():
        try:
            with _scoring():
                config = _arguments(model, 1, engine_options).create_model_config()
                is_language_model = config.registry.is_text_generation_model(config.architectures, config)
        except (ImportError, AttributeError, TypeError) as error:
            return f"this vLLM lacks an interface that the pooling route builds on ({brief(error)})"
        except Exception as error:
            return f"vLLM does not take this architecture as a pooling model ({brief(error)})"
    if not is_language_model:
        return f"{', '.join(config.architectures)} has no logits"
    if config.is_encoder_decoder or config.attn_type == "encoder_only":
        return f"{', '.join(config.architectures)} is not a decoder"
    return None


def _missing_entry_point() -> str | None:
    """Returns why vLLM will not run our plugin, which it finds as an entry point of the installed package only; or None."""
    wanted = f"{prepare_engine.__module__}:{prepare_engine.__name__}"
    installed = {point.name for point in entry_points(group="vllm.general_plugins") if point.value == wanted}
    if not installed:
        return "logitcache's plugin for vLLM is not installed: install logitcache anew, with pip"
    if "VLLM_PLUGINS" in os.environ and not installed & set(os.environ["VLLM_PLUGINS"].split(",")):
        return "VLLM_PLUGINS keeps logitcache's plugin out: add logitcache to it"
    return None


@contextmanager
def _scoring() -> Iterator[None]:
    """Makes the models that this process loads, and processes that it starts inside, scoring ones."""
    from logitcache.capture.teachers.vllm.model import scoring_models

    copied_by_ray = filter(None, [os.environ.get(COPIED_BY_RAY), SCORE_LOGITS])
    with environment({SCORE_LOGITS: "1", COPIED_BY_RAY: ",".join(copied_by_ray)}), scoring_models():
        yield


def _arguments(model: TeacherModel, longest: int, engine_options: Mapping[str, Any]) -> Any:
    from vllm import EngineArgs
    from vllm.config import PoolerConfig
    from vllm.platforms import current_platform

    route_options = {
        "runner": "pooling",
        "convert": "none",
        "pooler_config": PoolerConfig(task=TASK, seq_pooling_type="LAST", tok_pooling_type="ALL"),
        "enable_chunked_prefill": True,
        "max_num_batched_tokens": 8192,
    }
    overrides = engine_options.get("hf_overrides") or {}
    quantised = engine_options.get("quantization") or getattr(model.config, "quantization_config", None)
    if isinstance(overrides, Mapping) and (current_platform.is_cpu() or quantised):
        # A pooling model's head runs in float32. On a GPU that is free, and spares the logits their rounding; elsewhere it
        # takes a copy of the head for each chunk of rows, and a quantised head cannot.
        overrides = {"head_dtype": "model"} | dict(overrides)
    engine_options = {**engine_options, "hf_overrides": overrides}
    return EngineArgs(**engine_arguments(model, longest, route_options, engine_options))

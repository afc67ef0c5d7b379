"""vLLM as the teacher that completes prompts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from logitcache.capture.generation.sampling import GenerationSettings, sampling_params
from logitcache.capture.teachers.base import TeacherModel
from logitcache.capture.teachers.vllm.engine import EngineProcesses, check_prompt, engine_arguments
from logitcache.engines.vllm_process import SHUTDOWN_S, set_environment, whole_prompts
from logitcache.errors import UserError
from logitcache.format.sequences import TokenSequence

COMPLETIONS_IN_FLIGHT = 2048
"""Completions asked for and not yet there: more than any engine decodes at once, so that it never waits for the build."""


@dataclass(frozen=True)
class Completion:
    """The teacher's answer to a prompt.

    token_ids: int32 [A], with the end-of-text token if the teacher wrote it.  finish_reason: vLLM's word for its end.
    """

    token_ids: np.ndarray
    finish_reason: str


class VllmGenerator:
    """A vLLM engine in a process of its own, for prompts and completions of up to `longest` tokens together."""

    def __init__(self, model: TeacherModel, longest: int, engine_options: Mapping[str, Any]) -> None:
        set_environment()
        from vllm import LLMEngine

        self._model, self._longest = model, longest
        self._processes = EngineProcesses()
        with self._processes.starting():
            self._engine = LLMEngine.from_engine_args(_arguments(model, longest, engine_options))
        self._processes.watch(self._engine)

    def generate(
        self, prompts: Iterable[TokenSequence], settings: GenerationSettings
    ) -> Iterator[tuple[int, list[Completion]]]:
        """Yields (number of a prompt, its completions) as soon as all of them are there, in whatever order that is.

        Prompts are read ahead as far as keeps the engine busy. Raises UserError if vLLM gave up a completion.
        """
        template = _template(settings)
        arriving: dict[int, list[Completion | None]] = {}
        missing = 0
        for number, prompt in enumerate(prompts):
            check_prompt(prompt, self._longest - settings.shortest, self._model.num_logits)
            arriving[number] = [None] * settings.num_samples
            for sample in range(settings.num_samples):
                self._submit(f"{number} {sample}", prompt, settings.seed(prompt.row_id, sample), template)
            missing += settings.num_samples
            while missing > COMPLETIONS_IN_FLIGHT:
                for complete in self._step(arriving):
                    missing -= settings.num_samples
                    yield complete
        while arriving:
            yield from self._step(arriving)

    def _submit(self, request_id: str, prompt: TokenSequence, seed: int, template: Any) -> None:
        room = self._longest - len(prompt.input_ids)
        params = template.clone()
        params.seed, params.max_tokens = seed, min(template.max_tokens or room, room)
        tokens: Any = {"type": "token", "prompt_token_ids": prompt.input_ids.tolist()}
        with self._processes.running():
            self._engine.add_request(request_id, tokens, params)

    def _step(self, arriving: dict[int, list[Completion | None]]) -> Iterator[tuple[int, list[Completion]]]:
        """Takes the prompts out of `arriving` whose last completion came in one step of the engine."""
        with self._processes.running():
            outputs = self._engine.step()
        for output in outputs:
            number, sample = map(int, output.request_id.split())
            completion = cast(Any, output).outputs[0]
            if completion.finish_reason in ("abort", "error"):
                raise UserError(f"vLLM gave up an answer ({completion.finish_reason}); the same command continues")
            token_ids = np.array(completion.token_ids, dtype=np.int32)
            arriving[number][sample] = Completion(token_ids, str(completion.finish_reason))
            there = [one for one in arriving[number] if one is not None]
            if len(there) == len(arriving[number]):
                del arriving[number]
                yield number, there

    def close(self) -> None:
        """Ends the engine's process and returns when its memory is free."""
        self._engine.engine_core.shutdown(timeout=SHUTDOWN_S)
        del self._engine


def _template(settings: GenerationSettings) -> Any:
    """Returns the SamplingParams of a completion but for its seed and its room."""
    from vllm.sampling_params import RequestOutputKind

    params = sampling_params({**settings.params, "n": 1})
    params.output_kind = RequestOutputKind.FINAL_ONLY
    params.detokenize = bool(params.stop)  # text is needed to look for stop strings only
    return params


def _arguments(model: TeacherModel, longest: int, engine_options: Mapping[str, Any]) -> Any:
    """Returns vLLM's EngineArgs. The tokenizer ends completions, and those of one prompt share its prefix."""
    from vllm import EngineArgs
    from vllm.platforms import current_platform

    route_options = {"skip_tokenizer_init": False, "enable_prefix_caching": True}
    arguments = engine_arguments(model, longest, route_options, engine_options)
    if current_platform.is_cpu():
        arguments |= whole_prompts(max(arguments.get("max_num_batched_tokens") or 0, arguments["max_model_len"]))
    return EngineArgs(**arguments)

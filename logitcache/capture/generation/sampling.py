"""The sampling parameters with which the teacher answers prompts, under vLLM's own names, checked by vLLM itself."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from logitcache.errors import UserError, one_line

DEFAULTS: Mapping[str, Any] = {"n": 1, "temperature": 1.0, "seed": 0, "max_tokens": None}
"""Fields that have these values unless the user gives others; max_tokens None: as many as --max-length leaves."""

MEANINGLESS = {
    **dict.fromkeys(
        ("logprobs", "prompt_logprobs", "prompt_logprob_token_ids", "prompt_logprob_start", "logprob_token_ids"),
        "what is stored of each distribution is for --top-k and its like to say",
    ),
    **dict.fromkeys(
        ("detokenize", "skip_special_tokens", "spaces_between_special_tokens", "include_stop_str_in_output"),
        "completions are stored as token ids, and as their text without special tokens",
    ),
    **dict.fromkeys(
        (
            "flat_logprobs",
            "output_kind",
            "output_text_buffer_length",
            "routed_experts_prompt_start",
            "skip_clone",
            "skip_reading_prefix_cache",
            "stream_interval",
            "trace_decode_token_ids",
        ),
        "a build sets it itself",
    ),
}
"""Fields of SamplingParams that a build does not take, and why."""


@dataclass(frozen=True)
class GenerationSettings:
    """The settings with which prompts are answered.

    params: fields of vLLM's SamplingParams as plain JSON types, those of `DEFAULTS` among them. Each prompt gets `n`
    completions, each with a seed of its own.
    """

    params: Mapping[str, Any]

    @classmethod
    def check(cls, params: Mapping[str, Any], max_length: int) -> GenerationSettings:
        """Returns the settings that a user asks for, with values as numbers or as text.

        max_length: tokens of the longest prompt and its completion together. Raises UserError for a field that vLLM does not
        know or that makes no sense here, and for a value that vLLM refuses.
        """
        for name in params:
            _check_name(name)
        given = {**DEFAULTS, **params}
        checked = sampling_params(given)
        settings = cls({name: _plain(getattr(checked, name)) for name in sorted(given)})
        if not isinstance(settings.params["seed"], int):
            raise UserError(f"--sampling-params seed={given['seed']}: a number from 0 is wanted")
        most = settings.params["max_tokens"] or settings.shortest
        if max(most, settings.shortest) >= max_length:
            raise UserError(
                f"--sampling-params max_tokens={most}: prompt and answer share --max-length {max_length}, raise that"
            )
        return settings

    @property
    def num_samples(self) -> int:
        """Completions of each prompt."""
        return int(self.params["n"])

    @property
    def shortest(self) -> int:
        """Tokens that every completion must have room for."""
        return max(1, int(self.params.get("min_tokens", 0)))

    def seed(self, row_id: str, sample: int) -> int:
        """Returns the seed of one completion of a prompt, whatever else is answered and in whatever order."""
        text = f"{self.params['seed']} {row_id} {sample}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.params.items() if value is not None)


def sampling_params(params: Mapping[str, Any]) -> Any:
    """Returns vLLM's SamplingParams. Raises UserError for values that they refuse."""
    from pydantic import TypeAdapter, ValidationError
    from vllm import SamplingParams

    try:
        return TypeAdapter(SamplingParams).validate_python(dict(params))
    except ValidationError as error:
        # One error for each type that a value may have, and first one for not being SamplingParams already.
        last = error.errors()[-1]
        name = next((str(part) for part in last["loc"] if part in params), "?")
        raise UserError(f"--sampling-params {name}={params.get(name)}: {last['msg']}") from error
    except Exception as error:  # of vLLM's own kinds, which change between releases
        raise UserError(f"--sampling-params: {one_line(error)}") from error


def _check_name(name: str) -> None:
    from vllm import SamplingParams

    if reason := MEANINGLESS.get(name):
        raise UserError(f"--sampling-params {name}: {reason}, leave it out")
    known = {field for field in SamplingParams.__struct_fields__ if not field.startswith("_")} - MEANINGLESS.keys()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; it has {', '.join(sorted(known))}"
        raise UserError(f"--sampling-params {name}: vLLM's SamplingParams have no such field{hint}")


def _plain(value: Any) -> Any:
    """Returns a field of SamplingParams, some of which are dataclasses, as it comes back from a JSON file."""
    return json.loads(json.dumps(value, default=asdict))

"""Options of a teacher and of vLLM: typed for callers, read with vLLM's own parser, and told apart for the fingerprint."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypedDict, TypeVar

from logitcache.engines.vllm_process import why_not_vllm
from logitcache.errors import UserError

F = TypeVar("F", bound=Callable[..., Any])


class PlacementOptions(TypedDict, total=False):
    """Options of vLLM that say where and how fast, not what: no part of the fingerprint."""

    block_size: int | None
    cpu_offload_gb: float
    distributed_executor_backend: str | None
    download_dir: str | None
    enforce_eager: bool
    gpu_memory_utilization: float
    load_format: str
    max_model_len: int | None
    max_num_batched_tokens: int | None
    max_num_seqs: int | None
    pipeline_parallel_size: int
    swap_space: float
    tensor_parallel_size: int


class EngineOptions(PlacementOptions, total=False):
    """Options of vLLM that type checkers know. All others pass too, from a `dict[str, Any]` with `**`."""

    attention_backend: str | None
    compilation_config: Any
    config_format: str
    data_parallel_size: int
    disable_custom_all_reduce: bool
    enable_expert_parallel: bool
    hf_overrides: Mapping[str, Any]
    kv_cache_dtype: str
    language_model_only: bool
    limit_mm_per_prompt: Mapping[str, Any]
    model_impl: str
    quantization: str | None
    tokenizer_mode: str


class TeacherOptions(EngineOptions, total=False):
    """Options that say how a teacher runs, see `logitcache.build`."""

    backend: str
    capture_route: str
    base_url: str | None
    model: str | None
    revision: str | None
    dtype: str
    trust_remote_code: bool
    attn_implementation: str | None


class InputOptions(TeacherOptions, total=False):
    """Options that decide what a cache will hold, see `logitcache.build`."""

    top_k: int | None
    top_p: float | None
    min_k: int | None
    tail_groups: int | None
    tail_rank: int | None
    tail_probes: int | None
    temperatures: Sequence[float] | None
    tail_entropy: bool | None
    tail_samples: int | None
    precision: str | None
    layout: str | None
    chat_template: str | None
    turns: str
    columns: Mapping[str, str] | None
    max_length: int | None
    long: str | None
    keep: Sequence[str]
    skip_bad: bool
    data_split: str
    data_config: str | None


PLACEMENT_OPTIONS = frozenset(PlacementOptions.__annotations__)

OWN_OPTIONS = frozenset(
    {
        "dtype",
        "enable_prefix_caching",
        "logprobs_mode",
        "max_logprobs",
        "model",
        "revision",
        "runner",
        "skip_tokenizer_init",
        "tokenizer",
        "trust_remote_code",
    }
)
"""Engine options that a build sets itself."""


def passes_on_to(other: Callable[..., Any]) -> Callable[[F], F]:
    """Gives a function, whose `**options` go to `other`, the keyword arguments of `other` in help() and completion."""

    def decorate(function: F) -> F:
        *own, _ = inspect.signature(function).parameters.values()
        names = {parameter.name for parameter in own}
        passed = [
            parameter
            for parameter in inspect.signature(other).parameters.values()
            if parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_KEYWORD) and parameter.name not in names
        ]
        vars(function)["__signature__"] = inspect.signature(function).replace(parameters=[*own, *passed])
        return function

    return decorate


def check_engine_options(options: Mapping[str, Any]) -> None:
    """Raises UserError for an option that vLLM does not have, or that contradicts what a build does."""
    unknown = options.keys() - EngineOptions.__annotations__.keys() - OWN_OPTIONS
    if unknown and not why_not_vllm():
        from vllm import EngineArgs

        if unknown := unknown - EngineArgs.__dataclass_fields__.keys():
            raise UserError(f"--{min(unknown).replace('_', '-')}: neither `logitcache build` nor vLLM has this option")
    if taken := sorted(OWN_OPTIONS & set(options)):
        raise UserError(f"--{taken[0].replace('_', '-')}: a build sets this option of vLLM itself, leave it out")


def decisive_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options that can change a number, as plain JSON types, for the fingerprint."""
    return {
        name: value if isinstance(value, bool | int | float | str | None) else str(value)
        for name, value in sorted(options.items())
        if name not in PLACEMENT_OPTIONS
    }


def parse_engine_options(arguments: list[str]) -> dict[str, Any]:
    """Returns fields of vLLM's EngineArgs from command-line arguments that `logitcache build` does not know itself.

    Raises UserError for an argument that vLLM does not know either, and for any if vLLM does not import.
    """
    if not arguments:
        return {}
    if why_not_vllm():
        raise UserError(f"unknown argument {arguments[0]} (options of vLLM are accepted where vLLM is installed)")
    from vllm import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):  # type: ignore[misc]
        def error(self, message: str) -> NoReturn:
            raise UserError(f"{message} (neither `logitcache build` nor vLLM takes this)")

    parser = EngineArgs.add_cli_args(Parser(add_help=False))
    parsed = vars(parser.parse_args(arguments))
    return {name: value for name, value in parsed.items() if value != parser.get_default(name)}

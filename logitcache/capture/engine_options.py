"""vLLM's own options: read with vLLM's own parser, so that all pass through under their own names, and told apart."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any, NoReturn

from logitcache.errors import UserError

PLACEMENT_OPTIONS = frozenset(
    {
        "block_size",
        "cpu_offload_gb",
        "distributed_executor_backend",
        "download_dir",
        "enforce_eager",
        "gpu_memory_utilization",
        "load_format",
        "max_model_len",
        "max_num_batched_tokens",
        "max_num_seqs",
        "pipeline_parallel_size",
        "swap_space",
        "tensor_parallel_size",
    }
)
"""Engine options that say where and how fast, not what: no part of the fingerprint."""

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


def check_engine_options(options: Mapping[str, Any]) -> None:
    """Raises UserError for an option that contradicts what a build does."""
    if taken := sorted(OWN_OPTIONS & set(options)):
        raise UserError(f"--{taken[0].replace('_', '-')}: a build sets this option of vLLM itself, leave it out")


def decisive_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that can change a number, as plain JSON types, for the fingerprint."""
    return {
        name: value if isinstance(value, bool | int | float | str | None) else str(value)
        for name, value in sorted(options.items())
        if name not in PLACEMENT_OPTIONS
    }


def parse_engine_options(arguments: list[str]) -> dict[str, Any]:
    """Fields of vLLM's EngineArgs from command-line arguments that `logitcache build` does not know itself.

    Raises UserError for an argument that vLLM does not know either, and for any where vLLM is not installed.
    """
    if not arguments:
        return {}
    if importlib.util.find_spec("vllm") is None:
        raise UserError(f"unknown argument {arguments[0]} (options of vLLM are accepted where vLLM is installed)")
    from vllm import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise UserError(f"{message} (neither `logitcache build` nor vLLM takes this)")

    parser = EngineArgs.add_cli_args(Parser(add_help=False))
    parsed = vars(parser.parse_args(arguments))
    return {name: value for name, value in parsed.items() if value != parser.get_default(name)}

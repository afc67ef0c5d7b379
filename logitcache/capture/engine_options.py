"""vLLM's own command-line options, read with vLLM's own parser, so that all of them pass through under their own names."""

from __future__ import annotations

import importlib.util
from typing import Any, NoReturn

from logitcache.errors import UserError


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

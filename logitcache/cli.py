"""Command line: parses and prints, decides nothing."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from logitcache.arguments import parser
from logitcache.cache import LogitCache
from logitcache.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `logitcache …`. Returns the exit status: 0, 2 for bad input, 130 after Ctrl-C."""
    try:
        options, rest = parser().parse_known_args(arguments)
        with _log_lines():
            _COMMANDS[options.command](options, rest)
        return 0
    except UserError as error:
        print(f"logitcache: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("logitcache: stopped; the same command continues where it was", file=sys.stderr)
        return 130


@contextmanager
def _log_lines() -> Iterator[None]:
    """Shows what a command reports, as plain lines on stderr."""
    logger = logging.getLogger("logitcache")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("logitcache: %(message)s"))
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def _build(options: argparse.Namespace, rest: list[str]) -> None:
    with _engines_needed():
        from logitcache.capture.build import build
        from logitcache.capture.engine_options import parse_engine_options

    cache = build(**_settings(options), **parse_engine_options(rest))
    if cache is not None:
        _print_cache(cache)


def _plan(options: argparse.Namespace, rest: list[str]) -> None:
    with _engines_needed():
        from logitcache.capture.engine_options import parse_engine_options
        from logitcache.capture.estimate import plan_build

    print(plan_build(**_settings(options), **parse_engine_options(rest)).table())


def _finish(options: argparse.Namespace, rest: list[str]) -> None:
    if rest:
        raise UserError(f"unknown argument {rest[0]} (`logitcache finish --help` lists the options)")
    with _engines_needed():
        from logitcache.capture.finish import finish

    _print_cache(finish(options.out))


_COMMANDS: dict[str, Callable[[argparse.Namespace, list[str]], None]] = {
    "build": _build,
    "plan": _plan,
    "finish": _finish,
}


@contextmanager
def _engines_needed() -> Iterator[None]:
    """Around the import of what makes a cache."""
    # Before transformers and vLLM are imported, which read these.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")  # of vLLM's processes
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install 'logitcache[capture]' (or [vllm])") from error


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(options).items() if name != "command"}


def _print_cache(cache: LogitCache) -> None:
    manifest = cache.manifest
    print(f"cache      {cache.path}")
    print(f"sequences  {len(cache):,}")
    print(f"positions  {cache.num_positions:,}")
    print(
        f"entries    {manifest.num_entries / cache.num_positions:.1f} per position, {1 - manifest.mean_tail_mass:.2%} of the mass"
    )
    print(f"bytes      {manifest.num_bytes:,} ({manifest.num_bytes / cache.num_positions:.0f} per position)")

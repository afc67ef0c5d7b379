"""Launchers, which start the ranks of a recipe's runs."""

from __future__ import annotations

import shlex
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from logitcache import UserError

ONE_HOST = ("1", "1:1")


@dataclass(frozen=True)
class Launcher:
    """A launcher: the words before `-m trainer fit …`, and the ranks of a run, None if the words do not say."""

    command: list[str]
    ranks: int | None


def launcher(line: object) -> Launcher:
    """Reads the line of a recipe that names the launcher; its ranks run in this interpreter. Raises UserError."""
    try:
        words = shlex.split(line) if isinstance(line, str) else []
        if words[:1] == ["torchrun"]:
            return _torchrun(words[1:])
        if words[:2] == ["accelerate", "launch"]:
            return _accelerate(words[2:])
    except ValueError as error:
        raise UserError(f"launch: {line}: {error}") from error
    raise UserError(
        f"launch: `torchrun …` or `accelerate launch …` is expected, got {line!r}; variables of the environment belong "
        "before `trainer compare`"
    )


def _torchrun(options: Sequence[str]) -> Launcher:
    from torch.distributed.run import get_args_parser

    named = _parsed(get_args_parser(), options)
    ranks = int(named.nproc_per_node) if named.nproc_per_node.isdecimal() and named.nnodes in ONE_HOST else None
    return _checked("torch.distributed.run", options, ranks)


def _accelerate(options: Sequence[str]) -> Launcher:
    from accelerate.commands.launch import launch_command_parser

    return _checked("accelerate.commands.launch", options, _parsed(launch_command_parser(), options).num_processes)


def _parsed(parser: ArgumentParser, options: Sequence[str]) -> Any:
    def refuse(message: str) -> NoReturn:
        raise ValueError(message)

    parser.error = refuse  # type: ignore[method-assign]
    named = parser.parse_args([*options, "-m", "trainer"])
    if named.training_script != "trainer" or named.training_script_args:
        raise ValueError("options of the launcher alone are expected, `-m trainer fit …` follows by itself")
    if named.max_restarts:
        raise ValueError("leave the restarts out: the same `trainer compare` continues a run that failed")
    return named


def _checked(module: str, options: Sequence[str], ranks: int | None) -> Launcher:
    if ranks is not None and ranks < 1:
        raise ValueError(f"{ranks} ranks train nothing")
    return Launcher([sys.executable, "-m", module, *options], ranks)

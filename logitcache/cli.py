"""The command line finds the command and turns its errors into one line and an exit status."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from logitcache.commands import (
    build,
    export,
    finish,
    import_logits,
    info,
    merge,
    plan,
    pull,
    push,
    recode,
    slice,
    verify,
    view,
)
from logitcache.commands.shared import refuse_unknown
from logitcache.errors import Parser, UserError, one_line, printable


class Command(Protocol):
    """A module of `logitcache.commands`. CONTINUES: the same command continues after an interruption."""

    HELP: str
    DESCRIPTION: str
    CONTINUES: bool

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Adds its options."""

    def run(self, options: dict[str, Any], rest: list[str]) -> int | None:
        """Runs it with the options that were given, and `rest`, which its parser does not know. Returns the exit status."""


COMMANDS: dict[str, Command] = {
    "build": build,
    "plan": plan,
    "finish": finish,
    "info": info,
    "view": view,
    "verify": verify,
    "recode": recode,
    "slice": slice,
    "merge": merge,
    "push": push,
    "pull": pull,
    "import": import_logits,
    "export": export,
}

TAKE_OPTIONS_OF_VLLM = {"build", "plan", "verify"}


def parser() -> argparse.ArgumentParser:
    """Returns the parser of `logitcache …`; unknown options are left over for vLLM."""
    top = Parser(prog="logitcache", description="Caches of teacher log-probabilities.", allow_abbrev=False)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.add_options(
            commands.add_parser(
                name,
                help=command.HELP,
                description=command.DESCRIPTION,
                allow_abbrev=False,
                argument_default=argparse.SUPPRESS,
            )
        )
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `logitcache …`. Returns the exit status: 0, 1 if `verify` finds something, 2 for bad input, 130 after Ctrl-C."""
    continued = False
    try:
        parsed, rest = parser().parse_known_args(arguments)
        options = vars(parsed)
        name = options.pop("command")
        command = COMMANDS[name]
        if name not in TAKE_OPTIONS_OF_VLLM:
            refuse_unknown(rest, name)
        continued = command.CONTINUES
        with _log_lines():
            status = command.run(options, rest) or 0
        sys.stdout.flush()
        return status
    except UserError as error:
        print(f"logitcache: error: {printable(one_line(error))}", file=sys.stderr)
        return 2
    except MemoryError as error:
        print(f"logitcache: error: out of memory ({one_line(error) or 'no more is given'})", file=sys.stderr)
        return 2
    except BrokenPipeError:  # of `| head`: there is nobody left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print(f"logitcache: stopped{'; the same command continues where it was' * continued}", file=sys.stderr)
        return 130


@contextmanager
def _log_lines() -> Iterator[None]:
    """Shows what a command reports, as plain lines on stderr."""
    logger = logging.getLogger("logitcache")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Printable("logitcache: %(message)s"))
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


class _Printable(logging.Formatter):
    """A formatter of messages that may quote a store, or someone else's file."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))

"""The options of every command, as argparse reads them. What is left out is decided further down, by the Python interface."""

from __future__ import annotations

import argparse

from logitcache.arguments import keeping, making, sharing
from logitcache.errors import Parser


def parser() -> argparse.ArgumentParser:
    """The parser of `logitcache …`; `command` names what was asked for, unknown options are left over for vLLM."""
    top = Parser(prog="logitcache", description="Caches of teacher log-probabilities.", allow_abbrev=False)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for group in (making, keeping, sharing):
        group.add_commands(commands)
    return top

"""`logitcache merge`."""

from __future__ import annotations

import argparse
from typing import Any

from logitcache.commands.shared import output_options, placement_options, print_rewritten

HELP = "several caches of one teacher as one, every row once"
DESCRIPTION = (
    "Writes the rows of several caches, made by one teacher with the same settings, to one; of rows with the "
    "same id the first is kept. The same command continues an interrupted one."
)
CONTINUES = True


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", metavar="CACHE", help="folders or URLs of the caches")
    output_options(parser)
    placement_options(parser, "write", "then `logitcache finish DIR`")


def run(options: dict[str, Any], rest: list[str]) -> None:
    from logitcache.maintenance.merge import merge

    print_rewritten(merge(**options))

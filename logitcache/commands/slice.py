"""`logitcache slice`."""

from __future__ import annotations

import argparse
from typing import Any

from logitcache.commands.shared import output_options, placement_options, print_rewritten

HELP = "some rows of a cache"
DESCRIPTION = (
    "Writes those rows of a cache to another that meet every one of the conditions. The same command continues "
    "an interrupted one."
)
CONTINUES = True


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="CACHE", help="folder or URL of the cache")
    parser.add_argument("--rows", metavar="A:B", help="from row A, counted from 0, up to B, which is left out")
    parser.add_argument("--row-ids", metavar="FILE", help="those whose ids stand in a text file, one a line")
    parser.add_argument(
        "--where",
        metavar="EXPRESSION",
        help="DuckDB's SQL over the kept columns, row_id, num_tokens and num_positions, for example "
        "\"source = 'wiki' and num_tokens < 512\"",
    )
    parser.add_argument("--sample", type=int, metavar="N", help="so many of them, at random")
    parser.add_argument("--seed", type=int, help="of --sample (default 0)")
    output_options(parser)
    placement_options(parser, "write", "then `logitcache finish DIR`")


def run(options: dict[str, Any], rest: list[str]) -> None:
    from logitcache.maintenance.slice import slice_cache

    print_rewritten(slice_cache(**options))

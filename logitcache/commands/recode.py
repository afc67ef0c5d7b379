"""`logitcache recode`."""

from __future__ import annotations

import argparse
from typing import Any

from logitcache.commands.shared import output_options, placement_options, print_rewritten
from logitcache.commands.values import names
from logitcache.format.quantization import PRESETS
from logitcache.format.tail_parts import PARTS

HELP = "fewer entries, coarser numbers or fewer columns of a cache, without the teacher"
DESCRIPTION = (
    "Writes the rows of a cache to another with fewer entries, coarser numbers or fewer columns, without the "
    "teacher. Entries that are left out join the tail. The same command continues an interrupted one."
)
CONTINUES = True


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="CACHE", help="folder or URL of the cache")
    parser.add_argument("--top-k", type=int, metavar="K", help="at most so many entries per position")
    parser.add_argument("--top-p", type=float, metavar="P", help="only as many entries as hold this mass")
    parser.add_argument("--min-k", type=int, metavar="K", help="floor under --top-p (default 32)")
    parser.add_argument("--precision", choices=PRESETS, help="no finer than the cache's own (default: the same)")
    parser.add_argument("--tail-rank", type=int, metavar="R", help="only the first R coefficients of the low-rank tail")
    parser.add_argument(
        "--drop",
        type=names,
        metavar="NAME,NAME",
        help=f"leave out: {', '.join(part.option for part in PARTS)}, or kept columns",
    )
    output_options(parser)
    placement_options(parser, "write", "then `logitcache finish DIR`")


def run(options: dict[str, Any], rest: list[str]) -> None:
    from logitcache.maintenance.recode import recode

    print_rewritten(recode(**options))

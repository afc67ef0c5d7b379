"""`logitcache finish`."""

from __future__ import annotations

import argparse
from typing import Any

from logitcache.commands.shared import engines_needed, print_cache

HELP = "make a cache of the shards that `logitcache build --shard-range` left, or recode, slice, merge, import"
DESCRIPTION = (
    "Makes a cache of the shards that several `logitcache build --shard-range` processes left in DIR, or those of recode, slice, "
    "merge or import."
)
CONTINUES = True


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", metavar="DIR", help="the folder or URL that they shared")


def run(options: dict[str, Any], rest: list[str]) -> None:
    with engines_needed():
        from logitcache.capture.finish import finish

    print_cache(finish(**options))

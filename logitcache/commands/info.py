"""`logitcache info`."""

from __future__ import annotations

import argparse
from typing import Any

from logitcache.errors import printable

HELP = "what a cache holds and what it was made from, on one screen"
DESCRIPTION = "Prints what a cache holds and what it was made from, on one screen, without reading its rows."
CONTINUES = False


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("cache", metavar="CACHE", help="folder or URL of the cache")


def run(options: dict[str, Any], rest: list[str]) -> None:
    from logitcache.maintenance.info import info

    print(printable(info(**options)))

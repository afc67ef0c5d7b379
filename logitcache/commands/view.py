"""`logitcache view`."""

from __future__ import annotations

import argparse
from typing import Any

from logitcache.commands.values import names

HELP = "one page for a browser: charts of a cache, and some of its rows to read with what the teacher expected"
DESCRIPTION = (
    "Writes one HTML page that needs no network: charts of the cache, and a reader of some of its rows, whose "
    "tokens are coloured by the teacher's entropy or by their probability and show what the teacher expected."
)
CONTINUES = False


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("cache", metavar="CACHE", help="folder or URL of the cache, of which only parts are read")
    parser.add_argument("--out", metavar="FILE", help="the page (default: the cache's name with .html, in this folder)")
    parser.add_argument(
        "--rows", type=names, metavar="A:B,ROW,ID", help="these rows, by range, number or id (default: evenly spread)"
    )
    parser.add_argument("--num-sequences", type=int, metavar="N", help="so many rows, evenly spread (default 24)")


def run(options: dict[str, Any], rest: list[str]) -> None:
    from logitcache.report.page import view

    page = view(**options)
    shown = f"{page.num_rows:,} of {page.of_rows:,} rows, {page.num_tokens:,} tokens of them"
    print(f"page       {page.path} ({page.num_bytes:,} bytes), which shows {shown}")

"""`logitcache pull`."""

from __future__ import annotations

import argparse
from typing import Any

from logitcache.commands.shared import print_cache, print_rewritten

HELP = "copy a cache, or a part of it, from a URL or a .tar.zst file, and check every byte"
DESCRIPTION = (
    "Copies a cache from a URL, a folder or a .tar.zst file; every file is checked against its SHA-256. The same "
    "command continues an interrupted one and mends a damaged copy."
)
CONTINUES = True


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", metavar="URL", help="of the cache, or of a .tar.zst file that holds one")
    parser.add_argument("--out", required=True, metavar="DIR", help="a local folder")
    parser.add_argument(
        "--against", metavar="SHA256", help="the identity that the cache must have, as build and push print it"
    )
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--shards", metavar="A:B", help="from shard A, counted from 0, up to B, which is left out")
    part.add_argument(
        "--rows",
        metavar="A:B",
        help="from row A, counted from 0, up to B: only their row groups are fetched, with --against their shards",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace another cache that DIR holds")


def run(options: dict[str, Any], rest: list[str]) -> None:
    from logitcache.sharing.pull import pull

    cache = pull(**options)
    if "rows" in options or "shards" in options:
        print_rewritten(cache)
    else:
        print_cache(cache)

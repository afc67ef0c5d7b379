"""`logitcache push`."""

from __future__ import annotations

import argparse
from typing import Any

HELP = "copy a cache to where others read it: the Hub, an object store, a folder, one file"
DESCRIPTION = (
    "Copies a finished cache to a place that others read. What is there already is not sent again, so the same "
    "command continues an interrupted one; the manifest goes last, so half a cache is never taken for a whole one."
)
CONTINUES = True


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="CACHE", help="folder of the cache")
    parser.add_argument(
        "url",
        metavar="URL",
        help="hf://datasets/ORG/NAME, s3://…, gs://…, a folder, or a file at any of them that ends in .tar.zst",
    )
    parser.add_argument(
        "--license", metavar="ID", help="of the cache, for its card, as the Hub has them: apache-2.0, …"
    )
    parser.add_argument("--teacher-license", metavar="TEXT", help="of the teacher, for the card")
    parser.add_argument("--data-license", metavar="TEXT", help="of the corpus, for the card")
    parser.add_argument(
        "--public", action="store_true", help="a repository that this makes on the Hub is for all to read"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace another cache that is there")


def run(options: dict[str, Any], rest: list[str]) -> None:
    from logitcache.sharing.push import push

    pushed = push(**options)
    print(f"url        {pushed.url}")
    print(f"identity   {pushed.identity}")
    print(f"sent       {pushed.num_sent:,} files ({pushed.sent_bytes:,} bytes)")
    print(f"kept       {pushed.num_kept:,} files")
    if pushed.revision is not None:
        print(f"revision   {pushed.revision}")

"""`logitcache verify`."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from logitcache.commands.shared import engines_needed, refuse_unknown, teacher_options
from logitcache.errors import printable

HELP = "everything that is wrong with a cache"
DESCRIPTION = (
    "Reads a whole cache and lists everything that is wrong with it: manifest, files, checksums, columns, rows, "
    "targets. Exit status 0 where nothing is, 1 where something is, 2 where there is no cache."
)
CONTINUES = False


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="CACHE", help="folder or URL of the cache")
    parser.add_argument(
        "--against",
        metavar="SHA256",
        help="the cache's identity, as build and push print it: any other cache is refused before anything of it is read",
    )
    group = parser.add_argument_group("the teacher once more; options of vLLM are passed on under their own names")
    group.add_argument("--rescore", type=int, metavar="N", help="N random rows are scored again and compared")
    group.add_argument("--seed", type=int, help="random seed for choosing the rows (default 0)")
    group.add_argument(
        "--teacher", metavar="NAME", help="model name or folder (default: that of the cache's fingerprint)"
    )
    teacher_options(group)


def run(options: dict[str, Any], rest: list[str]) -> int:
    """Prints the findings. Returns 1 if there are any, otherwise 0."""
    with engines_needed():
        from logitcache.capture.options import parse_engine_options
        from logitcache.capture.verify import verify

    if "rescore" in options:
        options |= parse_engine_options(rest)
    else:
        refuse_unknown(rest, "verify")
    report = verify(**options)
    if report.rescored:
        print(report.rescored, end="\n\n")
    if report:
        print(printable(report.text()), end="\n\n")
    if "rescore" in options and not report.rescored:
        print("logitcache: --rescore was skipped: fix the problems listed above first", file=sys.stderr)
    print(f"{len(report):,} finding{'s' * (len(report) != 1)}: {report.summary}")
    return 1 if report else 0

"""Options of info, view, verify, recode, slice and merge."""

from __future__ import annotations

import argparse

from logitcache.arguments.shared import output_options, teacher_options
from logitcache.arguments.values import names
from logitcache.errors import Parser
from logitcache.format.quantization import PRESETS


def add_commands(commands: argparse._SubParsersAction[Parser]) -> None:
    """Adds a parser for each of them."""
    _info(commands)
    _view(commands)
    _verify(commands)
    _recode(commands)
    _slice(commands)
    _merge(commands)


def _info(commands: argparse._SubParsersAction[Parser]) -> None:
    info = commands.add_parser(
        "info",
        help="what a cache holds and what it was made from, on one screen",
        description="Prints what a cache holds and what it was made from, on one screen, without reading its rows.",
        allow_abbrev=False,
    )
    info.add_argument("path", metavar="CACHE", help="folder or URL of the cache")


def _view(commands: argparse._SubParsersAction[Parser]) -> None:
    view = commands.add_parser(
        "view",
        help="one page for a browser: charts of a cache, and some of its rows to read with what the teacher expected",
        description="Writes one HTML page that needs no network: charts of the cache, and a reader of some of its rows, whose "
        "tokens are coloured by the teacher's entropy or by their probability and show what the teacher expected.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    view.add_argument("cache", metavar="CACHE", help="folder or URL of the cache, of which only parts are read")
    view.add_argument("--out", metavar="FILE", help="the page (default: the cache's name with .html, in this folder)")
    view.add_argument(
        "--rows",
        type=names,
        metavar="A:B,ROW,ID",
        help="these rows, by range, number or id (default: evenly spread)",
    )
    view.add_argument("--num-sequences", type=int, metavar="N", help="so many rows, evenly spread (default 24)")


def _verify(commands: argparse._SubParsersAction[Parser]) -> None:
    verify = commands.add_parser(
        "verify",
        help="everything that is wrong with a cache",
        description="Reads a whole cache and lists everything that is wrong with it: manifest, files, checksums, columns, rows, "
        "targets. Exit status 0 where nothing is, 1 where something is, 2 where there is no cache.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    verify.add_argument("path", metavar="CACHE", help="folder or URL of the cache")
    verify.add_argument(
        "--against",
        metavar="SHA256",
        help="the cache's identity, as build and push print it: any other cache is refused before anything of it is read",
    )
    group = verify.add_argument_group("the teacher once more; options of vLLM are passed on under their own names")
    group.add_argument("--rescore", type=int, metavar="N", help="N random rows are scored again and compared")
    group.add_argument("--seed", type=int, help="that decides which rows (default 0)")
    group.add_argument(
        "--teacher", metavar="NAME", help="model name or folder (default: that of the cache's fingerprint)"
    )
    teacher_options(group)


def _recode(commands: argparse._SubParsersAction[Parser]) -> None:
    recode = commands.add_parser(
        "recode",
        help="fewer entries, coarser numbers or fewer columns of a cache, without the teacher",
        description="Writes the rows of a cache to another with fewer entries, coarser numbers or fewer columns, without the "
        "teacher. Entries that are left out join the tail. The same command continues an interrupted one.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    recode.add_argument("path", metavar="CACHE", help="folder or URL of the cache")
    recode.add_argument("--top-k", type=int, metavar="K", help="at most so many entries per position")
    recode.add_argument("--top-p", type=float, metavar="P", help="only as many entries as hold this mass")
    recode.add_argument("--min-k", type=int, metavar="K", help="floor under --top-p (default 32)")
    recode.add_argument("--precision", choices=list(PRESETS), help="no finer than the cache's own (default: the same)")
    recode.add_argument(
        "--drop",
        type=names,
        metavar="NAME,NAME",
        help="leave out: tail_groups, temperatures, tail_entropy, tail_samples, or kept columns",
    )
    output_options(recode)


def _slice(commands: argparse._SubParsersAction[Parser]) -> None:
    part = commands.add_parser(
        "slice",
        help="some rows of a cache",
        description="Writes those rows of a cache to another that meet every one of the conditions. The same command continues "
        "an interrupted one.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    part.add_argument("path", metavar="CACHE", help="folder or URL of the cache")
    part.add_argument("--rows", metavar="A:B", help="from row A, counted from 0, up to B, which is left out")
    part.add_argument("--row-ids", metavar="FILE", help="those whose ids stand in a text file, one a line")
    part.add_argument(
        "--where",
        metavar="EXPRESSION",
        help="DuckDB's SQL over the kept columns, row_id, num_tokens and num_positions, for example "
        "\"source = 'wiki' and num_tokens < 512\"",
    )
    part.add_argument("--sample", type=int, metavar="N", help="so many of them, at random")
    part.add_argument("--seed", type=int, help="of --sample (default 0)")
    output_options(part)


def _merge(commands: argparse._SubParsersAction[Parser]) -> None:
    merge = commands.add_parser(
        "merge",
        help="several caches of one teacher as one, every row once",
        description="Writes the rows of several caches, made by one teacher with the same settings, to one; of rows with the "
        "same id the first is kept. The same command continues an interrupted one.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    merge.add_argument("paths", nargs="+", metavar="CACHE", help="folders or URLs of the caches")
    output_options(merge)

"""Options of push, pull, import and export."""

from __future__ import annotations

import argparse

from logitcache.arguments.shared import output_options
from logitcache.arguments.values import names
from logitcache.errors import Parser
from logitcache.format.quantization import PRESETS


def add_commands(commands: argparse._SubParsersAction[Parser]) -> None:
    """Adds a parser for each of them."""
    _push(commands)
    _pull(commands)
    _import(commands)
    _export(commands)


def _push(commands: argparse._SubParsersAction[Parser]) -> None:
    push = commands.add_parser(
        "push",
        help="copy a cache to where others read it: the Hub, an object store, a folder, one file",
        description="Copies a finished cache to a place that others read. What is there already is not sent again, so the same "
        "command continues an interrupted one; the manifest goes last, so half a cache is never taken for a whole one.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    push.add_argument("path", metavar="CACHE", help="folder of the cache")
    push.add_argument(
        "url",
        metavar="URL",
        help="hf://datasets/ORG/NAME, s3://…, gs://…, a folder, or a file at any of them that ends in .tar.zst",
    )
    push.add_argument("--license", metavar="ID", help="of the cache, for its card, as the Hub has them: apache-2.0, …")
    push.add_argument("--teacher-license", metavar="TEXT", help="of the teacher, for the card")
    push.add_argument("--data-license", metavar="TEXT", help="of the corpus, for the card")
    push.add_argument(
        "--public", action="store_true", help="a repository that this makes on the Hub is for all to read"
    )
    push.add_argument("--overwrite", action="store_true", help="replace another cache that is there")


def _pull(commands: argparse._SubParsersAction[Parser]) -> None:
    pull = commands.add_parser(
        "pull",
        help="copy a cache, or a part of it, from a URL or a .tar.zst file, and check every byte",
        description="Copies a cache from a URL, a folder or a .tar.zst file; every file is checked against its SHA-256. The same "
        "command continues an interrupted one and mends a damaged copy.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    pull.add_argument("url", metavar="URL", help="of the cache, or of a .tar.zst file that holds one")
    pull.add_argument("--out", required=True, metavar="DIR", help="a local folder")
    pull.add_argument(
        "--against", metavar="SHA256", help="the identity that the cache must have, as build and push print it"
    )
    part = pull.add_mutually_exclusive_group()
    part.add_argument("--shards", metavar="A:B", help="from shard A, counted from 0, up to B, which is left out")
    part.add_argument(
        "--rows",
        metavar="A:B",
        help="from row A, counted from 0, up to B: only their row groups are fetched, with --against their shards",
    )
    pull.add_argument("--overwrite", action="store_true", help="replace another cache that DIR holds")


def _import(commands: argparse._SubParsersAction[Parser]) -> None:
    importing = commands.add_parser(
        "import",
        help="a cache of another tool's logit dataset: DistillKit's, or plain top-k rows",
        description="Writes the rows of a logit dataset in another tool's format to a cache. distillkit: its compressed Parquet. "
        "topk: rows with input_ids, topk_ids, topk_logprobs and, if there, loss_mask and tail_logprob; list i is the "
        "distribution of token i + 1. Where a source does not store the tail, it is what the entries leave of 1, and the "
        "cache says that it is approximate. The same command continues an interrupted one.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    importing.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help=".parquet, .jsonl[.gz|.zst], folder or pattern, local or a URL such as hf://datasets/ORG/NAME or s3://…",
    )
    importing.add_argument(
        "--from", dest="source_format", required=True, choices=["distillkit", "topk"], help="the sources' format"
    )
    importing.add_argument("--teacher", required=True, metavar="NAME", help="the model that gave the log-probabilities")
    importing.add_argument("--tokenizer", required=True, metavar="NAME", help="its tokenizer: model name or folder")
    importing.add_argument(
        "--vocab-size",
        type=int,
        metavar="V",
        help="tokens that the log-probabilities are normalised over (default: DistillKit's d, or the tokenizer's)",
    )
    importing.add_argument(
        "--config", metavar="FILE", help="DistillKit's configuration (default: compression_config.yaml beside the data)"
    )
    importing.add_argument(
        "--loss-mask",
        metavar="COLUMN",
        help="0 or 1 for each token, or labels (default: loss_mask, labels and the like, which must agree; without them all "
        "tokens but a row's first are trained)",
    )
    importing.add_argument("--top-k", type=int, metavar="K", help="at most so many entries per position (default: all)")
    importing.add_argument(
        "--precision",
        choices=list(PRESETS),
        help="exact: as decoded; balanced (default): a third of the bytes; compact: fewer bytes still",
    )
    importing.add_argument("--keep", type=names, metavar="NAME,NAME", help="source columns to store in the cache")
    importing.add_argument(
        "--data-name", metavar="NAME", help="what the cache calls its corpus (default: the source's name)"
    )
    importing.add_argument("--skip-bad", action="store_true", help="leave bad rows out and count them")
    output_options(importing)


def _export(commands: argparse._SubParsersAction[Parser]) -> None:
    export = commands.add_parser(
        "export",
        help="the rows of a cache in another tool's format: plain top-k rows, or Axolotl's",
        description="Writes the rows of a cache, with its kept columns, to one file in another tool's format. topk: input_ids, "
        "loss_mask, topk_ids, topk_logprobs and, but for approximate ones, tail_logprob; imported at the cache's own "
        "--precision they are the same again. axolotl (a list of token and logprob per "
        "position) and axolotl-v2 (logprobs and target_token_ids): for type axolotl.integrations.kd.chat_template. There the "
        "tail is lost, Axolotl divides the entries by their sum. It tokenises the kept chat messages itself and "
        "puts the last list at the last token: only rows that it tokenises as the cache did, whole, line up, and it must "
        "train the same tokens.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    export.add_argument("cache", metavar="CACHE", help="folder or URL of the cache")
    export.add_argument("--to", required=True, choices=["topk", "axolotl", "axolotl-v2"], help="format of the file")
    export.add_argument("--out", required=True, metavar="FILE", help="a path or URL that ends with .parquet or .jsonl")
    export.add_argument(
        "--logprobs-field", metavar="NAME", help="Axolotl's logprobs_field: the column of the lists (default logprobs)"
    )
    export.add_argument("--overwrite", action="store_true", help="replace FILE")

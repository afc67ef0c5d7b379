"""`logitcache import`."""

from __future__ import annotations

import argparse
from typing import Any

from logitcache.commands.shared import engines_needed, output_options, placement_options, print_cache
from logitcache.commands.values import names
from logitcache.exchange.formats import FORMATS
from logitcache.format.quantization import PRESETS

HELP = "a cache of another tool's logit dataset: DistillKit's, or plain top-k rows"
DESCRIPTION = (
    "Writes the rows of a logit dataset in another tool's format to a cache. distillkit: its compressed Parquet. "
    "topk: rows with input_ids, topk_ids, topk_logprobs and, if there, loss_mask and tail_logprob; list i is the "
    "distribution of token i + 1. Where a source does not store the tail, it is what the entries leave of 1, and the "
    "cache says that it is approximate. The same command continues an interrupted one."
)
CONTINUES = True


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help=".parquet, .jsonl[.gz|.zst], folder or pattern, local or a URL such as hf://datasets/ORG/NAME or s3://…",
    )
    parser.add_argument("--from", dest="source_format", required=True, choices=FORMATS, help="the sources' format")
    parser.add_argument("--teacher", required=True, metavar="NAME", help="the model that gave the log-probabilities")
    parser.add_argument("--tokenizer", required=True, metavar="NAME", help="its tokenizer: model name or folder")
    parser.add_argument(
        "--vocab-size",
        type=int,
        metavar="V",
        help="tokens that the log-probabilities are normalised over (default: DistillKit's d, or the tokenizer's)",
    )
    parser.add_argument(
        "--config", metavar="FILE", help="DistillKit's configuration (default: compression_config.yaml beside the data)"
    )
    parser.add_argument(
        "--loss-mask",
        metavar="COLUMN",
        help="0 or 1 for each token, or labels (default: loss_mask, labels and the like, which must agree; without them all "
        "tokens but a row's first are trained)",
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="at most so many entries per position (default: all)")
    parser.add_argument(
        "--precision",
        choices=PRESETS,
        help="exact: as decoded; balanced (default): a third of the bytes; compact: fewer bytes still",
    )
    parser.add_argument("--keep", type=names, metavar="NAME,NAME", help="source columns to store in the cache")
    parser.add_argument(
        "--data-name", metavar="NAME", help="what the cache calls its corpus (default: the source's name)"
    )
    parser.add_argument("--skip-bad", action="store_true", help="leave bad rows out and count them")
    output_options(parser)
    placement_options(parser, "write", "then `logitcache finish DIR`")


def run(options: dict[str, Any], rest: list[str]) -> None:
    with engines_needed():
        from logitcache.exchange.importing import import_logits

    print_cache(import_logits(**options))

"""`logitcache export`."""

from __future__ import annotations

import argparse
from typing import Any

from logitcache.exchange.exporting import FORMATS, export

HELP = "the rows of a cache in another tool's format: plain top-k rows, or Axolotl's"
DESCRIPTION = (
    "Writes the rows of a cache, with its kept columns, to one file in another tool's format. topk: input_ids, "
    "loss_mask, topk_ids, topk_logprobs and, but for approximate ones, tail_logprob; imported at the cache's own "
    "--precision they are the same again. axolotl (a list of token and logprob per "
    "position) and axolotl-v2 (logprobs and target_token_ids): for type axolotl.integrations.kd.chat_template. There the "
    "tail is lost, Axolotl divides the entries by their sum. It tokenises the kept chat messages itself and "
    "puts the last list at the last token: only rows that it tokenises as the cache did, whole, line up, and it must "
    "train the same tokens."
)
CONTINUES = False


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("cache", metavar="CACHE", help="folder or URL of the cache")
    parser.add_argument("--to", required=True, choices=FORMATS, help="format of the file")
    parser.add_argument("--out", required=True, metavar="FILE", help="a path or URL that ends with .parquet or .jsonl")
    parser.add_argument(
        "--top-k",
        type=int,
        metavar="K",
        help="entries per position; those beyond what the cache stores are rebuilt from its coefficients, and a column "
        "exact_entries has the number of the others (default: as stored)",
    )
    parser.add_argument(
        "--logprobs-field", metavar="NAME", help="Axolotl's logprobs_field: the column of the lists (default logprobs)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace FILE")


def run(options: dict[str, Any], rest: list[str]) -> None:
    exported = export(**options)
    print(f"exported   {exported.path}")
    print(f"rows       {exported.num_rows:,}")
    print(f"positions  {exported.num_positions:,}")
    print(f"bytes      {exported.num_bytes:,}")

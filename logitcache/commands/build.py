"""`logitcache build`."""

from __future__ import annotations

import argparse
from typing import Any

from logitcache.assembly.placement import EXECUTORS
from logitcache.capture.corpus.chat import TURNS
from logitcache.capture.corpus.tokenize import LONG_POLICIES
from logitcache.commands.shared import engines_needed, output_options, print_cache, ray_address_option, teacher_options
from logitcache.commands.values import assignments, mapping, names, numbers, part_of
from logitcache.format.quantization import PRESETS

HELP = "run a teacher once over a corpus and write its top-k log-probabilities to a cache"
DESCRIPTION = (
    "Runs a teacher once over a corpus and writes its top-k log-probabilities, with the tail, to a cache. "
    "The same command continues an interrupted build. Options of vLLM (--tensor-parallel-size, "
    "--gpu-memory-utilization, --quantization, --max-model-len, …) are passed on under their own names."
)
CONTINUES = True


def add_options(parser: argparse.ArgumentParser) -> None:
    input_options(parser)
    output_options(parser)
    parser.add_argument(
        "--reuse",
        nargs="+",
        metavar="CACHE",
        help="caches of the same teacher and settings: rows that they hold are copied, only the others are scored",
    )

    group = parser.add_argument_group("generation")
    group.add_argument(
        "--generate",
        action="store_true",
        help="documents are prompts: the teacher answers them first (one engine, with vLLM), then its answers are scored; "
        "with --shard-range the first process answers, the others wait",
    )
    group.add_argument(
        "--sampling-params",
        type=assignments,
        metavar="NAME=VALUE,…",
        help='of vLLM, under its own names: n=4,temperature=0.8,max_tokens=512,stop=["\\n"] (default n=1,'
        "temperature=1.0,seed=0, answers as long as --max-length leaves)",
    )

    group = parser.add_argument_group("many engines")
    group.add_argument("--executor", choices=EXECUTORS, help="ray: several engines, on one host or many")
    group.add_argument("--engines", type=int, metavar="N", help="engines on Ray (default: as many as its GPUs hold)")
    ray_address_option(group)
    group.add_argument(
        "--shard-range",
        type=part_of,
        metavar="I/N",
        help="score the I-th of N parts, counted from 0, of a build that N processes share without Ray; "
        "then `logitcache finish DIR`",
    )


def input_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that decide what a cache will hold."""
    parser.add_argument("--teacher", default=None, metavar="NAME", help="model name or folder")
    parser.add_argument(
        "--data",
        required=True,
        nargs="+",
        metavar="SOURCE",
        help=".jsonl[.gz|.zst], .parquet, .txt, folder, glob, or dataset name",
    )

    teacher_options(parser.add_argument_group("teacher"))

    group = parser.add_argument_group("what is stored of each distribution")
    group.add_argument(
        "--top-k",
        type=int,
        metavar="K",
        help="entries per position (default 16 with --tail-rank, 64 without or with --top-p)",
    )
    group.add_argument(
        "--top-p", type=float, metavar="P", help="only as many entries as hold this mass (default 1: always K)"
    )
    group.add_argument("--min-k", type=int, metavar="K", help="floor under --top-p (default 32, or --top-k if less)")
    group.add_argument(
        "--tail-groups",
        type=int,
        metavar="G",
        help="mass of the tail in G groups of the vocabulary (default 0; `logitcache plan` shows what 32 would give)",
    )
    group.add_argument(
        "--tail-rank",
        type=int,
        metavar="R",
        help="R coefficients from which the whole tail is rebuilt, in a basis made from the first positions (default 64 where "
        "the engine shows the logits and there are no --tail-groups, less for a narrow teacher; otherwise 0)",
    )
    group.add_argument(
        "--tail-probes",
        type=int,
        metavar="P",
        help="P random tokens of which is stored what the coefficients leave (default 2 with --tail-rank)",
    )
    group.add_argument(
        "--precision",
        choices=PRESETS,
        help="exact: as captured, columns that any reader reads as they are; balanced (default): a third of the bytes, "
        "probabilities to 0.1 %% in sum; compact: 0.5 %%, fewer bytes still",
    )
    group.add_argument("--temperatures", type=numbers, metavar="T,T", help="temperatures to train at, for example 1,2")
    group.add_argument("--tail-entropy", action="store_true", help="the tail's entropy")
    group.add_argument("--tail-samples", type=int, metavar="S", help="S ids drawn from the tail")

    group = parser.add_argument_group("corpus")
    group.add_argument(
        "--layout", help="input_ids, messages, prompt-completion or text (default: found by the columns)"
    )
    group.add_argument(
        "--chat-template", metavar="FILE", help="Jinja template for `messages` (default: the tokenizer's own)"
    )
    group.add_argument(
        "--turns",
        choices=TURNS,
        help="trained answers of a chat: all in one sequence (default), the last, or each in a sequence of its own, rendered "
        "as at inference",
    )
    group.add_argument(
        "--columns", type=mapping, metavar="OURS=THEIRS,…", help="rename source columns: prompt=question,…"
    )
    group.add_argument("--keep", type=names, metavar="NAME,NAME", help="source columns to store in the cache")
    group.add_argument(
        "--max-length", type=int, metavar="N", help="longest sequence in tokens (default: the context, at most 4096)"
    )
    group.add_argument("--long", choices=LONG_POLICIES, help="longer documents (default: split text, refuse others)")
    group.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave bad documents, and rows for which the teacher gives NaN, out and count them instead of stopping",
    )
    group.add_argument("--data-split", metavar="NAME", help="split of a dataset (default train)")
    group.add_argument("--data-config", metavar="NAME", help="configuration of a dataset")


def run(options: dict[str, Any], rest: list[str]) -> None:
    with engines_needed():
        from logitcache.capture.build import build
        from logitcache.capture.options import parse_engine_options

    print_cache(build(**options, **parse_engine_options(rest)))

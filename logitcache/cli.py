"""Command line: parses and prints, decides nothing."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from logitcache.errors import Parser, UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `logitcache …`. Returns the exit status: 0, 2 for bad input, 130 after Ctrl-C."""
    try:
        options, rest = _parser().parse_known_args(arguments)
        with _log_lines():
            return _build(options, rest)
    except UserError as error:
        print(f"logitcache: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("logitcache: stopped; the same command continues with the first shard that is missing", file=sys.stderr)
        return 130


@contextmanager
def _log_lines() -> Iterator[None]:
    """Shows what the build reports, as plain lines on stderr."""
    logger = logging.getLogger("logitcache")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("logitcache: %(message)s"))
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def _build(options: argparse.Namespace, rest: list[str]) -> int:
    # Before transformers and vLLM are imported, which read these.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")  # of vLLM's processes
    try:
        from logitcache.capture.build import build
        from logitcache.capture.engine_options import parse_engine_options
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install 'logitcache[capture]' (or [vllm])") from error

    settings = {name: value for name, value in vars(options).items() if name != "command"}
    cache = build(**settings, **parse_engine_options(rest))
    manifest = cache.manifest
    print(f"cache      {cache.path}")
    print(f"sequences  {len(cache):,}")
    print(f"positions  {cache.num_positions:,}")
    print(
        f"entries    {manifest.num_entries / cache.num_positions:.1f} per position, {1 - manifest.mean_tail_mass:.2%} of the mass"
    )
    print(f"bytes      {manifest.num_bytes:,} ({manifest.num_bytes / cache.num_positions:.0f} per position)")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="logitcache", description="Caches of teacher log-probabilities.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    build = commands.add_parser(
        "build",
        help="run a teacher once over a corpus and write its top-k log-probabilities to a cache",
        description="Runs a teacher once over a corpus and writes its top-k log-probabilities, with the tail, to a cache "
        "directory. The same command continues an interrupted build. Options of vLLM (--tensor-parallel-size, "
        "--gpu-memory-utilization, --quantization, --max-model-len, …) are passed on under their own names.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    add = build.add_argument
    add("--teacher", required=True, metavar="NAME", help="model name or folder")
    add(
        "--data",
        required=True,
        nargs="+",
        metavar="SOURCE",
        help=".jsonl[.gz|.zst], .parquet, .txt, folder, glob, or dataset name",
    )
    add("--out", required=True, metavar="DIR", help="the cache directory")
    add("--overwrite", action="store_true", help="replace the cache that DIR holds")

    group = build.add_argument_group("teacher")
    group.add_argument("--backend", choices=["auto", "vllm", "transformers"], help="auto: vLLM where it is installed")
    group.add_argument("--revision", help="branch, tag or commit of the model")
    group.add_argument("--dtype", help="float32, bfloat16, float16; auto (default): the checkpoint's own")
    group.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")

    group = build.add_argument_group("what is stored of each distribution")
    group.add_argument("--top-k", type=int, metavar="K", help="entries per position (default 64)")
    group.add_argument(
        "--top-p", type=float, metavar="P", help="only as many entries as hold this mass (default 1: always K)"
    )
    group.add_argument("--min-k", type=int, metavar="K", help="floor under --top-p (default 32)")
    group.add_argument(
        "--tail-groups", type=int, metavar="G", help="store the tail's mass in G groups (transformers only)"
    )
    group.add_argument(
        "--temperatures",
        type=_numbers,
        metavar="T,T",
        help="temperatures to train at, for example 1,2 (transformers only)",
    )
    group.add_argument("--tail-entropy", action="store_true", help="store the tail's entropy (transformers only)")
    group.add_argument(
        "--tail-samples", type=int, metavar="S", help="store S ids drawn from the tail (transformers only)"
    )

    group = build.add_argument_group("corpus")
    group.add_argument(
        "--layout", help="input_ids, messages, prompt-completion or text (default: found by the columns)"
    )
    group.add_argument(
        "--columns", type=_mapping, metavar="OURS=THEIRS,…", help="rename source columns: prompt=question,…"
    )
    group.add_argument("--keep", type=_names, metavar="NAME,NAME", help="source columns to store in the cache")
    group.add_argument(
        "--max-length", type=int, metavar="N", help="longest sequence in tokens (default: the context, at most 4096)"
    )
    group.add_argument(
        "--long", choices=["split", "truncate", "skip"], help="longer documents (default: split text, refuse others)"
    )
    group.add_argument(
        "--skip-bad", action="store_true", help="leave bad documents out and count them instead of stopping"
    )
    group.add_argument("--data-split", metavar="NAME", help="split of a dataset (default train)")
    group.add_argument("--data-config", metavar="NAME", help="configuration of a dataset")
    group.add_argument("--shard-positions", type=int, metavar="N", help="positions per shard (default 262144)")
    return parser


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _numbers(text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: write numbers with commas between them") from error


def _mapping(text: str) -> dict[str, str]:
    pairs = [pair.partition("=") for pair in text.split(",")]
    if not all(ours and theirs for ours, _, theirs in pairs):
        raise argparse.ArgumentTypeError(f"{text!r}: write OURS=THEIRS,OURS=THEIRS")
    return {ours: theirs for ours, _, theirs in pairs}

"""The options of every command, as argparse reads them. What is left out is decided further down, by the Python interface."""

from __future__ import annotations

import argparse
import json
from typing import Any

from logitcache.errors import Parser
from logitcache.format.levels import PRESETS


def parser() -> argparse.ArgumentParser:
    """The parser of `logitcache …`; `command` names what was asked for, unknown options are left over for vLLM."""
    top = Parser(prog="logitcache", description="Caches of teacher log-probabilities.", allow_abbrev=False)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _build(commands)
    _plan(commands)
    _finish(commands)
    _recode(commands)
    _slice(commands)
    _merge(commands)
    _info(commands)
    _verify(commands)
    return top


def _build(commands: argparse._SubParsersAction[Parser]) -> None:
    build = commands.add_parser(
        "build",
        help="run a teacher once over a corpus and write its top-k log-probabilities to a cache",
        description="Runs a teacher once over a corpus and writes its top-k log-probabilities, with the tail, to a cache. "
        "The same command continues an interrupted build. Options of vLLM (--tensor-parallel-size, "
        "--gpu-memory-utilization, --quantization, --max-model-len, …) are passed on under their own names.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    _inputs(build)
    build.add_argument("--out", required=True, metavar="DIR", help="the cache: a folder, or a URL such as s3://…")
    build.add_argument("--overwrite", action="store_true", help="replace the cache that DIR holds")
    build.add_argument(
        "--reuse",
        nargs="+",
        metavar="CACHE",
        help="caches of the same teacher and settings: rows that they hold are copied, only the others are scored",
    )
    build.add_argument("--shard-positions", type=int, metavar="N", help="positions per shard (default 262144)")

    group = build.add_argument_group("generation")
    group.add_argument(
        "--generate",
        action="store_true",
        help="documents are prompts: the teacher answers them first (one engine, with vLLM), then its answers are scored; "
        "with --shard-range the first process answers, the others wait",
    )
    group.add_argument(
        "--sampling-params",
        type=_assignments,
        metavar="NAME=VALUE,…",
        help='of vLLM, under its own names: n=4,temperature=0.8,max_tokens=512,stop=["\\n"] (default n=1,'
        "temperature=1.0,seed=0, answers as long as --max-length leaves)",
    )

    group = build.add_argument_group("many engines")
    group.add_argument("--executor", choices=["local", "ray"], help="ray: several engines, on one host or many")
    group.add_argument("--engines", type=int, metavar="N", help="engines on Ray (default: as many as its GPUs hold)")
    group.add_argument(
        "--ray-address",
        metavar="HOST:PORT",
        help="of a running Ray cluster (default: that of RAY_ADDRESS or of this machine, otherwise one is started here)",
    )
    group.add_argument(
        "--shard-range",
        type=_range,
        metavar="I/N",
        help="score the I-th of N parts, counted from 0, of a build that N processes share without Ray; "
        "then `logitcache finish DIR`",
    )


def _plan(commands: argparse._SubParsersAction[Parser]) -> None:
    plan = commands.add_parser(
        "plan",
        help="what a build would take and give, from a sample: positions, bytes, hours, fidelity of each k",
        description="Counts the corpus, tokenises and scores a sample of it, and prints what `logitcache build` with the "
        "same options would take (positions, bytes, hours) and what each --top-k would give. Writes nothing.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    _inputs(plan)


def _finish(commands: argparse._SubParsersAction[Parser]) -> None:
    finish = commands.add_parser(
        "finish",
        help="make a cache of the shards that `logitcache build --shard-range` left",
        description="Makes a cache of the shards that several `logitcache build --shard-range` processes left in DIR.",
        allow_abbrev=False,
    )
    finish.add_argument("out", metavar="DIR", help="the folder or URL that they shared")


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
        type=_names,
        metavar="NAME,NAME",
        help="leave out: tail_groups, temperatures, tail_entropy, tail_samples, or kept columns",
    )
    _output(recode)


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
    _output(part)


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
    _output(merge)


def _info(commands: argparse._SubParsersAction[Parser]) -> None:
    info = commands.add_parser(
        "info",
        help="what a cache holds and what it was made from, on one screen",
        description="Prints what a cache holds and what it was made from, on one screen, without reading its rows.",
        allow_abbrev=False,
    )
    info.add_argument("path", metavar="CACHE", help="folder or URL of the cache")


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
    group = verify.add_argument_group("the teacher once more; options of vLLM are passed on under their own names")
    group.add_argument("--rescore", type=int, metavar="N", help="N random rows are scored again and compared")
    group.add_argument("--seed", type=int, help="that decides which rows (default 0)")
    group.add_argument(
        "--teacher", metavar="NAME", help="model name or folder (default: that of the cache's fingerprint)"
    )
    _teacher(group)


def _teacher(group: argparse._ArgumentGroup) -> None:
    """How the teacher runs."""
    group.add_argument(
        "--backend",
        choices=["auto", "vllm", "transformers", "openai"],
        help="openai: a running vLLM server; auto (default): vLLM where it is installed, otherwise transformers",
    )
    group.add_argument(
        "--capture-route",
        choices=["auto", "pooling", "flat"],
        help="of vLLM; pooling sees the logits, flat gets top-k only; auto (default): pooling where it is possible",
    )
    group.add_argument("--base-url", metavar="URL", help="of the server, for example http://localhost:8000/v1")
    group.add_argument("--model", metavar="NAME", help="the name that the server serves the teacher by")
    group.add_argument("--revision", help="branch, tag or commit of the model")
    group.add_argument("--dtype", help="float32, bfloat16, float16; auto (default): the checkpoint's own")
    group.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")


def _output(parser: argparse.ArgumentParser) -> None:
    """Where a cache is written to."""
    parser.add_argument("--out", required=True, metavar="DIR", help="the new cache: a folder, or a URL such as s3://…")
    parser.add_argument("--overwrite", action="store_true", help="replace the cache that DIR holds")
    parser.add_argument("--shard-positions", type=int, metavar="N", help="positions per shard (default 262144)")


def _inputs(parser: argparse.ArgumentParser) -> None:
    """Options that decide what a cache will hold."""
    parser.add_argument("--teacher", default=None, metavar="NAME", help="model name or folder")
    parser.add_argument(
        "--data",
        required=True,
        nargs="+",
        metavar="SOURCE",
        help=".jsonl[.gz|.zst], .parquet, .txt, folder, glob, or dataset name",
    )

    _teacher(parser.add_argument_group("teacher"))

    group = parser.add_argument_group("what is stored of each distribution")
    group.add_argument("--top-k", type=int, metavar="K", help="entries per position (default 64)")
    group.add_argument(
        "--top-p", type=float, metavar="P", help="only as many entries as hold this mass (default 1: always K)"
    )
    group.add_argument("--min-k", type=int, metavar="K", help="floor under --top-p (default 32)")
    group.add_argument(
        "--tail-groups",
        type=int,
        metavar="G",
        help="mass of the tail in G groups of the vocabulary (default 0; `logitcache plan` shows what 32 would give)",
    )
    group.add_argument(
        "--precision",
        choices=list(PRESETS),
        help="exact: as captured, columns that any reader reads as they are; balanced (default): a third of the bytes, "
        "probabilities to 0.1 %% in sum; compact: 0.5 %%, fewer bytes still",
    )
    group.add_argument("--temperatures", type=_numbers, metavar="T,T", help="temperatures to train at, for example 1,2")
    group.add_argument("--tail-entropy", action="store_true", help="the tail's entropy")
    group.add_argument("--tail-samples", type=int, metavar="S", help="S ids drawn from the tail")

    group = parser.add_argument_group("corpus")
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


def _assignments(text: str) -> dict[str, Any]:
    """NAME=VALUE,NAME=VALUE; a value is JSON, or text without a comma."""
    assigned: dict[str, Any] = {}
    rest = text
    while rest:
        name, equals, rest = rest.partition("=")
        if not (equals and name.isidentifier()):
            raise argparse.ArgumentTypeError(f"{name + equals!r} in {text!r}: write NAME=VALUE,NAME=VALUE")
        if name in assigned:
            raise argparse.ArgumentTypeError(f"{text!r}: {name} stands there twice")
        assigned[name], rest = _value(rest)
    return assigned


def _value(text: str) -> tuple[Any, str]:
    """The value that `text` begins with, and what follows the comma after it."""
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    except ValueError:
        end = -1
    if end < 0 or text[end:].strip()[:1] not in ("", ","):
        value, _, rest = text.partition(",")
        return value, rest
    return value, text[end:].strip()[1:]


def _range(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r}: write I/N, for example 0/8")
    return int(index), int(count)

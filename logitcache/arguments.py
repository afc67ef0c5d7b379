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
    _import(commands)
    _export(commands)
    _push(commands)
    _pull(commands)
    _info(commands)
    _view(commands)
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
        "--rows", metavar="A:B", help="from row A, counted from 0, up to B: of the others little is fetched"
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
        help="0 or 1 for each token (default: loss_mask of top-k rows; without one all tokens but a row's first are trained)",
    )
    importing.add_argument("--top-k", type=int, metavar="K", help="at most so many entries per position (default: all)")
    importing.add_argument(
        "--precision",
        choices=list(PRESETS),
        help="exact: as decoded; balanced (default): a third of the bytes; compact: fewer bytes still",
    )
    importing.add_argument("--keep", type=_names, metavar="NAME,NAME", help="source columns to store in the cache")
    importing.add_argument(
        "--data-name", metavar="NAME", help="what the cache calls its corpus (default: the source's name)"
    )
    importing.add_argument("--skip-bad", action="store_true", help="leave bad rows out and count them")
    _output(importing)


def _export(commands: argparse._SubParsersAction[Parser]) -> None:
    export = commands.add_parser(
        "export",
        help="the rows of a cache in another tool's format: plain top-k rows, or Axolotl's",
        description="Writes the rows of a cache, with its kept columns, to one file in another tool's format. topk: input_ids, "
        "loss_mask, topk_ids, topk_logprobs, tail_logprob; nothing of these is lost. axolotl (a list of token and logprob per "
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
        type=_names,
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

"""Several commands share options, the import of engines, and how a cache is printed."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager

from logitcache.assembly.placement import EXECUTORS
from logitcache.assembly.plan import SHARD_POSITIONS
from logitcache.capture.engine import BACKENDS, ROUTES
from logitcache.commands.values import part_of
from logitcache.errors import UserError
from logitcache.reading.cache import LogitCache


def teacher_options(group: argparse._ArgumentGroup) -> None:
    """Adds the options that say how the teacher runs."""
    group.add_argument(
        "--backend",
        choices=BACKENDS,
        help="openai: a running vLLM server; auto (default): vLLM where it is installed, otherwise transformers",
    )
    group.add_argument(
        "--capture-route",
        choices=ROUTES,
        help="of vLLM; pooling sees the logits, flat gets top-k only; auto (default): pooling where it is possible",
    )
    group.add_argument("--base-url", metavar="URL", help="of the server, for example http://localhost:8000/v1")
    group.add_argument("--model", metavar="NAME", help="the name that the server serves the teacher by")
    group.add_argument("--revision", help="branch, tag or commit of the model")
    group.add_argument("--dtype", help="float32, bfloat16, float16; auto (default): the checkpoint's own")
    group.add_argument(
        "--attn-implementation",
        metavar="NAME",
        help="of transformers: eager, sdpa, flash_attention_2, … (default: sdpa, or eager where sdpa leaves out a part of the "
        "model's configuration)",
    )
    group.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")


def output_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say where a cache is written to."""
    parser.add_argument("--out", required=True, metavar="DIR", help="the new cache: a folder, or a URL such as s3://…")
    parser.add_argument("--overwrite", action="store_true", help="replace the cache that DIR holds")
    parser.add_argument(
        "--shard-positions", type=int, metavar="N", help=f"positions per shard (default {SHARD_POSITIONS})"
    )


def placement_options(parser: argparse.ArgumentParser, work: str, then: str) -> None:
    """Adds the options that say which processes work.  work: what each does of shards.  then: what follows the last."""
    group = parser.add_argument_group("many processes")
    group.add_argument("--executor", choices=EXECUTORS, help="ray: several workers, on one host or many")
    group.add_argument(
        "--workers", type=int, metavar="N", help="on Ray, with a core each (default: as many as the cluster has cores)"
    )
    ray_address_option(group)
    group.add_argument(
        "--shard-range",
        type=part_of,
        metavar="I/N",
        help=f"{work} the I-th of N parts of the shards, counted from 0, which N processes share without Ray; {then}",
    )


def ray_address_option(group: argparse._ArgumentGroup) -> None:
    """Adds the option that names a Ray cluster."""
    group.add_argument(
        "--ray-address",
        metavar="HOST:PORT",
        help="of a running Ray cluster (default: that of RAY_ADDRESS or of this machine, otherwise one is started here)",
    )


@contextmanager
def engines_needed() -> Iterator[None]:
    """Wraps the import of modules that run teachers. Raises UserError if a package that they need is not installed."""
    # Before transformers and vLLM are imported, which read these.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")  # of vLLM's processes
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install 'logitcache[capture]' (or [vllm])") from error


def refuse_unknown(rest: list[str], command: str) -> None:
    """Raises UserError for arguments that the command does not know."""
    if rest:
        raise UserError(f"unknown argument {rest[0]} (`logitcache {command} --help` lists the options)")


def print_cache(cache: LogitCache | None) -> None:
    """Prints where a cache is, what it holds and its identity; nothing of None, which a shard range gives."""
    if cache is None:
        return
    manifest = cache.manifest
    print(f"cache      {cache.path}")
    print(f"sequences  {len(cache):,}")
    print(f"positions  {cache.num_positions:,}")
    positions = max(cache.num_positions, 1)
    print(
        f"entries    {manifest.num_entries / positions:.1f} per position, {1 - manifest.mean_tail_mass:.2%} of the mass"
    )
    print(f"bytes      {manifest.num_bytes:,} ({manifest.num_bytes / positions:.0f} per position)")
    print(f"identity   {cache.identity}")


def print_rewritten(cache: LogitCache | None) -> None:
    """Prints a cache, and what the last step of its history changed."""
    print_cache(cache)
    if cache is None:
        return
    step = cache.manifest.history[-1]
    num_bytes, num_rows = (sum(source[name] for source in step["from"]) for name in ("bytes", "sequences"))
    duplicates = f", {step['duplicates']:,} duplicates left out" if "duplicates" in step else ""
    print(
        f"changed    {num_bytes:,} → {cache.manifest.num_bytes:,} bytes, {num_rows:,} → {len(cache):,} sequences{duplicates}"
    )

"""Options that several commands have."""

from __future__ import annotations

import argparse

from logitcache.capture.engine import BACKENDS, ROUTES


def teacher_options(group: argparse._ArgumentGroup) -> None:
    """How the teacher runs."""
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
    """Where a cache is written to."""
    parser.add_argument("--out", required=True, metavar="DIR", help="the new cache: a folder, or a URL such as s3://…")
    parser.add_argument("--overwrite", action="store_true", help="replace the cache that DIR holds")
    parser.add_argument("--shard-positions", type=int, metavar="N", help="positions per shard (default 262144)")

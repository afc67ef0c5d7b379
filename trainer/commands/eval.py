"""`trainer eval`."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import logitcache
from logitcache import UserError
from logitcache.errors import Parser
from trainer.commands.shared import check_writable, metrics_table, positive, quieten
from trainer.files import EVALUATION_NAME


def run(argv: Sequence[str]) -> int:
    """Measures a model; returns the exit status."""
    parser = Parser(prog="trainer eval", description="Measures a model against the teacher of a held-out cache.")
    parser.add_argument("model", help="a folder that `trainer fit` wrote, or any model folder or name")
    parser.add_argument("--cache", required=True, metavar="DIR", help="the held-out cache")
    parser.add_argument(
        "--batch_size", "--batch-size", type=positive, default=8, help="sequences at a time (default: 8)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON with the numbers (default: MODEL/eval.json)")
    args = parser.parse_args(argv)
    out = _evaluation_path(args)
    quieten()
    from trainer.evaluation.evaluate import check_overwrites_same_cache, evaluate_folder, write_evaluation

    cache = logitcache.open(args.cache)
    if args.out is None:
        check_overwrites_same_cache(out, cache)
    metrics = evaluate_folder(args.model, cache, batch_size=args.batch_size)
    print(metrics_table(metrics), flush=True)
    write_evaluation(out, args.model, cache, metrics)
    print(f"written to {out}")
    return 0


def _evaluation_path(args: Namespace) -> Path:
    if args.out is None and not Path(args.model).is_dir():
        raise UserError(f"{args.model} is no folder here: name the JSON file to write with --out")
    out = args.out or Path(args.model) / EVALUATION_NAME
    check_writable(out)
    return out

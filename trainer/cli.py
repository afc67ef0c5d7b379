"""trainer: trains a student from a cache of teacher log-probabilities.

usage: trainer fit --cache DIR --student NAME [options]     train
       trainer eval MODEL --cache DIR [options]             measure a model against a held-out cache
       trainer compare RUN… [--out FILE]                    finished runs side by side: a table and a picture

`trainer COMMAND --help` lists the options of a command.
"""

from __future__ import annotations

import os
import shlex
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

import logitcache
from logitcache import UserError
from logitcache.errors import Parser, one_line
from logitcache.table import aligned
from trainer.files import EVALUATION_NAME

METRICS = {
    "ce": "cross-entropy (nats)",
    "perplexity": "perplexity",
    "fkl": "FKL to the teacher, bucketed (nats)",
    "rkl": "RKL to the teacher, bucketed (nats)",
    "agreement": "top-1 agreement with the teacher",
    "ece": "expected calibration error",
    "teacher_tail": "teacher's mass outside the entries",
    "student_tail": "student's mass outside the entries",
    "positions": "positions",
}
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status: 0, 2 after bad input, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    name, *rest = arguments
    try:
        if name not in COMMANDS:
            raise UserError(f"unknown command {name}: choose {', '.join(COMMANDS)}")
        return COMMANDS[name](rest)
    except UserError as error:
        print(f"trainer: error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("trainer: stopped. `trainer fit … --resume_from_checkpoint true` continues from the last checkpoint")
        return INTERRUPTED


def _fit(argv: Sequence[str]) -> int:
    from trainer.arguments import parse

    config = parse(argv)
    _quieten()
    from trainer.fit import fit, prepare

    run = prepare(config)
    width = max(map(len, run.choices))

    def tell(choices: Mapping[str, str]) -> None:
        if config.process_index == 0:
            print(_lines(choices, width), flush=True)

    tell(run.choices)
    if config.process_index == 0:
        for warning in run.warnings:
            print(f"trainer: warning: {warning}", file=sys.stderr)
    outcome = fit(run, tell)
    if config.process_index != 0:
        return 0
    if outcome.stopped_at:
        again = shlex.join(["trainer", "fit", *argv, "--resume_from_checkpoint", outcome.stopped_at])
        print(f"trainer: stopped after step {outcome.steps}. This continues:\n  {again}")
        return INTERRUPTED
    print(f"\n{outcome.steps} steps done; model, tokenizer and run.json are in {config.output_dir}")
    if outcome.metrics:
        print(_metrics(outcome.metrics))
    return 0


def _eval(argv: Sequence[str]) -> int:
    parser = Parser(prog="trainer eval", description="Measures a model against the teacher of a held-out cache.")
    parser.add_argument("model", help="a folder that `trainer fit` wrote, or any model folder or name")
    parser.add_argument("--cache", required=True, metavar="DIR", help="the held-out cache")
    parser.add_argument(
        "--batch_size", "--batch-size", type=_positive, default=8, help="sequences at a time (default: 8)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON with the numbers (default: MODEL/eval.json)")
    args = parser.parse_args(argv)
    out = _evaluation_path(args)
    _quieten()
    from trainer.evaluate import check_overwrites_same_cache, evaluate_folder, write_evaluation

    cache = logitcache.open(args.cache)
    if args.out is None:
        check_overwrites_same_cache(out, cache)
    metrics = evaluate_folder(args.model, cache, batch_size=args.batch_size)
    print(_metrics(metrics), flush=True)
    write_evaluation(out, args.model, cache, metrics)
    print(f"written to {out}")
    return 0


def _evaluation_path(args: Namespace) -> Path:
    if args.out is None and not Path(args.model).is_dir():
        raise UserError(f"{args.model} is no folder here: name the JSON file to write with --out")
    out = args.out or Path(args.model) / EVALUATION_NAME
    _check_writable(out)
    return out


def _compare(argv: Sequence[str]) -> int:
    parser = Parser(prog="trainer compare", description="Finished runs side by side; seeds of one run make one row.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output folders of `trainer fit`")
    parser.add_argument(
        "--out", type=Path, default=Path("compare.png"), metavar="FILE", help="picture (default: compare.png)"
    )
    args = parser.parse_args(argv)
    _check_writable(args.out)
    from trainer.compare import compare

    print(compare(args.runs, args.out))
    print(f"curves: {args.out}")
    return 0


COMMANDS = {"fit": _fit, "eval": _eval, "compare": _compare}


def _check_writable(out: Path) -> None:
    if out.is_dir():
        raise UserError(f"--out {out}: this is a folder; name a file")
    if not os.access(out.parent, os.W_OK):
        raise UserError(f"--out {out}: no file can be written in {out.parent}: name an existing folder")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text}: a whole number of at least 1 is expected")
    return int(text)


def _quieten() -> None:
    """Keeps transformers' progress bars out of log files."""
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def _lines(pairs: Mapping[str, str], width: int) -> str:
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in pairs.items())


def _metrics(metrics: Mapping[str, float]) -> str:
    return aligned([(label, f"{metrics[name]:,.5g}") for name, label in METRICS.items()])

"""`trainer eval`."""

from __future__ import annotations

import os
from argparse import SUPPRESS, ArgumentTypeError, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import logitcache
from logitcache import UserError
from logitcache.errors import Parser
from trainer.commands.shared import check_writable, metrics_table, positive, quieten
from trainer.run.files import ANSWERS_NAME, EVALUATION_NAME
from trainer.terminal import say

if TYPE_CHECKING:
    from trainer.evaluation.generation_settings import GenerationSettings

ALWAYS_ACCEPTED = ("model", "cache", "batch_size", "out", "generate")
"""Arguments that do not need --generate."""


def run(argv: Sequence[str]) -> int:
    """Measures a model; returns the exit status."""
    args = make_parser().parse_args(argv)
    given = {name: value for name, value in vars(args).items() if name not in ALWAYS_ACCEPTED}
    if given and not args.generate:
        raise UserError(f"--{next(iter(given))} needs --generate")
    if args.cache is None and not args.generate:
        raise UserError(
            "name what to measure on: a held-out cache with --cache, prompts with --generate --data, or both"
        )
    if args.out is not None and args.cache is None:
        raise UserError("--out is for the numbers of --cache; --answers names the folder of answers and their scores")
    quieten()
    answers = _answers(args, given) if args.generate else None  # refused before anything is measured
    if args.cache is not None:
        _evaluate(args)
    if answers is not None:
        from trainer.evaluation.protocol import generate_scores, scores_table
        from trainer.run.output_folder import folder_held

        folder, settings = answers
        with folder_held(folder, "--answers"):
            scores = generate_scores(args.model, folder, settings, say)
        say(scores_table(scores))
        say(f"written to {folder}: {', '.join(f'{stem}.json' for stem in scores)} and the answers")
    return 0


def make_parser() -> Parser:
    """Makes the parser of `trainer eval`."""
    parser = Parser(
        prog="trainer eval",
        description="Measures a model: against the teacher of a held-out cache, by the answers that it writes, or both.",
    )
    parser.add_argument("model", help="a folder that `trainer fit` wrote, or any model folder or name")
    parser.add_argument("--cache", metavar="DIR", help="the held-out cache")
    parser.add_argument(
        *("--batch_size", "--batch-size"),
        type=positive,
        help="sequences at a time (default: 8 of a cache, 32 when generating; it changes no answer, up to rounding in half "
        "precision)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="JSON with the numbers of --cache (default: MODEL/eval.json)"
    )
    group = parser.add_argument_group("answers", "generated from prompts and scored with ROUGE-L against references")
    group.add_argument("--generate", action="store_true", help="generate answers to the prompts of --data")

    def add(name: str, *, help: str, **more: object) -> None:
        names = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        group.add_argument(*names, default=SUPPRESS, help=help, **more)  # type: ignore[arg-type]

    add(
        "data",
        nargs="+",
        metavar="FILE",
        help=".jsonl, .jsonl.gz, .jsonl.zst or .parquet with `prompt` and `completion` (a text, or a list of references), or "
        "`messages`",
    )
    add("columns", type=_mapping, metavar="OURS=THEIRS,…", help="rename columns: prompt=question,completion=answer")
    add(
        "prompt_template",
        action="append",
        metavar="TEXT",
        help=r"the prompt from {column} fields, \n is a new line; given several times, a row takes the first whose columns "
        "all have text in it, or else the last",
    )
    add("chat_template", metavar="FILE", help="Jinja template for `messages` (default: the tokenizer's own)")
    add(
        "seeds", nargs="+", type=_from_0, metavar="N", help="each is one run over all prompts (default: 10 20 30 40 50)"
    )
    add("temperature", type=float, metavar="T", help="of sampling; 0: greedy, once (default: 1)")
    add("max_new_tokens", type=positive, metavar="N", help="of an answer (default: 256)")
    add(
        "max_prompt_length",
        type=positive,
        metavar="N",
        help="tokens; longer prompts are left out and counted (default: all must fit the model)",
    )
    add(
        "backend",
        metavar="NAME",
        help="transformers, vllm, or auto: vllm where it is installed and CUDA is there (default: auto); on a CPU in "
        "float32, on CUDA in the precision of the weights as they are saved",
    )
    add("answers", type=Path, metavar="FOLDER", help="for scores and answers (default: MODEL/generate)")
    return parser


def _evaluate(args: Namespace) -> None:
    if args.out is None and not Path(args.model).is_dir():
        raise UserError(f"{args.model} is no folder here: name the JSON file to write with --out")
    out = args.out or Path(args.model) / EVALUATION_NAME
    check_writable(out)
    from trainer.evaluation.evaluate import check_overwrites_same_cache, evaluate, write_evaluation

    cache = logitcache.open(args.cache)
    if args.out is None:
        check_overwrites_same_cache(out, cache)
    metrics = evaluate(args.model, cache, batch_size=args.batch_size or 8)
    say(metrics_table(metrics))
    write_evaluation(out, args.model, cache, metrics)
    say(f"written to {out}")


def _answers(args: Namespace, given: Mapping[str, Any]) -> tuple[Path, GenerationSettings]:
    """Returns the folder of the answers and the settings of their making. given: options of --generate."""
    from trainer.evaluation.generation_settings import GenerationSettings

    options = {"data": (), **given}
    folder = options.pop("answers", Path(args.model) / ANSWERS_NAME)
    if "answers" not in given and not Path(args.model).is_dir():
        raise UserError(f"{args.model} is no folder here: name a folder for the answers with --answers")
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"--answers {folder}: {existing} is a file; name a folder")
    if not os.access(existing, os.W_OK):
        raise UserError(f"--answers {folder}: nothing can be written in {existing}; name another folder")
    if args.batch_size is not None:
        options["batch_size"] = args.batch_size
    return folder, GenerationSettings(**options)


def _mapping(text: str) -> dict[str, str]:
    pairs = [part.split("=", 1) for part in text.split(",")]
    if not all(len(pair) == 2 and all(pair) for pair in pairs):
        raise ArgumentTypeError(f"{text}: OURS=THEIRS,… is expected, for example prompt=question,completion=answer")
    return {ours.strip(): theirs.strip() for ours, theirs in pairs}


def _from_0(text: str) -> int:
    if not text.isdecimal():
        raise ArgumentTypeError(f"{text}: whole numbers from 0 are expected")
    return int(text)

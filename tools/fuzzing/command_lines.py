"""Command lines of both programs: every option that their parsers have, with values good, odd and contradictory."""

from __future__ import annotations

import argparse
import dataclasses
import os
from typing import Any

from trial import FIT, Command, Trial

ODD_VALUES = (
    *("", " ", "0", "1", "2", "-1", "0.5", "1e400", "nan", "inf", "-inf", "99999999999999999999", "1_0", "٣", "true"),
    *(
        "x",
        "x=y",
        "a=1,b=[1",
        "prompt=text",
        "1,2",
        "2,2,x",
        "0:2",
        "2:0",
        ":",
        "1/2",
        "3/2",
        "0/0",
        "fkl",
        "fkl@0,rkl@0.5",
    ),
    *(
        "auto",
        "vllm",
        "transformers",
        "float16",
        "/",
        ".",
        "/dev/null",
        "nowhere",
        "../../x",
        "x" * 5000,
        "\udcff",
        "no",
    ),
    *(
        "{}",
        "[]",
        '{"a": 1}',
        "--",
        "-",
        "@x",
        "~",
        "~nobody/x",
        "*",
        "[x",
        "memory://x",
        "file:///",
        "x://y",
        "http://[",
    ),
    *("::", "\x1b[2J"),
)
"""None that waits for somebody, and none of another machine."""
NEVER = {"--help", "-h", "--base-url", "--ray-address", "--trust-remote-code"}
"""Nor options that do either, or run what they are told to."""


def command_lines(trial: Trial) -> list[Command]:
    """A command with what it needs, mostly, and some options more."""
    from logitcache.cli import parser

    commands = {("logitcache", name): _options(of) for name, of in _subcommands(parser()).items()}
    commands |= {("trainer", name): options for name, options in _of_the_trainer().items()}
    program, name = trial.choose(sorted(commands))
    required = _required(trial)[program, name]
    if trial.maybe(0.15):
        required = trial.random.sample(required, trial.random.randrange(len(required) + 1))
    line = [argument for group in required for argument in group]
    options = commands[program, name]
    for option, takes in trial.random.sample(options, min(trial.choose([0, 1, 1, 2, 3, 6]), len(options))):
        line += [option, *[_value(trial) for _ in range(trial.choose([1, 1, 1, 1, 2, 0]))]] if takes else [option]
    if trial.maybe(0.1):
        line.insert(trial.random.randrange(len(line) + 1), _value(trial))
    return [[program, name if trial.maybe(0.98) else _value(trial), *line]]


def _value(trial: Trial) -> str:
    material = trial.material
    good = [str(material / name) for name in ("cache", "exact", "teacher", "student", "run", "documents.jsonl")]
    return str(trial.choose([*good, str(trial.path()), *ODD_VALUES] if trial.maybe(0.8) else good))


def _required(trial: Trial) -> dict[tuple[str, str], list[list[str]]]:
    """Groups of arguments without which a command does nothing."""
    cache, student, run = (str(trial.material / name) for name in ("cache", "student", "run"))
    out, teacher = ["--out", str(trial.path())], ["--teacher", str(trial.material / "teacher")]
    corpus = [teacher, ["--data", str(trial.material / "documents.jsonl")], ["--backend", "transformers"]]
    tokenizer = ["--tokenizer", str(trial.material / "teacher")]
    fit = [["--cache", cache], ["--student", student], ["--output_dir", str(trial.path())], FIT]
    return {
        ("logitcache", "build"): [*corpus, out],
        ("logitcache", "plan"): corpus,
        ("logitcache", "finish"): [[str(trial.path())]],
        **{("logitcache", name): [[cache]] for name in ("info", "view", "verify")},
        **{("logitcache", name): [[cache], out] for name in ("recode", "slice", "merge")},
        ("logitcache", "push"): [[cache], [str(trial.path(trial.choose(["", ".tar.zst"])))]],
        ("logitcache", "pull"): [[cache], out],
        ("logitcache", "import"): [[cache], ["--from", trial.choose(["topk", "distillkit"])], teacher, tokenizer, out],
        ("logitcache", "export"): [[cache], ["--to", "topk"], ["--out", str(trial.path(".jsonl"))]],
        ("trainer", "fit"): fit,
        ("trainer", "eval"): [[student], ["--cache", cache], ["--out", str(trial.path(".json"))]],
        ("trainer", "compare"): [[run]],
    }


def _subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    return next(
        dict(action.choices or {}) for action in parser._actions if isinstance(action, argparse._SubParsersAction)
    )


def _options(parser: argparse.ArgumentParser) -> list[tuple[str, bool]]:
    """Each option, and whether it takes a value."""
    options = [(name, action.nargs != 0) for action in parser._actions for name in action.option_strings[:1]]
    return [(name, takes) for name, takes in options if name not in NEVER]


def _of_the_trainer() -> dict[str, list[tuple[str, bool]]]:
    from trainer.commands import compare, eval
    from trainer.config.config import DistillConfig

    fields: list[Any] = [field for field in dataclasses.fields(DistillConfig) if field.init]
    return {
        "fit": [(f"--{field.name}", True) for field in fields],
        "eval": _options(eval.make_parser()),
        "compare": _options(compare._parser()),
    }


os.environ.setdefault("HF_HUB_OFFLINE", "1")

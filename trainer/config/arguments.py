"""The command line of `trainer fit`, and the same settings in a YAML file, as a DistillConfig."""

from __future__ import annotations

import dataclasses
import json
from argparse import Action, ArgumentDefaultsHelpFormatter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from transformers import HfArgumentParser

from logitcache import UserError
from logitcache.errors import Parser, one_line
from trainer.config.config import DistillConfig
from trainer.config.marked_yaml import MarkedYaml, read_yaml, suggestion

DESCRIPTION = """Train a student from a cache. Every field of transformers.TrainingArguments is an option under its own
name, listed first; what distillation adds comes last. Options may be written with _ or -."""
SETTINGS = [field.name for field in dataclasses.fields(DistillConfig) if field.init]
LISTS = ("cache", "average_with")  # options that may be repeated
EXAMPLE = """example: trainer fit --cache my-cache --eval_cache my-heldout-cache --student Qwen/Qwen3-0.6B --loss todi
--output_dir runs/todi --learning_rate 5e-5 --num_train_epochs 1 --bf16"""


def parse(argv: Sequence[str]) -> DistillConfig:
    """Reads settings from a command line and from the YAML file that it names with --config; the command line wins.

    Raises:
        UserError: a setting is unknown, a value does not parse, or settings contradict each other.
    """
    only_config = Parser(prog="trainer fit", add_help=False, allow_abbrev=False)
    only_config.add_argument("--config")
    path = only_config.parse_known_args(argv)[0].config
    parser = _FitParser(
        cast(Any, DistillConfig),
        prog="trainer fit",
        usage="trainer fit --cache DIR --student NAME [--config FILE] [options]",
        description=DESCRIPTION,
        epilog=EXAMPLE,
        allow_abbrev=False,
        formatter_class=_Help,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of these settings.")
    from_file = [] if path is None else _arguments_of(Path(path))
    try:
        config, _, unknown = parser.parse_args_into_dataclasses(
            [*from_file, *_gathered(argv)], return_remaining_strings=True, look_for_args_file=False
        )
    except UserError:
        raise
    except ValueError as error:
        raise UserError(one_line(error)) from error
    if unknown:
        close = suggestion(unknown[0].lstrip("-").partition("=")[0].replace("-", "_"), SETTINGS)
        raise UserError(f"unknown option {unknown[0]}{close}; `trainer fit --help` lists all")
    return config


def _gathered(argv: Sequence[str]) -> list[str]:
    """Gathers the values of a list's repeated option (--cache A --cache B) after one of them."""
    others: list[str] = []
    lists: dict[str, list[str]] = {}
    into = others
    for argument in argv:
        option, equals, value = argument.partition("=")
        name = option.removeprefix("--").replace("-", "_") if option.startswith("--") else ""
        if name in LISTS:
            into = lists.setdefault(name, [])
            into += [value] if equals else []
        else:
            into = others if argument.startswith("-") else into
            into.append(argument)
    return [*others, *(part for name, values in lists.items() for part in (f"--{name}", *values))]


class _FitParser(Parser, HfArgumentParser):
    """transformers' parser, whose errors are UserErrors."""


class _Help(ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def _arguments_of(path: Path) -> list[str]:
    """Turns the settings of a YAML file into command-line arguments, so that both are read by the same rules."""
    file = read_yaml(path)
    if not isinstance(file.content, Mapping):
        raise UserError(f"{path}: a mapping of settings to values is expected, such as `loss: todi`")
    arguments: list[str] = []
    for key, value in file.content.items():
        name = setting_name(file, key)
        try:
            arguments += as_arguments(name, value)
        except UserError as error:
            raise file.error(str(error), key) from error
    return arguments


def setting_name(file: MarkedYaml, *keys: Any) -> str:
    """Returns the setting that a key of a YAML file names. Raises UserError if there is none of this name."""
    name = str(keys[-1]).replace("-", "_")
    if name not in SETTINGS:
        close = suggestion(name, SETTINGS)
        raise file.error(f"unknown setting {keys[-1]}{close}; `trainer fit --help` lists all", *keys)
    return name


def as_arguments(name: str, value: Any) -> list[str]:
    """Writes a setting of a YAML file as arguments of the command line."""
    if value is None:
        return []
    if name == "fsdp" and isinstance(value, bool):  # transformers takes it bare, or an old list of options
        return ["--fsdp"] * value
    if isinstance(value, list):
        if not all(isinstance(part, str | int | float) for part in value):
            written = "; PATH:WEIGHT is written without a space" if name == "cache" else ""
            raise UserError(f"{name}: a list of plain values is expected, not {value}{written}")
        if name.endswith("_schedule"):
            return [f"--{name}={','.join(map(str, value))}"]
        return [f"--{name}", *map(str, value)]
    if isinstance(value, Mapping):
        return [f"--{name}={json.dumps(value)}"]
    if value is False and name.endswith("_strategy"):  # YAML 1.1 reads `no` as false
        return [f"--{name}=no"]
    return [f"--{name}={str(value).lower() if isinstance(value, bool) else value}"]

"""A recipe: runs × losses × seeds from one YAML file, each a folder and the settings of a `trainer fit`.

output_dir: runs/demo                       # folders RUN-LOSS-SEED below it
seeds: [1, 2, 3]
losses: [fkl, todi]                         # optional: the runs below with each of these
common: {cache: train, eval_cache: heldout, student: gpt2}
runs:                                       # the differences; a run with a loss of its own or kd_weight 0 is done once
  hard labels: {kd_weight: 0}
  KD: {kd_weight: 0.9}
generate: {data: [dolly.jsonl]}             # optional: options of `trainer eval --generate`, for each student
launch: torchrun --nproc-per-node 8         # optional: every run on several ranks, one run at a time
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logitcache import UserError
from trainer.comparison.launch import Launcher, launcher
from trainer.comparison.run_groups import displayed
from trainer.config.arguments import as_arguments, parse, setting_name
from trainer.config.config import DistillConfig
from trainer.config.marked_yaml import MarkedYaml, read_yaml, suggestion
from trainer.evaluation.generation_settings import GenerationSettings

KEYS = ["output_dir", "seeds", "losses", "common", "runs", "generate", "launch"]
LOSSES = ("loss", "loss_schedule")  # a run that names one of them is done with that only
LARGEST_SEED = 2**32 - 1  # of NumPy
LONGEST_NAME_BYTES = 255  # of Linux and macOS
ELSEWHERE = {
    "seed": "seeds belong into `seeds: [1, 2, 3]` at the top",
    "output_dir": "it belongs to the top: the folders of the runs are made below it",
    "resume_from_checkpoint": "leave it out: a run that was interrupted is continued by itself",
}


@dataclass(frozen=True)
class PlannedRun:
    """One `trainer fit`. row: name of its row.  where: line of the recipe.  ranks: as of Launcher."""

    row: str
    where: str
    arguments: list[str]
    config: DistillConfig
    ranks: int | None

    @property
    def folder(self) -> Path:
        """The output folder of the run."""
        return Path(str(self.config.output_dir))


@dataclass(frozen=True)
class Recipe:
    """Runs in the order of the file, seeds of one row together.

    generate: answers wanted of each student, or None.  launch: what starts the ranks of a run; None for one rank.
    """

    path: Path
    output_dir: Path
    runs: list[PlannedRun]
    generate: GenerationSettings | None
    launch: Launcher | None


def read_recipe(path: Path) -> Recipe:
    """Reads a recipe and checks the settings of every run.

    Raises UserError that names file and line: for names that do not exist, values and combinations that `trainer fit`
    refuses, and runs that would share a folder or a row.
    """
    file = read_yaml(path)
    content = _mapping(file, file.content)
    for key in content:
        if key not in KEYS:
            raise file.error(f"unknown key {key}{suggestion(str(key), KEYS)}; accepted are {', '.join(KEYS)}", key)
    output_dir = content.get("output_dir")
    if not isinstance(output_dir, str) or not output_dir:
        raise file.error("output_dir: the folder of all runs is expected, such as runs/demo", "output_dir")
    launch = _launch(file, content.get("launch"))
    runs: list[PlannedRun] = []
    for row, folder, settings, keys in _rows(file, content):
        for seed in _seeds(file, content.get("seeds")):
            named = settings | {"seed": seed, "output_dir": str(Path(output_dir) / f"{folder}-{seed}")}
            runs.append(_planned_run(file, keys, row, named, launch))
    _check_distinct(file, runs)
    return Recipe(path, Path(output_dir), runs, _generate(file, content.get("generate")), launch)


def _rows(file: MarkedYaml, content: Mapping[str, Any]) -> Iterator[tuple[str, str, dict[str, Any], tuple[str, ...]]]:
    """Yields the name, the beginning of the folder's name, the settings and the place of each row."""
    common = _settings(file, content.get("common") or {}, "common")
    losses = content.get("losses")
    if losses is not None and not _different_names(losses):
        raise file.error("losses: a list of different divergences is expected, such as [fkl, todi]", "losses")
    for name in LOSSES:
        if losses and name in common:
            raise file.error(f"common names a {name}, and so does `losses`: leave one of them out", "common", name)
    runs = _mapping(file, content.get("runs") or {}, "runs")
    if not runs:
        raise file.error("runs: at least one is expected, such as `runs: {KD: {kd_weight: 0.9}}`", "runs")
    for key, differs in runs.items():
        name, keys = str(key), ("runs", str(key))
        folder = re.sub(r"[^\w.]+", "-", name).strip("-.")
        if not folder:
            raise file.error(f"runs: {name!r} makes no name of a folder: it needs a letter or a digit", *keys)
        settings = common | _settings(file, differs or {}, *keys)
        if losses and not settings.keys() & {*LOSSES} and settings.get("kd_weight") != 0:
            for loss in losses:
                row = f"{name} {displayed(str(loss))}"
                yield row, f"{folder}-{loss}", settings | {"loss": str(loss)}, keys
        else:
            yield name, folder, settings, keys


def _different_names(losses: Any) -> bool:
    plain = isinstance(losses, list) and all(isinstance(loss, str) for loss in losses)
    return plain and 0 < len(losses) == len(set(losses))


def _settings(file: MarkedYaml, given: Any, *keys: str) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for key, value in _mapping(file, given, *keys).items():
        name = setting_name(file, *keys, key)
        if name in ELSEWHERE:
            raise file.error(f"{key} is no setting of one run: {ELSEWHERE[name]}", *keys, key)
        settings[name] = value
    return settings


def _mapping(file: MarkedYaml, given: Any, *keys: str) -> Mapping[str, Any]:
    if not isinstance(given, Mapping):
        raise file.error(f"{keys[-1] if keys else 'a recipe'}: names and values are expected, got {given!r}", *keys)
    return given


def _seeds(file: MarkedYaml, seeds: Any) -> list[int]:
    whole = isinstance(seeds, list) and all(type(seed) is int and 0 <= seed <= LARGEST_SEED for seed in seeds)
    if not whole or not seeds or len(set(seeds)) < len(seeds):
        received = "nothing" if seeds is None else repr(seeds)
        raise file.error(
            f"seeds: a list of different whole numbers up to 2³²−1 is expected, such as [1, 2, 3]; got {received}",
            "seeds",
        )
    return list(seeds)


def _planned_run(
    file: MarkedYaml, keys: tuple[str, ...], row: str, settings: Mapping[str, Any], launch: Launcher | None
) -> PlannedRun:
    arguments = [argument for name, value in settings.items() for argument in as_arguments(name, value)]
    try:
        with _environment_kept():
            config = parse(arguments)
        for name in ("cache", "eval_cache", "student"):
            if not getattr(config, name):
                raise UserError(f"{name} is missing: name it in `common`")
        if config.fsdp and (launch is None or launch.ranks == 1):
            raise UserError("fsdp shards a model over ranks: `launch: torchrun …` at the top starts several")
    except UserError as error:
        raise file.error(f"run {row}: {error}", *keys) from error
    return PlannedRun(row, file.where(*keys), arguments, config, launch.ranks if launch else 1)


@contextmanager
def _environment_kept() -> Iterator[None]:
    """Takes back the variables that TrainingArguments writes for its own process: no other run must see them."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _check_distinct(file: MarkedYaml, runs: list[PlannedRun]) -> None:
    folders: dict[str, PlannedRun] = {}
    rows: dict[str, str] = {}
    for run in runs:
        if len(os.fsencode(run.folder.name)) > LONGEST_NAME_BYTES:
            raise UserError(
                f"{run.where}: runs: {run.folder.name} is longer than the {LONGEST_NAME_BYTES} bytes that a folder's name has"
            )
        former = folders.setdefault(str(run.folder).casefold(), run)
        if former is not run:
            raise UserError(f"{run.where}: {run.row} and {former.row} would share the folder {run.folder}: rename one")
        if rows.setdefault(run.row, run.where) != run.where:
            raise UserError(f"{run.where}: two rows are called {run.row}: rename one")


def _generate(file: MarkedYaml, options: Any) -> GenerationSettings | None:
    if options is None:
        return None
    names = [field.name for field in dataclasses.fields(GenerationSettings)]
    for key in _mapping(file, options, "generate"):
        if key not in names:
            raise file.error(
                f"unknown option {key}{suggestion(str(key), names)}; `trainer eval --help` lists all", "generate", key
            )
    try:
        return GenerationSettings(**({"data": ()} | options))
    except UserError as error:
        raise file.error(f"generate: {error}", "generate") from error


def _launch(file: MarkedYaml, line: Any) -> Launcher | None:
    try:
        return None if line is None else launcher(line)
    except UserError as error:
        raise file.error(str(error), "launch") from error

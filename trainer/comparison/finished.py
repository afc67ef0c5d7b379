"""Finished runs, read from the files that `trainer fit` left."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import logitcache
from logitcache import UserError
from logitcache.urls import public_url
from trainer.comparison.generation import Answers, read_answers
from trainer.comparison.settings import filled_in
from trainer.config.metrics import CURVES, ROUGE_L
from trainer.config.schedules import parse_points
from trainer.evaluation.identity import identities
from trainer.run.files import EVALUATION_NAME, RUN_NAME, STATE_NAME, read_record

NUMBER = int | float
SETTINGS_SHAPE = {
    "seed": (int,),
    "data_seed": (int | None,),
    "loss": (str,),
    "kd_weight": (NUMBER,),
    "kd_weight_schedule": (str | None,),
}
ENTRY_SHAPE = {
    "step": int,
    **{f"eval_{name}": (NUMBER,) for name in CURVES},
    **dict.fromkeys(["tokens_per_second", "data_wait", "train_runtime"], (NUMBER,)),
}
"""The parts of run.json and of the log in trainer_state.json that are read."""


@dataclass(frozen=True)
class FinishedRun:
    """A finished run, read from its files.

    Attributes:
        metrics: the known metrics of the held-out cache, of the answers and of the pace, by names of `config.metrics`.
        curves: metric → {step: value}.
        answers: by data file.
        notes: on anything that is left out.
    """

    path: Path
    settings: Mapping[str, Any]
    tail: str
    eval_cache: str
    eval_cache_sha256: str
    metrics: Mapping[str, float]
    curves: Mapping[str, Mapping[int, float]]
    answers: Mapping[str, Answers]
    notes: Sequence[str]

    @property
    def seeds(self) -> tuple[int, int]:
        """The seed of the weights, and the seed of the order of the rows."""
        seed, of_data = self.settings["seed"], self.settings.get("data_seed")
        return int(seed), int(seed if of_data is None else of_data)

    @property
    def learnt_from_labels_only(self) -> bool:
        """Whether the weight of the teacher was 0 throughout."""
        schedule = self.settings.get("kd_weight_schedule")
        if not schedule:
            return bool(self.settings["kd_weight"] == 0)
        points = parse_points(schedule, f"{self.path / RUN_NAME}: kd_weight_schedule", float, from_start=False)
        return all(weight == 0 for _, weight in points)


def read_run(path: Path) -> FinishedRun:
    """Reads a run. Raises UserError for a folder without a finished run that has a held-out evaluation."""
    record = _record(path, RUN_NAME, settings=SETTINGS_SHAPE, tail=str)
    evaluation = _record(path, EVALUATION_NAME, cache=str, cache_sha256=str, metrics={...: NUMBER})
    history = _record(path, STATE_NAME, log_history=[ENTRY_SHAPE])["log_history"]
    curves = {
        name: {int(entry["step"]): float(entry[f"eval_{name}"]) for entry in history if f"eval_{name}" in entry}
        for name in CURVES
    }
    answers, notes = read_answers(path)
    rouge = {ROUGE_L + stem: of.rouge_l for stem, of in answers.items()}
    return FinishedRun(
        path,
        filled_in(record["settings"]),
        record["tail"],
        public_url(evaluation["cache"]),
        evaluation["cache_sha256"],
        evaluation["metrics"] | rouge | _pace(record["settings"], history),
        curves,
        answers,
        notes,
    )


def read_runs(paths: Sequence[Path]) -> list[FinishedRun]:
    """Reads runs that stand side by side; answers that were made differently from the first run's are left out.

    Raises UserError if a folder is named twice, or if two runs were evaluated on different data.
    """
    known: dict[Path, Path] = {}
    for path in paths:
        if known.setdefault(path.resolve(), path) is not path:
            raise UserError(f"{path} is named twice: it would count as two runs")
    runs = [read_run(path) for path in paths]
    for run in runs[1:]:
        if not _same_cache(run, runs[0]):
            raise UserError(
                f"{run.path} was evaluated on the cache {run.eval_cache}, {runs[0].path} on another one, "
                f"{runs[0].eval_cache}: compare runs with the same --eval_cache"
            )
    first: dict[str, FinishedRun] = {}
    for run in runs:
        first |= {stem: run for stem in run.answers if stem not in first}
    return [_with_comparable_answers(run, first) for run in runs]


def _same_cache(a: FinishedRun, b: FinishedRun) -> bool:
    """Says whether two runs were evaluated on one cache, of which a former version may have recorded another hash."""
    if a.eval_cache_sha256 == b.eval_cache_sha256:
        return True
    for path in (a.eval_cache, b.eval_cache):
        with suppress(UserError, OSError):
            if {a.eval_cache_sha256, b.eval_cache_sha256} <= {*identities(logitcache.open(path))}:
                return True
    return False


def _with_comparable_answers(run: FinishedRun, first: Mapping[str, FinishedRun]) -> FinishedRun:
    metrics, notes = dict(run.metrics), list(run.notes)
    for stem, answers in run.answers.items():
        wanted, settings = first[stem].answers[stem].settings, answers.settings
        differ = [name for name in {**wanted, **settings} if wanted.get(name) != settings.get(name)]
        if differ:
            del metrics[ROUGE_L + stem]
            notes.append(
                f"{run.path}: its answers to {stem} were made with another {', '.join(differ)} than those of "
                f"{first[stem].path}: left out"
            )
    return dataclasses.replace(run, metrics=metrics, notes=notes)


def _pace(settings: Mapping[str, Any], history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Computes medians of the logged pace, and the minutes of a run that was never interrupted: each part counts its own."""
    logged = {
        name: [float(entry[name]) for entry in history if name in entry and math.isfinite(entry[name])]
        for name in ("tokens_per_second", "data_wait")
    }
    pace = {name: median(values) for name, values in logged.items() if values}
    runtimes = [entry["train_runtime"] for entry in history if "train_runtime" in entry]
    if runtimes and not settings.get("resume_from_checkpoint"):
        pace["minutes"] = runtimes[-1] / 60
    return pace


def _record(folder: Path, name: str, **shapes: Any) -> dict[str, Any]:
    record = read_record(folder / name, **shapes)
    if record is None:
        raise UserError(
            f"{folder} is no finished run with a held-out evaluation: it has no {name}. "
            "`trainer fit --eval_cache DIR --output_dir RUN` makes one"
        )
    return record

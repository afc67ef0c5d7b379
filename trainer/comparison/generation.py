"""Answers that a student wrote: of which model, with which settings, and whether they can be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from logitcache import UserError
from trainer.evaluation.completion_files import read_scores
from trainer.evaluation.generation_settings import GenerationSettings
from trainer.evaluation.identity import WEIGHTS, model_identity
from trainer.evaluation.prompts import data_stem
from trainer.evaluation.protocol import choose_backend
from trainer.model.student import student_config
from trainer.run.files import ANSWERS_NAME


@dataclass(frozen=True)
class Answers:
    """Answers to the prompts of one data file.

    Attributes:
        rouge_l: their score, ×100.
        settings: all that they depend on beside the model.
    """

    rouge_l: float
    settings: Mapping[str, Any]


def read_answers(folder: Path) -> tuple[dict[str, Answers], list[str]]:
    """Reads the answers of the folder's present model, by stem of the data file, and notes on answers that are left out."""
    found, notes = {}, []
    for path in sorted((folder / ANSWERS_NAME).glob("*.json")):
        try:
            scores = read_scores(path) or {}
            answers = Answers(float(scores["rouge_l"]), {"data_sha256": scores["data_sha256"], **scores["settings"]})
            current = scores["model_identity"] == identity_of(folder)
        except (UserError, KeyError, TypeError, ValueError):
            notes.append(f"{path} holds no scores of this model's answers: left out")
            continue
        if current:
            found[path.stem] = answers
        else:
            notes.append(f"{path} is of another model than the one that lies there now: left out")
    return found, notes


def remove_other_answers(folder: Path, settings: GenerationSettings) -> list[str]:
    """Removes answers with other settings, which `trainer eval` refuses to replace; returns names of those settings."""
    decisive = settings.decisive(choose_backend(settings.backend, str(folder)))
    names: list[str] = []
    for data in settings.data:
        path = _scores_path(folder, data)
        scores = read_scores(path)
        differ = [name for name in decisive if scores and scores["settings"].get(name) != decisive[name]]
        if scores and differ:
            path.unlink()
            for run in scores["seeds"].values():
                (path.parent / Path(run["answers"]).name).unlink(missing_ok=True)
            names += differ
    return list(dict.fromkeys(names))


def check_answers_folder(folder: Path, settings: GenerationSettings) -> None:
    """Raises UserError if scores would replace a file of another kind."""
    for data in settings.data:
        path = _scores_path(folder, data)
        try:
            read_scores(path)
        except UserError as error:
            raise UserError(f"{path} holds no scores, and those of {data} belong there: move it away") from error


def identity_of(folder: Path) -> str:
    """Returns the identity of the model in a folder; its weights are read again only after they have changed."""
    weights = sorted({path for pattern in WEIGHTS for path in folder.glob(pattern)})
    stats = [(path, path.stat()) for path in weights]
    return _identity(str(folder), tuple((path.name, stat.st_size, stat.st_mtime_ns) for path, stat in stats))


@cache
def _identity(folder: str, weights: Sequence[tuple[str, int, int]]) -> str:
    return model_identity(folder, student_config(folder))


def _scores_path(folder: Path, data: str) -> Path:
    return folder / ANSWERS_NAME / f"{data_stem(data)}.json"

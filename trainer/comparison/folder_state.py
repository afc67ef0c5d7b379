"""What a run's folder holds already: everything, a checkpoint to continue from, or another run."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import logitcache
from logitcache import UserError
from trainer.comparison.recipe import PlannedRun
from trainer.comparison.settings import matters
from trainer.config import DistillConfig
from trainer.data.training_data import open_training_data
from trainer.evaluation.evaluate import cache_sha256
from trainer.evaluation.generation_settings import GenerationSettings
from trainer.evaluation.prompts import data_stem
from trainer.files import ANSWERS_NAME, EVALUATION_NAME, RUN_NAME, STATE_NAME


@dataclass(frozen=True)
class FolderState:
    """differs: why the run that is there, which would be lost, is another one.  done: it is finished, on these caches.

    checkpoint: where it continues from, or None.
    """

    differs: list[str]
    done: bool
    checkpoint: Path | None


def folder_state(run: PlannedRun) -> FolderState:
    """Raises UserError for a cache that does not open and for a record that is not JSON."""
    checkpoints = _checkpoints(run.folder)
    record = _json(run.folder / RUN_NAME)
    if record is None:
        differs = [f"it holds {checkpoints[-1].name} and no {RUN_NAME}"] if checkpoints else []
        return FolderState(differs, False, None)
    differs = _differences(record["settings"], json.loads(run.config.to_json_string()))
    if differs:
        return FolderState(differs, False, None)
    learnt_from = [cache["identity"] for cache in record["cache"].get("caches", [])]
    if learnt_from != _identities(tuple(run.config.cache or ()), tuple(run.config.average_with or ())):
        begun = checkpoints and not (run.folder / EVALUATION_NAME).exists()
        return FolderState([f"{record['cache']['path']} has changed since it began"] if begun else [], False, None)
    evaluation = _json(run.folder / EVALUATION_NAME)
    done = (
        evaluation is not None
        and (run.folder / STATE_NAME).exists()
        and (run.folder / EVALUATION_NAME).stat().st_mtime >= (run.folder / RUN_NAME).stat().st_mtime
        and evaluation["cache_sha256"] == _held_out_sha256(str(run.config.eval_cache))
    )
    whole = [checkpoint for checkpoint in checkpoints if (checkpoint / STATE_NAME).exists()]
    return FolderState([], done, whole[-1] if whole else None)


def _checkpoints(folder: Path) -> list[Path]:
    """By step; one without STATE_NAME, which is written last, was killed on the way."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def _differences(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A setting that a former version of `trainer` did not know had its default."""
    former = {field.name: field.default for field in dataclasses.fields(DistillConfig)} | was
    names = [name for name in now if matters(name) and former[name] != now[name]]
    return [f"{name} was {former[name]}, is {now[name]}" for name in names]


@cache
def _identities(cache: tuple[str, ...], average_with: tuple[str, ...]) -> list[str]:
    data = open_training_data(cache, average_with)
    return [opened.identity for opened in (*data.caches, *data.averaged_with)]


@cache
def _held_out_sha256(path: str) -> str:
    return cache_sha256(logitcache.open(path))


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}). Remove the file, and the run is done again") from error


def answers_done(folder: Path, settings: GenerationSettings) -> bool:
    """Whether the answers of `trainer eval --generate` with these settings lie beside this evaluation of the student."""
    for data in settings.data:
        path = folder / ANSWERS_NAME / f"{data_stem(data)}.json"
        scores = _json(path)
        if scores is None or path.stat().st_mtime < (folder / EVALUATION_NAME).stat().st_mtime:
            return False
        if (
            scores["settings"] != settings.decisive(scores["settings"]["backend"])
            or settings.runs.keys() - scores["seeds"]
        ):
            return False
    return True

"""The state of a run's folder: finished, begun with a checkpoint to continue from, or of another run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import logitcache
from trainer.comparison.recipe import PlannedRun
from trainer.comparison.settings import filled_in, matters
from trainer.data.training_data import open_training_data
from trainer.evaluation.identity import identities
from trainer.run.files import ANSWERS_NAME, EVALUATION_NAME, MODEL_FILES, RUN_NAME, STATE_NAME, NotARecord, read_record
from trainer.run.resume import data_record, last_checkpoint


@dataclass(frozen=True)
class FolderState:
    """The state of a run's folder.

    Attributes:
        differs: reasons why the folder holds another run, which would be lost.
        done: the run is finished, on these caches.
        checkpoint: the checkpoint that the run continues from, or None.
    """

    differs: list[str]
    done: bool
    checkpoint: Path | None


def folder_state(run: PlannedRun) -> FolderState:
    """Judges a folder by its content, whenever it was written. Raises UserError if a cache or the folder does not open."""
    try:
        record = read_record(run.folder / RUN_NAME, settings=dict, cache={"caches": ([dict],)})
        evaluation = read_record(run.folder / EVALUATION_NAME, cache_sha256=str)
    except NotARecord as error:
        return FolderState([str(error)], False, None)
    checkpoints = _checkpoints(run.folder)
    if record is None:
        left = [path.name for path in (*checkpoints, *model_files(run.folder))]
        return FolderState([f"it holds {left[-1]} and no {RUN_NAME}"] if left else [], False, None)
    was, now = filled_in(record["settings"]), run.config.recorded()
    names = [name for name in now if matters(name) and was.get(name) != now[name]]
    differs = [f"{name} was {was.get(name)}, is {now[name]}" for name in names]
    ranks = record.get("world_size", run.ranks)
    if run.ranks is not None and ranks != run.ranks:
        differs.append(f"the number of ranks was {ranks}, is {run.ranks}")
    if differs:
        return FolderState(differs, False, None)
    if not _same_caches(record["cache"], _caches(tuple(run.config.cache or ()), tuple(run.config.average_with or ()))):
        begun = checkpoints and evaluation is None
        changed = f"{record['cache'].get('path')} has changed since it began"
        return FolderState([changed] if begun else [], False, None)
    done = (
        evaluation is not None
        and (run.folder / STATE_NAME).exists()
        and evaluation["cache_sha256"] in identities_at(str(run.config.eval_cache))
    )
    checkpoint = last_checkpoint(run.folder)
    return FolderState([], done, Path(checkpoint) if checkpoint else None)


def model_files(folder: Path) -> list[Path]:
    """Lists the files that a trained model left in a folder: weights, adapters and answers."""
    return [path for pattern in (ANSWERS_NAME, *MODEL_FILES) for path in sorted(folder.glob(pattern))]


def _checkpoints(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def _same_caches(record: Mapping[str, Any], now: list[dict[str, Any]]) -> bool:
    """Compares caches; a former version recorded one cache, and its fingerprint only."""
    was = record.get("caches", [record])
    keys = ["identity" if "identity" in cache else "fingerprint" for cache in was]
    return len(was) == len(now) and all(a.get(key) == b[key] for key, a, b in zip(keys, was, now, strict=True))


@cache
def _caches(cache: tuple[str, ...], average_with: tuple[str, ...]) -> list[dict[str, Any]]:
    return list(data_record(open_training_data(cache, average_with))["caches"])


@cache
def identities_at(path: str) -> tuple[str, str]:
    """Return the `identities` of the held-out cache at a path."""
    return identities(logitcache.open(path))

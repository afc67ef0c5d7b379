"""What `trainer fit` left of a run, read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from logitcache import UserError
from trainer.comparison.metrics import CURVES, ROUGE_L
from trainer.files import ANSWERS_NAME, EVALUATION_NAME, RUN_NAME, STATE_NAME


@dataclass(frozen=True)
class FinishedRun:
    """metrics: of the held-out cache, of its answers and of its pace, those that are known; names as in `metrics.METRICS`.

    curves: metric → {step: value}.
    """

    path: Path
    settings: Mapping[str, Any]
    tail: str
    eval_cache: str
    eval_cache_sha256: str
    metrics: Mapping[str, float]
    curves: Mapping[str, Mapping[int, float]]

    @property
    def seed(self) -> int:
        """Of the weights and of the order of the rows."""
        return int(self.settings["seed"])

    @property
    def hard(self) -> bool:
        """Whether it learnt from the hard labels only."""
        return bool(self.settings["kd_weight"] == 0)


def read_run(path: Path) -> FinishedRun:
    """Raises UserError for a folder that holds no finished run with a held-out evaluation."""
    record, evaluation = _json(path, RUN_NAME), _json(path, EVALUATION_NAME)
    history = _json(path, STATE_NAME)["log_history"]
    curves = {
        name: {int(entry["step"]): float(entry[f"eval_{name}"]) for entry in history if f"eval_{name}" in entry}
        for name in CURVES
    }
    return FinishedRun(
        path,
        record["settings"],
        record["tail"],
        evaluation["cache"],
        evaluation["cache_sha256"],
        evaluation["metrics"] | _rouge(path) | _pace(record["settings"], history),
        curves,
    )


def check_comparable(runs: Sequence[FinishedRun]) -> None:
    """Raises UserError for runs that were evaluated on different data."""
    for run in runs[1:]:
        if run.eval_cache_sha256 != runs[0].eval_cache_sha256:
            raise UserError(
                f"{run.path} was evaluated on the cache {run.eval_cache}, {runs[0].path} on another one, "
                f"{runs[0].eval_cache}: compare runs with the same --eval_cache"
            )


def _rouge(path: Path) -> dict[str, float]:
    scores = sorted((path / ANSWERS_NAME).glob("*.json"))
    return {ROUGE_L + file.stem: float(_json(file.parent, file.name)["rouge_l"]) for file in scores}


def _pace(settings: Mapping[str, Any], history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The medians of what was logged; minutes of a run that was never interrupted, since each part counts its own only."""
    logged = {
        name: [float(entry[name]) for entry in history if name in entry and math.isfinite(entry[name])]
        for name in ("tokens_per_second", "data_wait")
    }
    pace = {name: median(values) for name, values in logged.items() if values}
    runtimes = [entry["train_runtime"] for entry in history if "train_runtime" in entry]
    if runtimes and not settings.get("resume_from_checkpoint"):
        pace["minutes"] = runtimes[-1] / 60
    return pace


def _json(path: Path, name: str) -> Any:
    try:
        return json.loads((path / name).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path} is no finished run with a held-out evaluation: it has no {name}. "
            "`trainer fit --eval_cache DIR --output_dir RUN` makes one"
        ) from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path / name}, line {error.lineno}: not JSON ({error.msg})") from error

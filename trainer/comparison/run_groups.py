"""Rows of a comparison: runs that differ in nothing but their seed, under a name that tells them from the others."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from logitcache import UserError
from trainer.comparison.finished import FinishedRun
from trainer.comparison.settings import KD_ONLY, SEEDS, differing, matters
from trainer.comparison.statistics import Estimate, estimate, paired_difference
from trainer.config.metrics import JUDGED, PACE, ROUGE_L

DISPLAYED = {"todi": "ToDi"}  # every other loss in capitals


@dataclass(frozen=True)
class Row:
    """The seeds of one run."""

    name: str
    runs: Sequence[FinishedRun]

    def estimate(self, metric: str) -> Estimate | None:
        """Estimates a metric over the runs in which it is known; None if it is in none."""
        values = list(self.by_seed(metric).values())
        return estimate(values) if values else None

    def by_seed(self, metric: str) -> dict[tuple[int, int], float]:
        """Returns the metric's value by the seeds of weights and order."""
        return {run.seeds: run.metrics[metric] for run in self.runs if metric in run.metrics}

    def difference(self, metric: str, reference: Row) -> Estimate | None:
        """Estimates the metric of this row less that of the other, seed by seed."""
        return paired_difference(self.by_seed(metric), reference.by_seed(metric))


def displayed(loss: str) -> str:
    """Writes a divergence's name as people do."""
    return DISPLAYED.get(loss, loss.upper())


def rows_of(runs: Sequence[FinishedRun]) -> list[Row]:
    """Makes one row of runs that differ only in their seed, named after the loss and the settings that differ.

    Raises UserError if two runs differ in nothing at all: they would count as two seeds.
    """
    groups: dict[str, list[FinishedRun]] = {}
    for run in runs:
        groups.setdefault(json.dumps(row_settings(run), sort_keys=True), []).append(run)
    for members in groups.values():
        known: dict[tuple[int, int], FinishedRun] = {}
        for run in members:
            if known.setdefault(run.seeds, run) is not run:
                raise UserError(
                    f"{run.path} and {known[run.seeds].path} are one run with the same seed ({run.seeds[0]}), twice: "
                    "name one of them"
                )
    first = [members[0] for members in groups.values()]
    names = [
        _name(run, [other for other in first if other.learnt_from_labels_only == run.learnt_from_labels_only])
        for run in first
    ]
    return [Row(name, members) for name, members in zip(names, groups.values(), strict=True)]


def row_settings(run: FinishedRun) -> dict[str, Any]:
    """Returns the settings that decide a run, but for its seed."""
    ignored = SEEDS | KD_ONLY if run.learnt_from_labels_only else SEEDS
    settings = dict(run.settings) | {"tail": run.tail}
    return {name: value for name, value in settings.items() if name not in ignored and matters(name)}


def reference_of(rows: Sequence[Row]) -> Row:
    """Returns the row that others are measured against: the first row of hard labels only, else the first."""
    return next((row for row in rows if row.runs[0].learnt_from_labels_only), rows[0])


def metrics_of(rows: Sequence[Row]) -> list[str]:
    """Returns the metrics that any run has, in the order of columns."""
    known = {name for row in rows for run in row.runs for name in run.metrics}
    rouge = sorted(name for name in known if name.startswith(ROUGE_L))
    return [name for name in (*JUDGED, *rouge, *PACE) if name in known]


def _name(run: FinishedRun, others: Sequence[FinishedRun]) -> str:
    """Names a row after the loss and every setting in which `others` differ."""
    settings = row_settings(run)
    names = [name for name in differing([row_settings(other) for other in others]) if name != "loss"]
    base = "hard labels" if run.learnt_from_labels_only else displayed(run.settings["loss"])
    return " ".join([base, *(f"{name}={settings.get(name)}" for name in names)])

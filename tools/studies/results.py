"""Finished students on disk, one line each, and their numbers over the seeds."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from students import Student

# Two-sided 95 % quantiles of Student's t for 1, 2, … degrees of freedom.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

Record = dict[str, Any]


class Results:
    """What is known of students: a JSONL file, so that a study goes on where it stopped, and studies share students."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._records: dict[str, Record] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            with suppress(json.JSONDecodeError):  # a line that was cut off: its student is trained again
                record = json.loads(line)
                self._records[_key(record["student"])] = record

    def __contains__(self, student: Student) -> bool:
        return _key(asdict(student)) in self._records

    def add(self, student: Student, record: Record) -> None:
        """Writes what came of a student."""
        record = {"student": asdict(student)} | record
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps(record, ensure_ascii=False))  # not behind a line that was cut off
        self._records[_key(record["student"])] = record

    def judged(self, student: Student) -> list[dict[str, Any]]:
        """The judgements of a student, in the order of its steps."""
        judged: list[dict[str, Any]] = self._records[_key(asdict(student))]["judged"]
        return judged

    def final(self, student: Student, judge: str = "heldout") -> dict[str, float]:
        """The last judgement by one judge."""
        metrics: dict[str, float] = self.judged(student)[-1][judge]
        return metrics

    def cells(self, students: Sequence[Student], metrics: Iterable[str]) -> list[str]:
        """`cell` of each metric of the last held-out judgements of students that differ in their seed."""
        finals = [self.final(student) for student in students]
        return [cell([final[metric] for final in finals]) for metric in metrics]

    def training_s(self, student: Student) -> float:
        """Wall time of its steps."""
        return float(self._records[_key(asdict(student))]["training_s"])


def _key(student: dict[str, Any]) -> str:
    return json.dumps(student, sort_keys=True)


def mean_and_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % confidence interval by Student's t; NaN of a single value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, T_95[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))


def cell(values: Sequence[float], decimals: int = 3, scale: float = 1.0) -> str:
    """`mean ± interval`, or the mean alone of one value."""
    mean, half = mean_and_interval([scale * value for value in values])
    return f"{mean:.{decimals}f}" if math.isnan(half) else f"{mean:.{decimals}f} ± {half:.{decimals}f}"

"""Rows of a comparison as text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from logitcache.table import aligned
from trainer.comparison.run_groups import Row, metrics_of, reference_of
from trainer.comparison.statistics import Estimate
from trainer.config.metrics import PACE, metric_of

ABSENT = "–"


def table(rows: Sequence[Row]) -> str:
    """Shows every row's means, its differences from the reference seed by seed, and how fast it was."""
    names = metrics_of(rows)
    judged = [name for name in names if name not in PACE]
    parts = [_means(rows, judged, with_seeds=True), _differences(rows, judged)]
    if len(judged) < len(names):
        parts.append(_means(rows, [name for name in names if name in PACE]))
    return "\n\n".join(filter(None, parts))


def _means(rows: Sequence[Row], names: Sequence[str], with_seeds: bool = False) -> str:
    lines = [["", *["seeds"] * with_seeds, *(metric_of(name).heading for name in names)]]
    for row in rows:
        seeds = [str(len(row.runs))] * with_seeds
        lines.append([row.name, *seeds, *(cell(row.estimate(name)) for name in names)])
    text = aligned(lines)
    if with_seeds and any(len(row.runs) > 1 for row in rows):
        text += "\n± is half of the mean's 95 % confidence interval over the seeds (Student's t)."
    return text


def cell(of: Estimate | None, signed: bool = False) -> str:
    """Shows a mean and half the width of its confidence interval, as far as they are known."""
    if of is None:
        return ABSENT
    mean, half_width = numbers(of, signed)
    return f"{mean} ± {half_width}" if half_width else mean


def numbers(of: Estimate, signed: bool = False) -> tuple[str, str]:
    """Formats a mean, and half the width of its interval to two digits; the mean has as many places as that."""
    sign = "+" if signed else ""
    if not of.half_width:
        return f"{of.mean:{sign}.4g}", "" if of.half_width is None else "0"
    places = max(0, 1 - math.floor(math.log10(of.half_width)))
    return f"{of.mean:{sign}.{places}f}", f"{of.half_width:.{places}f}"


def _differences(rows: Sequence[Row], names: Sequence[str]) -> str:
    reference = reference_of(rows)
    others = [row for row in rows if row is not reference]
    if not others:
        return ""
    lines = [[f"less {reference.name}, by seed", *(metric_of(name).heading for name in names)]]
    for row in others:
        lines.append([row.name, *(cell(row.difference(name, reference), signed=True) for name in names)])
    return aligned(lines)

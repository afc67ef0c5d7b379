"""Held-out curves as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from textwrap import fill
from typing import TYPE_CHECKING, Any

from logitcache import UserError
from logitcache.storage.atomic import atomic_path
from trainer.comparison.run_groups import Row
from trainer.config.metrics import metric_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

PANEL_INCHES = (6, 4.5)
LABEL_SIGNS = 44
"""Signs of a line of an axis's label that a panel's height has room for."""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
"""Okabe and Ito's, told apart by the colour-blind too, with a grey that is seen on dark paper; line styles repeat it."""
STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))


def draw(rows: Sequence[Row], curves: Sequence[str], picture: Path) -> None:
    """Draws a panel for each metric of `curves`: means over seeds, and bands from the lowest to the highest.

    The suffix of the file is its format. Raises UserError if it cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    figure, panels = pyplot.subplots(
        1, len(curves), figsize=(PANEL_INCHES[0] * len(curves), PANEL_INCHES[1]), layout="constrained", squeeze=False
    )
    lines: dict[int, Line2D] = {}
    for axis, name in zip(panels[0], curves, strict=True):
        for number, row in enumerate(rows):
            steps, seeds = common_steps([run.curves[name] for run in row.runs])
            if not steps:
                continue
            colour, style = look(number)
            mean = [fmean(values) for values in seeds]
            [lines[number]] = axis.plot(steps, mean, color=colour, linestyle=style, marker="o", markersize=3)
            axis.fill_between(steps, [min(v) for v in seeds], [max(v) for v in seeds], color=colour, alpha=0.2, lw=0)
        axis.set(xlabel="step", ylabel=fill(f"held-out {metric_of(name).description}", LABEL_SIGNS))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    drawn = sorted(lines)
    _legend(figure, [rows[number].name for number in drawn], [lines[number] for number in drawn])
    figure.suptitle("line: mean over seeds; band: lowest to highest seed", fontsize="small")
    try:
        with atomic_path(picture) as temporary:
            figure.savefig(temporary, format=picture.suffix.removeprefix("."), dpi=150)
    except OSError as error:
        raise UserError(f"--out {picture}: cannot be written ({error.strerror})") from error
    finally:
        pyplot.close(figure)


def look(number: int) -> tuple[str, Any]:
    """Returns colour and line style of a row, the same again after 49."""
    return COLOURS[number % len(COLOURS)], STYLES[(number + number // len(COLOURS)) % len(STYLES)]


def _legend(figure: Figure, names: Sequence[str], lines: Sequence[Line2D]) -> None:
    """Puts a legend below the panels, in as many columns as there is room for; the picture grows by its lines."""
    if not lines:
        return
    width, height = figure.get_size_inches()
    columns = max(1, int(width / (0.7 + 0.09 * max(map(len, names)))))
    figure.set_size_inches(width, height + 0.23 * math.ceil(len(lines) / columns))
    legend = figure.legend(lines, ["row"] * len(lines), loc="outside lower center", ncols=columns)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_parse_math(False)  # $ is a sign like others; and here a name may begin with _
        text.set_text(name)


def common_steps(curves: Sequence[Mapping[int, float]]) -> tuple[list[int], list[list[float]]]:
    """Returns the steps at which every seed was evaluated, and the seeds' finite values there."""
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    values = [[curve[step] for curve in curves] for step in steps]
    finite = [(step, seeds) for step, seeds in zip(steps, values, strict=True) if all(map(math.isfinite, seeds))]
    return [step for step, _ in finite], [seeds for _, seeds in finite]

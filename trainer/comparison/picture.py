"""Held-out curves as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from trainer.comparison.metrics import metric
from trainer.comparison.rows import Row

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
"""Okabe and Ito's, told apart by the colour-blind too, with a grey that is seen on dark paper; line styles repeat it."""
STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))


def draw(rows: Sequence[Row], curves: Sequence[str], picture: Path) -> None:
    """A PNG with a panel for each of these metrics: means over seeds, and bands from the lowest to the highest."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    figure, panels = pyplot.subplots(
        1, len(curves), figsize=(6 * len(curves), 4.5), layout="constrained", squeeze=False
    )
    for axis, name in zip(panels[0], curves, strict=True):
        for number, row in enumerate(rows):
            steps, seeds = common_steps([run.curves[name] for run in row.runs])
            if not steps:
                continue
            colour, style = COLOURS[number % len(COLOURS)], STYLES[number % len(STYLES)]
            mean = [fmean(values) for values in seeds]
            axis.plot(steps, mean, color=colour, linestyle=style, marker="o", markersize=3, label=row.name)
            axis.fill_between(steps, [min(v) for v in seeds], [max(v) for v in seeds], color=colour, alpha=0.2, lw=0)
        axis.set(xlabel="step", ylabel=f"held-out {metric(name).description}")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    panels[0][0].legend()
    figure.suptitle("line: mean over seeds; band: lowest to highest seed", fontsize="small")
    figure.savefig(picture, dpi=150)
    pyplot.close(figure)


def common_steps(curves: Sequence[Mapping[int, float]]) -> tuple[list[int], list[list[float]]]:
    """The steps at which every seed was evaluated, and the seeds' finite values there."""
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    values = [[curve[step] for curve in curves] for step in steps]
    finite = [(step, seeds) for step, seeds in zip(steps, values, strict=True) if all(map(math.isfinite, seeds))]
    return [step for step, _ in finite], [seeds for _, seeds in finite]

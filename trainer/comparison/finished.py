"""Runs side by side: one table of their final evaluations, one picture of their held-out curves."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logitcache import UserError
from logitcache.table import aligned
from trainer.files import EVALUATION_NAME, RUN_NAME, STATE_NAME

# Settings that may differ between the seeds of one group.
NOT_COMPARED = {"seed", "data_seed", "output_dir", "run_name", "resume_from_checkpoint", "logging_dir"}
# Settings without effect where kd_weight is 0.
KD_ONLY = {"loss", "tail", "ablation", "temperature", "t_squared", "loss_args", "approximate_temperature"}

DISPLAYED = {"todi": "ToDi"}  # every other loss in capitals

COLUMNS = {  # metric → heading
    "ce": "CE",
    "perplexity": "perplexity",
    "fkl": "FKL",
    "rkl": "RKL",
    "agreement": "top-1 agreement",
    "ece": "ECE",
}
CURVES = {"eval_fkl": "held-out FKL to the teacher (nats)", "eval_ce": "held-out cross-entropy (nats)"}

# Okabe and Ito's colours, told apart by the colour-blind too; line styles repeat the difference in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))


@dataclass(frozen=True)
class FinishedRun:
    """What `trainer fit` left of a run. curves: metric → {step: value}."""

    path: Path
    settings: Mapping[str, Any]
    tail: str
    eval_cache: str
    eval_cache_sha256: str
    metrics: Mapping[str, float]
    curves: Mapping[str, Mapping[int, float]]


def compare(paths: Sequence[Path], picture: Path | None) -> str:
    """The table of these runs, runs that differ only in their seed as one row; draws `picture` where one is named.

    Raises UserError for a folder that holds no finished run, and for runs evaluated on different data.
    """
    groups = _named_groups([_read(path) for path in paths])
    if picture is not None:
        _draw(groups, picture)
    return _table(groups)


def _read(path: Path) -> FinishedRun:
    record, evaluation = _json(path, RUN_NAME), _json(path, EVALUATION_NAME)
    history = _json(path, STATE_NAME)["log_history"]
    curves = {
        metric: {int(entry["step"]): float(entry[metric]) for entry in history if metric in entry} for metric in CURVES
    }
    return FinishedRun(
        path,
        record["settings"],
        record["tail"],
        evaluation["cache"],
        evaluation["cache_sha256"],
        evaluation["metrics"],
        curves,
    )


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


def _named_groups(runs: Sequence[FinishedRun]) -> dict[str, list[FinishedRun]]:
    for run in runs[1:]:
        if run.eval_cache_sha256 != runs[0].eval_cache_sha256:
            raise UserError(
                f"{run.path} was evaluated on the cache {run.eval_cache}, {runs[0].path} on another one, "
                f"{runs[0].eval_cache}: compare runs with the same --eval_cache"
            )
    groups: dict[str, list[FinishedRun]] = {}
    for run in runs:
        groups.setdefault(json.dumps(_compared(run), sort_keys=True), []).append(run)
    first = [members[0] for members in groups.values()]
    names = [_name(run, [other for other in first if _hard(other) == _hard(run)]) for run in first]
    return dict(zip(names, groups.values(), strict=True))


def _compared(run: FinishedRun) -> dict[str, Any]:
    ignored = NOT_COMPARED | KD_ONLY if _hard(run) else NOT_COMPARED
    return {key: value for key, value in (*run.settings.items(), ("tail", run.tail)) if key not in ignored}


def _hard(run: FinishedRun) -> bool:
    return run.settings["kd_weight"] == 0


def _name(run: FinishedRun, others: Sequence[FinishedRun]) -> str:
    """The loss, and every setting in which `others` differ."""
    settings = _compared(run)
    differing = [key for key in settings if len({json.dumps(_compared(other).get(key)) for other in others}) > 1]
    loss = run.settings["loss"]
    base = "hard labels" if _hard(run) else DISPLAYED.get(loss, loss.upper())
    return " ".join([base, *(f"{key}={settings[key]}" for key in differing if key != "loss")])


def _table(groups: Mapping[str, Sequence[FinishedRun]]) -> str:
    rows = [["", "seeds", *COLUMNS.values()]]
    for name, runs in groups.items():
        rows.append([name, str(len(runs)), *(_cell([run.metrics[metric] for run in runs]) for metric in COLUMNS)])
    repeated = any(len(runs) > 1 for runs in groups.values())
    return aligned(rows) + ("\n± is the standard deviation over the seeds." if repeated else "")


def _cell(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):.4g}"
    return f"{mean} ± {statistics.stdev(values):.2g}" if len(values) > 1 else mean


def _draw(groups: Mapping[str, Sequence[FinishedRun]], picture: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    figure, axes = pyplot.subplots(1, len(CURVES), figsize=(6 * len(CURVES), 4.5), layout="constrained")
    for axis, (metric, label) in zip(axes, CURVES.items(), strict=True):
        for number, (name, runs) in enumerate(groups.items()):
            steps, seeds = _common_steps([run.curves[metric] for run in runs])
            if not steps:
                continue
            colour, style = COLOURS[number % len(COLOURS)], STYLES[number % len(STYLES)]
            mean = [statistics.fmean(values) for values in seeds]
            axis.plot(steps, mean, color=colour, linestyle=style, marker="o", markersize=3, label=name)
            axis.fill_between(steps, [min(v) for v in seeds], [max(v) for v in seeds], color=colour, alpha=0.2, lw=0)
        axis.set(xlabel="step", ylabel=label)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle("line: mean over seeds; band: lowest to highest seed", fontsize="small")
    figure.savefig(picture, dpi=150)
    pyplot.close(figure)


def _common_steps(curves: Sequence[Mapping[int, float]]) -> tuple[list[int], list[list[float]]]:
    """The steps at which every seed was evaluated, and the seeds' finite values there."""
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    values = [[curve[step] for curve in curves] for step in steps]
    finite = [(step, seeds) for step, seeds in zip(steps, values, strict=True) if all(map(math.isfinite, seeds))]
    return [step for step, _ in finite], [seeds for _, seeds in finite]

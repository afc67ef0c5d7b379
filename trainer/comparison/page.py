"""A comparison as one HTML page that holds all that it needs and asks no network."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from statistics import fmean
from typing import Any

from logitcache import UserError
from logitcache.html_page import embedded, filled, source_hash
from logitcache.storage.atomic import write_text
from trainer.comparison.picture import common_steps
from trainer.comparison.run_groups import Row, metrics_of, reference_of, row_settings
from trainer.comparison.settings import differing
from trainer.comparison.statistics import Estimate
from trainer.comparison.table import ABSENT, numbers
from trainer.config.metrics import CURVES, LOWER, PACE, metric_of

MEANS = "Means over the seeds ± half of the 95 % confidence interval (Student's t); none with one seed. The best mean is bold."
PAIRED = (
    "Means over the seeds of a run's value less that of {reference} with the same seed, ± half of the 95 % confidence "
    "interval. Coloured where the interval leaves 0 out: green is better, orange worse. Many comparisons are made here: of "
    "twenty differences that are none, one is coloured."
)
PACES = " Times are as measured: runs beside each other slow each other down."


def write_page(rows: Sequence[Row], page: Path, title: str) -> None:
    """Writes the page. Raises UserError if it cannot be written."""
    try:
        write_text(page, page_html(rows, title))
    except OSError as error:
        raise UserError(f"--page {page}: cannot be written ({error.strerror})") from error


def page_html(rows: Sequence[Row], title: str) -> str:
    """Makes the page: markup, style, data and scripts, which its security policy allows by their hashes."""
    from plotly.offline import get_plotlyjs

    script, plotly = _resource("page.js"), get_plotlyjs()
    parts = {
        "policy": f"default-src 'none'; script-src {source_hash(script)} {source_hash(plotly)}; "
        "style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'",
        "title": escape(title),
        "lede": escape(_lede(rows)),
        "style": _resource("page.css"),
        "means_remark": MEANS + (PACES if set(PACE) & set(metrics_of(rows)) else ""),
        "means": _means(rows),
        "differences": _differences(rows),
        "settings": _settings(rows),
        "runs": _runs(rows),
        "data": embedded(_data(rows)),
        "plotly": plotly,
        "script": script,
    }
    return filled(_resource("page.html"), parts)


def _lede(rows: Sequence[Row]) -> str:
    runs = [run for row in rows for run in row.runs]
    positions = runs[0].metrics.get("positions")
    size = f", {int(positions):,} positions" if positions else ""
    return f"{_counted(len(runs), 'run')} in {_counted(len(rows), 'row')}, measured on {runs[0].eval_cache}{size}"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _means(rows: Sequence[Row]) -> str:
    names = metrics_of(rows)
    best = {name: _best(rows, name) for name in names}
    lines = [
        [
            _name(row),
            _number(len(row.runs), str(len(row.runs))),
            *(_estimate(row.estimate(name), "best" if row is best[name] else "") for name in names),
        ]
        for row in rows
    ]
    return _table([("run", ""), ("seeds", "of this run"), *_headings(names)], lines)


def _best(rows: Sequence[Row], name: str) -> Row | None:
    better = metric_of(name).better
    known = [(of.mean, row) for row in rows if (of := row.estimate(name))]
    finite = [(mean, row) for mean, row in known if math.isfinite(mean)]
    if not better or len(known) < 2 or not finite:
        return None
    return max(finite, key=lambda pair: pair[0] * better)[1]


def _differences(rows: Sequence[Row]) -> str:
    reference = reference_of(rows)
    others = [row for row in rows if row is not reference]
    if not others:
        return ""
    names = [name for name in metrics_of(rows) if name not in PACE]
    lines = []
    for row in others:
        found = [(row.difference(name, reference), metric_of(name).better) for name in names]
        lines.append([_name(row), *(_estimate(of, _verdict(of, better), signed=True) for of, better in found)])
    return (
        f"<section><h2>Less {escape(reference.name)}, seed by seed</h2>"
        f'<p class="remark">{escape(PAIRED.format(reference=reference.name))}</p>'
        f'<div class="scroll">{_table([("run", ""), *_headings(names)], lines)}</div></section>'
    )


def _verdict(of: Estimate | None, better: int) -> str:
    if of is None or of.half_width is None or not better or abs(of.mean) <= of.half_width:
        return ""
    return "better" if of.mean * better > 0 else "worse"


def _settings(rows: Sequence[Row]) -> str:
    """Shows the settings that tell the rows apart as a table, and the shared settings to be unfolded."""
    settings = [row_settings(row.runs[0]) for row in rows]
    differ = differing(settings)
    lines = [
        [_name(row), *(_text(found.get(name)) for name in differ)] for row, found in zip(rows, settings, strict=True)
    ]
    table = _table([("run", ""), *((name, "") for name in differ)], lines) if differ else ""
    shared = [(name, value) for name, value in settings[0].items() if name not in differ and _shown(value) != ABSENT]
    pairs = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(_shown(value))}</dd></div>" for name, value in shared)
    return (
        f'<div class="scroll">{table}</div>' * bool(differ)
        + f"<details><summary>{len(shared)} settings that all share</summary><dl>{pairs}</dl></details>"
    )


def _runs(rows: Sequence[Row]) -> str:
    names = metrics_of(rows)
    lines = [
        [
            _name(row),
            _number(run.seeds[0], "/".join(map(str, dict.fromkeys(run.seeds)))),
            *(_value(run.metrics.get(name)) for name in names),
            _text(str(run.path)),
        ]
        for row in rows
        for run in row.runs
    ]
    return _table([("run", ""), ("seed", "of weights and order"), *_headings(names), ("folder", "")], lines)


def _data(rows: Sequence[Row]) -> dict[str, Any]:
    curves = []
    for name in CURVES:
        series = []
        for number, row in enumerate(rows):
            steps, seeds = common_steps([run.curves[name] for run in row.runs])
            if steps:
                bands = {"low": list(map(min, seeds)), "high": list(map(max, seeds))}
                series.append({"row": number, "steps": steps, "mean": list(map(fmean, seeds)), **bands})
        if series:
            title = metric_of(name).description
            curves.append({"title": title[:1].upper() + title[1:], "series": series})
    return {"rows": [row.name for row in rows], "curves": curves}


def _table(headings: Sequence[tuple[str, str]], lines: Sequence[Sequence[str]]) -> str:
    """Makes a table. headings: text and, for numbers, their meaning.  lines: cells in HTML."""
    titled = [(text, f' title="{escape(title)}"' if title else ' class="text"') for text, title in headings]
    head = "".join(f'<th scope="col"{attribute}>{escape(text)}</th>' for text, attribute in titled)
    body = "".join(f"<tr>{''.join(cells)}</tr>" for cells in lines)
    return f'<table class="sortable"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _headings(names: Sequence[str]) -> list[tuple[str, str]]:
    arrows = {LOWER: ", lower is better", -LOWER: ", higher is better"}
    found = [metric_of(name) for name in names]
    return [(of.heading, of.description + arrows.get(of.better, "")) for of in found]


def _name(row: Row) -> str:
    return f'<th scope="row" data-value="{escape(row.name)}">{escape(row.name)}</th>'


def _estimate(of: Estimate | None, kind: str, signed: bool = False) -> str:
    if of is None:
        return f"<td>{ABSENT}</td>"
    mean, half_width = numbers(of, signed)
    return _number(of.mean, mean + (f" <small>± {half_width}</small>" if half_width else ""), kind)


def _value(value: float | None) -> str:
    return f"<td>{ABSENT}</td>" if value is None else _number(value, f"{value:.5g}")


def _number(value: float, html: str, kind: str = "") -> str:
    """Makes a cell; a number that is not finite sorts like an unknown one."""
    sorted_by = f' data-value="{value!r}"' * math.isfinite(value)
    return f'<td class="{kind}"{sorted_by}>{html}</td>'


def _text(value: Any) -> str:
    text = escape(_shown(value))
    return f'<td class="text" data-value="{text}">{text}</td>'


def _shown(value: Any) -> str:
    if value in (None, [], {}):
        return ABSENT
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)


def _resource(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")

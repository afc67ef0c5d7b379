"""`trainer compare`."""

from __future__ import annotations

import shlex
from argparse import ArgumentTypeError, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from logitcache import UserError
from logitcache.errors import Parser
from trainer.commands.shared import INTERRUPTED, check_writable, positive
from trainer.config.metrics import CURVES
from trainer.terminal import say

if TYPE_CHECKING:
    from trainer.comparison.execute import Failure
    from trainer.comparison.run_groups import Row

PICTURES = (".png", ".pdf", ".svg")
RECIPE_SUFFIXES = (".yaml", ".yml")
FAILED = 1


def run(argv: Sequence[str]) -> int:
    """Compares runs, after doing those of a recipe; returns the exit status."""
    args = _parser().parse_args(argv)
    recipes = [path for path in args.runs if path.suffix in RECIPE_SUFFIXES]
    if recipes and len(args.runs) > 1:
        raise UserError(f"{recipes[0]} is a recipe: name it alone, or finished runs only")
    return _recipe(args, argv) if recipes else _finished(args)


def _parser() -> Parser:
    parser = Parser(
        prog="trainer compare",
        description="Runs side by side; seeds of one run make one row. A recipe's runs are done first, as far as they are "
        "missing: the same command continues after an interruption.",
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RECIPE.yaml | RUN", help="a recipe, or output folders of `trainer fit`"
    )
    parser.add_argument(
        "--out",
        type=_picture,
        metavar="FILE",
        help=f"picture of the curves, {', '.join(PICTURES)} (default: compare.png, of a recipe in its output_dir)",
    )
    parser.add_argument("--page", type=Path, metavar="FILE", help="HTML page (default: beside the picture)")
    parser.add_argument(
        "--curves",
        type=_curves,
        default=("fkl", "ce"),
        metavar="NAME,…",
        help=f"in the picture: {', '.join(CURVES)} (default: fkl,ce)",
    )
    parser.add_argument(
        "--jobs",
        type=positive,
        metavar="N",
        help="runs of a recipe at a time (default: one for each GPU, else each core; 1 where it has `launch`)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="do runs of a recipe again where its folders hold runs with other settings",
    )
    return parser


def _finished(args: Namespace) -> int:
    for name in ("jobs", "overwrite"):
        if getattr(args, name):
            raise UserError(f"--{name} belongs to a recipe: {args.runs[0]} is taken for a finished run")
    from trainer.comparison.finished import read_runs
    from trainer.comparison.run_groups import rows_of

    out = args.out or Path("compare.png")
    check_outputs(args, out)
    show(rows_of(read_runs(args.runs)), args, out, title="Runs side by side")
    return 0


def _recipe(args: Namespace, argv: Sequence[str]) -> int:
    from trainer.comparison.check import check
    from trainer.comparison.execute import default_jobs, execute
    from trainer.comparison.finished import read_runs
    from trainer.comparison.recipe import read_recipe
    from trainer.comparison.run_groups import Row

    recipe = read_recipe(args.runs[0])
    if recipe.launch and args.jobs not in (None, 1):
        raise UserError(
            f"--jobs {args.jobs}: `launch` in {recipe.path} gives a run all devices, so they are done one at a time"
        )
    states = check(recipe, overwrite=args.overwrite)
    try:
        recipe.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{recipe.path}: output_dir {recipe.output_dir}: {error.strerror}") from error
    out = args.out or recipe.output_dir / "compare.png"
    check_outputs(args, out)
    jobs = 1 if recipe.launch else min(args.jobs or default_jobs(), len(recipe.runs))
    done = sum(state.done for state in states.values())
    say(f"{recipe.path}: {done} of {len(recipe.runs)} runs in {recipe.output_dir} are finished; {jobs} at a time")
    try:
        failures = execute(recipe, jobs=jobs)
    except KeyboardInterrupt:
        say(f"trainer: stopped. The same command continues:\n  {shlex.join(['trainer', 'compare', *argv])}")
        return INTERRUPTED
    failed = {failure.folder for failure in failures}
    planned = [run for run in recipe.runs if run.folder not in failed]
    if planned:
        finished = list(zip(planned, read_runs([run.folder for run in planned]), strict=True))
        names = dict.fromkeys(run.row for run in planned)
        rows = [Row(name, [one for run, one in finished if run.row == name]) for name in names]
        say("")
        show(rows, args, out, title=recipe.path.stem)
    for failure in failures:
        say(_report(failure), error=True)
    return FAILED if failures else 0


def check_outputs(args: Namespace, out: Path) -> None:
    """Raises UserError where picture or page cannot be written."""
    check_writable(out)
    page = page_of(args, out)
    if page.is_dir() or not page.parent.is_dir():
        raise UserError(f"--page {page}: name a file in an existing folder")
    if page.resolve() == out.resolve():
        raise UserError(f"--page {page}: that is the picture; name another file")


def page_of(args: Namespace, out: Path) -> Path:
    """Where the page goes."""
    return args.page or out.with_suffix(".html")


def show(rows: Sequence[Row], args: Namespace, out: Path, *, title: str) -> None:
    """Prints the table, draws the picture and writes the page."""
    from trainer.comparison.page import write_page
    from trainer.comparison.picture import draw
    from trainer.comparison.table import table

    say(table(rows))
    for note in dict.fromkeys(note for row in rows for run in row.runs for note in run.notes):
        say(f"note: {note}")
    draw(rows, args.curves, out)
    write_page(rows, page_of(args, out), title)
    say(f"\ncurves: {out}\npage: {page_of(args, out)}")


def _report(failure: Failure) -> str:
    lines = "\n".join(f"  {line}" for line in failure.lines)
    return f"trainer: error: {failure.folder} failed; the end of its log.txt:\n{lines}"


def _picture(text: str) -> Path:
    path = Path(text)
    if path.suffix not in PICTURES:
        raise ArgumentTypeError(f"{text}: a picture is expected, {', '.join(PICTURES)}")
    return path


def _curves(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    for name in names:
        if name not in CURVES:
            raise ArgumentTypeError(f"{name}: choose from {', '.join(CURVES)}")
    return names

"""`trainer compare`."""

from __future__ import annotations

import shlex
from argparse import ArgumentTypeError, Namespace
from collections.abc import Sequence
from pathlib import Path

from logitcache import UserError
from logitcache.errors import Parser
from trainer.commands.shared import INTERRUPTED, check_writable, positive
from trainer.config.metrics import CURVES
from trainer.terminal import say

PICTURES = (".png", ".pdf", ".svg")
FAILED = 1


def run(argv: Sequence[str]) -> int:
    """Compares runs, after doing those of a recipe; returns the exit status."""
    args = _parser().parse_args(argv)
    from trainer.comparison.compare import RECIPE_SUFFIXES, compare
    from trainer.comparison.recipe import read_recipe

    recipe = read_recipe(args.runs[0]) if len(args.runs) == 1 and args.runs[0].suffix in RECIPE_SUFFIXES else None
    out = args.out or (recipe.output_dir if recipe else Path()) / "compare.png"
    page = args.page or out.with_suffix(".html")
    _check_outputs(args, out, page, recipe.output_dir.resolve() if recipe else None)
    try:
        compared = compare(recipe or args.runs, jobs=args.jobs, overwrite=args.overwrite)
    except KeyboardInterrupt:
        if recipe is None:
            raise
        say(f"trainer: stopped. The same command continues:\n  {shlex.join(['trainer', 'compare', *argv])}")
        return INTERRUPTED
    if compared.rows:
        say(("\n" if recipe else "") + compared.table())
        for note in compared.notes:
            say(f"note: {note}")
        compared.draw(out, args.curves)
        compared.write_page(page)
        say(f"\ncurves: {out}\npage: {page}")
    for failure in compared.failures:
        lines = "\n".join(f"  {line}" for line in failure.lines)
        say(f"trainer: error: {failure.folder} failed; the end of its log.txt:\n{lines}", error=True)
    return FAILED if compared.failures else 0


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


def _check_outputs(args: Namespace, out: Path, page: Path, output_dir: Path | None) -> None:
    """Raises UserError if picture or page cannot be written. A recipe's output_dir may be missing, as its runs make it."""
    made = [] if output_dir is None else [output_dir, *output_dir.parents]
    if out.parent.exists() or out.parent.resolve() not in made:
        check_writable(out)
    if page.is_dir() or not (page.parent.is_dir() or page.parent.resolve() in made):
        raise UserError(f"--page {page}: name a file in an existing folder")
    if page.resolve() == out.resolve():
        raise UserError(f"--page {page}: that is the picture; name another file")


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

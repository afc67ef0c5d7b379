"""trainer.compare: does the runs of a recipe, as far as they are missing, and puts finished runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from logitcache import UserError
from trainer.comparison.finished import read_runs
from trainer.comparison.picture import draw
from trainer.comparison.recipe import Recipe, read_recipe
from trainer.comparison.run_groups import Row, rows_of
from trainer.comparison.table import table
from trainer.terminal import say

if TYPE_CHECKING:
    from trainer.comparison.execute import Failure

RECIPE_SUFFIXES = (".yaml", ".yml")
SHOWN_CURVES = ("fkl", "ce")


@dataclass(frozen=True)
class Comparison:
    """Runs side by side. rows: each has the seeds of one run.  failures: runs of the recipe that ended with an error."""

    title: str
    rows: Sequence[Row]
    failures: Sequence[Failure] = ()

    @property
    def notes(self) -> list[str]:
        """Notes on numbers that are left out, each once."""
        return list(dict.fromkeys(note for row in self.rows for run in row.runs for note in run.notes))

    def table(self) -> str:
        """Shows the metrics of the rows, their differences and their pace as aligned text."""
        return table(self._known_rows())

    def draw(self, picture: str | Path, curves: Sequence[str] = SHOWN_CURVES) -> None:
        """Draws the curves of these metrics to a file, whose suffix is its format."""
        draw(self._known_rows(), curves, Path(picture))

    def write_page(self, page: str | Path) -> None:
        """Writes the comparison as one HTML page."""
        from trainer.comparison.page import write_page

        write_page(self._known_rows(), Path(page), self.title)

    def _known_rows(self) -> Sequence[Row]:
        if not self.rows:
            failed = [str(failure.folder) for failure in self.failures]
            raise UserError(f"nothing to compare: {'failed are ' + ', '.join(failed) if failed else 'no run is named'}")
        return self.rows


def compare(
    runs: str | Path | Recipe | Sequence[str | Path], *, jobs: int | None = None, overwrite: bool = False
) -> Comparison:
    """Compares runs, after doing those of a recipe that are missing.

    The same call continues after an interruption. Each run of a recipe is a process of its own. While they are done,
    their progress is printed and SIGINT and SIGTERM have other handlers, so a recipe belongs to the main thread.

    Args:
        runs: A recipe (RECIPE.yaml, or one that was read), or output folders of `trainer fit`.
        jobs: Runs of a recipe at a time. None: one for each GPU, or else for each core; 1 if the recipe has `launch`.
        overwrite: Does runs of a recipe again if its folders hold runs with other settings.

    Returns:
        The comparison, whose `table()` is text.

    Raises:
        UserError: A recipe or a run cannot be read, or `trainer fit` would refuse a run of the recipe.
    """
    if isinstance(runs, Recipe):
        return _compare_recipe(runs, jobs, overwrite)
    paths = [Path(run) for run in ([runs] if isinstance(runs, str | Path) else runs)]
    recipes = [path for path in paths if path.suffix in RECIPE_SUFFIXES]
    if recipes and len(paths) > 1:
        raise UserError(f"{recipes[0]} is a recipe: name it alone, or finished runs only")
    if recipes:
        return _compare_recipe(read_recipe(recipes[0]), jobs, overwrite)
    if paths and (jobs or overwrite):
        raise UserError(
            f"--{'jobs' if jobs else 'overwrite'} belongs to a recipe: {paths[0]} is taken for a finished run"
        )
    return Comparison("Runs side by side", rows_of(read_runs(paths)))


def _compare_recipe(recipe: Recipe, jobs: int | None, overwrite: bool) -> Comparison:
    from trainer.comparison.check import check
    from trainer.comparison.execute import default_jobs, execute

    if recipe.launch and jobs not in (None, 1):
        raise UserError(
            f"--jobs {jobs}: `launch` in {recipe.path} gives a run all devices, so they are done one at a time"
        )
    states = check(recipe, overwrite=overwrite)
    try:
        recipe.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{recipe.path}: output_dir {recipe.output_dir}: {error.strerror}") from error
    jobs = 1 if recipe.launch else min(jobs or default_jobs(), len(recipe.runs))
    done = sum(state.done for state in states.values())
    say(f"{recipe.path}: {done} of {len(recipe.runs)} runs in {recipe.output_dir} are finished; {jobs} at a time")
    failures = execute(recipe, jobs=jobs)
    failed = {failure.folder for failure in failures}
    planned = [run for run in recipe.runs if run.folder not in failed]
    finished = list(zip(planned, read_runs([run.folder for run in planned]), strict=True)) if planned else []
    names = dict.fromkeys(run.row for run in planned)
    rows = [Row(name, [one for run, one in finished if run.row == name]) for name in names]
    return Comparison(recipe.path.stem, rows, failures)

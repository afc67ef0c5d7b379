"""Finds all that would stop a recipe's runs before the first of them starts."""

from __future__ import annotations

from pathlib import Path

from logitcache import UserError
from trainer.comparison.folder_state import FolderState, folder_state, identities_at
from trainer.comparison.generation import check_answers_folder
from trainer.comparison.recipe import PlannedRun, Recipe
from trainer.evaluation.generation_settings import GenerationSettings
from trainer.evaluation.prompts import read_prompts
from trainer.evaluation.protocol import choose_backend, prompts_that_fit
from trainer.run.prepare import PreparedRun, prepare


def check(recipe: Recipe, *, overwrite: bool) -> dict[Path, FolderState]:
    """Returns the state of each run's folder. overwrite: a folder may hold another run.

    Raises UserError if a folder holds another run, or if `trainer fit` or `trainer eval` would refuse a run after hours:
    its cache, tokenizer, student or prompts do not fit.
    """
    states: dict[Path, FolderState] = {}
    prepared: set[str] = set()
    for run in recipe.runs:
        try:
            _check_held_out(run, recipe.runs[0])
            states[run.folder] = folder_state(run)
            if recipe.generate is not None:
                check_answers_folder(run.folder, recipe.generate)
            if not states[run.folder].done and run.row not in prepared:
                ready = prepare(run.config)
                if recipe.generate is not None:
                    _check_prompts(ready, recipe.generate)
                prepared.add(run.row)
        except UserError as error:
            raise UserError(f"{run.where}: run {run.row}: {error}") from error
    others = {folder: state.differs for folder, state in states.items() if state.differs}
    if others and not overwrite:
        folder, differs = next(iter(others.items()))
        more = f" (and so {len(others) - 1} more)" if len(others) > 1 else ""
        raise UserError(
            f"{folder} holds another run{more}: {'; '.join(differs)}. Name another output_dir in {recipe.path}, or add "
            "--overwrite to do such runs again"
        )
    return states


def _check_held_out(run: PlannedRun, first: PlannedRun) -> None:
    here, there = str(run.config.eval_cache), str(first.config.eval_cache)
    if identities_at(here) != identities_at(there):
        raise UserError(
            f"--eval_cache {here}: {first.row} is measured on another one, {there}, and numbers of one table must be of "
            "the same"
        )


def _check_prompts(ready: PreparedRun, settings: GenerationSettings) -> None:
    """Raises UserError if the student could not answer the prompts."""
    student = str(ready.config.student)
    choose_backend(settings.backend, student)
    if ready.tokenizer is None:
        raise UserError(f"generate: neither {student} nor the cache has a tokenizer, which prompts need")
    for path in settings.data:
        prompts = read_prompts(
            path, ready.tokenizer, settings.columns, settings.prompt_template, settings.read_template()
        )
        if not prompts_that_fit(prompts, student, ready.student_config, settings):
            raise UserError(
                f"generate: no prompt of {path} is as short as max_prompt_length {settings.max_prompt_length}"
            )

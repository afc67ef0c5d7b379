"""The files of generated answers, and which of them count when the same is asked again.

    FOLDER/dolly.json            settings, scores of every seed, their mean and spread
    FOLDER/dolly-seed10.jsonl    the answers of one seed, for reading

A seed counts from when it stands in the .json. The same call continues: it makes the seeds that are missing. Answers that
no longer count are removed when the first new ones stand there, and those of another model never.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from logitcache import UserError
from logitcache.storage.atomic import write_json, write_text
from trainer.evaluation.generation import Answer
from trainer.evaluation.prompts import Prompt
from trainer.evaluation.rouge import rouge_l

Scores = dict[str, Any]
"""Content of a .json file: see `generate_scores`."""


def run_name(run: str) -> str:
    """Names a run in words, given by its seed or "greedy"."""
    return run if run == "greedy" else f"seed {run}"


def answers_name(stem: str, run: str) -> str:
    """Returns the name of the file that holds a run's answers."""
    return f"{stem}-{run_name(run).replace(' ', '')}.jsonl"


def runs_there(folder: Path, stem: str, blank: Scores, say: Callable[[str], None]) -> dict[str, Any]:
    """Returns the runs that need not be made again. blank: the content of the .json beside scores.

    Raises UserError if it holds answers of other settings or of another model; a changed model of the same name, or in
    the same folder above `folder`, is no other.
    """
    path = folder / f"{stem}.json"
    former = read_scores(path)
    if former is None:
        return {}
    for name, value in blank["settings"].items():
        if former["settings"].get(name) != value:
            raise UserError(
                f"{path} holds answers with {name} {former['settings'].get(name)}, now it is {value}: name another folder "
                "with --answers"
            )
    if former.get("model_identity") != blank["model_identity"] and not _same_model(former, blank["model"], folder):
        raise UserError(
            f"{path} holds answers of the model {former['model']}, now it is {blank['model']}: name another folder with "
            "--answers"
        )
    for what in ("model_identity", "data_sha256"):
        if former.get(what) != blank[what]:
            say(
                f"{stem}: the {what.split('_')[0]} has changed since {path.name} was written, all answers are made again"
            )
            return {}
    return runs_with_answers(folder, former)


def read_scores(path: Path) -> Scores | None:
    """Reads a .json file of scores; None if there is none. Raises UserError for a file without scores."""
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))
        scores["model"], dict(scores["settings"]), [Path(run["answers"]) for run in scores["seeds"].values()]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"{path} holds no scores of generated answers: name another folder with --answers") from error
    return dict(scores)


def runs_with_answers(folder: Path, scores: Scores) -> dict[str, Any]:
    """Returns the runs of a .json whose answers lie beside it."""
    return {run: found for run, found in scores["seeds"].items() if (folder / Path(found["answers"]).name).is_file()}


def write_scores(folder: Path, stem: str, scores: Scores) -> None:
    """Writes the .json, and removes answers that only the former .json names."""
    path = folder / f"{stem}.json"
    former = read_scores(path)
    write_json(path, scores)
    named = {found["answers"] for found in scores["seeds"].values()}
    for found in former["seeds"].values() if former else ():
        if found["answers"] not in named:
            (folder / Path(found["answers"]).name).unlink(missing_ok=True)


def _same_model(former: Scores, model: str, folder: Path) -> bool:
    if not Path(model).is_dir():
        return bool(former["model"] == model)
    here = Path(model).resolve()
    return Path(former["model"]).resolve() == here or folder.resolve().parent == here


def write_answers(path: Path, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> dict[str, Any]:
    """Scores answers and writes them down; returns the scores of the run."""
    lines, scores = [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        scores.append(rouge_l(answer.text, prompt.references))
        line = {
            "row": prompt.row,
            "rouge_l": round(scores[-1], 2),
            "answer_tokens": answer.num_tokens,
            "ended": answer.ended,
            "prompt": prompt.text,
            "answer": answer.text,
            "references": list(prompt.references),
        }
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_text(path, "".join(lines))
    return {
        "rouge_l": statistics.fmean(scores),
        "answer_tokens": statistics.fmean(answer.num_tokens for answer in answers),
        "ended": statistics.fmean(answer.ended for answer in answers),
        "answers": path.name,
    }


def means_of_runs(seeds: Mapping[str, Mapping[str, float]]) -> dict[str, float | None]:
    """Computes means over runs, and the standard deviation of `rouge_l` over them (n − 1; None for one run)."""
    means = {
        name: statistics.fmean(scores[name] for scores in seeds.values())
        for name in ("rouge_l", "answer_tokens", "ended")
    }
    of_seeds = [scores["rouge_l"] for scores in seeds.values()]
    return means | {"spread": statistics.stdev(of_seeds) if len(of_seeds) > 1 else None}

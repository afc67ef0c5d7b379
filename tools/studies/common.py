"""What the studies share: their options, and training many students beside each other."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import lru_cache

import task
import torch
from judging import Judge
from results import Record, Results
from students import HARD, ONLINE, Student, judged
from task import FOLDER
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

STUDENTS = FOLDER / "students.jsonl"
JUDGED_ROWS = 128

# Okabe and Ito's colours, told apart by the colour-blind too.
COLOURS = {"fkl": "#0072B2", "rkl": "#D55E00", "akl": "#009E73", "todi": "#CC79A7"}
MARKERS = {"fkl": "o", "rkl": "s", "akl": "^", "todi": "D"}


def options(description: str | None) -> argparse.ArgumentParser:
    """The options of every study."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = 1 if torch.cuda.is_available() else os.cpu_count() or 1
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="(default: 1 2 3)")
    parser.add_argument("--jobs", type=int, default=jobs, help="students at a time, one thread each (default: cores)")
    return parser


def finish(students: Iterable[Student], jobs: int, temperatures: Sequence[float] = (1.0,)) -> Results:
    """Trains and judges the students that are not in studies/students.jsonl yet."""
    results = Results(STUDENTS)
    wanted = list(dict.fromkeys(students))
    missing = [student for student in wanted if student not in results]
    for rows in sorted({student.rows for student in wanted}):
        sources = {student.source for student in wanted if student.rows == rows} - {ONLINE, HARD} | {task.NARROWEST}
        task.prepare(rows, sorted(sources))
    if not missing:
        return results
    began = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_one_thread) as pool:
        futures = {pool.submit(_train_and_judge, student, tuple(temperatures)): student for student in missing}
        for number, future in enumerate(as_completed(futures), start=1):
            student = futures[future]
            if future.exception():
                pool.shutdown(cancel_futures=True)
            results.add(student, future.result())
            left = (time.perf_counter() - began) / number * (len(missing) - number)
            print(f"{number}/{len(missing)}  {describe(student)}  {left / 60:.0f} min left", flush=True)
    return results


def describe(student: Student) -> str:
    """A student in a few words."""
    parts = [student.source, student.loss, student.tail, f"T={student.temperature:g}", f"seed {student.seed}"]
    return ", ".join(parts[:1] + parts[-1:] if student.source == HARD else parts)


def _one_thread() -> None:
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _train_and_judge(student: Student, temperatures: tuple[float, ...]) -> Record:
    teacher = _teacher()
    judges = {"heldout": _judge("heldout", temperatures)}
    if student.rows != "train":
        judges[student.rows] = _judge(student.rows, temperatures)
    cache = task.cache(student.rows, task.NARROWEST if student.source in (ONLINE, HARD) else student.source)
    return judged(student, lambda: task.student(student.start), cache, teacher, judges)


@lru_cache
def _judge(cache: str, temperatures: tuple[float, ...]) -> Judge:
    return Judge(_teacher(), task.cache(cache), JUDGED_ROWS, temperatures)


@lru_cache
def _teacher() -> PreTrainedModel:
    model = task.teacher()
    return model.cuda() if torch.cuda.is_available() else model  # type: ignore[call-arg]  # the wrapper hides self

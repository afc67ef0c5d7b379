"""Runs of a recipe, some at a time; a finished run is not done again."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch

from logitcache import UserError
from logitcache.errors import one_line
from logitcache.progress import duration
from trainer.comparison.child import Child, last_step, locked_log
from trainer.comparison.folder_state import folder_state, model_files
from trainer.comparison.generation import remove_other_answers
from trainer.comparison.launch import Launcher
from trainer.comparison.recipe import PlannedRun, Recipe
from trainer.comparison.status_line import StatusLine
from trainer.evaluation.generation_settings import GenerationSettings
from trainer.evaluation.protocol import scores_are_current
from trainer.run.files import ANSWERS_NAME, EVALUATION_NAME, RUN_NAME, STATE_NAME
from trainer.run.output_folder import folder_held
from trainer.run.ranks import RANKS_VARIABLE

TRAINER = ("-m", "trainer")
SAFE_PATH = {"PYTHONSAFEPATH": "1"}
"""With it `-m` takes no `trainer.py` of the working folder for this package, also in ranks."""
LOG_NAME = "log.txt"
POLL_S = 0.2
SHOWN_LOG_LINES = 6


@dataclass(frozen=True)
class Failure:
    """A run that ended with an error, and the lines that tell why: its exit status and the end of its log."""

    folder: Path
    lines: list[str]


@dataclass
class _ActiveRun:
    """A run under way. log: None while another process trains it.  slot: its number among the `jobs`."""

    run: PlannedRun
    slot: int
    log: BinaryIO | None = None
    child: Child | None = None
    doing: str = "starting"
    began: float = field(default_factory=time.monotonic)

    @property
    def log_path(self) -> Path:
        return self.run.folder / LOG_NAME


def default_jobs() -> int:
    """Returns the default number of runs at a time: one for each GPU, or else for each core."""
    return torch.cuda.device_count() or len(os.sched_getaffinity(0))


def execute(recipe: Recipe, *, jobs: int) -> list[Failure]:
    """Does the missing runs, `jobs` at a time; a run that fails stops no other.

    Each run is a process of its own, its output in the folder's log.txt. A folder that holds another run is overwritten,
    so call `check.check` first. On Ctrl-C or SIGTERM the runs write checkpoints, and KeyboardInterrupt is raised when they
    have ended. Should this process be killed, its runs go on, and the next call waits for them.
    """
    pool = _Pool(recipe, jobs)
    with _stopped_by_signals():
        try:
            pool.run()
        except KeyboardInterrupt:
            pool.stop()
            raise
        finally:
            pool.close()
    return pool.failures


class _Pool:
    def __init__(self, recipe: Recipe, jobs: int) -> None:
        self.failures: list[Failure] = []
        self._generate, self._launch = recipe.generate, recipe.launch
        self._waiting = deque(recipe.runs)
        self._active: list[_ActiveRun] = []
        self._jobs = jobs
        self._status = StatusLine(len(recipe.runs))

    def run(self) -> None:
        while self._waiting or self._active:
            while self._waiting and len(self._active) < self._jobs:
                taken = {active.slot for active in self._active}
                slot = next(slot for slot in range(self._jobs) if slot not in taken)
                self._active.append(_ActiveRun(self._waiting.popleft(), slot))
            for active in list(self._active):
                try:
                    self._advance(active)
                except UserError as error:
                    self._fail(active, str(error))
                except Exception as error:  # whatever is wrong with one folder, the other runs go on
                    self._fail(active, f"{type(error).__name__}: {one_line(error)}")
            running = {active.run.folder.name: active.doing or last_step(active.log_path) for active in self._active}
            self._status.show(running)
            if self._active:
                time.sleep(POLL_S)

    def stop(self) -> None:
        """Asks the runs to write checkpoints and end; a second Ctrl-C ends them at once, a third kills them."""
        children = [active.child for active in self._active if active.child is not None]
        if children:
            self._status.say("stopping: every run writes a checkpoint first (Ctrl-C again: no checkpoints)")
        for end in (Child.interrupt, Child.interrupt, Child.kill):
            for child in children:
                end(child)
            try:
                while any(child.status() is None for child in children):
                    time.sleep(POLL_S)
                return
            except KeyboardInterrupt:
                continue

    def close(self) -> None:
        """Kills the runs that an error of this process left behind, and closes the logs."""
        self._status.close()
        for active in self._active:
            if active.child is not None and active.child.status() is None:
                active.child.kill()
            if active.log is not None:
                active.log.close()

    def _advance(self, active: _ActiveRun) -> None:
        """Takes a run one step further: waits for another process, starts the next command, or ends."""
        if active.log is None:
            active.run.folder.mkdir(parents=True, exist_ok=True)
            active.log = locked_log(active.log_path)
            if active.log is None:
                if active.doing != "waited for":
                    active.doing = "waited for"
                    self._status.say(f"{active.run.folder} is being trained by another process: waiting for it")
                return
        if active.child is not None:
            status = active.child.status()
            if status is None or self._ranks_go_on(active):
                return
            if status != 0:
                self._fail(active, f"exit status {status}", *active.child.last_lines(active.log_path, SHOWN_LOG_LINES))
                return
        command = self._next_command(active)
        if command is None:
            self._status.finished(active.run, duration(time.monotonic() - active.began), fresh=active.child is not None)
            self._end(active)
        else:
            launched = self._launch is not None and active.doing != "generating"
            active.child = Child(command, active.log, SAFE_PATH | self._environment(active), launcher=launched)

    def _ranks_go_on(self, active: _ActiveRun) -> bool:
        """Tells whether a launcher that was killed left ranks behind: they have the log's lock when it is given up."""
        assert active.log is not None
        active.log.close()
        active.log = locked_log(active.log_path)
        return active.log is None

    def _next_command(self, active: _ActiveRun) -> list[str] | None:
        assert active.log is not None
        run, state = active.run, folder_state(active.run)
        if not state.done:
            if active.child is not None:
                raise UserError(
                    f"{run.folder}: `trainer fit` ended well and left no finished run; see {active.log_path}"
                )
            if state.checkpoint is None:
                with folder_held(run.folder, "output_dir"):
                    _remove_former_run(run.folder)
                active.log.truncate(0)
            active.doing = ""
            return fit_command(run, state.checkpoint, self._launch)
        wanted = self._generate
        if wanted is None or scores_are_current(str(run.folder), run.folder / ANSWERS_NAME, wanted):
            return None
        if active.doing == "generating":
            raise UserError(f"{run.folder}: `trainer eval --generate` left no scores; see {active.log_path}")
        with folder_held(run.folder / ANSWERS_NAME, "answers"):
            other = remove_other_answers(run.folder, wanted)
        if other:
            self._status.say(
                f"{run.folder}: its answers were made with another {', '.join(other)}: they are made again"
            )
        active.doing = "generating"
        return generate_command(run.folder, wanted)

    def _fail(self, active: _ActiveRun, *lines: str) -> None:
        self._end(active)
        self.failures.append(Failure(active.run.folder, list(lines)))
        self._status.failed(active.run)

    def _end(self, active: _ActiveRun) -> None:
        if active.log is not None:
            active.log.close()
        self._active.remove(active)

    def _environment(self, active: _ActiveRun) -> dict[str, str]:
        if self._launch:
            return {} if active.run.ranks is None else {RANKS_VARIABLE: str(active.run.ranks)}
        gpus = torch.cuda.device_count()
        if gpus:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
            return {"CUDA_VISIBLE_DEVICES": visible.split(",")[active.slot % gpus]}
        if self._jobs == 1 or "OMP_NUM_THREADS" in os.environ:
            return {}
        return {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // self._jobs))}


def _remove_former_run(folder: Path) -> None:
    """Removes the files of a former run, so that none is taken for the new run's."""
    for name in (EVALUATION_NAME, STATE_NAME):
        (folder / name).unlink(missing_ok=True)
    for path in (*folder.glob("checkpoint-*"), *model_files(folder)):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    (folder / RUN_NAME).unlink(missing_ok=True)  # last: without it the folder would be someone else's


def fit_command(run: PlannedRun, checkpoint: Path | None, launch: Launcher | None) -> list[str]:
    """Returns the command line of `trainer fit`, from a checkpoint if there is one."""
    resume = [] if checkpoint is None else ["--resume_from_checkpoint", str(checkpoint)]
    return [*(launch.command if launch else [sys.executable]), *TRAINER, "fit", *run.arguments, *resume]


def generate_command(folder: Path, settings: GenerationSettings) -> list[str]:
    """Returns the command line of `trainer eval --generate` for a finished student."""
    options: list[str] = []
    for name, value in vars(settings).items():
        if name == "columns":
            options += ["--columns=" + ",".join(f"{ours}={theirs}" for ours, theirs in value.items())] if value else []
        elif name == "prompt_template":
            options += [f"--prompt_template={template}" for template in value]
        elif name in ("data", "seeds"):
            options += [f"--{name}", *map(str, value)]
        elif value is not None:
            options.append(f"--{name}={value}")
    return [sys.executable, *TRAINER, "eval", str(folder), "--generate", *options]


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Lets SIGINT and SIGTERM raise KeyboardInterrupt, even if they were ignored when this process started."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

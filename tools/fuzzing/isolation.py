"""One input in a process of its own, forked from one in which everything is imported, and watched."""

from __future__ import annotations

import json
import os
import resource
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from trial import Command, Trial

import logitcache.capture.engine
import logitcache.capture.inputs
import logitcache.capture.options
import logitcache.cli
import trainer.cli
import trainer.comparison.execute
import trainer.run.fit
from logitcache import UserError
from logitcache.capture.engine import EngineChoice
from trainer.comparison.execute import Failure
from trainer.comparison.recipe import Recipe

HANG_S = 20.0
"""By the clock, without the time that a process waits for a processor on a busy machine."""
MAX_BYTES = 2 << 30
HANG, MEMORY = "hang: more than 20 s", "memory: more than 2 GiB"
MAX_LINE = 6000
OUTPUT_NAME, COMMANDS_NAME, RESULT_NAME = "output.txt", "commands.json", "result.json"
PROGRAMS = ("logitcache", "trainer")


@dataclass(frozen=True)
class Finding:
    """what: kind of fault, and its place where there is one: findings that share it are probably one fault."""

    what: str
    details: str


@dataclass(frozen=True)
class Ended:
    """What became of an input. statuses: of its commands, those that ended as they should.  seconds: of the processor."""

    findings: list[Finding]
    statuses: list[int]
    seconds: float


class Running:
    """An input at work in a process."""

    def __init__(self, make: Callable[[Trial], list[Command]], trial: Trial) -> None:
        self.trial = trial
        self._began = time.monotonic()
        self.pid = os.fork()
        if not self.pid:
            try:
                _run(make, trial)
                os._exit(0)
            finally:
                os._exit(1)
        os.setpgid(self.pid, self.pid)
        self.end = os.pidfd_open(self.pid)  # readable when it has ended
        self._killed = ""

    def watch(self) -> None:
        """Kills a process that hangs or takes too much."""
        process = Path(f"/proc/{self.pid}")
        try:
            pages = int((process / "statm").read_text().split()[1])
            waited_ns = sum(int(task.read_text().split()[1]) for task in process.glob("task/*/schedstat"))
        except (OSError, IndexError):  # it has ended meanwhile
            return
        if pages * resource.getpagesize() > MAX_BYTES:
            self._killed = MEMORY
        elif time.monotonic() - self._began - waited_ns / 1e9 > HANG_S:
            self._killed = HANG
        if self._killed:
            os.killpg(self.pid, signal.SIGKILL)

    def result(self) -> Ended:
        """What became of it, once the process has ended."""
        os.close(self.end)
        _, status, usage = os.wait4(self.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        if usage.ru_maxrss * 1024 > MAX_BYTES:
            self._killed = MEMORY
        elif code and not self._killed:
            self._killed = f"died: exit status {code}"
        seconds = usage.ru_utime + usage.ru_stime
        if self._killed:
            commands = self.trial.folder / COMMANDS_NAME
            return Ended([Finding(self._killed, commands.read_text() if commands.exists() else "")], [], seconds)
        said = json.loads((self.trial.folder / RESULT_NAME).read_text())
        return Ended([Finding(**finding) for finding in said["findings"]], said["statuses"], seconds)


def _run(make: Callable[[Trial], list[Command]], trial: Trial) -> None:
    """Runs the commands of an input and writes down what came of them."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.environ |= {"TMPDIR": str(trial.folder), "LOGITCACHE_HOME": str(trial.folder / "home")}
    os.chdir(trial.folder)
    try:
        commands = make(trial)
        (trial.folder / COMMANDS_NAME).write_text(json.dumps(commands))
        with _stopped_short(trial):
            judged = [_judged(command) for command in commands]
    except BaseException:
        judged = [Finding("this script: an error of its own", traceback.format_exc())]
    findings = [vars(one) for one in judged if isinstance(one, Finding)]
    statuses = [one for one in judged if not isinstance(one, Finding)]
    (trial.folder / RESULT_NAME).write_text(json.dumps({"findings": findings, "statuses": statuses}))


def _judged(command: Command) -> Finding | int:
    """Runs a command in this process. Returns its exit status, or in which way it did not end as every command promises."""
    program, arguments = command[0], command[1:]
    shown = f"$ {' '.join(command)[:3000]!r}"
    with _output() as output:
        try:
            status: int = (logitcache.cli if program == "logitcache" else trainer.cli).main(arguments)
        except SystemExit as error:  # of --help
            status = error.code if isinstance(error.code, int) else 0
        except BaseException as error:
            return Finding(_place(error), f"{shown}\n{traceback.format_exc()[-6000:]}")
        said = output()
    if "Traceback (most recent call last)" in said:
        return Finding(f"traceback in the output: {said.strip().splitlines()[-1][:200]}", f"{shown}\n{said[-6000:]}")
    if status not in ((0, 1, 2) if arguments[0] in ("verify", "compare") else (0, 2)):
        return Finding(f"exit status {status}", f"{shown}\n{said[-3000:]}")
    _, mark, message = said.rpartition(f"{program}: error: ")
    if status == 2 and (not mark or len(message.strip().splitlines()) != 1 or len(message) > MAX_LINE):
        return Finding("exit status 2 without one line that says why", f"{shown}\n{said[:3000]}")
    return status


@contextmanager
def _output() -> Iterator[Callable[[], str]]:
    """Everything that is printed meanwhile, by whatever part of the process."""
    with Path(OUTPUT_NAME).open("w+", buffering=1, errors="replace") as file:
        saved = os.dup(1), os.dup(2)
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        with redirect_stdout(file), redirect_stderr(file):
            yield lambda: Path(OUTPUT_NAME).read_text(errors="replace")
        for number, before in zip((1, 2), saved, strict=True):
            os.dup2(before, number)


def _place(error: BaseException) -> str:
    """Kind of an error, and the last line of ours and of anybody's that it went through."""
    frames = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
    paths = [Path(frame.filename).parts for frame in traceback.extract_tb(error.__traceback__)]
    ours = [
        frame
        for frame, path in zip(frames, paths, strict=True)
        if {*PROGRAMS} & {*path} and "site-packages" not in path
    ]
    return f"{type(error).__name__} at {' → '.join(dict.fromkeys([*ours[-1:], *frames[-1:]]))}"


@contextmanager
def _stopped_short(trial: Trial) -> Iterator[None]:
    """Without engines, runs of recipes and, mostly, training."""
    choose_engine = logitcache.capture.engine.choose_engine

    def engine(options: EngineChoice, *arguments: Any) -> Any:
        if options.backend in ("auto", "vllm"):
            raise UserError("no engine of vLLM is started here")
        return choose_engine(options, *arguments)

    def options(arguments: list[str]) -> dict[str, Any]:
        if arguments:
            raise UserError("vLLM's own options are not read here")
        return {}

    def not_done(recipe: Recipe, jobs: int) -> list[Failure]:
        return [Failure(run.folder, ["no run is done here"]) for run in recipe.runs]

    def fitted(run: Any, tell: Any) -> trainer.run.fit.Outcome:
        return trainer.run.fit.Outcome(0, None)

    with (
        patch.object(logitcache.capture.inputs, "choose_engine", engine),
        patch.object(logitcache.capture.options, "parse_engine_options", options),
        patch.object(trainer.comparison.execute, "execute", not_done),
        patch.object(trainer.run.fit, "fit", trainer.run.fit.fit if trial.trains else fitted),
    ):
        yield

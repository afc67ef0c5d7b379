"""Processes of their own that start in milliseconds: forked from a server that has imported what they need."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import vllm_forks

PRELOADED = [
    *("logitcache.capture.build", "logitcache.capture.teachers.hf", "logitcache.exchange.importing"),
    *("logitcache.maintenance.merge", "logitcache.sharing.pull", "logitcache.sharing.push", "s3fs"),
    *("trainer.run.fit", "transformers.models.llama.modeling_llama"),
]
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(PRELOADED)
LONGEST_S = 300
CORE_HERE = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
"""The environment variable with which vLLM's front end does the work of its core too."""


def run_command(
    program: str, *arguments: str, cwd: Path | None = None, env: Mapping[str, str] = os.environ
) -> subprocess.CompletedProcess[str]:
    """Does what `subprocess.run` does with `python -m program`, but for the seconds of imports."""
    with started_command(program, *arguments, cwd=cwd, env=env) as command:
        pass
    return subprocess.CompletedProcess([program, *arguments], command.exitcode, *command.said)


class Command(FORKED.Process):  # type: ignore[name-defined, misc]
    """`python -m program`, in a session of its own as a terminal's job is.

    Attributes:
        said: What it wrote to standard output and error, once it has ended.
    """

    said: list[str]


@contextmanager
def started_command(
    program: str, *arguments: str, cwd: Path | None = None, env: Mapping[str, str] = os.environ
) -> Iterator[Command]:
    """Starts such a command, and waits for its end where the block ends."""
    with tempfile.TemporaryDirectory() as folder:
        command = Command(target=_command, args=(folder, program, arguments, cwd or Path.cwd(), dict(env)))
        command.start()
        try:
            yield command
        finally:
            command.said = _ended([command], folder)


def on_two_ranks(function: Callable[..., None], *arguments: Any, status: int = 0) -> list[str]:
    """Calls it in two processes that are told of each other as torchrun tells them. Returns what both print and report.

    status: with which both must end.
    """
    with tempfile.TemporaryDirectory() as folder:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
            common["MASTER_PORT"] = str(free.getsockname()[1])
        ranks = []
        for rank in ("0", "1"):
            told = {**os.environ, **common, "RANK": rank, "LOCAL_RANK": rank}
            ranks.append(FORKED.Process(target=_rank, args=(folder, told, function, arguments)))
            ranks[-1].start()
        said = _ended(ranks, folder)
        assert [rank.exitcode for rank in ranks] == [status, status], said[1][-3000:]
        return said


@contextmanager
def vllm_core_here() -> Iterator[dict[str, str]]:
    """Options of an engine that is started inside: only its workers are processes of their own."""
    from vllm import envs

    with pytest.MonkeyPatch.context() as patch:
        for name, value in CORE_HERE.items():
            patch.setenv(name, value)
        yield {"distributed_executor_backend": "mp"}
    envs.disable_envs_cache()


def _ended(processes: list[Any], folder: str) -> list[str]:
    """What they wrote to standard output and error, once they have ended."""
    for process in processes:
        process.join(LONGEST_S)
        if process.is_alive():
            process.kill()
            process.join()
    return [path.read_text() if (path := Path(folder, name)).exists() else "" for name in ("1", "2")]


def _enter(folder: str, env: Mapping[str, str]) -> None:
    """Takes the environment over, and sends what is written to files."""
    os.environ.clear()
    os.environ.update(env)
    for descriptor in (1, 2):
        os.dup2(os.open(Path(folder, str(descriptor)), os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)


def _command(folder: str, program: str, arguments: tuple[str, ...], cwd: Path, env: Mapping[str, str]) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell ignores for what runs in the background
    _enter(folder, env)
    if "vllm" in sys.modules:
        vllm_forks.fork_processes(vllm_forks.Forks)
    os.chdir(cwd)
    sys.argv = [program, *arguments]
    try:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # as an interpreter does at its end, and a fork does not


def _rank(folder: str, env: Mapping[str, str], function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    import torch

    _enter(folder, env)
    torch.set_num_threads(1)
    function(*arguments)

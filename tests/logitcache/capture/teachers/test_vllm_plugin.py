"""What logitcache does in vLLM's processes, and what is known of those that a signal ended."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
from multiprocessing.popen_fork import Popen
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from logitcache import UserError
from logitcache.capture.teachers.vllm.engine import EngineProcesses
from logitcache.capture.teachers.vllm.plugin import prepare_engine, record_signals
from logitcache.capture.teachers.vllm.protocol import SCORE_LOGITS, SIGNALS_FILE
from logitcache.engines.vllm_process import OWNER_PID


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """A processor with AMX. Holds an entry for each time that the kernel was asked for its tiles."""
    calls: list[bool] = []

    def init_amx() -> bool:
        calls.append(True)
        return True

    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_init_amx", init_amx)
    monkeypatch.delenv(SCORE_LOGITS, raising=False)
    return calls


def test_a_process_of_a_build_asks_for_amx(asked: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OWNER_PID, str(os.getpid()))
    prepare_engine()
    assert asked


def test_without_amx_nothing_is_asked_for(asked: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setenv(OWNER_PID, str(os.getpid()))
    prepare_engine()
    assert not asked


def test_engines_of_other_programs_are_left_alone(asked: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(OWNER_PID, raising=False)
    prepare_engine()
    assert not asked


def end_by(number: int) -> None:
    faulthandler.disable()  # pytest's, which would show it
    if number != signal.SIGKILL:
        signal.signal(
            number, signal.SIG_DFL
        )  # Ray's handler, where an earlier test started it, ends a process otherwise
    os.kill(os.getpid(), number)


def ended(number: int) -> Any:
    """A process that a signal ended and of which its parent knows."""
    process = multiprocessing.get_context("fork").Process(target=end_by, args=(number,))
    process.start()
    process.join()
    assert process.exitcode == -number
    return process


def test_the_first_signal_that_ended_a_worker_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Popen, "poll", Popen.poll)  # put back afterwards
    monkeypatch.setenv(OWNER_PID, str(os.getppid()))  # this process is the engine
    monkeypatch.setenv(SIGNALS_FILE, str(tmp_path / "signals"))
    record_signals()
    for number in (signal.SIGTERM, signal.SIGILL, signal.SIGKILL):  # vLLM's own end of a worker; a crash; a leftover
        ended(number)
    *others, first, second = map(int, (tmp_path / "signals").read_text().split())
    assert (first, second) == (signal.SIGILL, signal.SIGKILL)
    assert signal.SIGTERM not in others  # engines that earlier tests closed may end meanwhile


@pytest.mark.engine  # for the sake of the time that vLLM takes to import
@pytest.mark.parametrize(
    ("workers", "engine", "told"),
    [
        (
            [signal.SIGILL],
            None,
            r"while it was working \(SIGILL: an instruction that this processor does not have.*\); ",
        ),
        ([signal.SIGSEGV, signal.SIGKILL], signal.SIGKILL, r"while it was working \(SIGSEGV: Segmentation fault\); "),
        ([], signal.SIGKILL, r"while it was working \(SIGKILL: killed, as the kernel does where memory runs out\); "),
        ([], signal.SIGTERM, r"while it was working; "),
        ([], None, r"while it was working; "),
    ],
)
def test_the_message_of_a_dead_engine_names_the_signal(workers: list[int], engine: int | None, told: str) -> None:
    pytest.importorskip("vllm")
    from vllm.v1.engine.exceptions import EngineDeadError

    processes = EngineProcesses()
    with processes.starting(), Path(os.environ[SIGNALS_FILE]).open("a") as file:
        file.writelines(f"{number}\n" for number in workers)
    if engine is not None:
        core = SimpleNamespace(resources=SimpleNamespace(engine_manager=SimpleNamespace(processes=[ended(engine)])))
        core.outputs_queue = SimpleNamespace(put_nowait=lambda item: None)
        processes.watch(SimpleNamespace(engine_core=core))
    with pytest.raises(UserError, match=told), processes.running():
        raise EngineDeadError


def test_an_engine_that_does_not_start_names_the_signal_too() -> None:
    processes = EngineProcesses()
    with (
        pytest.raises(UserError, match=r"does not start with this teacher: worker failed \(SIGILL: "),
        processes.starting(),
    ):
        Path(os.environ[SIGNALS_FILE]).write_text(f"{signal.SIGILL}\n")
        raise RuntimeError("worker failed")

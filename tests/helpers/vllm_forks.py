"""vLLM's processes as forks of a process that has imported vLLM: each of them would import it anew, for eight seconds.

They get what vLLM gives to processes that it spawns: the environment as it is when they start, and plugins that are not
loaded yet.
"""

from __future__ import annotations

import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.context import ForkContext, ForkProcess, ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

PRELOADED = [
    *(
        "vllm.entrypoints.llm",
        "vllm.v1.engine.core",
        "vllm.v1.executor.multiproc_executor",
        "vllm.v1.worker.cpu_worker",
    ),
    *(
        "vllm.entrypoints.openai.api_server",
        "vllm.model_executor.models.llama",
        "logitcache.capture.teachers.vllm.model",
    ),
]
"""What a server of forks imports before it makes one."""


def fork_processes(context: type[Forks] | type[ServedForks]) -> None:
    """Makes vLLM take its processes from this context, from now on, in this process."""
    from vllm.model_executor.models import registry
    from vllm.utils import system_utils
    from vllm.v1.engine import utils
    from vllm.v1.executor import multiproc_executor

    made = context()
    for module in (system_utils, utils, multiproc_executor):
        module.get_mp_context = lambda: made
    registry._run_in_subprocess = lambda function: _result_of(function, made)


class _Fork(ForkProcess):
    """A fork of this process."""

    def run(self) -> None:
        _load_plugins_anew()
        super().run()


class _ServedFork(ForkServerProcess):
    """A fork of the server, which other threads of this process do not disturb."""

    def start(self) -> None:
        self._environment = dict(os.environ)
        super().start()

    def run(self) -> None:
        os.environ.clear()
        os.environ.update(self._environment)
        fork_processes(Forks)
        _load_plugins_anew()
        super().run()


class Forks(ForkContext):
    """For a process that is a fork of the server itself."""

    Process = _Fork


class ServedForks(ForkServerContext):
    """For pytest's own process."""

    Process = _ServedFork


def _load_plugins_anew() -> None:
    from vllm import plugins

    plugins.plugins_loaded = False


def _result_of(function: Callable[[], Any], context: Any) -> Any:
    """What vLLM computes in a process of its own to leave the calling one as it is."""
    import cloudpickle

    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result")
        process = context.Process(target=_compute, args=(cloudpickle.dumps(function), result))
        process.start()
        process.join()
        if not result.exists():
            raise RuntimeError(f"the process ended with status {process.exitcode}")
        value = pickle.loads(result.read_bytes())
    if isinstance(value, Exception):
        raise value
    return value


def _compute(function: bytes, result: Path) -> None:
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    try:
        value = pickle.loads(function)()
    except Exception:
        value = RuntimeError(f"Error raised in subprocess:\n{traceback.format_exc()}")
    result.write_bytes(pickle.dumps(value))

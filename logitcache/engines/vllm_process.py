"""The processes of vLLM, for every command that starts some: environment, settings on a CPU, end, errors in short.

vLLM runs its engine and its workers in processes of their own. They do not notice when the process that started them is
gone, and would keep their GPU memory for ever. `ends_with_this_process` names the owner in the environment; the plugin
that vLLM loads into each of its processes calls `end_with_owner`.
"""

from __future__ import annotations

import importlib
import os
import re
import select
import signal
import textwrap
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

OWNER_PID = "LOGITCACHE_BUILD_PID"
"""Environment variable with the id of the process that vLLM's processes must not outlive."""
SHUTDOWN_S = 60.0
"""How long vLLM's processes may take to end by themselves; killed ones leave shared memory behind."""


def set_environment() -> None:
    """Sets the environment variables of vLLM that nobody has set to what we need. Call it before vLLM is imported."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    # A forked engine would not run the plugin again, and so outlive its owner.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")


def why_not_vllm() -> str | None:
    """Returns why vLLM cannot be used here, or None if it imports."""
    set_environment()
    try:
        importlib.import_module("vllm")
    except Exception as error:  # a build for other hardware fails in its own ways
        return f"vLLM does not import ({brief(error)})"
    return None


def brief(error: BaseException) -> str:
    """Returns the beginning of an error's message, which in vLLM can run over pages, without pydantic's frame around it."""
    framed = re.search(r"Value error, (.*?)\.? (?:Supported architectures: |\[type=)", str(error), re.DOTALL)
    return textwrap.shorten(framed[1] if framed else str(error), 300, placeholder=" …") or type(error).__name__


def whole_prompts(max_tokens: int) -> dict[str, Any]:
    """Returns the EngineArgs with which an engine reads each prompt, of at most `max_tokens`, in one step.

    Generation on vLLM's CPU backend needs them: it cannot rewind a seeded generator, as it must for prompts that are read in
    chunks.
    """
    return {"enable_chunked_prefill": False, "max_num_batched_tokens": max(max_tokens, 2048)}


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets environment variables for the processes that are started inside, and for no others."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def ends_with_this_process() -> Iterator[None]:
    """Makes the processes that vLLM starts inside end with this one, even if it is killed."""
    with environment({OWNER_PID: str(os.getpid())}):
        yield


def end_with_owner() -> None:
    """Makes this process end when its owner does, and not before: Ctrl-C is the owner's to handle.

    A thread waits on the owner's process descriptor (pidfd_open(2)): its whole process, not the thread that started vLLM.
    """
    owner = int(os.environ.get(OWNER_PID, os.getpid()))
    if owner == os.getpid():
        return
    try:
        descriptor = os.pidfd_open(owner)
    except ProcessLookupError:
        os.kill(os.getpid(), signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_after, args=(descriptor,), name="logitcache-owner-watch", daemon=True).start()


def _end_after(process: int) -> None:
    select.select([process], [], [])
    os.kill(os.getpid(), signal.SIGKILL)

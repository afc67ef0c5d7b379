"""Runs in every process that vLLM starts for a build; does nothing in engines of other programs.

Installed as an entry point of `vllm.general_plugins`. vLLM calls it in the front end, in the engine's own process and in
each worker, before a model is loaded there. The engine must not outlive a build that was killed: it does not notice when
its front end is gone, would keep its GPU memory for ever, and the build that continues would find none. The signal that ends
a worker is known to its parent only, which keeps it to itself. And where the build asks for logits, every model must be
able to hand them out.
"""

from __future__ import annotations

import os
import select
import signal
import threading
from multiprocessing.popen_fork import Popen
from pathlib import Path
from typing import Final

BUILD_PID = "LOGITCACHE_BUILD_PID"
"""Environment variable: the process that the engine must not outlive."""
SIGNALS_FILE = "LOGITCACHE_SIGNALS_FILE"
"""Environment variable: the file to which the engine's processes add a line for each child that a signal ended."""
SCORE_LOGITS = "LOGITCACHE_SCORE_LOGITS"
"""Environment variable: set where models are to be loaded as pooling models that give rows of `capture.packing`."""
TASK: Final = "token_embed"
"""vLLM's name for what such a model does: a tensor for each token."""


def prepare_engine() -> None:
    """The entry point."""
    if BUILD_PID in os.environ:
        allow_amx()
        die_with_the_build()
        record_signals()
    if SCORE_LOGITS in os.environ:
        from logitcache.capture.teachers.vllm.model import register_scoring_models

        register_scoring_models()


def allow_amx() -> None:
    """Asks the kernel for the tile registers of processors with AMX.

    Linux gives them to a process that asks (arch_prctl(2), ARCH_REQ_XCOMP_PERM) and ends any other one at its first tile
    instruction. vLLM's attention in bfloat16 uses tiles wherever the processor has them, and does not ask.
    """
    import torch

    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()


def die_with_the_build() -> None:
    """Makes this process end when the build that started it does, and not before: Ctrl-C is the build's to handle.

    A thread waits on the build's process descriptor (pidfd_open(2)): its whole process, not the thread that started vLLM.
    """
    build = int(os.environ.get(BUILD_PID, os.getpid()))
    if build == os.getpid():
        return
    try:
        descriptor = os.pidfd_open(build)
    except ProcessLookupError:
        os.kill(os.getpid(), signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_after, args=(descriptor,), name="logitcache-build-watch", daemon=True).start()


def record_signals() -> None:
    """Makes this process add a line to `SIGNALS_FILE` for each child that a signal ended, as soon as it learns of it.

    SIGTERM is left out: it is how vLLM ends its workers, whatever went wrong before.
    """
    path = os.environ.get(SIGNALS_FILE)
    if path is None or os.environ[BUILD_PID] == str(os.getpid()):
        return
    poll = Popen.poll

    def recorded(child: Popen, flag: int = os.WNOHANG) -> int | None:
        running = child.returncode is None
        status = poll(child, flag)
        if running and status is not None and status < 0 and status != -signal.SIGTERM:
            with Path(path).open("a") as file:
                file.write(f"{-status}\n")
        return status

    Popen.poll = recorded  # type: ignore[method-assign, assignment]


def _end_after(process: int) -> None:
    select.select([process], [], [])
    os.kill(os.getpid(), signal.SIGKILL)

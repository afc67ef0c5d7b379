"""A command run again with the same settings returns the finished cache, or continues the unfinished one; others are refused.

The settings are a `spec` in plain JSON. That of a build is the fingerprint of its cache; every other command names itself in
it, and the spec becomes the last step of the cache's history.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from logitcache.assembly.plan import PLAN_NAME, P
from logitcache.assembly.workspace import ANSWERS_NAME, PROMPTS_NAME, remove_former
from logitcache.errors import UserError
from logitcache.format.manifest import BUILD_DIRECTORY, MANIFEST_NAME, read_manifest
from logitcache.reading.cache import LogitCache, open_cache
from logitcache.storage.folder import Folder

logger = logging.getLogger("logitcache")


def finished_cache(folder: Folder, spec: Mapping[str, Any]) -> LogitCache | None:
    """Opens the cache in `folder`, if it is complete and was made with the same settings.

    Raises UserError if it does not open or was made otherwise.
    """
    if not folder.exists(MANIFEST_NAME):
        return None
    try:
        cache = open_cache(folder.path)
    except UserError as error:
        raise UserError(f"{error}, or make the whole cache anew with --overwrite") from error
    last = cache.manifest.history[-1] if cache.manifest.history else {"command": "build"}
    is_build = "command" not in spec
    recorded = _without_result(cache.manifest.fingerprint) if is_build else {name: last.get(name) for name in spec}
    refuse_changes(recorded, spec, folder, "a finished cache")
    if is_build and not last["command"].startswith("build"):
        raise UserError(
            f"--out {folder} holds what `logitcache {last['command']}` made of a cache like this one: choose another --out, "
            "or start anew with --overwrite"
        )
    folder.remove(BUILD_DIRECTORY)
    logger.info("%s is already complete", folder)
    return cache


def _without_result(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the spec of a build, given the fingerprint of its cache."""
    corpus = {name: value for name, value in fingerprint["corpus"].items() if name != "sequences_sha256"}
    return {**fingerprint, "corpus": corpus}


def made_with(folder: Folder, overwrite: bool) -> Mapping[str, Any] | None:
    """Returns the settings of the cache in `folder` that the same command opens or continues; None without one.

    overwrite: a finished one is not opened.
    """
    if folder.exists(MANIFEST_NAME) and not overwrite:
        with suppress(UserError):  # `finished_cache` reports it
            return read_manifest(folder).fingerprint
    return recorded_spec(folder)


def recorded_spec(folder: Folder) -> dict[str, Any] | None:
    """Returns the settings that an unfinished cache was begun with; None if it was interrupted before they were recorded."""
    for name in (PLAN_NAME, PROMPTS_NAME):
        if folder.exists(name):
            spec: dict[str, Any] = json.loads(folder.read(name))["request"]
            return spec
    return None


def continues(folder: Folder, spec: Mapping[str, Any], overwrite: bool) -> bool:
    """Tells whether `folder` contains an unfinished cache with a plan, begun with the same settings.

    Raises UserError if it was begun with others, which `overwrite` may replace.
    """
    recorded = _begun_with(folder, spec)
    if recorded is None or (overwrite and differences(recorded, spec)):
        return False
    refuse_changes(recorded, spec, folder, "an unfinished cache")
    return folder.exists(PLAN_NAME)


def _begun_with(folder: Folder, spec: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Returns the settings of an unfinished cache; without a plan, its answers serve whatever `spec` captures of them."""
    recorded = recorded_spec(folder)
    if recorded is None or folder.exists(PLAN_NAME):
        return recorded
    return {**recorded, **{name: spec[name] for name in ("capture", "format") if name in spec}}


def begun_plan(kind: type[P], folder: Folder, spec: Mapping[str, Any], overwrite: bool) -> P | None:
    """Reads the plan of an interrupted command that `spec` continues, if there is one; see `continues`.

    The completions of a build that `overwrite` replaces are removed.
    """
    if not continues(folder, spec, overwrite):
        if differences(_begun_with(folder, spec) or spec, spec):
            folder.remove(ANSWERS_NAME)
        return None
    if overwrite and folder.exists(MANIFEST_NAME):
        remove_former(folder)  # interrupted between planning and removing the cache that it overwrites
    return kind.read(folder)


def refuse_changes(recorded: Mapping[str, Any], spec: Mapping[str, Any], folder: Folder, what: str) -> None:
    """Raises UserError naming the first settings in which `spec` differs from the recorded ones."""
    changes = differences(recorded, spec)
    if changes:
        raise UserError(
            f"--out {folder} holds {what} made otherwise: {first_of(changes)}. "
            "Repeat the former settings, choose another --out, or start anew with --overwrite"
        )


def differences(recorded: Mapping[str, Any], spec: Mapping[str, Any]) -> list[str]:
    """Lists the settings in which two specs differ, in words; of two commands only that they are two."""
    before, now = (each.get("command", "build") for each in (recorded, spec))
    if before != now:
        return [f"command was {before}, now {now}"]
    return [f"{name} was {old}, now {new}" for name, old, new in compared(recorded, spec)]


def first_of(changes: list[str]) -> str:
    """Joins the first three changes, and says how many more there are."""
    return "; ".join(changes[:3]) + (f" and {len(changes) - 3} more" if len(changes) > 3 else "")


def compared(one: Any, other: Any, path: str = "") -> Iterator[tuple[str, str, str]]:
    """Yields where two trees of plain JSON differ: the dotted name of the place, and its value in each as text."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in {**one, **other}:
            yield from compared(one.get(key), other.get(key), f"{path}.{key}" if path else key)
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for index, (first, second) in enumerate(zip(one, other, strict=True)):
            yield from compared(first, second, f"{path}[{index}]")
    elif one != other:
        yield path, _shown(one), _shown(other)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"{len(value)} items"
    return f"{value[:12]}…" if isinstance(value, str) and len(value) > 48 else str(value)

"""The same command again: is the cache complete, is one under way? For commands that end a history with their request."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from logitcache.assembly.unfinished import PLAN_NAME, differences, read_request, refuse_changes
from logitcache.assembly.workspace import ANSWERS_NAME, remove_former
from logitcache.errors import UserError
from logitcache.format.manifest import BUILD_DIRECTORY, MANIFEST_NAME
from logitcache.reading.cache import LogitCache, open_cache
from logitcache.storage.folder import Folder


def finished_cache(folder: Folder, request: Mapping[str, Any]) -> LogitCache | None:
    """The cache in `folder`, if it is complete and was made from the same request.

    Raises UserError where it does not open or was made otherwise.
    """
    if not folder.exists(MANIFEST_NAME):
        return None
    try:
        cache = open_cache(folder.path)
    except UserError as error:
        raise UserError(f"{error}, or write the whole cache anew with --overwrite") from error
    last = cache.manifest.history[-1] if cache.manifest.history else {"command": "build"}
    refuse_changes({name: last.get(name) for name in request}, request, folder, "a finished cache")
    folder.remove(BUILD_DIRECTORY)
    return cache


def begun_plan(folder: Folder, request: Mapping[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """plan.json of an interrupted command that this request continues, or None; under `overwrite` no other is refused."""
    recorded = read_request(folder)
    if recorded is None and not folder.exists(ANSWERS_NAME):
        return None
    if recorded is None or "command" not in recorded:
        recorded = {"command": "build"}
    if overwrite and differences(recorded, request):
        return None
    refuse_changes(recorded, request, folder, "an unfinished cache")
    if overwrite and folder.exists(MANIFEST_NAME):
        remove_former(folder)  # interrupted between planning and removing the cache that it overwrites
    plan: dict[str, Any] = json.loads(folder.read(PLAN_NAME))
    return plan

"""Shards that are all there → a cache: tokenizer, partition and card, then the manifest."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path

from logitcache.assembly.finalize import seal, trusted_files
from logitcache.assembly.unfinished import PLAN_NAME, read_request
from logitcache.assembly.workspace import workspace
from logitcache.capture.plan import PARTITION_NAME, Plan, read_plan
from logitcache.capture.reuse import copied_history
from logitcache.errors import UserError
from logitcache.format.manifest import BUILD_DIRECTORY, MANIFEST_NAME, Manifest
from logitcache.format.tail_groups import TAIL_GROUPS_NAME
from logitcache.reading.cache import LogitCache, open_cache
from logitcache.storage.folder import Folder
from logitcache.version import __version__

NOT_SCORED = "not scored"
"""What `skipped` of the manifest calls rows for which the teacher gave NaN."""

logger = logging.getLogger("logitcache")


def finish(out: str | Path) -> LogitCache:
    """Makes a cache of the shards that `logitcache build --shard-range` left in `out`.

    Raises UserError where no build was begun, where shards are missing (naming them), and while one is being written.
    """
    folder = Folder(out)
    with workspace(folder):
        request = read_request(folder)
        if request is None:
            if folder.exists(MANIFEST_NAME):
                return open_cache(out)
            raise UserError(f"{folder}: nothing to finish, no build was begun there")
        if "command" in request:
            raise UserError(f"{folder} is an unfinished `logitcache {request['command']}`: run the same command again")
        return finish_plan(read_plan(folder))


def finish_plan(plan: Plan) -> LogitCache:
    """The same while the folder is held."""
    folder = plan.folder
    shards = [plan.finished(index) for index in range(len(plan.shards))]
    missing = [index for index, shard in enumerate(shards) if shard is None]
    if missing:
        some = ", ".join(map(str, missing[:10])) + (", …" if len(missing) > 10 else "")
        raise UserError(
            f"{folder}: {len(missing)} of {len(shards)} shards are not complete ({some}): run `logitcache build` with the "
            "shard range that holds them again"
        )
    folder.remove(TAIL_GROUPS_NAME)  # of a cache that was overwritten
    if plan.cache_layout.tail_parts.groups:
        folder.write(TAIL_GROUPS_NAME, folder.read(PARTITION_NAME))
    left_out = plan.left_out()
    fingerprint = {**plan.request, "corpus": plan.request["corpus"] | {"sequences_sha256": _sha256(plan, left_out)}}
    skipped = dict(plan.skipped)
    if reasons := [reason for rows in left_out.values() for reason in rows.values()]:
        skipped[NOT_SCORED] = len(reasons)
        logger.warning("left out: %s %s; the first: %s", f"{len(reasons):,}", NOT_SCORED, reasons[0])
    complete = tuple(shard for shard in shards if shard is not None)
    manifest = Manifest(
        plan.cache_layout,
        fingerprint,
        complete,
        skipped,
        f"logitcache {__version__}",
        trusted_files(folder),
        copied_history(folder),
    )
    seal(folder, manifest)
    folder.remove(PLAN_NAME)  # without it nothing asks what else is left, should this be cut off
    folder.remove(BUILD_DIRECTORY)
    return open_cache(folder.path)


def _sha256(plan: Plan, left_out: Mapping[int, Mapping[int, str]]) -> str:
    """Of the row ids in order, without the rows that are left out."""
    if not left_out:
        return plan.sequences_sha256
    digest = hashlib.sha256()
    for index in range(len(plan.shards)):
        for row, sequence in enumerate(plan.sequences(index)):
            if row not in left_out.get(index, {}):
                digest.update(sequence.row_id.encode())
    return digest.hexdigest()

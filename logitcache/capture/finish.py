"""logitcache finish: the complete shards of a build, or of another command, become a cache."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path

from logitcache.assembly.finalize import finalize_cache, trusted_files
from logitcache.assembly.plan import PLAN_NAME
from logitcache.assembly.resume import recorded_spec
from logitcache.assembly.workspace import workspace
from logitcache.assembly.write import written_shards
from logitcache.capture.plan import BuildPlan
from logitcache.capture.reuse import copied_history
from logitcache.errors import UserError
from logitcache.exchange.import_plan import ImportPlan
from logitcache.exchange.importing import finish_import
from logitcache.format.manifest import BUILD_DIRECTORY, MANIFEST_NAME, Manifest
from logitcache.format.tail_parts import TAIL_FILES
from logitcache.maintenance.rewrite import RewritePlan, finish_rewrite
from logitcache.reading.cache import LogitCache, open_cache
from logitcache.storage.folder import Folder
from logitcache.version import CREATED_BY

NOT_SCORED = "not scored"
"""The reason in `Manifest.skipped` of rows for which the teacher gave NaN."""

logger = logging.getLogger("logitcache")


def finish(out: str | Path) -> LogitCache:
    """Makes a cache of the shards that calls with a `shard_range` left.

    Args:
        out: The folder or URL that they shared.

    Returns:
        The cache.

    Raises:
        UserError: Nothing was begun, shards are missing (the message names them), or one is being written.
    """
    folder = Folder(out)
    with workspace(folder):
        if not folder.exists(PLAN_NAME):
            if folder.exists(MANIFEST_NAME):
                return open_cache(out)
            raise UserError(f"{folder}: nothing to finish, no build was begun there")
        command = (recorded_spec(folder) or {}).get("command", "build")
        if command == "build":
            return finish_plan(BuildPlan.read(folder))
        if command == "import":
            imported = ImportPlan.read(folder)
            return finish_import(imported, written_shards(imported, {}, command))
        rewritten = RewritePlan.read(folder)
        return finish_rewrite(rewritten, written_shards(rewritten, {}, command))


def finish_plan(plan: BuildPlan) -> LogitCache:
    """Makes a cache of the shards of a build whose folder is locked; see `finish`."""
    folder = plan.folder
    shards = written_shards(plan, {}, "build")
    for name in TAIL_FILES:
        folder.remove(name)  # of a cache that was overwritten
    for name in plan.cache_layout.tail_parts.files:
        folder.write(name, folder.read(f"{BUILD_DIRECTORY}/{name}"))
    left_out = plan.left_out()
    fingerprint = {**plan.spec, "corpus": plan.spec["corpus"] | {"sequences_sha256": _sha256(plan, left_out)}}
    skipped = dict(plan.skipped)
    if reasons := [reason for rows in left_out.values() for reason in rows.values()]:
        skipped[NOT_SCORED] = len(reasons)
        logger.warning("left out: %s %s; the first: %s", f"{len(reasons):,}", NOT_SCORED, reasons[0])
    manifest = Manifest(
        layout=plan.cache_layout,
        fingerprint=fingerprint,
        shards=shards,
        skipped=skipped,
        created_by=CREATED_BY,
        files=trusted_files(folder),
        history=copied_history(folder),
    )
    return finalize_cache(folder, manifest)


def _sha256(plan: BuildPlan, left_out: Mapping[int, Mapping[int, str]]) -> str:
    """Returns the SHA-256 of the row ids in order, without the rows that are left out."""
    if not left_out:
        return plan.sequences_sha256
    digest = hashlib.sha256()
    for index in range(len(plan.shards)):
        for row, sequence in enumerate(plan.sequences(index)):
            if row not in left_out.get(index, {}):
                digest.update(sequence.row_id.encode())
    return digest.hexdigest()

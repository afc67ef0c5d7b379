"""logitcache pull: a cache, or some of its shards, from a URL, a folder or a bundle; its manifest last.

    OUT/.build/plan.json    which cache it will be, see `logitcache.assembly.plan`
    OUT/data/…              files appear under their names when their SHA-256 is found to be the manifest's

What is there and right is not fetched again, so the same command continues an interrupted pull and mends a damaged copy.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from logitcache.assembly.card import read_card
from logitcache.assembly.finalize import finalize_cache, history_step, open_finished
from logitcache.assembly.plan import PLAN_NAME
from logitcache.assembly.resume import continues
from logitcache.assembly.workspace import begin, workspace
from logitcache.errors import UserError, one_line
from logitcache.format.manifest import (
    CARD_NAME,
    MANIFEST_NAME,
    Manifest,
    cache_identity,
    check_identity,
    manifest_content,
    parse_manifest,
    source_of,
)
from logitcache.maintenance.slice import slice_cache
from logitcache.ranges import parse_range
from logitcache.reading.cache import LogitCache
from logitcache.reading.shard_reader import ShardReader
from logitcache.sharing.bundle import bundled_manifest, is_bundle
from logitcache.sharing.fetch import Source, fetch
from logitcache.sharing.transfer import left_behind, persistently, vouched_files
from logitcache.storage.atomic import space_needed
from logitcache.storage.folder import Folder, refuse_overlap
from logitcache.version import CREATED_BY

logger = logging.getLogger("logitcache")


def pull(
    url: str | Path,
    out: str | Path,
    *,
    against: str | None = None,
    shards: str | None = None,
    rows: str | None = None,
    overwrite: bool = False,
) -> LogitCache:
    """Copies a finished cache, or a part of it, to a local folder.

    Every file is checked against its SHA-256 in the manifest. The same call continues an interrupted one and mends a damaged
    copy.

    Args:
        url: A folder, a URL that fsspec reads, or a bundle (.tar.zst) at either.
        out: A local folder.
        against: Identity that the cache must have.
        shards: "A:B", from shard A, counted from 0, up to B, which is left out: these files and a manifest of them.
        rows: "A:B", from row A up to B, not of a bundle. With `against` the shards that hold them are fetched whole and their
            SHA-256 is checked. Otherwise only their row groups are fetched and checked against their CRC, which finds
            damage, but not what somebody altered.
        overwrite: Replaces another cache that `out` holds.

    Returns:
        The copy.

    Raises:
        UserError: There is no whole cache or another than `against`, a file is missing, altered or has no business in a
            cache, `out` holds something else, the connection breaks every time, or the disk is full.
    """
    if rows is not None:
        return _pull_rows(url, out, rows, shards, against, overwrite)
    url, folder = str(url), Folder(out)
    if not url:
        raise UserError("the URL is empty: say where the cache is")
    if folder.local is None:
        raise UserError(f"--out {out}: a local folder is wanted; `logitcache push` copies to a URL")
    if is_bundle(url):
        content = persistently(partial(bundled_manifest, url))
    else:
        refuse_overlap(f"--out {out}", folder, Folder(url))
        content = persistently(partial(manifest_content, Folder(url)))
    identity = hashlib.sha256(content).hexdigest()
    check_identity(identity, against, url)
    source = Source(url, identity, parse_manifest(content, f"{url.rstrip('/')}/{MANIFEST_NAME}"))
    chosen = parse_range(shards, len(source.manifest.shards), "shard")
    spec = {"command": "pull", "manifest_sha256": identity, "shards": shards and f"{chosen.start}:{chosen.stop}"}
    with workspace(folder):
        with _writable(folder), space_needed(out):
            _begin(folder, spec, content, overwrite)
            texts = fetch(source, chosen, folder)
            if shards is not None:
                return _finish_part(folder, source, chosen, texts)
            _finish_whole(folder, content, source, texts)
        return open_finished(folder)


def _pull_rows(
    url: str | Path, out: str | Path, rows: str, shards: str | None, against: str | None, overwrite: bool
) -> LogitCache:
    if shards is not None:
        raise UserError(f"--rows {rows} and --shards {shards}: choose one of them")
    if is_bundle(str(url)):
        raise UserError(
            f"--rows {rows}: {url} is one file, read as a whole; pull it, then `logitcache slice --rows {rows}`"
        )
    return slice_cache(url, out, rows=rows, against=against, overwrite=overwrite)


@contextmanager
def _writable(folder: Folder) -> Iterator[None]:
    """Raises UserError if something else in the folder, such as a folder in place of a file, is in the way."""
    try:
        yield
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written ({one_line(error)})") from error


def _begin(folder: Folder, spec: Mapping[str, Any], content: bytes, overwrite: bool) -> None:
    """Records the settings. Raises UserError if another cache, finished or not, is in the folder and is to stay."""
    begun = continues(folder, spec, overwrite)
    holds_another = folder.exists(MANIFEST_NAME) and not _is_what_it_makes(folder, spec, content)
    if holds_another and not begun and not overwrite:
        raise UserError(
            f"--out {folder} holds another cache (identity {cache_identity(folder)}): choose another folder, or replace it "
            "with --overwrite"
        )
    if not begun:
        begin(folder)
        folder.write(PLAN_NAME, json.dumps({"request": spec}))
    if holds_another:
        folder.remove(MANIFEST_NAME)


def _is_what_it_makes(folder: Folder, spec: Mapping[str, Any], content: bytes) -> bool:
    """Tells whether the finished cache in a folder was made with the same settings."""
    there = folder.read(MANIFEST_NAME)
    if spec["shards"] is None:
        return there == content
    with suppress(UserError):
        history = parse_manifest(there, folder.where(MANIFEST_NAME)).history
        return bool(history) and _spec_of(history[-1]) == spec
    return False


def _spec_of(step: Mapping[str, Any]) -> dict[str, Any]:
    origins = step.get("from") or [{}]
    return {
        "command": step["command"],
        "manifest_sha256": origins[0].get("manifest_sha256"),
        "shards": step.get("shards"),
    }


def _finish_whole(folder: Folder, content: bytes, source: Source, texts: Mapping[str, bytes]) -> None:
    files = vouched_files(source.manifest, source.where)
    for name in left_behind(folder.stored(), [*(file.name for file in files), *texts, MANIFEST_NAME]):
        folder.remove(name)
    for name, text in texts.items():
        folder.write(name, text)
    if CARD_NAME in texts:
        logger.info("%s is what its author says: no checksum covers it", folder.where(CARD_NAME))
    folder.write(MANIFEST_NAME, content)


def _finish_part(folder: Folder, source: Source, chosen: range, texts: Mapping[str, bytes]) -> LogitCache:
    """Writes a manifest of some of the shards, whose history says what was left out, and its card."""
    whole = source.manifest
    shards = whole.shards[chosen.start : chosen.stop]
    spec = {
        "command": "pull",
        "shards": f"{chosen.start}:{chosen.stop}",
        "from": [source_of(Folder(source.url), source.identity, whole)],
    }
    step = history_step(spec, shards, left_out=whole.num_sequences - sum(shard.num_sequences for shard in shards))
    part = replace(whole, shards=shards, history=(*whole.history, step), created_by=CREATED_BY)
    corpus = whole.fingerprint.get("corpus")
    if isinstance(corpus, dict) and "sequences_sha256" in corpus:
        corpus = {**corpus, "sequences_sha256": _sequences_sha256(folder, part)}
        part = replace(part, fingerprint={**whole.fingerprint, "corpus": corpus})
    for name in left_behind(folder.stored(), [*(shard.name for shard in shards), *part.files, MANIFEST_NAME]):
        folder.remove(name)
    if CARD_NAME in texts:
        folder.write(CARD_NAME, texts[CARD_NAME])
    return finalize_cache(folder, part, read_card(folder).licenses)


def _sequences_sha256(folder: Folder, manifest: Manifest) -> str:
    """Returns the SHA-256 of the row ids in order, as a build takes it."""
    digest = hashlib.sha256()
    for info in manifest.shards:
        shard = ShardReader(folder, info, manifest.layout)
        for row_group in range(len(info.row_group_sizes)):
            row_ids = shard.read_columns(row_group, ["row_id"])["row_id"].to_pylist()
            digest.update("".join(map(str, row_ids)).encode())
    return digest.hexdigest()

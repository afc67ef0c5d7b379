"""Complete shards become a finished cache: the card is written, then the manifest, and the build directory goes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from logitcache.assembly.card import write_card
from logitcache.assembly.plan import PLAN_NAME
from logitcache.format.manifest import (
    BUILD_DIRECTORY,
    SIGNATURE_NAME,
    TOKENIZER_DIRECTORY,
    Manifest,
    without_secrets_of_sources,
)
from logitcache.format.shards import ShardInfo
from logitcache.format.tail_parts import TAIL_FILES
from logitcache.reading.cache import LogitCache, open_cache
from logitcache.storage.atomic import TEMPORARY_SUFFIX
from logitcache.storage.folder import Folder
from logitcache.version import CREATED_BY


def trusted_files(folder: Folder) -> dict[str, str]:
    """Computes `Manifest.files`: the SHA-256 of the tokenizer's files and of the tail's, by name."""
    names = [*folder.files(TOKENIZER_DIRECTORY), *TAIL_FILES]
    return {name: hashlib.sha256(folder.read(name)).hexdigest() for name in names if folder.exists(name)}


def history_step(spec: Mapping[str, Any], shards: Sequence[ShardInfo], **counts: int) -> dict[str, Any]:
    """Returns the step of a history that records the command which wrote these shards; counts: further numbers of rows."""
    return {
        **spec,
        "created_by": CREATED_BY,
        "sequences": sum(shard.num_sequences for shard in shards),
        "positions": sum(shard.num_positions for shard in shards),
        **counts,
    }


def finalize_cache(folder: Folder, manifest: Manifest, licenses: Mapping[str, str] | None = None) -> LogitCache:
    """Writes card and manifest beside the shards, removes all other shards and the build directory, and opens the cache.

    Secrets of URLs are left out of the manifest.  licenses: those that the card states, see `card.LICENSES`.
    """
    named = {shard.name for shard in manifest.shards}
    for name in folder.names("data"):
        if f"data/{name}" not in named and name.endswith((".parquet", TEMPORARY_SUFFIX)):
            folder.remove(f"data/{name}")  # of a cache that was overwritten, or of a killed writer
    folder.remove(SIGNATURE_NAME)
    manifest = without_secrets_of_sources(manifest)
    write_card(folder, manifest, hashlib.sha256(manifest.to_bytes()).hexdigest(), licenses or {})
    manifest.write(folder)
    return open_finished(folder)


def open_finished(folder: Folder) -> LogitCache:
    """Removes the build directory of a cache whose manifest was just written, and opens the cache."""
    folder.remove(PLAN_NAME)  # without it nothing asks what else is left, should this be cut off
    folder.remove(BUILD_DIRECTORY)
    return open_cache(folder.path)

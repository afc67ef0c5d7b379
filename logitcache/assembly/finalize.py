"""Shards that are all there → a finished cache: the card, then the manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from logitcache.assembly.card import write_card
from logitcache.format.manifest import SIGNATURE_NAME, TOKENIZER_DIRECTORY, Manifest, without_secrets_of_sources
from logitcache.format.tail_groups import TAIL_GROUPS_NAME
from logitcache.storage.atomic import TEMPORARY_SUFFIX
from logitcache.storage.folder import Folder


def trusted_files(folder: Folder) -> dict[str, str]:
    """SHA-256 of the tokenizer's files and of the tail groups, by name: `Manifest.files`."""
    names = [*folder.files(TOKENIZER_DIRECTORY), TAIL_GROUPS_NAME]
    return {name: hashlib.sha256(folder.read(name)).hexdigest() for name in names if folder.exists(name)}


def seal(folder: Folder, manifest: Manifest, licenses: Mapping[str, str] | None = None) -> None:
    """Removes shards that the manifest does not name, then writes card and manifest: from here on it is a cache.

    licenses: what the card states, see `card.LICENSES`.
    """
    named = {shard.name for shard in manifest.shards}
    for name in folder.names("data"):
        if f"data/{name}" not in named and name.endswith((".parquet", TEMPORARY_SUFFIX)):
            folder.remove(f"data/{name}")  # of a cache that was overwritten, or of a killed writer
    folder.remove(SIGNATURE_NAME)
    manifest = without_secrets_of_sources(manifest)
    write_card(folder, manifest, hashlib.sha256(manifest.to_bytes()).hexdigest(), licenses or {})
    manifest.write(folder)

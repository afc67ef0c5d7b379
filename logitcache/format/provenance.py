"""What a history says of a cache that another was made from; what any record says of where rows came from, without secrets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from logitcache.errors import UserError
from logitcache.format.manifest import Manifest, fingerprint_digest
from logitcache.storage.folder import Folder
from logitcache.urls import public_url

_PLACES = ("path", "name")
"""Keys of a record under which a path or URL may stand."""


def source_of(folder: Folder, identity: str, manifest: Manifest) -> dict[str, Any]:
    """Plain JSON: where a cache lay, by which hashes it is told from others, how much it held."""
    return {
        "path": folder.location,
        "manifest_sha256": identity,
        "fingerprint_sha256": fingerprint_digest(manifest.fingerprint),
        "sequences": manifest.num_sequences,
        "positions": manifest.num_positions,
        "bytes": manifest.num_bytes,
    }


def without_secrets_of_sources(manifest: Manifest) -> Manifest:
    """A manifest whose records of sources, of an earlier version perhaps, hold no secrets of URLs.

    Raises UserError for records within records without end, which no command writes.
    """
    fingerprint = dict(manifest.fingerprint)
    try:
        if "corpus" in fingerprint:
            fingerprint["corpus"] = _public(fingerprint["corpus"])
        return replace(manifest, fingerprint=fingerprint, history=tuple(_public(step) for step in manifest.history))
    except RecursionError:
        raise UserError("the manifest was altered: its history or its corpus is nested too deep to be read") from None


def _public(record: Any) -> Any:
    if isinstance(record, Mapping):
        return {
            name: public_url(value) if name in _PLACES and isinstance(value, str) else _public(value)
            for name, value in record.items()
        }
    return [_public(item) for item in record] if isinstance(record, list | tuple) else record

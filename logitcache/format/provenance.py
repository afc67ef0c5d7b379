"""What a history says of a cache that another was made from."""

from __future__ import annotations

from typing import Any

from logitcache.format.manifest import Manifest, fingerprint_digest


def source_of(path: str, identity: str, manifest: Manifest) -> dict[str, Any]:
    """Plain JSON: where it lay, by which hashes it is told from others, how much it held."""
    return {
        "path": path,
        "manifest_sha256": identity,
        "fingerprint_sha256": fingerprint_digest(manifest.fingerprint),
        "sequences": manifest.num_sequences,
        "positions": manifest.num_positions,
        "bytes": manifest.num_bytes,
    }

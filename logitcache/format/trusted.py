"""Files beside the shards that a manifest names, the tokenizer's and the tail groups, are checked against it."""

from __future__ import annotations

import hashlib

from logitcache.errors import UserError, one_line
from logitcache.format.manifest import Manifest
from logitcache.storage.folder import MAX_READ_BYTES, Folder


def read_trusted(folder: Folder, manifest: Manifest, name: str, at_most: int = MAX_READ_BYTES) -> bytes:
    """Reads a file of a cache whole and checks it against the manifest.

    Raises UserError if the file is missing or cannot be read, has more bytes, or has another SHA-256 than the manifest says.
    """
    where = folder.where(name)
    try:
        content = folder.read(name, at_most)
    except FileNotFoundError:
        raise UserError(
            f"{where} is missing, though the manifest names it: fetch it or build the cache again"
        ) from None
    except OSError as error:
        raise UserError(f"{where} cannot be read ({one_line(error)}): fetch it or build the cache again") from error
    if hashlib.sha256(content).hexdigest() != manifest.files.get(name):
        raise UserError(f"{where} was altered: its SHA-256 is not the manifest's. Fetch it or build the cache again")
    return content

"""logitcache pull --rows: some rows of a cache at a URL, of whose other row groups nothing is fetched."""

from __future__ import annotations

from pathlib import Path

from logitcache.cache import LogitCache
from logitcache.errors import UserError
from logitcache.format.manifest import cache_identity, check_identity, read_manifest
from logitcache.format.storage import Folder
from logitcache.maintenance.slice import slice_cache
from logitcache.sharing.bundle import is_bundle


def pull_rows(
    url: str | Path, out: str | Path, *, rows: str, against: str | None = None, overwrite: bool = False
) -> LogitCache:
    """`slice_cache` of a cache whose identity is `against`, where that is given; see `sharing.pull.pull` for the rest.

    Raises UserError for another identity, for a bundle, which is read as a whole, and as `slice_cache` does.
    """
    if is_bundle(str(url)):
        raise UserError(
            f"--rows {rows}: {url} is one file, read as a whole; pull it, then `logitcache slice --rows {rows}`"
        )
    folder = Folder(url)
    read_manifest(folder)
    check_identity(cache_identity(folder), against, str(url))
    return slice_cache(url, out, rows=rows, overwrite=overwrite)

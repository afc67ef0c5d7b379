"""logitcache pull --rows: some rows of a cache at a URL, of whose other row groups nothing is fetched."""

from __future__ import annotations

from pathlib import Path

from logitcache.errors import UserError
from logitcache.maintenance.slice import slice_cache
from logitcache.reading.cache import LogitCache
from logitcache.sharing.bundle import is_bundle


def pull_rows(
    url: str | Path, out: str | Path, *, rows: str, against: str | None = None, overwrite: bool = False
) -> LogitCache:
    """`slice_cache` of a cache at a URL; see `sharing.pull.pull` for the rest.

    against: the identity that the cache must have. Given, the shards that hold these rows are fetched whole and their SHA-256
    is checked; otherwise only their row groups are fetched, and checked against their CRC: that finds damage, and not what
    somebody altered.

    Raises UserError for another identity, for a bundle, which is read as a whole, and as `slice_cache` does.
    """
    if is_bundle(str(url)):
        raise UserError(
            f"--rows {rows}: {url} is one file, read as a whole; pull it, then `logitcache slice --rows {rows}`"
        )
    return slice_cache(url, out, rows=rows, against=against, overwrite=overwrite)

"""Files of a cache travel from one place to another: which files, which are the same already, several at a time."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from logitcache.errors import UserError
from logitcache.format.manifest import (
    CARD_NAME,
    MANIFEST_NAME,
    SIGNATURE_NAME,
    TOKENIZER_DIRECTORY,
    UNFINISHED_NAME,
    Manifest,
    is_plain,
)
from logitcache.format.tail_basis import MAX_TAIL_BASIS_BYTES
from logitcache.format.tail_groups import MAX_TAIL_GROUPS_BYTES
from logitcache.format.tail_parts import TAIL_FILES
from logitcache.format.tokenizer import MAX_TOKENIZER_BYTES
from logitcache.progress import Progress
from logitcache.storage.atomic import TEMPORARY_SUFFIX
from logitcache.storage.folder import Unreachable

logger = logging.getLogger("logitcache")
T = TypeVar("T")

NUM_TRANSFERS = 8
"""At a time: some wait for the store's answer while others send or hash."""
IN_FLIGHT_BYTES = 1 << 29
"""Of all transfers together, for a file may be held in memory while it is sent: of large files fewer go at a time."""
TRIES = 4
FIRST_PAUSE_S = 1.0
"""Before the second try; doubled before each one after it."""
MAX_FILE_BYTES = max(MAX_TOKENIZER_BYTES, MAX_TAIL_GROUPS_BYTES, MAX_TAIL_BASIS_BYTES)
"""Of a file whose size the manifest does not say."""
READ_BYTES = 1 << 22

LEFTOVERS = {
    f"{name}{TEMPORARY_SUFFIX}" for name in (CARD_NAME, MANIFEST_NAME, SIGNATURE_NAME, *TAIL_FILES, UNFINISHED_NAME)
}
"""Beside the folders of a cache, of writers that were killed."""


@dataclass(frozen=True)
class TravellingFile:
    """A file of a cache.  num_bytes: None if the manifest does not say.

    sha256: as the manifest says, empty for the card and a signature, which it does not name.
    """

    name: str
    sha256: str
    num_bytes: int | None = None


def vouched_files(manifest: Manifest, where: str) -> list[TravellingFile]:
    """Lists every file that a manifest names with its SHA-256: tokenizer, tail groups and tail basis, then the shards.

    Raises UserError for names that are not where a cache has its files, that are no plain path in it, or that stand there twice.
    """
    files = [TravellingFile(name, digest) for name, digest in manifest.files.items()]
    files += [TravellingFile(shard.name, shard.sha256, shard.num_bytes) for shard in manifest.shards]
    seen: set[str] = set()
    for file in files:
        if not _is_ours(file.name):
            raise UserError(f"{where} names a file that no cache has: {file.name!r}")
        if file.name in seen:
            raise UserError(f"{where} names {file.name} twice")
        seen.add(file.name)
    return files


def _is_ours(name: str) -> bool:
    """Tells whether a file of this name may be in a cache."""
    return is_plain(name) and (name.startswith(("data/", f"{TOKENIZER_DIRECTORY}/")) or name in TAIL_FILES)


def left_behind(names: Iterable[str], kept: Collection[str]) -> list[str]:
    """Lists the files that a former cache left in a folder: those where a cache has its files, except `kept`."""
    own = (CARD_NAME, MANIFEST_NAME, SIGNATURE_NAME, *LEFTOVERS)
    return sorted(name for name in names if name not in kept and (_is_ours(name) or name in own))


def check(file: TravellingFile, sha256: str, where: str) -> None:
    """Raises UserError if a file's content, at `where`, is not what the manifest says it is."""
    if file.sha256 and sha256 != file.sha256:
        raise UserError(f"{where} was altered: its SHA-256 is not the manifest's. Fetch, build or push it again")


def digests(path: Path, algorithms: Collection[str]) -> dict[str, str]:
    """Computes digests of a file's content, hexadecimal, by algorithm (see `Stored`), in one reading."""
    hashes = {name: hashlib.new("sha1" if name == "git" else name) for name in algorithms}
    if "git" in hashes:
        hashes["git"].update(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as file:
        while chunk := file.read(READ_BYTES):
            for each in hashes.values():
                each.update(chunk)
    return {name: each.hexdigest() for name, each in hashes.items()}


def persistently(work: Callable[[], T]) -> T:
    """Does work that a store may fail to answer, a few times. Raises UserError with what is lost by that: nothing."""
    for number in range(1, TRIES + 1):
        try:
            return work()
        except Unreachable as error:
            if number == TRIES:
                raise UserError(f"{error}. Tried {TRIES} times; the same command continues where it was") from error
            pause_s = FIRST_PAUSE_S * 2 ** (number - 1)
            logger.info("%s; another try in %g s", error, pause_s)
            time.sleep(pause_s)
    raise AssertionError


def at_once(
    work: Callable[[TravellingFile], T], files: Sequence[TravellingFile], label: str, sizes: Sequence[int]
) -> list[T]:
    """Does work(file) for every file, several at a time, with progress in bytes. The first failure ends it."""
    progress = Progress(label, sum(sizes), 0, "bytes")
    most = IN_FLIGHT_BYTES // max([1, *sizes])
    threads = ThreadPoolExecutor(max(1, min(NUM_TRANSFERS, most)), "transfer")
    try:
        futures = {threads.submit(work, file): size for file, size in zip(files, sizes, strict=True)}
        for future in as_completed(futures):
            future.result()
            progress.advance(futures[future])
        return [future.result() for future in futures]
    finally:
        threads.shutdown(cancel_futures=True)
        progress.close()

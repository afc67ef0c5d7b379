"""A bundle is a cache as one file, .tar.zst: a tar archive (POSIX ustar) in one Zstandard frame, the manifest first.

The same files give the same bytes. A bundle is not unpacked by a library: of a tar archive's many kinds of members it has one,
regular files, so a link, a device or an extension header has nothing here that would follow it.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import zstandard

from logitcache.errors import UserError, one_line
from logitcache.format.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, is_as_written
from logitcache.sharing.transfer import TravellingFile, check
from logitcache.storage.folder import Folder
from logitcache.storage.regular_files import regular_file
from logitcache.urls import split_query

SUFFIX = ".tar.zst"
CHUNK_BYTES = 1 << 20
_LEVEL = 1
"""Shards are Zstandard already: what a higher level would still find in a manifest and a tokenizer is not worth its time."""
_BLOCK_BYTES = tarfile.BLOCKSIZE
FREE_BYTES = 1 << 26
MOST_EXPANSION = 64
"""A bundle unpacks to at most so many bytes for each of its own, and `FREE_BYTES`, for manifests of many like shards."""


def is_bundle(url: str) -> bool:
    """Tells whether a path or URL names a bundle, whatever query it has."""
    return split_query(url)[0].endswith(SUFFIX)


def place(url: str) -> tuple[Folder, str]:
    """Returns the folder that a bundle lies in, and its name there, with the query if there is one."""
    path, query = split_query(url)
    parent, slash, name = path.rpartition("/")
    return Folder(parent or slash or "."), name + query


def write_bundle(folder: Path, files: Sequence[TravellingFile], path: Path, advance: Callable[[int], None]) -> None:
    """Writes files of a cache in this order, the manifest first, to a bundle.

    advance: told the bytes of every file. Raises UserError for a file that is not the one of the manifest, and for a name that
    an archive cannot hold.
    """
    # Threads of zstandard's own, 1 or more, give the same bytes, however many.
    compressor = zstandard.ZstdCompressor(_LEVEL, write_checksum=True, threads=1)
    with path.open("wb") as raw, compressor.stream_writer(raw, closefd=False) as bundle:
        for file in files:
            source = regular_file(folder, file.name)
            num_bytes = source.stat().st_size
            bundle.write(_header(file.name, num_bytes))
            digest = hashlib.sha256()
            with source.open("rb") as content:
                while chunk := content.read(CHUNK_BYTES):
                    digest.update(chunk)
                    bundle.write(chunk)
            check(file, digest.hexdigest(), str(source))
            bundle.write(bytes(-num_bytes % _BLOCK_BYTES))
            advance(num_bytes)
        bundle.write(bytes(2 * _BLOCK_BYTES))


def _header(name: str, num_bytes: int) -> bytes:
    member = tarfile.TarInfo(name)  # of nobody, from 1970, mode 644
    member.size = num_bytes
    try:
        return member.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict")
    except ValueError as error:
        raise UserError(f"{name} cannot be put into a bundle ({one_line(error)})") from error


@dataclass(frozen=True)
class Member:
    """A regular file of a bundle. chunks: its content, once; what is not taken is skipped."""

    name: str
    num_bytes: int
    chunks: Iterator[bytes]


@contextmanager
def opened_bundle(url: str) -> Iterator[Iterator[Member]]:
    """Opens the members of a bundle, one after the other, the manifest first; it is read once, as a stream.

    Raises UserError for anything but regular files, for a manifest that is not first or is larger than `MAX_MANIFEST_BYTES`, and
    where the file ends too early or is none of ours; Unreachable where a store breaks off.
    """
    folder, name = place(url)
    if folder.local is not None:  # whoever names a link means the file there
        folder, name = place(str((folder.local / name).resolve()))
    with _understood(url, folder):
        raw = folder.open(name)
    counted = _Counted(raw)
    with raw, zstandard.ZstdDecompressor().stream_reader(cast(BinaryIO, counted), read_size=CHUNK_BYTES) as stream:
        unpacked = 0

        def read(num_bytes: int) -> bytes:
            nonlocal unpacked
            content = b""
            with _understood(url, folder):
                while len(content) < num_bytes:
                    if not (chunk := stream.read(num_bytes - len(content))):
                        raise UserError(f"{url} ends too early: fetch or make it again")
                    content += chunk
            unpacked += num_bytes
            if unpacked > FREE_BYTES + MOST_EXPANSION * counted.num_bytes:
                raise UserError(
                    f"{url} is refused: {counted.num_bytes:,} bytes of it unpack to {unpacked:,}, which no cache does: its "
                    "shards are compressed already"
                )
            return content

        yield _members(read, url)


class _Counted:
    """A file whose bytes are counted as they are read."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.num_bytes = 0

    def read(self, num_bytes: int) -> bytes:
        content = self._file.read(num_bytes)
        self.num_bytes += len(content)
        return content


def bundled_manifest(url: str) -> bytes:
    """Reads the manifest of a bundle, and no more. Raises UserError as `opened_bundle` does."""
    with opened_bundle(url) as members:
        content = b"".join(next(members).chunks)
    parts = None
    with suppress(ValueError, RecursionError):  # what is no JSON is refused by who parses it
        parts = json.loads(content)
    if isinstance(parts, dict) and not is_as_written(content, parts):
        raise UserError(f"{url} was damaged: the checksum of its manifest is not that of its content")
    return content


@contextmanager
def _understood(url: str, folder: Folder) -> Iterator[None]:
    try:
        with folder.answering(), _decompressed(url):
            yield
    except FileNotFoundError as error:
        raise UserError(f"{url} does not exist") from error
    except OSError as error:
        raise UserError(f"{url} cannot be read ({one_line(error)})") from error


@contextmanager
def _decompressed(url: str) -> Iterator[None]:
    try:
        yield
    except zstandard.ZstdError as error:
        raise UserError(f"{url} is not a bundle, or was damaged ({one_line(error)})") from error


def _members(read: Callable[[int], bytes], url: str) -> Iterator[Member]:
    """Yields the members; `read` returns exactly so many bytes."""
    first = True
    while (block := read(_BLOCK_BYTES)).strip(b"\0"):
        member = _parsed(block, url)
        if first and member.name != MANIFEST_NAME:
            raise UserError(
                f"{url} is not a bundle of a cache: it begins with {member.name!r}, not with {MANIFEST_NAME}"
            )
        if first and member.size > MAX_MANIFEST_BYTES:
            raise UserError(
                f"{url}: a manifest of {member.size} bytes is refused, at most {MAX_MANIFEST_BYTES} are read"
            )
        first = False
        chunks = _content(read, member.size)
        yield Member(member.name, member.size, chunks)
        for _ in chunks:
            pass
        read(-member.size % _BLOCK_BYTES)
    if first:
        raise UserError(f"{url} is empty")


def _parsed(block: bytes, url: str) -> tarfile.TarInfo:
    try:
        member = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    except (tarfile.HeaderError, UnicodeDecodeError) as error:
        raise UserError(f"{url} is not a bundle, or was damaged ({one_line(error)})") from error
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        raise UserError(
            f"{url} holds {member.name!r}, which is no regular file: nothing but the files of a cache is taken"
        )
    if member.size < 0:
        raise UserError(f"{url} was damaged: {member.name!r} has {member.size} bytes")
    return member


def _content(read: Callable[[int], bytes], num_bytes: int) -> Iterator[bytes]:
    while num_bytes:
        chunk = read(min(num_bytes, CHUNK_BYTES))
        num_bytes -= len(chunk)
        yield chunk

"""Files of a cache elsewhere are fetched to a local folder; each appears under its name when its SHA-256 is the manifest's."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

from logitcache.errors import UserError
from logitcache.format.manifest import CARD_NAME, MANIFEST_NAME, SIGNATURE_NAME, Manifest
from logitcache.progress import Progress
from logitcache.sharing.bundle import Member, is_bundle, opened_bundle
from logitcache.sharing.transfer import (
    MAX_FILE_BYTES,
    TravellingFile,
    at_once,
    check,
    digests,
    persistently,
    vouched_files,
)
from logitcache.storage.folder import Folder, Unreachable

logger = logging.getLogger("logitcache")

UNVOUCHED = (CARD_NAME, SIGNATURE_NAME)
"""Files of a cache that its manifest does not name; nothing is made of them but text for people and their tools."""
MAX_TEXT_BYTES = 1 << 22


@dataclass(frozen=True)
class Source:
    """A cache to read.  url: opens it.  identity: SHA-256 of its manifest."""

    url: str
    identity: str
    manifest: Manifest

    @property
    def where(self) -> str:
        """The place of its manifest, for messages."""
        return f"{self.url.rstrip('/')}/{MANIFEST_NAME}"


def fetch(source: Source, chosen: Collection[int], folder: Folder) -> dict[str, bytes]:
    """Fetches the files that are not in the folder yet. Returns the files that the manifest does not name, which are small."""
    files = vouched_files(source.manifest, source.where)
    kept = {source.manifest.shards[index].name for index in chosen} | set(source.manifest.files)
    wanted = [file for file in files if file.name in kept]
    present = [file for file in wanted if _has_size(folder, file)]
    sizes = [folder.num_bytes(file.name) for file in present]
    right = at_once(partial(_is_right, folder), present, "checking what is here", sizes)
    here = {file.name for file, is_right in zip(present, right, strict=True) if is_right}
    missing = [file for file in wanted if file.name not in here]
    if here:
        logger.info("continuing: %d of %d files are here", len(here), len(wanted))
    if is_bundle(source.url):
        return _unpack(source, files, {file.name: file for file in missing}, folder)
    origin = Folder(source.url)
    sizes = _sizes(origin, missing)
    at_once(partial(_fetch_file, origin, folder), missing, "fetching", sizes)
    return _texts(origin)


def _has_size(folder: Folder, file: TravellingFile) -> bool:
    with suppress(UserError, OSError):  # missing, or a link, which is replaced
        return file.num_bytes in (None, folder.num_bytes(file.name))
    return False


def _is_right(folder: Folder, file: TravellingFile) -> bool:
    return digests(folder.on_disk(file.name), {"sha256"})["sha256"] == file.sha256


def _sizes(origin: Folder, files: Iterable[TravellingFile]) -> list[int]:
    """Returns the bytes of files at their origin, from one listing if the store gives one."""
    listed: dict[str, int | None] = {}
    if origin.local is None:
        with suppress(UserError, FileNotFoundError, NotImplementedError):
            listed = {name: stored.num_bytes for name, stored in origin.stored().items()}
    sizes = []
    for file in files:
        found = listed.get(file.name)
        if found is None:
            try:
                found = persistently(partial(origin.num_bytes, file.name))
            except FileNotFoundError:
                _refuse_missing(origin.where(file.name))
        _check_size(file, found, origin.where(file.name))
        sizes.append(found)
    return sizes


def _fetch_file(origin: Folder, folder: Folder, file: TravellingFile) -> None:
    def fetch() -> None:
        with folder.writing(file.name) as path:
            try:
                origin.fetch(file.name, path, at_most=file.num_bytes or MAX_FILE_BYTES)
            except FileNotFoundError:
                _refuse_missing(origin.where(file.name))
            if file.num_bytes is not None and path.stat().st_size < file.num_bytes:
                raise Unreachable(f"{origin.where(file.name)}: {path.stat().st_size} of {file.num_bytes} bytes arrived")
            check(file, digests(path, {"sha256"})["sha256"], origin.where(file.name))

    persistently(fetch)


def _refuse_missing(where: str) -> NoReturn:
    raise UserError(f"{where} is missing, though the manifest names it: it has to be pushed or built again") from None


def _check_size(file: TravellingFile, num_bytes: int, where: str) -> None:
    """Raises UserError before a file is fetched that has other bytes than the manifest says, or more than any of its kind."""
    if file.num_bytes is not None and num_bytes != file.num_bytes:
        raise UserError(f"{where} was altered: {num_bytes} bytes, the manifest says {file.num_bytes}")
    if file.num_bytes is None and num_bytes > MAX_FILE_BYTES:
        raise UserError(f"{where}: {num_bytes} bytes are refused, a file of its kind has at most {MAX_FILE_BYTES}")


def _texts(origin: Folder) -> dict[str, bytes]:
    texts = {}
    for name in UNVOUCHED:
        try:
            _check_text_size(persistently(partial(origin.num_bytes, name)), origin.where(name))
            texts[name] = _checked_text(persistently(partial(origin.read, name, MAX_TEXT_BYTES)), origin.where(name))
        except FileNotFoundError:
            continue
    return texts


def _check_text_size(num_bytes: int, where: str) -> None:
    if num_bytes > MAX_TEXT_BYTES:
        raise UserError(f"{where}: {num_bytes} bytes are refused, it has at most {MAX_TEXT_BYTES}")


def _checked_text(content: bytes, where: str) -> bytes:
    try:
        content.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not text in UTF-8 ({error.reason}): it has to be pushed again") from error
    return content


def _unpack(
    source: Source, files: Sequence[TravellingFile], missing: dict[str, TravellingFile], folder: Folder
) -> dict[str, bytes]:
    """Takes the missing files out of a bundle; `missing` shrinks, so that another try goes on where a store broke off."""
    url, named = source.url, {file.name: file for file in files}
    progress = Progress("unpacking", sum(file.num_bytes or 0 for file in files), 0, "bytes")

    def take() -> dict[str, bytes]:
        texts, seen = {}, set()
        with opened_bundle(url) as members:
            for member in members:
                where = f"{url}: {member.name}"
                if member.name in seen:
                    raise UserError(f"{where} is in it twice")
                seen.add(member.name)
                if member.name == MANIFEST_NAME:
                    if hashlib.sha256(b"".join(member.chunks)).hexdigest() != source.identity:
                        raise UserError(f"{url} was replaced while it was read: pull it anew")
                elif member.name in UNVOUCHED:
                    _check_text_size(member.num_bytes, where)
                    texts[member.name] = _checked_text(b"".join(member.chunks), where)
                elif member.name not in named:
                    raise UserError(f"{url} holds {member.name!r}, which its manifest does not name")
                else:
                    _check_size(named[member.name], member.num_bytes, where)
                    if member.name in missing:
                        _store(member, missing[member.name], folder, where)
                        del missing[member.name]
                        progress.advance(member.num_bytes)
        if absent := named.keys() - seen:
            raise UserError(f"{url} is not whole: {min(absent)} is not in it, though its manifest names it")
        return texts

    try:
        return persistently(take)
    finally:
        progress.close()


def _store(member: Member, file: TravellingFile, folder: Folder, where: str) -> None:
    digest = hashlib.sha256()
    with folder.writing(file.name) as path:
        with path.open("wb") as out:
            for chunk in member.chunks:
                digest.update(chunk)
                out.write(chunk)
        check(file, digest.hexdigest(), where)

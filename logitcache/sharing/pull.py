"""logitcache pull: a cache, or some of its shards, from a URL, a folder or a bundle; its manifest last.

    OUT/.build/plan.json    which cache it will be, see `format.unfinished`
    OUT/data/…              files appear under their names when their SHA-256 is found to be the manifest's

What is there and right is not fetched again, so the same command continues an interrupted pull and mends a damaged copy.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from logitcache.cache import LogitCache, open_cache
from logitcache.errors import UserError
from logitcache.format.atomic import space_needed
from logitcache.format.manifest import (
    BUILD_DIRECTORY,
    CARD_NAME,
    MANIFEST_NAME,
    SIGNATURE_NAME,
    Manifest,
    cache_identity,
    check_identity,
    manifest_content,
    parse_manifest,
)
from logitcache.format.provenance import source_of
from logitcache.format.shard_reader import ShardReader
from logitcache.format.storage import Folder, Unreachable
from logitcache.format.unfinished import PLAN_NAME, read_request, refuse_changes
from logitcache.format.workspace import ANSWERS_NAME, begin, workspace
from logitcache.progress import Progress
from logitcache.sharing.bundle import MAX_MANIFEST_BYTES, Member, bundled_manifest, is_bundle, opened_bundle
from logitcache.sharing.card import read_card
from logitcache.sharing.seal import seal
from logitcache.sharing.transfer import (
    MAX_FILE_BYTES,
    TravellingFile,
    at_once,
    check,
    digests,
    left_behind,
    persistently,
    vouched_files,
)
from logitcache.version import __version__

logger = logging.getLogger("logitcache")

UNVOUCHED = (CARD_NAME, SIGNATURE_NAME)
"""Files of a cache that its manifest does not name; nothing is made of them but text for people and their tools."""
MAX_TEXT_BYTES = 1 << 22


def pull(
    url: str | Path,
    out: str | Path,
    *,
    against: str | None = None,
    shards: str | None = None,
    overwrite: bool = False,
) -> LogitCache:
    """Copies a finished cache to a local folder, every file checked against its SHA-256 in the manifest.

    url: a folder, a URL that fsspec reads, or a bundle (.tar.zst) at either.  against: the identity that the cache must have.
    shards: "A:B", from shard A, counted from 0, up to B, which is left out: these files and a manifest of them.  overwrite:
    replace another cache that `out` holds.

    Raises UserError where there is no whole cache or another than `against`, for a file that is missing, altered or has no
    business in a cache, where `out` holds something else, for a connection that breaks every time, and when the disk is full.
    """
    url, folder = str(url), Folder(out)
    if folder.local is None:
        raise UserError(f"--out {out}: a local folder is wanted; `logitcache push` copies to a URL")
    if not is_bundle(url) and (folder.lies_in(Folder(url)) or Folder(url).lies_in(folder)):
        raise UserError(f"--out {out}: choose a folder outside the cache that is read, {url}")
    content = persistently(partial(bundled_manifest, url)) if is_bundle(url) else _content(Folder(url))
    identity = hashlib.sha256(content).hexdigest()
    check_identity(identity, against, url)
    source = _Source(url, identity, parse_manifest(content, _where(url)))
    chosen = _range(shards, len(source.manifest.shards))
    request = {"command": "pull", "manifest_sha256": identity, "shards": shards and f"{chosen.start}:{chosen.stop}"}
    with workspace(folder), space_needed(out):
        _begin(folder, request, content, overwrite)
        texts = _fetch(source, chosen, folder)
        if shards is None:
            _finish_whole(folder, content, source, texts)
        else:
            _finish_part(folder, source, chosen, texts)
        folder.remove(PLAN_NAME)
        folder.remove(BUILD_DIRECTORY)
    return open_cache(folder.path)


@dataclass(frozen=True)
class _Source:
    """A cache to read. identity: SHA-256 of its manifest."""

    url: str
    identity: str
    manifest: Manifest


def _where(url: str) -> str:
    return f"{url.rstrip('/')}/{MANIFEST_NAME}"


def _content(source: Folder) -> bytes:
    content = persistently(partial(manifest_content, source))
    if len(content) > MAX_MANIFEST_BYTES:
        raise UserError(
            f"{source}: a manifest of {len(content)} bytes is refused, at most {MAX_MANIFEST_BYTES} are read"
        )
    return content


def _range(shards: str | None, count: int) -> range:
    if shards is None:
        return range(count)
    match = re.fullmatch(r"(\d*):(\d*)", shards)
    if not match:
        raise UserError(f"--shards {shards}: write A:B, for example 0:4; shard B is left out")
    first, end = int(match[1] or 0), int(match[2] or count)
    if not first < end <= count:
        raise UserError(f"--shards {shards}: the cache has shards 0…{count - 1}, so 0 ≤ A < B ≤ {count} is needed")
    return range(first, end)


def _begin(folder: Folder, request: Mapping[str, Any], content: bytes, overwrite: bool) -> None:
    """Records the request. Raises UserError where another cache is in the folder, finished or not, and is to stay."""
    recorded = read_request(folder)
    if recorded is not None or folder.exists(ANSWERS_NAME):
        unfinished = recorded if recorded is not None and "command" in recorded else {"command": "build"}
        if not overwrite:
            refuse_changes(unfinished, request, folder, "an unfinished cache")
    holds_another = folder.exists(MANIFEST_NAME) and not _is_what_it_makes(folder, request, content)
    if holds_another and recorded is None and not overwrite:
        raise UserError(
            f"--out {folder} holds another cache (identity {cache_identity(folder)}): choose another folder, or replace it "
            "with --overwrite"
        )
    if recorded != request:
        begin(folder)
        folder.write(PLAN_NAME, json.dumps({"request": request}))
    if holds_another:
        folder.remove(MANIFEST_NAME)


def _is_what_it_makes(folder: Folder, request: Mapping[str, Any], content: bytes) -> bool:
    """Whether the finished cache in a folder was made by the same request."""
    there = folder.read(MANIFEST_NAME)
    if request["shards"] is None:
        return there == content
    with suppress(UserError):
        history = parse_manifest(there, folder.where(MANIFEST_NAME)).history
        return bool(history) and _request_of(history[-1]) == request
    return False


def _request_of(step: Mapping[str, Any]) -> dict[str, Any]:
    origins = step.get("from") or [{}]
    return {
        "command": step["command"],
        "manifest_sha256": origins[0].get("manifest_sha256"),
        "shards": step.get("shards"),
    }


def _fetch(source: _Source, chosen: Collection[int], folder: Folder) -> dict[str, bytes]:
    """Fetches what is not in the folder yet. Returns the files that the manifest does not vouch for, which are small."""
    files = vouched_files(source.manifest, _where(source.url))
    kept = {source.manifest.shards[index].name for index in chosen} | set(source.manifest.files)
    wanted = [file for file in files if file.name in kept]
    assert folder.local is not None
    present = [file for file in wanted if _has_size(folder.local / file.name, file)]
    right = at_once(
        partial(_is_right, folder.local),
        present,
        "checking what is here",
        [(folder.local / file.name).stat().st_size for file in present],
    )
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


def _has_size(path: Path, file: TravellingFile) -> bool:
    return path.is_file() and file.num_bytes in (None, path.stat().st_size)


def _is_right(folder: Path, file: TravellingFile) -> bool:
    return digests(folder / file.name, {"sha256"})["sha256"] == file.sha256


def _sizes(origin: Folder, files: Iterable[TravellingFile]) -> list[int]:
    """Bytes of files at their origin, from one listing where it gives one."""
    listed: dict[str, int | None] = {}
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
                origin.fetch(file.name, path)
            except FileNotFoundError:
                _refuse_missing(origin.where(file.name))
            if file.num_bytes is not None and path.stat().st_size < file.num_bytes:
                raise Unreachable(f"{origin.where(file.name)}: {path.stat().st_size} of {file.num_bytes} bytes arrived")
            check(file, digests(path, {"sha256"})["sha256"], origin.where(file.name))

    persistently(fetch)


def _refuse_missing(where: str) -> NoReturn:
    raise UserError(f"{where} is missing, though the manifest names it: it has to be pushed or built again") from None


def _check_size(file: TravellingFile, num_bytes: int, where: str) -> None:
    """Before it is fetched: what the manifest says, or what any file of its kind may have."""
    if file.num_bytes is not None and num_bytes != file.num_bytes:
        raise UserError(f"{where} was altered: {num_bytes} bytes, the manifest says {file.num_bytes}")
    if num_bytes > MAX_FILE_BYTES:
        raise UserError(f"{where}: {num_bytes} bytes are refused, a file of its kind has at most {MAX_FILE_BYTES}")


def _texts(origin: Folder) -> dict[str, bytes]:
    texts = {}
    for name in UNVOUCHED:
        try:
            _check_text_size(persistently(partial(origin.num_bytes, name)), origin.where(name))
            texts[name] = _checked_text(persistently(partial(origin.read, name)), origin.where(name))
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
    source: _Source, files: Sequence[TravellingFile], missing: dict[str, TravellingFile], folder: Folder
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


def _finish_whole(folder: Folder, content: bytes, source: _Source, texts: Mapping[str, bytes]) -> None:
    files = vouched_files(source.manifest, _where(source.url))
    for name in left_behind(folder.stored(), [*(file.name for file in files), *texts, MANIFEST_NAME]):
        folder.remove(name)
    for name, text in texts.items():
        folder.write(name, text)
    if CARD_NAME in texts:
        logger.info("%s is what its author says: no checksum covers it", folder.where(CARD_NAME))
    folder.write(MANIFEST_NAME, content)


def _finish_part(folder: Folder, source: _Source, chosen: range, texts: Mapping[str, bytes]) -> None:
    """A manifest of some of the shards, with what was left out in its history, and a card of it."""
    whole = source.manifest
    shards = whole.shards[chosen.start : chosen.stop]
    step = {
        "command": "pull",
        "shards": f"{chosen.start}:{chosen.stop}",
        "from": [source_of(Folder(source.url).location, source.identity, whole)],
        "created_by": f"logitcache {__version__}",
        "sequences": sum(shard.num_sequences for shard in shards),
        "positions": sum(shard.num_positions for shard in shards),
        "left_out": whole.num_sequences - sum(shard.num_sequences for shard in shards),
    }
    part = replace(whole, shards=shards, history=(*whole.history, step), created_by=f"logitcache {__version__}")
    corpus = whole.fingerprint.get("corpus")
    if isinstance(corpus, dict) and "sequences_sha256" in corpus:
        corpus = {**corpus, "sequences_sha256": _sequences_sha256(folder, part)}
        part = replace(part, fingerprint={**whole.fingerprint, "corpus": corpus})
    for name in left_behind(folder.stored(), [*(shard.name for shard in shards), *part.files, MANIFEST_NAME]):
        folder.remove(name)
    if CARD_NAME in texts:
        folder.write(CARD_NAME, texts[CARD_NAME])
    seal(folder, part, read_card(folder).licenses)


def _sequences_sha256(folder: Folder, manifest: Manifest) -> str:
    """Of the row ids in their order, as a build takes it."""
    digest = hashlib.sha256()
    for info in manifest.shards:
        shard = ShardReader(folder, info, manifest.layout)
        for row_group in range(len(info.row_group_sizes)):
            row_ids = shard.read_columns(row_group, ["row_id"])["row_id"].to_pylist()
            digest.update("".join(map(str, row_ids)).encode())
    return digest.hexdigest()

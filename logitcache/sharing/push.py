"""logitcache push: a finished cache to where others read it, its manifest last.

What a place holds already is told by checksum and not sent again, so the same command continues an interrupted push and sends of
a cache that grew what is new. While files that a manifest there names are changing, that manifest is away and logitcache.json.
unfinished lies in its place: nobody takes a part for the whole.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from logitcache.assembly.card import update_card
from logitcache.assembly.resume import differences, first_of
from logitcache.errors import UserError, one_line
from logitcache.format.manifest import (
    BUILD_DIRECTORY,
    CARD_NAME,
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    SIGNATURE_NAME,
    UNFINISHED_NAME,
    Manifest,
    parse_manifest,
    without_secrets_of_sources,
)
from logitcache.progress import Progress
from logitcache.reading.cache import LogitCache, open_cache, path_of
from logitcache.sharing.bundle import bundled_manifest, is_bundle, place, write_bundle
from logitcache.sharing.transfer import (
    LEFTOVERS,
    TravellingFile,
    at_once,
    check,
    digests,
    left_behind,
    persistently,
    vouched_files,
)
from logitcache.storage.atomic import space_needed
from logitcache.storage.folder import Folder, Stored, refuse_overlap
from logitcache.storage.lock import locked_folder
from logitcache.storage.regular_files import regular_file


@dataclass(frozen=True)
class Pushed:
    """The result of a push.  identity: SHA-256 of the manifest that is there now.  num_sent, num_kept: files.

    revision: commit of a repository on the Hub, None elsewhere.
    """

    url: str
    identity: str
    num_sent: int
    sent_bytes: int
    num_kept: int
    revision: str | None = None


def push(
    path: LogitCache | str | Path,
    url: str | Path,
    *,
    license: str | None = None,
    teacher_license: str | None = None,
    data_license: str | None = None,
    overwrite: bool = False,
    public: bool = False,
) -> Pushed:
    """Copies a finished cache to a place that others read.

    Files that are there already are not sent again, so the same call continues an interrupted one.

    Args:
        path: A cache, or its folder.
        url: A URL that fsspec writes, hf://datasets/ORG/NAME, a folder, or one file that ends with .tar.zst.
        license: Licence of the cache, for its card, as the Hub has them. None: as the card has it; so for the other two.
        teacher_license: Licence of the teacher, for the card.
        data_license: Licence of the corpus, for the card.
        overwrite: Replaces another cache that is there.
        public: A repository that this makes on the Hub is for all to read.

    Returns:
        Where the cache is, its identity, and what was sent.

    Raises:
        UserError: The cache is not whole or not local, the place holds another cache or anything else or takes nothing, there
            are no credentials, another push is under way, or the connection breaks every time.
    """
    path, url = path_of(path), str(url)
    if not url:
        raise UserError(
            "nothing says where to push to: hf://datasets/ORG/NAME, s3://…, a folder or a FILE.tar.zst is wanted"
        )
    source = Folder(path)
    if source.local is None:
        raise UserError(f"{path} is a URL, a local cache is pushed: `logitcache pull` it first")
    (place(url)[0] if is_bundle(url) else Folder(url)).check_writable()
    if public and not url.startswith("hf://"):
        raise UserError(f"--public is of repositories on the Hub: who reads {url} is decided where that is kept")
    cache = open_cache(path)
    files = vouched_files(cache.manifest, source.where(MANIFEST_NAME))
    licenses = {"license": license, "teacher_license": teacher_license, "data_license": data_license}
    _refuse_secrets(cache)
    ours = _Outgoing(source.local, cache, files, licenses)
    try:
        return _push_bundle(ours, url, overwrite) if is_bundle(url) else _push_files(ours, url, overwrite, public)
    except OSError as error:
        raise UserError(f"{path} cannot be pushed to {url} ({one_line(error)})") from error


def _refuse_secrets(cache: LogitCache) -> None:
    """Raises UserError for a manifest of an earlier version with secrets, which would be published with it."""
    if without_secrets_of_sources(cache.manifest) != cache.manifest:
        raise UserError(
            f"{cache.path}: its manifest says where rows came from with a user name, a password or a query of the URL. Push "
            f"what `logitcache slice {cache.path} --rows 0:{len(cache)} --out DIR` makes of it, which leaves them out"
        )


@dataclass(frozen=True)
class _Outgoing:
    """The cache that is pushed. files: those that its manifest names."""

    folder: Path
    cache: LogitCache
    files: Sequence[TravellingFile]
    licenses: Mapping[str, str | None]

    @property
    def manifest(self) -> TravellingFile:
        return TravellingFile(MANIFEST_NAME, self.cache.identity)

    def with_card(self) -> list[TravellingFile]:
        """Brings the card up to date. Returns it, and a signature."""
        update_card(Folder(self.folder), self.licenses)
        names = {path.name for path in self.folder.iterdir()}
        return [TravellingFile(name, "") for name in (CARD_NAME, SIGNATURE_NAME) if name in names]

    def path(self, file: TravellingFile) -> Path:
        """Returns the local path of a file. Raises UserError if it is missing, or no regular file."""
        try:
            return regular_file(self.folder, file.name)
        except OSError as error:
            raise UserError(
                f"{self.folder / file.name} cannot be read ({error.strerror}), though the manifest names it: fetch or build "
                "it again"
            ) from error

    def num_bytes(self, file: TravellingFile) -> int:
        return self.path(file).stat().st_size


def _push_files(ours: _Outgoing, url: str, overwrite: bool, public: bool) -> Pushed:
    target = Folder(url)
    refuse_overlap(url, target, Folder(ours.folder), "the cache that is pushed")
    with locked_folder(target):
        return _push_to(target, ours, url, overwrite, public)


def _push_to(target: Folder, ours: _Outgoing, url: str, overwrite: bool, public: bool) -> Pushed:
    on_hub = url.startswith("hf://")
    stored = _stored(target, on_hub)
    there = _manifest_there(target, stored, on_hub, overwrite)
    if there is not None and not overwrite:
        _refuse_other(there, ours.cache.manifest, url)
    words = {file.name: file.sha256 for file in vouched_files(there, url)} if there and MANIFEST_NAME in stored else {}

    def missing(files: Sequence[TravellingFile]) -> list[TravellingFile]:
        sizes = [ours.num_bytes(file) for file in files]
        same = at_once(partial(_is_same, ours, target, stored, words), files, "checking", sizes)
        return [file for file, is_same in zip(files, same, strict=True) if not is_same]

    files = missing(ours.files)
    unvouched = ours.with_card()
    files += missing(unvouched)
    last = missing([ours.manifest])
    unreadable = MANIFEST_NAME in stored and there is None
    away = unreadable or bool(words.keys() & {file.name for file in files})  # while the files that it names change
    if away:
        last = [ours.manifest]
    names = [file.name for file in [*ours.files, *unvouched, ours.manifest]]
    left = left_behind(stored, names)
    revision = None
    if on_hub:
        from logitcache.sharing.hub import push_to_hub

        sent = [file.name for file in [*files, *last]]
        message = f"logitcache push: {ours.cache.identity}"
        revision = push_to_hub(ours.folder, sent, left, url, private=not public, message=message)
    else:
        _send(ours, files, last, target, away)
        finished = [UNFINISHED_NAME] if last or UNFINISHED_NAME in stored else []
        for name in [*left, *finished]:
            persistently(partial(target.remove, name))
    sent_bytes = sum(ours.num_bytes(file) for file in [*files, *last])
    num_sent = len(files) + len(last)
    return Pushed(str(target), ours.cache.identity, num_sent, sent_bytes, len(names) - num_sent, revision)


def _send(
    ours: _Outgoing, files: Sequence[TravellingFile], last: Sequence[TravellingFile], target: Folder, away: bool
) -> None:
    """Sends files, then the manifest, if that is to go. away: the manifest there is removed before the files change."""

    def send(file: TravellingFile) -> None:
        persistently(partial(target.put, ours.path(file), file.name, file.sha256))

    if last:
        persistently(partial(target.put, ours.path(ours.manifest), UNFINISHED_NAME))
        _refuse_another_push(target, ours)
    if away:
        persistently(partial(target.remove, MANIFEST_NAME))
    at_once(send, files, "sending", [ours.num_bytes(file) for file in files])
    if last:
        _refuse_another_push(target, ours)
    at_once(send, last, "sending", [ours.num_bytes(file) for file in last])


def _refuse_another_push(target: Folder, ours: _Outgoing) -> None:
    """Raises UserError if the mark of our push is gone or another's: that push may have replaced files of ours."""
    try:
        content = persistently(partial(target.read, UNFINISHED_NAME, MAX_MANIFEST_BYTES))
    except FileNotFoundError:
        content = b""
    if hashlib.sha256(content).hexdigest() != ours.cache.identity:
        raise UserError(
            f"{target}: another push is under way there; when it has ended, push again the cache that is to be there"
        )


def _stored(target: Folder, on_hub: bool) -> Mapping[str, Stored]:
    """Lists the files that are there; a repository that is not there yet is made by the push, a bucket is not."""
    try:
        return persistently(target.stored)
    except FileNotFoundError as error:
        if on_hub:
            return {}
        raise UserError(f"{target} cannot be written: there is no such bucket ({error}); create it first") from error


def _manifest_there(target: Folder, stored: Mapping[str, Stored], on_hub: bool, overwrite: bool) -> Manifest | None:
    """Reads the manifest of the cache in a place, whole or on its way there; under `overwrite` None if it cannot be read.

    Raises UserError if the place holds something else.
    """
    name = MANIFEST_NAME if MANIFEST_NAME in stored else UNFINISHED_NAME
    if name in stored:
        content = persistently(partial(target.read, name, MAX_MANIFEST_BYTES))
        try:
            manifest = parse_manifest(content, target.where(name))
            vouched_files(manifest, target.where(name))
            return manifest
        except UserError as error:
            if overwrite:
                return None
            raise UserError(f"{error}; --overwrite replaces the cache there") from error
    if any(other.startswith(f"{BUILD_DIRECTORY}/") for other in stored):
        raise UserError(f"{target} is an unfinished build: finish it, or choose another place")
    # Where the Hub made a repository, it put these there.
    others = sorted(stored.keys() - LEFTOVERS - ({".gitattributes", CARD_NAME} if on_hub else set()))
    if others:
        raise UserError(f"{target} holds no cache but other files ({others[0]}, …): choose an empty place")
    return None


def _refuse_other(there: Manifest, ours: Manifest, url: str) -> None:
    """Raises UserError unless a cache is the same one, whole or at an earlier or later state of the same build."""
    changes = differences(
        {"fingerprint": there.fingerprint, "history": list(there.history)},
        {"fingerprint": ours.fingerprint, "history": list(ours.history)},
    )
    if changes:
        raise UserError(
            f"{url} holds another cache: {first_of(changes)}. Choose another place, or replace that cache with --overwrite"
        )


def _is_same(
    outgoing: _Outgoing, target: Folder, stored: Mapping[str, Stored], words: Mapping[str, str], file: TravellingFile
) -> bool:
    """Tells whether the target has a file already, by whatever tells its content.

    words: SHA-256 by name, of a whole manifest there, for a store that has no checksums. Raises UserError for a file here whose
    SHA-256 is not that of its manifest.
    """
    path, there = outgoing.path(file), stored.get(file.name)
    comparable = there is not None and there.num_bytes == path.stat().st_size
    theirs = there.algorithm if there is not None and comparable else None
    ours = digests(path, {"sha256", theirs or "sha256"})
    check(file, ours["sha256"], str(path))
    if there is None or not comparable:
        return False
    if theirs is not None and ours[theirs] == there.digest:
        return True
    if (noted := persistently(partial(target.sha256, file.name))) is not None:
        return noted == ours["sha256"]
    if theirs is not None:
        return False
    if target.local is not None:
        with suppress(UserError):  # a link there is not the same, and is replaced
            return digests(target.on_disk(file.name), {"sha256"})["sha256"] == ours["sha256"]
        return False
    if file.name in words:
        return words[file.name] == ours["sha256"]
    if file.num_bytes is not None:
        return False
    content = persistently(partial(target.read, file.name))  # of the few files that are not large
    return hashlib.sha256(content).hexdigest() == ours["sha256"]


def _push_bundle(ours: _Outgoing, url: str, overwrite: bool) -> Pushed:
    target, name = place(url)
    if target.lies_in(Folder(ours.folder)):
        raise UserError(f"{url}: choose a place outside the cache that is pushed, {ours.folder}")
    if target.local is not None and (target.local / name).is_dir():
        raise UserError(f"{url} is a folder, a name for a file is wanted")
    stored = persistently(partial(target.look_up, name))
    if stored is not None and not overwrite:
        there = parse_manifest(persistently(partial(bundled_manifest, url)), url)
        _refuse_other(there, ours.cache.manifest, url)
    members = [ours.manifest, *sorted([*ours.files, *ours.with_card()], key=lambda file: file.name)]
    progress = Progress("bundling", sum(ours.num_bytes(file) for file in members), 0, "bytes")
    try:
        with _written_for(target, name) as path:
            write_bundle(ours.folder, members, path, progress.advance)
            num_bytes = path.stat().st_size
            if stored == Stored(num_bytes, "md5", digests(path, {"md5"})["md5"]):
                return Pushed(target.where(name), ours.cache.identity, 0, 0, 1)
            if target.local is None:
                persistently(partial(target.put, path, name))
    finally:
        progress.close()
    return Pushed(target.where(name), ours.cache.identity, 1, num_bytes, 0)


@contextmanager
def _written_for(target: Folder, name: str) -> Iterator[Path]:
    """Yields a path to write a file to, beside its place in a local folder."""
    if target.local is not None:
        with target.writing(name) as path:
            yield path
        return
    with tempfile.TemporaryDirectory(prefix="logitcache-") as directory:
        path = Path(directory) / name
        with space_needed(path):
            yield path

"""The card of a cache is its README.md: every command that changes the cache writes it; words below its last line are kept."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from logitcache.assembly.card_text import card_text
from logitcache.errors import UserError
from logitcache.format.manifest import CARD_NAME, Manifest, cache_identity, read_manifest
from logitcache.report.statistics import statistics
from logitcache.storage.folder import Folder

logger = logging.getLogger("logitcache")

UNKNOWN = "unknown"
LICENSES = ("license", "teacher_license", "data_license")
_MARK = "<!-- logitcache writes what stands above this line ({digest}); what stands below it is yours and is kept -->"
_MARKED = re.compile("^" + re.escape(_MARK).replace(r"\{digest\}", "([0-9a-f]{16})") + "$", re.MULTILINE)


@dataclass(frozen=True)
class Card:
    """The part of a README.md that does not follow from the manifest.

    licenses: those of `LICENSES` that it states.  notes: what stands below the mark.  edited: what stands above it is not
    what was written there.
    """

    licenses: Mapping[str, str] = field(default_factory=dict)
    notes: str = ""
    edited: bool = False


def read_card(folder: Folder) -> Card:
    """Reads the card of a cache; returns an empty one if there is none."""
    if not folder.exists(CARD_NAME):
        return Card()
    text = folder.read(CARD_NAME).decode(errors="replace").replace("\r\n", "\n")
    mark = _MARKED.search(text)
    above = text[: mark.start()] if mark else text
    front = above.partition("---\n")[2].partition("\n---\n")[0]
    stated = {name: value for name in LICENSES if (value := _stated(name, front)) != UNKNOWN}
    edited = mark is None or mark[1] != _digest(above)
    return Card(stated, text[mark.end() :] if mark else "", edited)


def write_card(
    folder: Folder, manifest: Manifest, identity: str, licenses: Mapping[str, str], notes: str = "\n"
) -> None:
    """Writes README.md of a cache whose shards are there, unless it says the same already.

    identity: SHA-256 of the manifest as it lies there, or will.  licenses, notes: as `Card` has them.
    """
    stated = {name: licenses.get(name, UNKNOWN) for name in LICENSES}
    above = card_text(manifest, identity, statistics(folder, manifest), stated) + "\n"
    text = above + _MARK.format(digest=_digest(above)) + notes
    if not folder.exists(CARD_NAME) or folder.read(CARD_NAME) != text.encode():
        folder.write(CARD_NAME, text)


def update_card(folder: Folder, licenses: Mapping[str, str | None]) -> None:
    """Writes the card of a finished cache anew, with these licences; those that are None stay as they are.

    Raises UserError for a card that was edited where logitcache writes it, and for a licence that the Hub would not take.
    """
    card = read_card(folder)
    if card.edited:
        raise UserError(
            f"{folder.where(CARD_NAME)} was edited where logitcache writes it, or written by an earlier version: move your words "
            "below its last line (the comment 'what stands below it is yours'), state licences by --license, or remove the file; "
            "it is written anew"
        )
    given = {name: value for name, value in licenses.items() if value is not None}
    for name, value in given.items():
        check_license(name, value)
    stated = {**card.licenses, **given}
    if missing := [f"--{name.replace('_', '-')}" for name in LICENSES if name not in stated]:
        logger.warning("warning: the card says 'unknown' where no licence is stated: %s", ", ".join(missing))
    identity = cache_identity(folder)
    if folder.exists(CARD_NAME) and stated == card.licenses and identity.encode() in folder.read(CARD_NAME):
        return
    write_card(folder, read_manifest(folder), identity, stated, card.notes or "\n")


def check_license(name: str, value: str) -> None:
    """Raises UserError for what cannot stand in a card as one line of its YAML."""
    if name == "license" and not re.fullmatch(r"[a-z0-9][a-z0-9.\-]*", value):
        raise UserError(
            f"--license {value!r}: write an identifier as the Hub has them, such as apache-2.0, cc-by-4.0 or other"
        )
    if not value.strip() or not value.isprintable():
        raise UserError(f"--{name.replace('_', '-')} {value!r}: write a licence on one line")


def common_licenses(folders: Iterable[Folder]) -> dict[str, str]:
    """Returns the licences that the cards of all these caches state alike."""
    cards = [read_card(folder).licenses for folder in folders]
    first = cards[0] if cards else {}
    return {name: value for name, value in first.items() if all(card.get(name) == value for card in cards)}


def _stated(name: str, front: str) -> str:
    """Reads a licence from the YAML: "unknown" if `check_license` refuses it, for the card may be someone else's."""
    found = re.search(rf"^{name}: (.*)$", front, re.MULTILINE)
    value: object = found[1].strip() if found else UNKNOWN
    with suppress(ValueError):
        value = json.loads(str(value))
    with suppress(UserError):
        check_license(name, str(value))
        return str(value)
    return UNKNOWN


def _digest(above: str) -> str:
    return hashlib.sha256(above.encode()).hexdigest()[:16]

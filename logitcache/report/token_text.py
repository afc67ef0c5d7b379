"""Token ids become text by the tokenizer.json of a cache. It is parsed, not run: nothing but JSON is needed to show a text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from logitcache.format.manifest import TOKENIZER_DIRECTORY, Manifest
from logitcache.format.tokenizer import MAX_TOKENIZER_BYTES
from logitcache.format.trusted import read_trusted
from logitcache.report.samples import SHOWN_CHARACTERS
from logitcache.storage.folder import Folder

TOKENIZER_NAME = f"{TOKENIZER_DIRECTORY}/tokenizer.json"
MOST_STEPS = 32
"""Of a decoder; those of real tokenizers have up to 5."""
MOST_CHARACTERS = 4 * SHOWN_CHARACTERS
"""Of a piece, between the decoder's steps, any of which may lengthen it."""

Text = str | bytes | None
"""Of one token: its text; its bytes, where these are only a part of a character; None where nothing says what it is."""


def token_texts(folder: Folder, manifest: Manifest, ids: Sequence[int]) -> tuple[list[Text], str]:
    """Returns the text of each id, and why ids must be shown in place of texts, or "".

    The texts of a row's tokens, joined, are the row's text. Raises UserError if the file is not the cache's.
    """
    unknown: list[Text] = [None] * len(ids)
    if TOKENIZER_NAME not in manifest.files:
        return unknown, f"The cache has no {TOKENIZER_NAME}: tokens are shown as ids."
    content = read_trusted(folder, manifest, TOKENIZER_NAME, MAX_TOKENIZER_BYTES)
    try:
        return _texts(json.loads(content), ids), ""
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return unknown, f"{TOKENIZER_NAME} is not understood ({error!r:.100}): tokens are shown as ids."


def _texts(tokenizer: Mapping[str, Any], ids: Sequence[int]) -> list[Text]:
    vocabulary = tokenizer["model"]["vocab"]  # of a unigram model a list of [piece, score]
    numbered = (
        enumerate(piece for piece, _ in vocabulary)
        if isinstance(vocabulary, list)
        else ((number, piece) for piece, number in vocabulary.items())
    )
    pieces = {number: piece[:MOST_CHARACTERS] for number, piece in numbered if isinstance(piece, str)}
    added = {token["id"]: str(token["content"]) for token in tokenizer.get("added_tokens") or ()}
    steps = list(islice(_steps(tokenizer.get("decoder")), MOST_STEPS + 1))
    if len(steps) > MOST_STEPS:
        raise ValueError(f"a decoder of more than {MOST_STEPS} steps")
    return [added[i] if i in added else _text(pieces[i], steps) if i in pieces else None for i in map(int, ids)]


def _steps(decoder: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    if decoder is not None:
        yield decoder
        for inner in decoder.get("decoders", ()):
            yield from _steps(inner)


def _text(piece: str, steps: Sequence[Mapping[str, Any]]) -> str | bytes:
    """Decodes a piece of the vocabulary by the steps of the tokenizer's decoder that change single pieces."""
    for step in steps:
        match step:
            case {"type": "ByteLevel"}:
                return _readable(bytes(_BYTES[c] for c in piece)) if all(c in _BYTES for c in piece) else piece
            case {"type": "ByteFallback"} if byte := re.fullmatch("<0x([0-9A-Fa-f]{2})>", piece):
                return _readable(bytes.fromhex(byte[1]))
            case {"type": "Metaspace", "replacement": str(mark)}:
                piece = _replaced(piece, mark, " ")
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                piece = _replaced(piece, old, new)
            case {"type": "WordPiece", "prefix": str(prefix)}:
                piece = piece.removeprefix(prefix) if piece.startswith(prefix) else f" {piece}"
            case {"type": "BPEDecoder", "suffix": str(suffix)}:
                piece = _replaced(piece, suffix, " ")
    return piece


def _replaced(piece: str, old: str, new: str) -> str:
    """Replaces `old` by `new`, up to `MOST_CHARACTERS` of the piece. An empty `old` changes nothing."""
    if not old:
        return piece
    enough = MOST_CHARACTERS // max(len(new), 1) + 1
    return piece.replace(old, new[:MOST_CHARACTERS], enough)[:MOST_CHARACTERS]


def _readable(content: bytes) -> str | bytes:
    try:
        return content.decode()
    except UnicodeDecodeError:
        return content


def _byte_alphabet() -> dict[str, int]:
    """Returns the characters that byte-level BPE writes bytes as, by GPT-2's `bytes_to_unicode`: printable Latin-1 as itself."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTES = _byte_alphabet()

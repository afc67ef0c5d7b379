"""The teacher's tokenizer is stored in a cache, with the hashes that a trainer compares."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any

from logitcache.errors import UserError
from logitcache.format.manifest import MANIFEST_NAME, TOKENIZER_DIRECTORY, Manifest
from logitcache.format.trusted import read_trusted
from logitcache.storage.folder import Folder

MAX_TOKENIZER_BYTES = 1 << 27
"""Of all its files; the largest that are published have 40 MB."""


def tokenizer_fingerprint(tokenizer: Any) -> dict[str, Any]:
    """Returns hashes of any tokenizer that offers `get_vocab()`.

    vocab_size: tokens, added ones included. vocabulary_sha256: of (id, token) in order of the ids. merges_sha256: of what cuts
    text besides the vocabulary (the merges of BPE, the scores of a unigram model), or None if the tokenizer has no
    `backend_tokenizer` or its model has neither.  special_tokens: role → token. chat_template_sha256: or None without a
    template.
    """
    vocabulary = tokenizer.get_vocab()
    template = getattr(tokenizer, "chat_template", None)
    return {
        "vocab_size": len(vocabulary),
        "vocabulary_sha256": _sha256(sorted((number, token) for token, number in vocabulary.items())),
        "merges_sha256": _merges_sha256(tokenizer),
        "special_tokens": {role: _plain(token) for role, token in tokenizer.special_tokens_map.items()},
        "chat_template_sha256": None if template is None else _sha256(template),
    }


def _merges_sha256(tokenizer: Any) -> str | None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    model = json.loads(backend.to_str())["model"]
    if model["type"] == "Unigram":
        return _sha256(model["vocab"])
    if "merges" not in model:
        return None
    # Older files hold a merge as one string "left right".
    return _sha256([merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]])


def _plain(token: Any) -> Any:
    return [str(one) for one in token] if isinstance(token, list | tuple) else str(token)


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()


def save_tokenizer(folder: Folder, tokenizer: Any) -> None:
    """Writes the teacher's tokenizer beside the shards, in place of any other."""
    folder.remove(TOKENIZER_DIRECTORY)
    with tempfile.TemporaryDirectory() as draft:
        tokenizer.save_pretrained(draft)
        for path in sorted(path for path in Path(draft).rglob("*") if path.is_file()):
            folder.write(f"{TOKENIZER_DIRECTORY}/{path.relative_to(draft).as_posix()}", path.read_bytes())


def read_tokenizer(folder: Folder, manifest: Manifest) -> dict[str, bytes] | None:
    """Reads the files of the tokenizer that a manifest names, by their names in `tokenizer/`; None if it names none.

    Raises UserError for a file that is missing or altered, for more bytes than a tokenizer has, and for names that no folder
    can hold together.
    """
    names = sorted(name for name in manifest.files if name.startswith(f"{TOKENIZER_DIRECTORY}/"))
    contents: dict[str, bytes] = {}
    left = MAX_TOKENIZER_BYTES
    for name in names:
        if folders := {str(parent) for parent in PurePosixPath(name).parents} & set(names):
            raise UserError(
                f"{folder.where(MANIFEST_NAME)} was altered: {folders.pop()} is a file, and a folder that holds {name}"
            )
        content = read_trusted(folder, manifest, name, left)
        left -= len(content)
        contents[name.removeprefix(f"{TOKENIZER_DIRECTORY}/")] = content
    return contents or None

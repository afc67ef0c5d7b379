"""Caches whose tokenizer a student can have, for training from a place elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from logitcache import LogitCache
from logitcache.format import shards
from logitcache.format.layout import Layout
from logitcache.format.manifest import TOKENIZER_DIRECTORY, Manifest
from logitcache.format.tokenizer import tokenizer_fingerprint
from logitcache.storage.atomic import file_sha256
from logitcache.storage.folder import Folder
from tests.helpers.objectstore import bucket, s3_endpoint  # noqa: F401
from tests.helpers.smallcaches import random_rows

NUM_SHARDS = 3


def make_cache(root: Path, tokenizer: Any, seed: int) -> LogitCache:
    """A cache of random targets in the tiny teacher's vocabulary, with its tokenizer."""
    layout = Layout(len(tokenizer))
    rows = random_rows(8 * NUM_SHARDS, layout, seed, longest=20)
    infos = []
    for index in range(NUM_SHARDS):
        with shards.ShardWriter(Folder(root), shards.shard_name(index, NUM_SHARDS), layout) as writer:
            for sequence, targets in rows[8 * index : 8 * index + 8]:
                writer.write(sequence, targets)
        infos.append(writer.info)
    tokenizer.save_pretrained(root / TOKENIZER_DIRECTORY)
    fingerprint = {"teacher": {"name": "random"}, "tokenizer": tokenizer_fingerprint(tokenizer)}
    files = {f"{TOKENIZER_DIRECTORY}/{path.name}": file_sha256(path) for path in (root / TOKENIZER_DIRECTORY).iterdir()}
    Manifest(layout, fingerprint, tuple(infos), {}, "tests", files).write(Folder(root))
    return LogitCache(str(root))

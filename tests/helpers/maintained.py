"""Small caches as a capture leaves them, for the commands that make caches of caches."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from logitcache import CachedSequence, LogitCache, SparseTargets
from logitcache.format.layout import Layout
from logitcache.storage.folder import Folder
from tests.helpers.smallcaches import FINGERPRINT, Row, made_once, write_cache

CAPTURE = {"top_k": 8, "top_p": 1.0, "min_k": 8, "shard_positions": 1000}
TOKENIZER = {"vocab_size": 50, "vocabulary_sha256": "1" * 64}


@made_once
def make_cache(
    root: Path,
    /,
    rows: Sequence[Row],
    layout: Layout,
    *,
    capture: Mapping[str, Any] = CAPTURE,
    rows_per_shard: int = 7,
    row_group_bytes: int = 2000,
    **fingerprint: Any,
) -> LogitCache:
    """A finished cache with a tokenizer, in several shards of several row groups."""
    cache = write_cache(root, rows, layout, rows_per_shard, row_group_bytes)
    tokenizer = root / "tokenizer/tokenizer.json"
    tokenizer.parent.mkdir()
    tokenizer.write_text('{"model": {}}')
    files = {**cache.manifest.files, "tokenizer/tokenizer.json": hashlib.sha256(tokenizer.read_bytes()).hexdigest()}
    identity = {**FINGERPRINT, "tokenizer": TOKENIZER, "capture": dict(capture), **fingerprint}
    replace(cache.manifest, fingerprint=identity, files=files).write(Folder(root))
    return LogitCache(str(root))


def contents(root: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def history(cache: LogitCache) -> list[dict[str, Any]]:
    """As the manifest's JSON has it."""
    steps: list[dict[str, Any]] = json.loads((Path(cache.path) / "logitcache.json").read_text())["history"]
    return steps


def assert_same_row(read: CachedSequence, expected: CachedSequence) -> None:
    """Bit for bit, targets included."""
    assert read.row_id == expected.row_id
    assert np.array_equal(read.input_ids, expected.input_ids)
    assert np.array_equal(read.loss_mask, expected.loss_mask)
    assert read.columns == expected.columns
    assert_same_targets(read.targets, expected.targets)


def assert_same_targets(read: SparseTargets, expected: SparseTargets) -> None:
    """Bit for bit, dtypes and shapes included."""
    ours, theirs = arrays_of(read), arrays_of(expected)
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        assert ours[name].dtype == values.dtype, name
        np.testing.assert_array_equal(ours[name], values, err_msg=str(name))


def arrays_of(targets: SparseTargets) -> dict[Any, np.ndarray]:
    """What the targets hold, by field; of the tempered tail by temperature."""
    present = {name: values for name, values in vars(targets).items() if values is not None}
    return {**present.pop("tempered_tail"), **present}

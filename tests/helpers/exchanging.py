"""What the tests of import and export share: a tokenizer of numbered words, plain top-k rows, files of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from logitcache import LogitCache
from logitcache.exchange.importing import import_logits
from logitcache.maintenance.verify.verification import Verification

FIXTURES = Path(__file__).parents[1] / "data/exchange"
VOCAB = 60


def write_tokenizer(path: Path, num_tokens: int = VOCAB) -> Path:
    """A tokenizer whose token i is the word `t<i>`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({f"t{i}": i for i in range(num_tokens)}, unk_token="t0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="t0").save_pretrained(path)
    return path


def random_row(random: np.random.Generator, num_tokens: int = 7, k: int = 4, **columns: Any) -> dict[str, Any]:
    """A plain top-k row of lists, entries most probable first."""
    logits = random.normal(scale=2, size=(num_tokens - 1, VOCAB))
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    ids = np.argsort(-logprobs, axis=1)[:, :k]
    return {
        "input_ids": random.integers(0, VOCAB, num_tokens).tolist(),
        "topk_ids": ids.tolist(),
        "topk_logprobs": np.take_along_axis(logprobs, ids, axis=1).astype(np.float32).astype(float).tolist(),
        **columns,
    }


def random_rows(count: int, seed: int = 0, **columns: Any) -> list[dict[str, Any]]:
    random = np.random.default_rng(seed)
    return [random_row(random, int(random.integers(2, 12)), **columns) for _ in range(count)]


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]], row_group_size: int = 1000) -> Path:
    """As Parquet or JSON lines, by the file's name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=row_group_size)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def import_topk(source: Path | str, out: Path, tokenizer: Path, **settings: Any) -> LogitCache:
    settings = {"teacher": "big", "precision": "exact", **settings}
    cache: LogitCache = import_logits(str(source), out, source_format="topk", tokenizer=str(tokenizer), **settings)
    return cache


def findings(cache: LogitCache) -> list[str]:
    """What `logitcache verify` says is wrong."""
    return [str(finding) for finding in Verification(cache.path)]

"""How fast DistillKit's bytes decode, and how fast an import and an export are, on one core.

    python tools/bench_exchange.py [--positions 200000] [--tokens 2048]

Rows of `tokens` tokens with k = 64 of d = 151 936, 16 of them exact as bfloat16 and the others on a curve of 6 terms, as the
public datasets have them: the sample of the tests repeated. decode: bytes to ids and log-probabilities, in memory. import: a
Parquet file to a cache, the loading of the tokenizer left out. export: that cache to plain top-k rows.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from logitcache.exchange.distillkit import decode
from logitcache.exchange.distillkit_config import CONFIG_NAME, parse_config
from logitcache.exchange.exporting import export
from logitcache.exchange.importing import import_logits
from logitcache.format.tokenizer import tokenizer_fingerprint
from logitcache.table import aligned

SAMPLE = Path(__file__).parent.parent / "tests/data/exchange/recommended"
REPEATS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=200_000)
    parser.add_argument("--tokens", type=int, default=2048, help="of a row")
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    ids, logprobs, tokens = _sample(options.positions)
    config = parse_config((SAMPLE / CONFIG_NAME).read_bytes(), CONFIG_NAME)
    rows = [("", "positions/s", "MB/s read")]
    packed_bytes = config.id_bytes + config.logprob_bytes
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        _write(folder, ids, logprobs, tokens, options.tokens)
        tokenizer = _tokenizer(folder / "tokenizer", config.d)

        loading = min(_seconds(lambda: _load_and_save(tokenizer, folder / "saved")) for _ in range(REPEATS))

        def run_import() -> None:
            shutil.rmtree(folder / "cache", ignore_errors=True)
            import_logits(
                str(folder / "data"), folder / "cache", source_format="distillkit", teacher="big", tokenizer=tokenizer
            )

        for label, work in [
            ("decode", lambda: decode(ids, logprobs, config)),
            ("import", run_import),
            ("export", lambda: export(folder / "cache", folder / "rows.parquet", to="topk", overwrite=True)),
        ]:
            seconds = min(_seconds(work) for _ in range(REPEATS)) - (loading if label == "import" else 0)
            rate = len(ids) / seconds
            rows.append((label, f"{rate:,.0f}", f"{rate * packed_bytes / 1e6:,.0f}" if label != "export" else ""))
    print(aligned(rows))


def _sample(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids and log-probabilities as bytes uint8 [count, …], and a token for each."""
    table = pq.read_table(SAMPLE / "data_0.parquet")
    columns = [
        np.concatenate([np.array(row.as_py(), dtype=np.uint8) for row in table[name]])
        for name in ("bytepacked_indices", "compressed_logprobs")
    ]
    tokens = np.concatenate([np.array(row.as_py(), dtype=np.uint64) for row in table["input_ids"]])
    ids, logprobs, tokens = (np.resize(part, (count, *part.shape[1:])) for part in (*columns, tokens))
    return ids, logprobs, tokens


def _write(folder: Path, ids: np.ndarray, logprobs: np.ndarray, tokens: np.ndarray, length: int) -> None:
    (folder / "data").mkdir()
    shutil.copy(SAMPLE / CONFIG_NAME, folder / "data")
    starts = np.arange(0, len(ids), length - 1)
    lengths = np.diff(np.append(starts, len(ids)))
    token_offsets = np.concatenate([[0], np.cumsum(lengths + 1)])
    columns = {
        "input_ids": pa.ListArray.from_arrays(token_offsets, np.resize(tokens, int(token_offsets[-1]))),
        "compressed_logprobs": _nested(logprobs, lengths),
        "bytepacked_indices": _nested(ids, lengths),
    }
    pq.write_table(pa.table(columns), folder / "data/data_0.parquet", row_group_size=64)


def _nested(content: np.ndarray, lengths: np.ndarray) -> pa.Array:
    inner = pa.ListArray.from_arrays(np.arange(len(content) + 1) * content.shape[1], content.reshape(-1))
    return pa.ListArray.from_arrays(np.concatenate([[0], np.cumsum(lengths)]), inner)


def _tokenizer(path: Path, num_tokens: int) -> str:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({f"t{i}": i for i in range(num_tokens)}, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(path)
    return str(path)


def _load_and_save(tokenizer: str, path: Path) -> None:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    tokenizer_fingerprint(loaded)
    loaded.save_pretrained(path)


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()

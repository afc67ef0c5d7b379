"""A cache as it lies, read by tools that do not know this project: the numbers are those of `cache[i]`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars
import pytest
from smallcaches import EVERYTHING, random_rows, write_cache

from logitcache import CachedSequence, LogitCache
from logitcache.format.codec import GROUP_STEP
from logitcache.format.manifest import CARD_NAME, TOKENIZER_DIRECTORY
from logitcache.sharing.card import dataset_card


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> LogitCache:
    """20 rows with every optional column, in 3 shards, with everything else that a build writes beside them."""
    root = tmp_path_factory.mktemp("cache")
    written = write_cache(root, random_rows(20, EVERYTHING), EVERYTHING, rows_per_shard=8, row_group_bytes=2000)
    (root / CARD_NAME).write_text(dataset_card(written.manifest), encoding="utf-8")
    (root / TOKENIZER_DIRECTORY).mkdir()
    (root / TOKENIZER_DIRECTORY / "tokenizer.json").write_text("{}")
    return written


def flattened(values: np.ndarray | None) -> np.ndarray:
    assert values is not None
    return values.reshape(-1)


def assert_same(row: dict[str, Any], sequence: CachedSequence) -> None:
    """A row of plain lists against a row of this project's reader."""
    targets = sequence.targets
    held = targets.token_ids >= 0
    expected = {
        "row_id": sequence.row_id,
        "input_ids": sequence.input_ids,
        "loss_mask": sequence.loss_mask,
        "num_entries": targets.num_entries,
        "token_ids": targets.token_ids[held],
        "logprobs": targets.logprobs[held],
        "tail_logprob": targets.tail_logprob,
        # The reader scales the rounded masses of a position to its tail; other readers see them as they are stored.
        "group_logprobs": np.float32(GROUP_STEP) * np.rint(flattened(targets.group_logprobs) / np.float32(GROUP_STEP)),
        "tail_log_norm_T0.5": targets.tempered_tail[0.5],
        "tail_log_norm_T2": targets.tempered_tail[2.0],
        "tail_entropy": targets.tail_entropy,
        "sample_ids": flattened(targets.sample_ids),
        "sample_logprobs": flattened(targets.sample_logprobs),
        **sequence.columns,
    }
    assert row.keys() == expected.keys()
    for name, value in expected.items():
        assert row[name] == (value.tolist() if isinstance(value, np.ndarray) else value), name


def test_datasets_reads_it(cache: LogitCache, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset(cache.path, split="train", cache_dir=str(tmp_path))
    assert len(loaded) == 20
    for row, sequence in zip(loaded, cache, strict=True):
        assert_same(row, sequence)


def test_datasets_streams_it(cache: LogitCache, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    stream = datasets.load_dataset(cache.path, split="train", streaming=True, cache_dir=str(tmp_path))
    for row, sequence in zip(stream, cache, strict=True):
        assert_same(row, sequence)


def test_polars_reads_it(cache: LogitCache) -> None:
    frame = polars.read_parquet(f"{cache.path}/data/*.parquet")
    for row, sequence in zip(frame.iter_rows(named=True), cache, strict=True):
        assert_same(row, sequence)


def test_duckdb_reads_it(cache: LogitCache) -> None:
    rows = duckdb.execute(f"SELECT * FROM '{cache.path}/data/*.parquet'")
    names = [column[0] for column in rows.description or ()]
    for values, sequence in zip(rows.fetchall(), cache, strict=True):
        assert_same(dict(zip(names, values, strict=True)), sequence)


def snippet(cache: LogitCache, language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", (Path(cache.path) / CARD_NAME).read_text(), re.DOTALL)
    assert found is not None
    return found[1]


def test_the_sql_of_the_card_gives_the_entries_of_the_first_positions(
    cache: LogitCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(cache.path)
    for (row_id, ids, logprobs), sequence in zip(duckdb.execute(snippet(cache, "sql")).fetchall(), cache, strict=True):
        count = sequence.targets.num_entries[0]
        assert row_id == sequence.row_id
        assert ids == sequence.targets.token_ids[0, :count].tolist()
        assert logprobs == sequence.targets.logprobs[0, :count].tolist()


def test_the_python_of_the_card_runs(cache: LogitCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(cache.path)
    names: dict[str, Any] = {}
    exec(snippet(cache, "python"), names)
    assert names["targets"].token_ids.tolist() == cache[0].targets.token_ids.tolist()


def test_the_card_names_every_column(cache: LogitCache) -> None:
    card = dataset_card(cache.manifest)
    for field in EVERYTHING.schema():
        assert f"| `{field.name}` | `{field.type}` |" in card

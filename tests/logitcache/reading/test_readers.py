"""A cache as it lies, read by tools that do not know this project: the numbers are those of `cache[i]`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from unittest.mock import patch

import duckdb
import numpy as np
import polars
import pyarrow.parquet as pq
import pytest

from logitcache import CachedSequence, LogitCache
from logitcache.assembly.card import write_card
from logitcache.format.manifest import CARD_NAME, TOKENIZER_DIRECTORY
from logitcache.format.quantization import PRESETS
from logitcache.storage.folder import Folder
from tests.helpers.smallcaches import EVERYTHING, VOCAB, at_precision, random_rows, write_cache


@pytest.fixture(scope="module", params=PRESETS)
def cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LogitCache:
    """20 rows with every optional column, in 3 shards, with everything else that a build writes beside them."""
    root = tmp_path_factory.mktemp(request.param)
    layout = at_precision(EVERYTHING, request.param)
    with patch("logitcache.format.codebook.LEAST_OCCURRENCES", 3):
        written = write_cache(root, random_rows(20, layout), layout, rows_per_shard=8, row_group_bytes=2000)
    write_card(Folder(root), written.manifest, written.identity, {})
    (root / TOKENIZER_DIRECTORY).mkdir()
    (root / TOKENIZER_DIRECTORY / "tokenizer.json").write_text("{}")
    return written


def flattened(values: np.ndarray | None) -> np.ndarray:
    assert values is not None
    return values.reshape(-1)


def columns_as_stored(cache: LogitCache) -> list[dict[str, Any]]:
    """What pyarrow, a reader of its own, finds in the shards."""
    return [row for path in sorted(Path(cache.path).glob("data/*")) for row in pq.ParquetFile(path).read().to_pylist()]


def assert_same(row: dict[str, Any], stored: dict[str, Any], sequence: CachedSequence) -> None:
    """A row of plain lists as another reader gives it: every column as it is stored, and what needs no decoding as we read it."""
    assert row == stored
    targets = sequence.targets
    held = targets.token_ids >= 0
    expected = {
        "row_id": sequence.row_id,
        "input_ids": sequence.input_ids,
        "loss_mask": sequence.loss_mask,
        "num_entries": targets.num_entries,
        "tail_logprob": targets.tail_logprob,
        "tail_log_norm_T0.5": targets.tempered_tail[0.5],
        "tail_log_norm_T2": targets.tempered_tail[2.0],
        "tail_entropy": targets.tail_entropy,
        "sample_ids": flattened(targets.sample_ids),
        "sample_logprobs": flattened(targets.sample_logprobs),
        **sequence.columns,
    }
    if "token_ids" in row:
        expected["token_ids"] = targets.token_ids[held]
        expected["logprobs"] = targets.logprobs[held]
        expected["group_logprobs"] = flattened(targets.group_logprobs)
        expected["tail_coefficients"] = flattened(targets.tail_coefficients)
        expected["probe_residuals"] = flattened(targets.probe_residuals)
    for name, value in expected.items():
        assert row[name] == (value.tolist() if isinstance(value, np.ndarray) else value), name


@pytest.mark.slow
def test_datasets_reads_it(cache: LogitCache, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset(cache.path, split="train", cache_dir=str(tmp_path))
    assert len(loaded) == 20
    for row, stored, sequence in zip(loaded, columns_as_stored(cache), cache, strict=True):
        assert_same(row, stored, sequence)


def test_datasets_streams_it(cache: LogitCache, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    stream = datasets.load_dataset(cache.path, split="train", streaming=True, cache_dir=str(tmp_path))
    for row, stored, sequence in zip(stream, columns_as_stored(cache), cache, strict=True):
        assert_same(row, stored, sequence)


def test_polars_reads_it(cache: LogitCache) -> None:
    frame = polars.read_parquet(f"{cache.path}/data/*.parquet")
    for row, stored, sequence in zip(frame.iter_rows(named=True), columns_as_stored(cache), cache, strict=True):
        assert_same(row, stored, sequence)


def test_duckdb_reads_it(cache: LogitCache) -> None:
    rows = duckdb.execute(f"SELECT * FROM '{cache.path}/data/*.parquet'")
    names = [column[0] for column in rows.description or ()]
    for values, stored, sequence in zip(rows.fetchall(), columns_as_stored(cache), cache, strict=True):
        assert_same(dict(zip(names, values, strict=True)), stored, sequence)


def snippet(cache: LogitCache, language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", (Path(cache.path) / CARD_NAME).read_text(), re.DOTALL)
    assert found is not None
    return found[1]


def test_the_sql_of_the_card_gives_every_entry(cache: LogitCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(cache.path)
    answer = duckdb.sql(snippet(cache, "sql"))
    assert answer is not None
    found = {(row, position, token): logprob for row, position, token, logprob in answer.fetchall()}
    expected = {
        (sequence.row_id, number + 1, int(token)): float(logprob)
        for sequence in cache
        for number in range(len(sequence.targets))
        for token, logprob in zip(sequence.targets.token_ids[number], sequence.targets.logprobs[number], strict=True)
        if token >= 0
    }
    assert found == pytest.approx(expected, rel=1e-6)


def test_the_second_sql_of_the_card_rebuilds_the_logits(cache: LogitCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(cache.path)
    *_, sql = re.findall(r"```sql\n(.*?)```", Path(CARD_NAME).read_text(encoding="utf-8"), re.DOTALL)
    answer, basis = duckdb.sql(sql), cache.tail_basis
    assert answer is not None and basis is not None
    ids, logits = zip(*answer.order("token_id").fetchall(), strict=True)
    assert list(ids) == list(range(VOCAB))
    coefficients = cache[0].targets.tail_coefficients
    assert coefficients is not None
    shift = np.array(logits) - (basis.offset + basis.directions @ coefficients[0])
    assert np.ptp(shift) <= 1e-5


def test_the_python_of_the_card_runs(cache: LogitCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(cache.path)
    names: dict[str, Any] = {}
    exec(snippet(cache, "python"), names)
    assert names["targets"].token_ids.tolist() == cache[0].targets.token_ids.tolist()


def test_the_card_names_every_column(cache: LogitCache) -> None:
    card = (Path(cache.path) / CARD_NAME).read_text(encoding="utf-8")
    for field in cache.manifest.layout.schema():
        assert f"| `{field.name}` | `{field.type}` |" in card

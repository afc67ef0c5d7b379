"""A stream's order and a row's place, from the manifest alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logitcache import LogitCache
from logitcache.format.layout import Layout
from logitcache.reading.shard_reader import ShardReader
from tests.helpers.smallcaches import VOCAB, random_rows, small, write_cache


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> LogitCache:
    """40 rows in three shards of several row groups each."""
    folder: Path = tmp_path_factory.mktemp("cache")
    layout = Layout(VOCAB)
    return write_cache(folder, random_rows(40, layout), layout, rows_per_shard=15, row_group_bytes=400)


@pytest.mark.slow
@given(shuffle=st.booleans(), seed=st.integers(0, 99), world=st.integers(1, 4), data=st.data())
@small
def test_the_order_is_that_of_the_stream(
    cache: LogitCache, shuffle: bool, seed: int, world: int, data: st.DataObject
) -> None:
    shard = (data.draw(st.integers(0, world - 1)), world)
    ids = [row.row_id for row in cache]
    order = cache.stream_order(shuffle, seed, shard)
    assert order.dtype == np.int64
    assert [ids[number] for number in order] == [row.row_id for row in cache.iter_sequences(shuffle, seed, shard)]


def test_the_order_reads_no_shard(cache: LogitCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ShardReader, "read_columns", None)
    assert sorted(cache.stream_order(shuffle=True)) == list(range(40))


def test_every_row_lies_where_its_row_group_says(cache: LogitCache) -> None:
    groups = list(cache.iter_row_groups())
    assert len(groups) > 6
    for number in range(len(cache)):
        row_group, row = cache.row_group_of(number)
        assert groups[row_group].row_ids[row] == cache[number].row_id
        assert cache.read_row_group(row_group).row_ids == groups[row_group].row_ids

"""logitcache.open: random access, streams in any order, shards of ranks, exact continuation, and what it must not import."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, pairwise
from pathlib import Path

import fsspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from smallcaches import EVERYTHING, VOCAB, assert_holds, random_rows, small, tail_groups, write_cache

import logitcache
from logitcache import CachedSequence, LogitCache, UserError
from logitcache.cache import SHUFFLE_ROW_GROUPS
from logitcache.format.codec import Layout
from logitcache.format.storage import Folder
from logitcache.format.tail_groups import TAIL_GROUPS_NAME, write_tail_groups

ROWS = random_rows(23, EVERYTHING)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> LogitCache:
    """23 rows in 4 shards of several row groups each."""
    written = write_cache(tmp_path_factory.mktemp("cache"), ROWS, EVERYTHING, rows_per_shard=7, row_group_bytes=1200)
    assert 4 < len(written._row_groups) < 23
    return written


@pytest.fixture(scope="module")
def long_cache(tmp_path_factory: pytest.TempPathFactory) -> LogitCache:
    """120 rows, each in a row group of its own: several windows of a shuffle."""
    layout = Layout(VOCAB)
    written = write_cache(
        tmp_path_factory.mktemp("long"), random_rows(120, layout), layout, rows_per_shard=50, row_group_bytes=1
    )
    assert len(written._row_groups) == 120 > 3 * SHUFFLE_ROW_GROUPS
    return written


def row_ids(rows: Iterable[CachedSequence]) -> list[str]:
    return [row.row_id for row in rows]


def test_every_row_is_the_one_that_was_written(cache: LogitCache) -> None:
    assert len(cache) == 23
    assert cache.num_positions == sum(len(targets) for _, targets in ROWS)
    assert cache.vocab_size == VOCAB
    for number in [*range(23), 5, 22, 0]:
        assert_holds(cache[number], ROWS[number])


def test_negative_rows_count_from_the_end(cache: LogitCache) -> None:
    assert_holds(cache[-1], ROWS[22])
    assert_holds(cache[-23], ROWS[0])


@pytest.mark.parametrize("row", [23, -24, 1000])
def test_a_row_beyond_the_cache_is_an_index_error(cache: LogitCache, row: int) -> None:
    with pytest.raises(IndexError, match=r"of a cache of 23"):
        cache[row]


def test_iterating_gives_the_rows_in_order(cache: LogitCache) -> None:
    for cached, row in zip(cache, ROWS, strict=True):
        assert_holds(cached, row)
    assert row_ids(cache) == row_ids(cache.iter_sequences())


def test_a_shuffle_is_a_permutation_that_the_seed_decides(long_cache: LogitCache) -> None:
    first, again = (row_ids(long_cache.iter_sequences(shuffle=True, seed=3)) for _ in range(2))
    assert first == again
    assert sorted(first) == sorted(row_ids(long_cache))
    assert first != row_ids(long_cache)
    assert first != row_ids(long_cache.iter_sequences(shuffle=True, seed=4))


def test_a_shuffle_begins_anywhere_in_the_cache(long_cache: LogitCache) -> None:
    order = {row_id: number for number, row_id in enumerate(row_ids(long_cache))}
    first = [order[row.row_id] for row, _ in zip(long_cache.iter_sequences(shuffle=True), range(16), strict=False)]
    assert min(first) < 30 and max(first) > 90


def test_a_shuffle_mixes_rows_of_different_row_groups(cache: LogitCache) -> None:
    order = {row_id: number for number, row_id in enumerate(row_ids(cache))}
    shuffled = [order[row_id] for row_id in row_ids(cache.iter_sequences(shuffle=True))]
    assert sum(abs(a - b) == 1 for a, b in pairwise(shuffled)) < 8


@given(world=st.integers(1, 5), shuffle=st.booleans(), seed=st.integers(0, 1000))
@small
def test_ranks_share_the_rows_evenly_and_without_overlap(
    cache: LogitCache, world: int, shuffle: bool, seed: int
) -> None:
    streams = [cache.iter_sequences(shuffle, seed, shard=(rank, world)) for rank in range(world)]
    lengths = [len(stream) for stream in streams]
    parts = [row_ids(stream) for stream in streams]
    assert [len(part) for part in parts] == lengths
    assert max(lengths) - min(lengths) <= 1
    assert sorted(chain(*parts)) == sorted(row_ids(cache))


def test_more_ranks_than_rows_leave_some_without_any(tmp_path: Path) -> None:
    cache = write_cache(tmp_path, ROWS[:2], EVERYTHING)
    parts = [row_ids(cache.iter_sequences(shard=(rank, 5))) for rank in range(5)]
    assert sorted(len(part) for part in parts) == [0, 0, 0, 1, 1]
    assert list(chain(*parts)) == row_ids(cache)


@pytest.mark.parametrize("shard", [(2, 2), (-1, 2), (0, 0)])
def test_a_rank_outside_the_world_is_refused(cache: LogitCache, shard: tuple[int, int]) -> None:
    with pytest.raises(UserError, match="the rank must lie in"):
        cache.iter_sequences(shard=shard)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("shard", [(0, 1), (0, 3), (2, 3)])
def test_a_stream_continues_where_another_stopped(cache: LogitCache, shuffle: bool, shard: tuple[int, int]) -> None:
    whole = row_ids(cache.iter_sequences(shuffle, 5, shard))
    for cut in range(len(whole) + 1):
        stream = cache.iter_sequences(shuffle, 5, shard)
        head = [next(stream).row_id for _ in range(cut)]
        assert stream.position == cut
        rest = cache.iter_sequences(shuffle, 5, shard, start=stream.position)
        assert head + row_ids(rest) == whole
        assert rest.position == len(rest) == len(whole)


def test_a_long_shuffled_stream_continues_in_every_window(long_cache: LogitCache) -> None:
    whole = row_ids(long_cache.iter_sequences(True, 1))
    for start in range(0, 121, 5):
        assert row_ids(long_cache.iter_sequences(True, 1, start=start)) == whole[start:]


def test_two_streams_of_one_cache_do_not_disturb_each_other(cache: LogitCache) -> None:
    pairs = list(zip(cache.iter_sequences(True, 1), cache.iter_sequences(True, 2), strict=True))
    assert [a.row_id for a, _ in pairs] == row_ids(cache.iter_sequences(True, 1))
    assert [b.row_id for _, b in pairs] == row_ids(cache.iter_sequences(True, 2))


def test_threads_read_their_own_rows(long_cache: LogitCache) -> None:
    expected = row_ids(long_cache)
    rows = np.random.default_rng(0).integers(0, len(expected), 800).tolist()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            read = list(threads.map(lambda row: long_cache[row].row_id, rows))
    finally:
        sys.setswitchinterval(interval)
    assert read == [expected[row] for row in rows]


def test_a_cache_opens_at_a_url(cache: LogitCache) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(cache.path, "/elsewhere", recursive=True)
    remote = logitcache.open("memory://elsewhere")
    for cached, row in zip(remote, ROWS, strict=True):
        assert_holds(cached, row)
    assert_holds(remote[11], ROWS[11])
    assert row_ids(remote.iter_sequences(True, 9)) == row_ids(cache.iter_sequences(True, 9))
    memory.rm("/elsewhere", recursive=True)


def test_tail_groups_are_read_from_their_file(tmp_path: Path) -> None:
    read = write_cache(tmp_path, ROWS, EVERYTHING).tail_groups
    assert read is not None
    assert read.dtype == np.int32
    assert read.tolist() == [0, 1, *[2] * (VOCAB - 2)]


def test_tail_groups_that_are_missing_or_not_the_manifests_are_refused(tmp_path: Path) -> None:
    cache = write_cache(tmp_path, ROWS, EVERYTHING)
    write_tail_groups(Folder(tmp_path), tail_groups(EVERYTHING)[::-1])
    with pytest.raises(UserError, match=r"tail_groups\.parquet is missing or was altered \(its SHA-256"):
        _ = cache.tail_groups
    (tmp_path / TAIL_GROUPS_NAME).unlink()
    with pytest.raises(UserError, match=r"tail_groups\.parquet is missing"):
        _ = cache.tail_groups


def test_a_cache_without_tail_groups_has_none(long_cache: LogitCache) -> None:
    assert long_cache.tail_groups is None


def test_a_cache_is_read_where_no_engine_can_be_imported(cache: LogitCache) -> None:
    script = """
import json, sys
for name in ("torch", "transformers", "vllm", "datasets", "tokenizers", "jinja2"):
    sys.modules[name] = None
import logitcache
cache = logitcache.open(sys.argv[1])
rows = [cache[3], next(cache.iter_sequences(shuffle=True, seed=1))]
print(json.dumps([[row.row_id, row.targets.token_ids.tolist(), row.targets.logprobs.tolist()] for row in rows]))
"""
    process = subprocess.run([sys.executable, "-c", script, cache.path], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    expected = [cache[3], next(cache.iter_sequences(shuffle=True, seed=1))]
    for (row_id, token_ids, logprobs), row in zip(json.loads(process.stdout), expected, strict=True):
        assert row_id == row.row_id
        assert token_ids == row.targets.token_ids.tolist()
        assert logprobs == row.targets.logprobs.tolist()

"""logitcache.open: random access, streams in any order, shards of ranks, exact continuation, and what it must not import."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, pairwise
from pathlib import Path

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import logitcache
from logitcache import CachedSequence, LogitCache, UserError
from logitcache.format.codec import DecodedRows
from logitcache.format.layout import Layout
from logitcache.format.tail_groups import write_tail_groups
from logitcache.format.tail_parts import TAIL_GROUPS_NAME
from logitcache.reading.cache import SHUFFLE_ROW_GROUPS
from logitcache.reading.shard_reader import ShardReader
from logitcache.storage.folder import Folder
from logitcache.storage.prefetch import AHEAD
from tests.helpers.kernels import DEVICE
from tests.helpers.smallcaches import (
    EVERYTHING,
    VOCAB,
    assert_holds,
    full_distributions,
    random_rows,
    small,
    sparse_targets,
    tail_groups,
    write_cache,
)

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


@pytest.fixture(scope="module")
def exact_cache(tmp_path_factory: pytest.TempPathFactory) -> LogitCache:
    """12 rows of an exact cache with five entries everywhere, in several row groups of one shard."""
    layout = Layout(VOCAB, precision="exact")
    random = np.random.default_rng(0)
    rows = [
        (sequence, sparse_targets(full_distributions(random, len(targets)), [5] * len(targets), layout))
        for sequence, targets in random_rows(12, layout)
    ]
    written = write_cache(tmp_path_factory.mktemp("exact"), rows, layout, row_group_bytes=1000)
    assert len(written._row_groups) > 2
    return written


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[DecodedRows]]:
    """Every row group that was decoded, those that are gone included."""
    references = []
    read_row_group = ShardReader.read_row_group

    def watched(self: ShardReader, index: int) -> DecodedRows:
        rows = read_row_group(self, index)
        references.append(weakref.ref(rows))
        return rows

    monkeypatch.setattr(ShardReader, "read_row_group", watched)
    return references


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


@pytest.mark.slow
def test_a_shuffle_is_a_permutation_that_the_seed_decides(long_cache: LogitCache) -> None:
    first, again = (row_ids(long_cache.iter_sequences(shuffle=True, seed=3)) for _ in range(2))
    assert first == again
    assert sorted(first) == sorted(row_ids(long_cache))
    assert first != row_ids(long_cache)
    assert first != row_ids(long_cache.iter_sequences(shuffle=True, seed=4))


@pytest.mark.slow
def test_a_shuffle_begins_anywhere_in_the_cache(long_cache: LogitCache) -> None:
    order = {row_id: number for number, row_id in enumerate(row_ids(long_cache))}
    first = [order[row.row_id] for row, _ in zip(long_cache.iter_sequences(shuffle=True), range(16), strict=False)]
    assert min(first) < 30 and max(first) > 90


def test_a_shuffle_mixes_rows_of_different_row_groups(cache: LogitCache) -> None:
    order = {row_id: number for number, row_id in enumerate(row_ids(cache))}
    shuffled = [order[row_id] for row_id in row_ids(cache.iter_sequences(shuffle=True))]
    assert sum(abs(a - b) == 1 for a, b in pairwise(shuffled)) < 8


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_a_stream_beyond_its_end_is_empty_and_none_begins_before_its_beginning(cache: LogitCache) -> None:
    assert list(cache.iter_sequences(start=len(cache) + 5)) == []
    with pytest.raises(UserError, match="start=-1: 0 or more rows can be left out"):
        cache.iter_sequences(start=-1)


@pytest.mark.slow
def test_a_long_shuffled_stream_continues_in_every_window(long_cache: LogitCache) -> None:
    whole = row_ids(long_cache.iter_sequences(True, 1))
    for start in range(0, 121, 5):
        assert row_ids(long_cache.iter_sequences(True, 1, start=start)) == whole[start:]


def test_two_streams_of_one_cache_do_not_disturb_each_other(cache: LogitCache) -> None:
    pairs = list(zip(cache.iter_sequences(True, 1), cache.iter_sequences(True, 2), strict=True))
    assert [a.row_id for a, _ in pairs] == row_ids(cache.iter_sequences(True, 1))
    assert [b.row_id for _, b in pairs] == row_ids(cache.iter_sequences(True, 2))


@pytest.mark.slow
def test_many_streams_of_one_cache_run_in_many_threads(long_cache: LogitCache) -> None:
    def read(seed: int) -> list[str]:
        return row_ids(long_cache.iter_sequences(shuffle=seed > 0, seed=seed))

    expected = [read(seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(read, range(8))) == expected


@pytest.mark.slow
def test_a_stream_begun_here_continues_in_a_forked_process(long_cache: LogitCache) -> None:
    stream = long_cache.iter_sequences(True, 1)
    head = [next(stream).row_id for _ in range(30)]
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    child = context.Process(target=lambda: answers.put(row_ids(stream)))
    child.start()
    assert head + answers.get() == row_ids(long_cache.iter_sequences(True, 1))
    child.join(60)
    assert child.exitcode == 0


@pytest.mark.slow
@pytest.mark.parametrize(("shuffle", "held"), [(False, 1), (True, SHUFFLE_ROW_GROUPS)])
def test_a_stream_holds_its_window_and_what_is_read_ahead(
    long_cache: LogitCache, decoded: list[weakref.ref[DecodedRows]], shuffle: bool, held: int
) -> None:
    alive = [
        sum(reference() is not None for reference in decoded.copy()) for _ in long_cache.iter_sequences(shuffle=shuffle)
    ]
    assert max(alive) <= held + AHEAD
    assert max(alive) > held


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_stream_that_is_dropped_frees_what_it_held(
    long_cache: LogitCache, decoded: list[weakref.ref[DecodedRows]], shuffle: bool
) -> None:
    stream = long_cache.iter_sequences(shuffle=shuffle)
    for _ in range(20):
        next(stream)
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]
    assert threads
    del stream
    for thread in threads:
        thread.join(60)
    assert decoded and all(reference() is None for reference in decoded)


@pytest.mark.parametrize("shuffle", [False, True])
def test_continuing_reads_nothing_of_what_was_handed_out_before(
    long_cache: LogitCache, decoded: list[weakref.ref[DecodedRows]], shuffle: bool
) -> None:
    stream = long_cache.iter_sequences(shuffle, start=110)
    assert decoded == []
    assert len(row_ids(stream)) == len(decoded) == 10


def test_row_groups_come_whole_and_in_order(cache: LogitCache) -> None:
    groups = list(cache.iter_row_groups())
    assert [len(group) for group in groups] == cache._row_groups[:, 3].tolist()
    assert row_ids(chain(*groups)) == list(chain(*(group.row_ids for group in groups))) == row_ids(cache)
    for group in groups:
        assert len(group.input_ids) == len(group.loss_mask) == group.token_offsets[-1]
        assert len(group.targets) == group.offsets[-1]
        for number, row in enumerate(group):
            tokens = slice(group.token_offsets[number], group.token_offsets[number + 1])
            np.testing.assert_array_equal(group.input_ids[tokens], row.input_ids)
            np.testing.assert_array_equal(group.loss_mask[tokens], row.loss_mask)
            stored = group.targets[int(group.offsets[number]) : int(group.offsets[number + 1])]
            np.testing.assert_array_equal(stored.tail_logprob, row.targets.tail_logprob)
            np.testing.assert_array_equal(stored.token_ids[:, : row.targets.token_ids.shape[1]], row.targets.token_ids)


def test_ranks_share_the_row_groups(cache: LogitCache) -> None:
    parts = [list(chain(*(row_ids(group) for group in cache.iter_row_groups(True, 3, (rank, 3))))) for rank in range(3)]
    assert sorted(chain(*parts)) == sorted(row_ids(cache))
    assert list(chain(*parts)) != row_ids(cache)
    with pytest.raises(UserError, match="the rank must lie in"):
        cache.iter_row_groups(shard=(3, 3))


def test_targets_of_an_exact_cache_are_arrows_own_memory_and_rows_are_views_of_it(exact_cache: LogitCache) -> None:
    (info,) = exact_cache.manifest.shards
    table = pq.ParquetFile(f"{exact_cache.path}/{info.name}").read_row_group(0)
    group = DecodedRows(table, exact_cache.manifest.layout)
    for name in ("token_ids", "logprobs", "tail_logprob"):
        values = getattr(group.targets, name)
        assert np.shares_memory(values, table[name].chunk(0).values.to_numpy())
        for row in group:
            assert np.shares_memory(getattr(row.targets, name), values)
    input_ids = table["input_ids"].chunk(0).values.to_numpy()
    assert all(np.shares_memory(row.input_ids, input_ids) for row in group)


def test_tensors_share_the_memory_of_the_arrays(cache: LogitCache, exact_cache: LogitCache) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for targets in (cache[3].targets, exact_cache[3].targets):
            tensors = targets.to_torch()
            tempered = tensors.pop("tempered_tail")
            assert tempered.keys() == targets.tempered_tail.keys()
            for values, array in [
                *((tensors[name], getattr(targets, name)) for name in tensors),
                *((tempered[T], targets.tempered_tail[T]) for T in tempered),
            ]:
                assert torch.equal(values, torch.tensor(array))
                assert values.dtype == {"i": torch.int32, "f": torch.float32}[array.dtype.kind]
                assert values.data_ptr() == array.__array_interface__["data"][0]
    assert "group_logprobs" in cache[0].targets.to_torch()
    assert "group_logprobs" not in exact_cache[0].targets.to_torch()


def test_tensors_outlive_the_row_and_its_row_group(
    exact_cache: LogitCache, decoded: list[weakref.ref[DecodedRows]]
) -> None:
    group = next(exact_cache.iter_row_groups())
    expected = group.targets.logprobs.copy()
    logprobs = group.targets.to_torch()["logprobs"]
    del group
    ballast = [np.ones(expected.size, dtype=np.float32) for _ in range(100)]
    assert logprobs.numpy().tolist() == expected.tolist() != ballast[0].tolist()


def test_tensors_go_to_the_device_that_is_asked_for(exact_cache: LogitCache) -> None:
    tensors = exact_cache[0].targets.to_torch("meta")
    assert {values.device.type for name, values in tensors.items() if name != "tempered_tail"} == {"meta"}


@pytest.mark.gpu
def test_tensors_on_a_device_hold_what_the_cache_holds(cache: LogitCache, exact_cache: LogitCache) -> None:
    """A copy to CUDA does not wait, and what it copies from is gone at once."""
    found = [(row.targets, row.targets.to_torch(DEVICE)) for _ in range(20) for row in (*cache, *exact_cache)]
    for targets, tensors in found:
        expected = targets.to_torch()
        copied = [*tensors.pop("tempered_tail").items(), *tensors.items()]
        assert dict(copied).keys() == {**expected.pop("tempered_tail"), **expected}.keys()
        for name, tensor in copied:
            assert tensor.device.type == DEVICE
            original = targets.tempered_tail[name] if isinstance(name, float) else getattr(targets, name)
            assert np.array_equal(tensor.cpu().numpy(), original)


@pytest.mark.slow
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


def test_a_cache_opens_where_folders_are_not_listed(cache: LogitCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Folder, name: str = "") -> list[str]:
        raise PermissionError(f"403 {name}")

    monkeypatch.setattr(Folder, "names", refuse)
    assert row_ids(logitcache.open(cache.path)) == row_ids(cache)


def test_tail_groups_are_read_from_their_file(tmp_path: Path) -> None:
    read = write_cache(tmp_path, ROWS, EVERYTHING).tail_groups
    assert read is not None
    assert read.dtype == np.int32
    assert read.tolist() == [0, 1, *[2] * (VOCAB - 2)]


def test_tail_groups_that_are_missing_or_not_the_manifests_are_refused(tmp_path: Path) -> None:
    cache = write_cache(tmp_path, ROWS, EVERYTHING)
    write_tail_groups(Folder(tmp_path), tail_groups(EVERYTHING)[::-1])
    with pytest.raises(UserError, match=r"tail_groups\.parquet was altered: its SHA-256"):
        _ = cache.tail_groups
    (tmp_path / TAIL_GROUPS_NAME).unlink()
    with pytest.raises(UserError, match=r"tail_groups\.parquet is missing"):
        _ = cache.tail_groups


def test_a_cache_without_tail_groups_has_none(long_cache: LogitCache) -> None:
    assert long_cache.tail_groups is None


@pytest.mark.slow
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

"""One cache or several as a run's data: shares, order, any place in it, lengths, and what does not belong together."""

from __future__ import annotations

import pickle
from collections import Counter
from fractions import Fraction
from itertools import islice
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logitcache import LogitCache, UserError
from logitcache.format import shards
from logitcache.format.codec import DecodedRows
from logitcache.format.tail_parts import TailParts
from logitcache.reading.shard_reader import ShardReader
from tests.helpers.cachemaking import VOCAB, random_sequences, tokenizer, write_cache
from trainer.data import mixture
from trainer.data.averaging import shared_rows
from trainer.data.mixture import RepeatedCache, SmoothOrder, apportioned
from trainer.data.training_data import TrainingData, open_training_data

few = settings(max_examples=15, deadline=None, database=None)
any_order = settings(max_examples=100, deadline=None, database=None)
COUNTS = st.lists(st.integers(0, 40), min_size=1, max_size=4)


def several_row_groups(path: Path, count: int, seed: int) -> LogitCache:
    with patch.object(shards, "ROW_GROUP_BYTES", 1200):
        cache = write_cache(path, random_sequences(count, seed=seed), k=4)
    assert len(cache.manifest.shards[0].row_group_sizes) > 2
    return cache


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> tuple[LogitCache, ...]:
    """40, 23 and 12 rows."""
    return tuple(
        several_row_groups(tmp_path_factory.mktemp("mixed"), count, seed)
        for count, seed in ((40, 11), (23, 12), (12, 13))
    )


@pytest.fixture(scope="module")
def plain(caches: tuple[LogitCache, ...]) -> TrainingData:
    return open_training_data([cache.path for cache in caches])


@pytest.fixture(scope="module")
def weighted(caches: tuple[LogitCache, ...]) -> TrainingData:
    """Of 75 rows 15, 22 (or 23) and 37 (or 38)."""
    return open_training_data([f"{cache.path}:{weight}" for cache, weight in zip(caches, (2, 3, 5), strict=True)])


@pytest.fixture(params=["plain", "weighted"])
def data(request: pytest.FixtureRequest) -> TrainingData:
    chosen: TrainingData = request.getfixturevalue(request.param)
    return chosen


def ids(data: TrainingData, epoch: int = 0, shard: tuple[int, int] = (0, 1), start: int = 0) -> list[str]:
    return [row.row_id for row in data.stream(epoch, shuffle=True, seed=3, shard=shard, start=start)]


def kinds(rows: list[str], caches: tuple[LogitCache, ...]) -> np.ndarray:
    """The cache of each row."""
    cache_of = {row.row_id: number for number, cache in enumerate(caches) for row in cache}
    return np.array([cache_of[row] for row in rows])


# The order of an epoch


@pytest.mark.slow
@pytest.mark.parametrize("shuffle", [False, True])
def test_one_cache_streams_as_it_does_alone(caches: tuple[LogitCache, ...], shuffle: bool) -> None:
    data = TrainingData.of(caches[0])
    seed = int(np.random.SeedSequence([7, 2]).generate_state(1)[0])
    alone = [row.row_id for row in caches[0].iter_sequences(shuffle, seed, (1, 3), start=4)]
    stream = data.stream(2, shuffle=shuffle, seed=7, shard=(1, 3), start=4)
    assert (stream.position, len(stream)) == (4, len(alone) + 4)
    assert [row.row_id for row in stream] == alone
    assert stream.position == len(alone) + 4


@pytest.mark.slow
def test_without_weights_every_row_comes_once_an_epoch_and_epochs_differ(
    plain: TrainingData, caches: tuple[LogitCache, ...]
) -> None:
    every_row = sorted(row.row_id for cache in caches for row in cache)
    first, second = ids(plain, epoch=0), ids(plain, epoch=1)
    assert sorted(first) == sorted(second) == every_row
    assert first != second
    assert len(plain) == plain.num_rows() == 75


@pytest.mark.slow
def test_without_a_shuffle_each_cache_comes_in_its_own_order(
    plain: TrainingData, caches: tuple[LogitCache, ...]
) -> None:
    rows = [row.row_id for row in plain.stream(5, shuffle=False, seed=0)]
    for number, cache in enumerate(caches):
        own = [row for row, kind in zip(rows, kinds(rows, caches), strict=True) if kind == number]
        assert own == [row.row_id for row in cache]


@pytest.mark.slow
@given(epoch=st.integers(0, 4), world=st.integers(1, 5))
@few
def test_without_weights_ranks_divide_the_rows_of_an_epoch(plain: TrainingData, epoch: int, world: int) -> None:
    parts = [ids(plain, epoch, (rank, world)) for rank in range(world)]
    assert sorted(row for part in parts for row in part) == sorted(ids(plain))
    assert [plain.num_rows((rank, world)) for rank in range(world)] == [len(part) for part in parts]
    assert max(map(len, parts)) - min(map(len, parts)) <= len(plain.caches)


@pytest.mark.parametrize("world", [1, 2])
def test_weights_are_shares_of_a_ranks_rows(weighted: TrainingData, caches: tuple[LogitCache, ...], world: int) -> None:
    for rank in range(world):
        rows = kinds(ids(weighted, 0, (rank, world)), caches)
        assert len(rows) == weighted.num_rows((rank, world))
        for number, share in enumerate((0.2, 0.3, 0.5)):
            assert abs((rows == number).sum() - share * len(rows)) < 1


def test_with_weights_every_row_comes_before_one_comes_again(
    weighted: TrainingData, caches: tuple[LogitCache, ...]
) -> None:
    rows = [row for epoch in range(6) for row in ids(weighted, epoch)]
    cache_of = kinds(rows, caches)
    for number, cache in enumerate(caches):
        own = [row for row, kind in zip(rows, cache_of, strict=True) if kind == number]
        passes = [own[start : start + len(cache)] for start in range(0, len(own), len(cache))]
        assert len(passes) > 2
        assert all(len(set(one)) == len(one) for one in passes)
        assert passes[0] != passes[1]


def test_over_ranks_every_row_comes_about_equally_often(weighted: TrainingData) -> None:
    seen = Counter(row for epoch in range(3) for rank in range(3) for row in ids(weighted, epoch, (rank, 3)))
    for cache in weighted.caches:
        times = [seen[row.row_id] for row in cache]
        assert max(times) - min(times) <= 2


def test_any_stretch_of_rows_has_the_shares(weighted: TrainingData, caches: tuple[LogitCache, ...]) -> None:
    rows = kinds([row for epoch in range(3) for row in ids(weighted, epoch)], caches)
    for number, share in enumerate((0.2, 0.3, 0.5)):
        beyond = np.cumsum((rows == number) - share)
        assert np.ptp(np.append(0, beyond)) <= 2.5


@pytest.mark.slow
@given(epoch=st.integers(0, 5), start=st.integers(0, 80), world=st.integers(1, 3), data_=st.data())
@few
def test_any_start_is_as_if_the_rows_before_were_skipped(
    plain: TrainingData, weighted: TrainingData, epoch: int, start: int, world: int, data_: st.DataObject
) -> None:
    shard = (data_.draw(st.integers(0, world - 1)), world)
    for data in (plain, weighted):
        assert ids(data, epoch, shard, start) == ids(data, epoch, shard)[start:]


@pytest.mark.slow
@given(epoch=st.integers(0, 5), shuffle=st.booleans(), seed=st.integers(0, 9), world=st.integers(1, 3), data_=st.data())
@few
def test_lengths_are_those_of_the_streams_rows(
    plain: TrainingData, weighted: TrainingData, epoch: int, shuffle: bool, seed: int, world: int, data_: st.DataObject
) -> None:
    shard = (data_.draw(st.integers(0, world - 1)), world)
    for data in (plain, weighted):
        lengths = data.lengths(epoch, shuffle=shuffle, seed=seed, shard=shard)
        assert lengths.dtype == np.int32
        stream = data.stream(epoch, shuffle=shuffle, seed=seed, shard=shard)
        assert lengths.tolist() == [len(row.input_ids) for row in stream]


@pytest.mark.slow
def test_a_rank_without_rows_streams_none(plain: TrainingData, weighted: TrainingData) -> None:
    for data in (plain, weighted):
        ranks = [data.num_rows((rank, 200)) for rank in range(200)]
        assert (sum(ranks), min(ranks)) == (75, 0)
        empty = ranks.index(0)
        assert ids(data, 1, (empty, 200)) == []
        assert len(data.lengths(1, shuffle=True, seed=0, shard=(empty, 200))) == 0
        for rank in range(200):
            assert len(ids(data, 3, (rank, 200))) == ranks[rank]


def test_a_start_reads_no_row_before_it(plain: TrainingData, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    read_row_group = ShardReader.read_row_group

    def watched(self: ShardReader, index: int) -> DecodedRows:
        decoded.append(index)
        return read_row_group(self, index)

    monkeypatch.setattr(ShardReader, "read_row_group", watched)
    assert len(list(plain.stream(0, shuffle=False, seed=0, start=72))) == 3
    assert len(decoded) <= 6
    decoded.clear()
    assert list(plain.stream(0, shuffle=False, seed=0, start=75)) == []
    assert decoded == []


def test_worker_processes_that_are_not_forked_read_the_same(data: TrainingData) -> None:
    assert ids(pickle.loads(pickle.dumps(data)), 2) == ids(data, 2)


@pytest.mark.slow
def test_a_small_cache_of_a_great_weight_is_read_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small, large = (
        write_cache(tmp_path / name, random_sequences(n, seed=n)) for name, n in (("small", 5), ("large", 300))
    )
    data = open_training_data([f"{small.path}:0.9", f"{large.path}:0.1"])
    decoded = []
    read_row_group = ShardReader.read_row_group

    def watched(self: ShardReader, index: int) -> DecodedRows:
        decoded.append(index)
        return read_row_group(self, index)

    monkeypatch.setattr(ShardReader, "read_row_group", watched)
    rows = ids(data)
    assert len(decoded) == 2
    own = [row for row in rows if row in {row.row_id for row in small}]
    passes = [own[start : start + 5] for start in range(0, len(own) - 4, 5)]
    assert len(passes) == 55
    assert all(len(set(one)) == 5 for one in passes)
    assert len({tuple(one) for one in passes}) > 20
    for start in (3, 77, 304):
        assert ids(data, start=start) == rows[start:]
    lengths = data.lengths(0, shuffle=True, seed=3)
    assert lengths.tolist() == [len(row.input_ids) for row in data.stream(0, shuffle=True, seed=3)]


@pytest.mark.parametrize("shuffle", [False, True])
def test_ranks_divide_each_pass_over_a_small_cache(tmp_path: Path, shuffle: bool) -> None:
    cache = write_cache(tmp_path, random_sequences(11, seed=4))
    for first_pass in (0, 3):
        parts = []
        for rank in range(3):
            draws = RepeatedCache(cache, 1, shuffle, 5, (rank, 3), weighted=True)
            size = 11 * (rank + 1) // 3 - 11 * rank // 3
            numbers = draws.row_numbers(first_pass * size, size).tolist()
            assert [row.row_id for row in islice(draws.rows(first_pass * size), size)] == [
                cache[number].row_id for number in numbers
            ]
            parts += numbers
        assert sorted(parts) == list(range(11))


# SmoothOrder and apportioned, against exact fractions


def slow_order(counts: list[int]) -> list[int]:
    phases = [Fraction(2 * cache + 1, 2 * len(counts)) for cache in range(len(counts))]
    places = [((j + phases[c]) / n, c) for c, n in enumerate(counts) for j in range(n)]
    return [cache for _, cache in sorted(places)]


@pytest.mark.slow
@given(counts=COUNTS, data_=st.data())
@any_order
def test_the_order_is_by_place_and_known_from_any_row(counts: list[int], data_: st.DataObject) -> None:
    start = data_.draw(st.integers(0, sum(counts)))
    with patch.object(mixture, "ROWS_PER_BLOCK", 7):
        order = SmoothOrder(np.array(counts))
        found = np.concatenate([np.empty(0, int), *order.blocks(start)]).tolist()
        before = order.before(start).tolist()
    assert found == slow_order(counts)[start:]
    assert before == [slow_order(counts)[:start].count(cache) for cache in range(len(counts))]


@given(counts=st.lists(st.integers(1, 400), min_size=2, max_size=5))
@any_order
def test_the_order_is_smooth(counts: list[int]) -> None:
    order = np.concatenate(list(SmoothOrder(np.array(counts)).blocks()))
    for cache, count in enumerate(counts):
        share = count / sum(counts)
        beyond = np.abs(np.cumsum((order == cache) - share))
        bound = 0.75 if len(counts) == 2 else (1 - share) + share * (len(counts) - 1)
        assert beyond.max() <= bound + 1e-6


@given(weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=6), rows=st.integers(0, 500))
@any_order
def test_shares_become_whole_rows_that_sum_up(weights: list[float], rows: int) -> None:
    shares = np.array(weights) / sum(weights)
    counts = apportioned(shares, rows)
    assert counts.sum() == rows
    assert (np.abs(counts - shares * rows) < 1).all()


def test_the_largest_remainders_are_rounded_up() -> None:
    assert apportioned(np.array([0.47, 0.28, 0.25]), 10).tolist() == [5, 3, 2]
    assert apportioned(np.array([0.5, 0.5]), 3).tolist() == [2, 1]


# What a run is told of its data


@pytest.mark.slow
def test_a_mixture_says_what_an_epoch_is(weighted: TrainingData, caches: tuple[LogitCache, ...]) -> None:
    assert weighted.path == " + ".join(
        f"{cache.path}:{weight}" for cache, weight in zip(caches, (2, 3, 5), strict=True)
    )
    assert weighted.vocab_size == VOCAB
    assert weighted.longest == max(len(row.input_ids) for cache in caches for row in cache)
    seen = sum(len(row.positions) for epoch in range(12) for row in weighted.stream(epoch, shuffle=True, seed=0)) / 12
    assert weighted.num_positions == pytest.approx(seen, rel=0.03)


def test_without_weights_the_positions_are_those_of_all_caches(
    plain: TrainingData, caches: tuple[LogitCache, ...]
) -> None:
    assert plain.num_positions == sum(cache.num_positions for cache in caches)
    assert plain.path == " + ".join(cache.path for cache in caches)


def test_one_cache_offers_all_that_it_holds(cache: LogitCache, rich_cache: LogitCache) -> None:
    data = TrainingData.of(cache)
    assert TrainingData.of(data) is data
    assert data.tail_parts == TailParts(temperatures=(2.0,), groups=5)
    assert data.tail_groups is not None and np.array_equal(data.tail_groups, np.arange(VOCAB) % 5)
    assert TrainingData.of(rich_cache).tail_parts == TailParts(entropy=True, samples=4)


def test_a_mixture_offers_what_all_caches_hold(tmp_path: Path) -> None:
    def made(name: str, seed: int, groups: np.ndarray, temperatures: tuple[float, ...], samples: int) -> str:
        return write_cache(
            tmp_path / name,
            random_sequences(4, seed=seed),
            groups=groups,
            temperatures=temperatures,
            num_tail_samples=samples,
            tail_entropy=True,
        ).path

    by_five, by_four = np.arange(VOCAB) % 5, np.arange(VOCAB) % 4
    first = made("first", 1, by_five, (0.5, 2.0), 3)
    same = made("same", 2, by_five, (4.0, 2.0), 3)
    other = made("other", 3, by_four, (), 2)
    assert open_training_data([first, same]).tail_parts == TailParts(5, (2.0,), True, 3)
    assert open_training_data([first, same, other]).tail_parts == TailParts(entropy=True)
    assert open_training_data([first, other]).tail_groups is None


def test_rows_of_an_evaluation_cache_that_are_trained_on_are_counted(
    plain: TrainingData, heldout: LogitCache, tmp_path: Path
) -> None:
    assert shared_rows(plain.caches, heldout) == 0
    of_both = [*random_sequences(23, seed=12)[5:8], *random_sequences(12, seed=13)[:1], *random_sequences(3, seed=99)]
    assert shared_rows(plain.caches, write_cache(tmp_path, [*of_both, of_both[0]])) == 5


# What is refused


def test_weights_on_some_caches_only_are_refused(caches: tuple[LogitCache, ...]) -> None:
    with pytest.raises(
        UserError, match=rf"--cache {caches[0].path}:2 has a weight and --cache {caches[1].path} has none"
    ):
        open_training_data([f"{caches[0].path}:2", caches[1].path])


@pytest.mark.parametrize(
    "weight", ["0", "-1", "0.0", "1e999", "nan", "-nan", "inf", "Infinity", "0.7,", "0,7", ",7", "70%", "1;", "-inf"]
)
def test_weights_that_are_not_above_zero_are_refused(caches: tuple[LogitCache, ...], weight: str) -> None:
    with pytest.raises(UserError, match=rf"the weight is {weight}, accepted are numbers above 0"):
        open_training_data([f"{caches[0].path}:{weight}"])


def test_what_is_no_weight_belongs_to_the_path(caches: tuple[LogitCache, ...]) -> None:
    for text in ("nano", "7b", "inform", "v1.2.3", "1,2,3"):
        with pytest.raises(UserError, match=rf"{caches[0].path}:{text}\b"):
            open_training_data([f"{caches[0].path}:{text}"])


@pytest.mark.parametrize("weight", ["0.5", "2", "nan"])
def test_teachers_to_average_have_no_weights(caches: tuple[LogitCache, ...], weight: str) -> None:
    with pytest.raises(
        UserError,
        match=rf"--average_with {caches[1].path}:{weight}: .* no weights, all count alike. Write {caches[1].path} without",
    ):
        open_training_data([caches[0].path], [f"{caches[1].path}:{weight}"])


def test_a_weight_too_small_for_one_row_is_refused(caches: tuple[LogitCache, ...]) -> None:
    with pytest.raises(UserError, match=rf"{caches[1].path}:1e-05: .* not one of the 63 rows of an epoch"):
        open_training_data([f"{caches[0].path}:1", f"{caches[1].path}:1e-5"])


def test_a_path_may_look_like_one_with_a_weight(tmp_path: Path) -> None:
    with_colon = write_cache(tmp_path / "cache:2", random_sequences(4, seed=1))
    data = open_training_data([with_colon.path])
    assert data.path == with_colon.path
    assert open_training_data([f"{with_colon.path}:.5"]).caches[0].path == with_colon.path


def test_a_cache_named_twice_is_refused(caches: tuple[LogitCache, ...], heldout: LogitCache) -> None:
    for cache, average_with in (([caches[0].path, f"{caches[0].path}/"], []), ([caches[0].path], [caches[0].path])):
        with pytest.raises(UserError, match=r"is the same cache as .*name it once"):
            open_training_data(cache, average_with)


def test_an_empty_cache_is_refused(caches: tuple[LogitCache, ...], tmp_path: Path) -> None:
    empty = write_cache(tmp_path, [])
    with pytest.raises(UserError, match=rf"{tmp_path} is an empty cache"):
        open_training_data([caches[0].path, empty.path])


def test_different_tokenizers_are_refused(caches: tuple[LogitCache, ...], tmp_path: Path) -> None:
    others = tokenizer(["<eos>", *(f"other{i}" for i in range(1, VOCAB))])
    foreign = write_cache(tmp_path, random_sequences(4, seed=1), teacher_tokenizer=others)
    with pytest.raises(
        UserError, match=rf"{caches[0].path} and {foreign.path} were made with different tokenizers \(voc"
    ):
        open_training_data([caches[0].path, foreign.path])
    with pytest.raises(UserError, match="different tokenizers"):
        open_training_data([caches[0].path], [foreign.path])

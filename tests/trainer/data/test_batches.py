"""A cache becomes batches: aligned, sharded, shuffled by epoch, resumable, whatever the worker processes."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import skip_first_batches

import trainer
from logitcache import LogitCache
from logitcache.format.layout import Layout
from logitcache.format.quantization import PRESETS
from logitcache.format.scaling import scaled_beside_tail, scaled_to_tail, scaled_within_tail
from logitcache.format.sequences import TokenSequence
from logitcache.format.shards import ShardWriter, shard_name
from logitcache.format.tail_parts import TailParts
from logitcache.format.targets import SparseTargets
from logitcache.reading.shard_reader import ShardReader
from logitcache.storage.folder import Folder
from tests.helpers.batches import equal
from tests.helpers.cachemaking import random_sequences, write_cache
from trainer.data.collator import Collator
from trainer.data.loader import BatchDataset, BatchLoader
from trainer.data.sampler import Key


def rows_of(loader: BatchLoader) -> list[tuple[int, ...]]:
    """The unpadded token ids of every sequence, in order."""
    rows = []
    for batch in loader:
        assert batch.attention_mask is not None
        rows += [
            tuple(ids[mask].tolist()) for ids, mask in zip(batch.input_ids, batch.attention_mask.bool(), strict=True)
        ]
    return rows


def test_a_batch_holds_every_stored_position_beside_its_label_and_targets(cache: LogitCache) -> None:
    sequences = [cache[i] for i in range(4)]
    batch = Collator(TailParts(groups=3, temperatures=(2.0,)))(sequences)

    width = len(batch.logits_to_keep)
    n = 0
    for i, sequence in enumerate(sequences):
        for m, position in enumerate(sequence.positions):
            row = int(batch.logit_indices[n])
            assert row // width == i
            assert int(batch.logits_to_keep[row % width]) == position
            assert int(batch.labels[n]) == sequence.input_ids[position + 1]
            assert batch.targets.token_ids[n].tolist() == sequence.targets.token_ids[m].tolist()
            np.testing.assert_allclose(batch.targets.logprobs[n], sequence.targets.logprobs[m], atol=1e-6)
            assert float(batch.targets.tail_logprob[n]) == sequence.targets.tail_logprob[m]
            assert batch.targets.group_logprobs is not None and sequence.targets.group_logprobs is not None
            np.testing.assert_allclose(batch.targets.group_logprobs[n], sequence.targets.group_logprobs[m], atol=0.2)
            assert float(batch.tempered_tail[2.0][n]) == sequence.targets.tempered_tail[2.0][m]
            n += 1
    assert n == batch.num_positions == len(batch.labels)
    assert batch.attention_mask is not None
    assert batch.attention_mask.sum(1).tolist() == [len(s.input_ids) for s in sequences]


@pytest.mark.parametrize("precision", PRESETS)
def test_entries_and_tail_of_a_batch_add_up_to_one_at_every_precision(precision: str, tmp_path: Path) -> None:
    rounded = write_cache(tmp_path, random_sequences(8, seed=0), precision=precision)
    batch = Collator()([rounded[i] for i in range(8)])
    masses = batch.targets.logprobs.double().exp().sum(1) + batch.targets.tail_logprob.double().exp()
    np.testing.assert_allclose(masses, 1, atol=1e-6)


def test_entries_are_scaled_by_one_factor_that_is_never_wild() -> None:
    masses = np.array([[0.52, 0.39], [0.3, 0.0], [1e-7, 3e-8], [0.0, 0.0]], dtype=np.float32)
    tails = np.array([0.09, 0.715, 1.0, 1.0], dtype=np.float32)
    with np.errstate(divide="ignore"):
        scaled = scaled_beside_tail(np.log(masses), np.log(tails))
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(np.exp(scaled[:2]), [[0.52, 0.39], [0.285, 0.0]], rtol=1e-6)
    np.testing.assert_allclose(np.exp(scaled[2:]), masses[2:] / 2, rtol=1e-5)


def test_the_groups_of_a_batch_add_up_to_the_tail(cache: LogitCache) -> None:
    batch = Collator(TailParts(groups=3))([cache[i] for i in range(8)])
    assert batch.targets.group_logprobs is not None
    masses = batch.targets.group_logprobs.double().exp().sum(1)
    np.testing.assert_allclose(masses, batch.targets.tail_logprob.double().exp(), rtol=1e-6)


def test_groups_are_scaled_by_one_factor_and_stay_where_they_have_no_mass() -> None:
    masses = np.array([[0.2, 0.1, 0.0], [0.0, 0.0, 0.0], [0.3, 0.0, 0.1]], dtype=np.float32)
    tails = np.array([0.15, 0.1, 0.0], dtype=np.float32)
    with np.errstate(divide="ignore"):
        scaled = scaled_to_tail(np.log(masses), np.log(tails))
    assert scaled is not None and scaled.dtype == np.float32
    np.testing.assert_allclose(np.exp(scaled), [[0.1, 0.05, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]], rtol=1e-6)


def test_samples_hold_no_more_than_the_tail_each_token_counted_once() -> None:
    masses = np.array([[0.21, 0.1, 0.21], [0.1, 0.2, 0.0], [0.3, 0.3, 0.3], [0.0, 0.0, 0.0]], np.float32)
    ids = np.array([[7, 5, 7], [1, 2, -1], [1, 2, 3], [-1, -1, -1]], np.int32)
    tails = np.array([0.3, 0.5, 0.3, 0.0], np.float32)
    with np.errstate(divide="ignore"):
        scaled = scaled_within_tail(np.log(masses), ids, np.log(tails))
    assert scaled is not None and scaled.dtype == np.float32
    np.testing.assert_allclose(np.exp(scaled[:2]), [masses[0] * (0.3 / 0.31), masses[1]], rtol=1e-6)
    np.testing.assert_allclose(np.exp(scaled[2:]), [[0.27] * 3, [0.0] * 3], rtol=1e-6)


@pytest.mark.parametrize("precision", PRESETS)
def test_samples_that_are_the_whole_tail_are_accepted_at_every_precision(precision: str, tmp_path: Path) -> None:
    layout = Layout(4, TailParts(samples=2), precision=precision)
    random = np.random.default_rng(0)
    probs = random.dirichlet([1.0, 1.0, 1.0, 1e-9], 50)
    order = np.argsort(-probs, axis=1).astype(np.int32)
    probs = np.take_along_axis(probs, order, 1)
    logprobs = np.log(np.maximum(probs, 1e-30)).astype(np.float32)
    tail = np.log(1 - probs[:, 0]).astype(np.float32)
    targets = SparseTargets(
        order[:, :1], logprobs[:, :1], tail, sample_ids=order[:, 1:3], sample_logprobs=logprobs[:, 1:3]
    )
    sequence = TokenSequence(np.zeros(51, np.int32), np.arange(51) > 0)
    with ShardWriter(Folder(tmp_path), shard_name(0, 1), layout) as writer:
        writer.write(sequence, targets)
    batch = Collator(TailParts(samples=3))(list(ShardReader(Folder(tmp_path), writer.info, layout).read_row_group(0)))
    names = ["token_ids", "logprobs", "tail_logprob", "sample_ids", "sample_logprobs"]
    held: Any = {name: getattr(batch.targets, name) for name in names}
    loss = trainer.sparse_divergence(torch.tensor(np.log(np.full((50, 4), 0.25))), tail="samples", **held)
    assert loss.isfinite().all()


def test_entropy_and_samples_of_the_tail_come_with_their_positions(rich_cache: LogitCache) -> None:
    batch = Collator(TailParts(entropy=True, samples=4))([rich_cache[0], rich_cache[1]])
    targets = [rich_cache[0].targets, rich_cache[1].targets]
    for name in ("tail_entropy", "sample_ids", "sample_logprobs"):
        np.testing.assert_array_equal(getattr(batch.targets, name), np.concatenate([getattr(t, name) for t in targets]))


def test_what_the_loss_does_not_need_stays_out_of_the_batch(cache: LogitCache, rich_cache: LogitCache) -> None:
    for row in (cache[0], rich_cache[0]):
        batch = Collator()([row])
        assert {name for name, part in vars(batch.targets).items() if part is not None} == {
            "token_ids",
            "logprobs",
            "tail_logprob",
        }
        assert batch.tempered_tail == {}


def test_positions_with_fewer_entries_are_padded(cache: LogitCache) -> None:
    wide, narrow = cache[0], cache[1]
    cut = type(narrow)(**vars(narrow) | {"targets": narrow.targets.cut_to_width(3)})
    batch = Collator()([wide, cut])
    ids, logprobs = batch.targets.token_ids[-len(cut.positions) :], batch.targets.logprobs[-len(cut.positions) :]
    assert (ids[:, 3:] == -1).all()
    assert (logprobs[:, 3:] == -np.inf).all()
    assert (ids[:, :3] >= 0).all()


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_share_the_rows_and_have_equally_many_batches(cache: LogitCache, world: int) -> None:
    loaders = [BatchLoader(cache, 3, Collator(), shuffle=True, seed=5, shard=(rank, world)) for rank in range(world)]
    batches = [list(loader) for loader in loaders]
    assert {len(b) for b in batches} == {len(loaders[0])}
    stored = [s for rank in batches for batch in rank for s in batch.labels.tolist()]
    assert len(stored) == cache.num_positions
    labels = [token for s in cache for token in s.input_ids[s.positions + 1].tolist()]
    assert sorted(stored) == sorted(labels)


def test_a_rank_whose_rows_ran_out_gets_a_batch_without_positions(cache: LogitCache) -> None:
    first, second = (list(BatchLoader(cache, 1, Collator(), shard=(rank, 2))) for rank in range(2))
    assert [len(first), len(second)] == [12, 12]
    assert first[-1].num_positions == 0
    assert first[-1].input_ids.numel() > 0
    assert first[-1].targets.token_ids.shape[0] == 0


def test_a_last_smaller_batch_can_be_dropped(cache: LogitCache) -> None:
    assert [len(b.input_ids) for b in BatchLoader(cache, 5, Collator())] == [5, 5, 5, 5, 3]
    assert [len(b.input_ids) for b in BatchLoader(cache, 5, Collator(), drop_last=True)] == [5, 5, 5, 5]


def test_the_order_follows_seed_and_epoch(cache: LogitCache) -> None:
    def order(seed: int, epoch: int) -> list[tuple[int, ...]]:
        loader = BatchLoader(cache, 4, Collator(), shuffle=True, seed=seed)
        loader.set_epoch(epoch)
        return rows_of(loader)

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 1) != order(1, 0)
    assert sorted(order(0, 0)) == sorted(order(0, 1))


def test_epochs_after_the_first_are_reached_without_a_new_loader(cache: LogitCache) -> None:
    loader = BatchLoader(cache, 4, Collator(), shuffle=True, seed=3)
    first = rows_of(loader)
    loader.set_epoch(1)
    second = rows_of(loader)
    loader.set_epoch(0)
    assert first != second
    assert rows_of(loader) == first


def test_worker_processes_change_nothing(cache: LogitCache) -> None:
    alone = list(BatchLoader(cache, 3, Collator(), shuffle=True, seed=2))
    assert equal(alone, list(BatchLoader(cache, 3, Collator(), shuffle=True, seed=2, num_workers=2)))


def test_worker_processes_continue_a_stream_that_was_begun_before_they_were_forked(cache: LogitCache) -> None:
    loader = BatchLoader(cache, 3, Collator(), shuffle=True, seed=2, num_workers=1, multiprocessing_context="fork")
    loader.dataset[Key(0, 0)]
    batches = list(skip_first_batches(loader, 1))
    assert equal(batches, list(BatchLoader(cache, 3, Collator(), shuffle=True, seed=2))[1:])


def test_skipping_batches_gives_the_rest_of_the_same_epoch(cache: LogitCache) -> None:
    loader = BatchLoader(cache, 4, Collator(), shuffle=True, seed=9)
    loader.set_epoch(2)
    assert equal(list(skip_first_batches(loader, 3)), list(loader)[3:])


def test_rows_survive_the_journey_into_a_spawned_process(cache: LogitCache) -> None:
    rows = BatchLoader(cache, 3, Collator(), shuffle=True).dataset
    expected = rows[Key(1, 4)]
    travelled: BatchDataset = pickle.loads(pickle.dumps(rows))
    assert equal(travelled[Key(1, 4)], expected)

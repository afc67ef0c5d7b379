"""A cache becomes batches: aligned, sharded, shuffled by epoch, resumable, whatever the worker processes."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from accelerate import skip_first_batches

from logitcache import LogitCache
from trainer.batches import Batch, BatchLoader, Collator, EpochRows


def rows_of(loader: BatchLoader) -> list[tuple[int, ...]]:
    """The unpadded token ids of every sequence, in order."""
    return [
        tuple(ids[mask.bool()].tolist())
        for batch in loader
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


def same(left: list[Batch], right: list[Batch]) -> bool:
    return len(left) == len(right) and all(
        a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a) for a, b in zip(left, right, strict=True)
    )


def test_a_batch_holds_every_stored_position_beside_its_label_and_targets(cache: LogitCache) -> None:
    sequences = [cache[i] for i in range(4)]
    batch = Collator(tail_groups=True, temperature=2.0)(sequences)

    width = len(batch["columns"])
    n = 0
    for i, sequence in enumerate(sequences):
        for m, position in enumerate(sequence.positions):
            row = int(batch["rows"][n])
            assert row // width == i
            assert int(batch["columns"][row % width]) == position
            assert int(batch["labels"][n]) == sequence.input_ids[position + 1]
            assert batch["token_ids"][n].tolist() == sequence.targets.token_ids[m].tolist()
            np.testing.assert_array_equal(batch["logprobs"][n], sequence.targets.logprobs[m])
            assert float(batch["tail_logprob"][n]) == sequence.targets.tail_logprob[m]
            np.testing.assert_array_equal(batch["group_logprobs"][n], sequence.targets.group_logprobs[m])
            assert float(batch["tempered_tail"][n]) == sequence.targets.tempered_tail[2.0][m]
            n += 1
    assert n == len(batch["rows"]) == len(batch["labels"])
    assert batch["attention_mask"].sum(1).tolist() == [len(s.input_ids) for s in sequences]


def test_entropy_and_samples_of_the_tail_come_with_their_positions(rich_cache: LogitCache) -> None:
    batch = Collator(tail_entropy=True, tail_samples=True)([rich_cache[0], rich_cache[1]])
    targets = [rich_cache[0].targets, rich_cache[1].targets]
    for name in ("tail_entropy", "sample_ids", "sample_logprobs"):
        np.testing.assert_array_equal(batch[name], np.concatenate([getattr(t, name) for t in targets]))


def test_what_the_loss_does_not_need_stays_out_of_the_batch(cache: LogitCache, rich_cache: LogitCache) -> None:
    assert {"group_logprobs", "tempered_tail"}.isdisjoint(Collator()([cache[0]]))
    assert {"tail_entropy", "sample_ids", "sample_logprobs"}.isdisjoint(Collator()([rich_cache[0]]))


def test_positions_with_fewer_entries_are_padded(cache: LogitCache) -> None:
    wide, narrow = cache[0], cache[1]
    cut = type(narrow)(**vars(narrow) | {"targets": narrow.targets.narrowed(3)})
    batch = Collator()([wide, cut])
    ids, logprobs = batch["token_ids"][-len(cut.positions) :], batch["logprobs"][-len(cut.positions) :]
    assert (ids[:, 3:] == -1).all()
    assert (logprobs[:, 3:] == -np.inf).all()
    assert (ids[:, :3] >= 0).all()


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_share_the_rows_and_have_equally_many_batches(cache: LogitCache, world: int) -> None:
    loaders = [BatchLoader(cache, 3, Collator(), shuffle=True, seed=5, shard=(rank, world)) for rank in range(world)]
    batches = [list(loader) for loader in loaders]
    assert {len(b) for b in batches} == {len(loaders[0])}
    stored = [s for rank in batches for batch in rank for s in batch["labels"].tolist()]
    assert len(stored) == cache.num_positions
    labels = [token for s in cache for token in s.input_ids[s.positions + 1].tolist()]
    assert sorted(stored) == sorted(labels)


def test_a_rank_whose_rows_ran_out_gets_a_batch_without_positions(cache: LogitCache) -> None:
    first, second = (list(BatchLoader(cache, 1, Collator(), shard=(rank, 2))) for rank in range(2))
    assert [len(first), len(second)] == [12, 12]
    assert len(first[-1]["rows"]) == 0
    assert first[-1]["input_ids"].numel() > 0
    assert first[-1]["token_ids"].shape[0] == 0


def test_a_last_smaller_batch_can_be_dropped(cache: LogitCache) -> None:
    assert [len(b["input_ids"]) for b in BatchLoader(cache, 5, Collator())] == [5, 5, 5, 5, 3]
    assert [len(b["input_ids"]) for b in BatchLoader(cache, 5, Collator(), drop_last=True)] == [5, 5, 5, 5]


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
    assert same(alone, list(BatchLoader(cache, 3, Collator(), shuffle=True, seed=2, num_workers=2)))


def test_skipping_batches_gives_the_rest_of_the_same_epoch(cache: LogitCache) -> None:
    loader = BatchLoader(cache, 4, Collator(), shuffle=True, seed=9)
    loader.set_epoch(2)
    assert same(list(skip_first_batches(loader, 3)), list(loader)[3:])


def test_rows_survive_the_journey_into_a_spawned_process(cache: LogitCache) -> None:
    rows = EpochRows(cache, shuffle=True, seed=0, shard=(0, 1))
    keys = [(1, 4), (1, 5)]
    expected = [row.row_id for row in rows.__getitems__(keys)]
    travelled: EpochRows = pickle.loads(pickle.dumps(rows))
    assert [row.row_id for row in travelled.__getitems__(keys)] == expected

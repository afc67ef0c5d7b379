"""Which rows make which batch, in every epoch, and how many batches a run has: equally many on all ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from torch.utils.data import Sampler

from logitcache import UserError
from trainer.data.plans import FixedPlan, ListedPlan, Plan, consecutive_plan, grouped_plan, packed_plan
from trainer.data.training_data import TrainingData

if TYPE_CHECKING:  # transformers takes seconds to import
    from trainer.config.config import DistillConfig

PLANNED_ROWS = 2**26
"""Rows of all ranks and epochs of which batches are counted before a run starts: a minute of packing."""
PLANNED_ORDERS = 512
"""Epochs of which batches are counted, over all ranks, however few rows they have: about a second."""
PACKED_LENGTH = 2048
"""Tokens of a bin, unless a sequence is longer."""


@dataclass(frozen=True)
class Batching:
    """The content of a rank's batch: `batch_size` sequences or, with `packed_length`, bins of so many tokens.

    tokens_per_batch: in place of a batch size, sequences × longest.  group_by_length: sequences of similar length.
    """

    batch_size: int = 8
    tokens_per_batch: int | None = None
    packed_length: int | None = None
    group_by_length: bool = False

    @property
    def needs_lengths(self) -> bool:
        """Whether the batches depend on the lengths of the rows, not only on their number."""
        return bool(self.tokens_per_batch or self.packed_length or self.group_by_length)

    def check(self, data: TrainingData) -> None:
        """Raises UserError for a sequence that fits into no batch."""
        for name in ("packed_length", "tokens_per_batch"):
            limit = getattr(self, name)
            if limit is not None and data.longest > limit:
                raise UserError(
                    f"--{name} {limit}: the longest sequence of {data.path} has {data.longest} tokens. Take --{name} "
                    f"{data.longest} or more, or build the cache with `logitcache build --max-length {limit}`"
                )


class Key(NamedTuple):
    """The index of a batch: its epoch and its number in the epoch."""

    epoch: int
    batch: int


class EpochBatches(Sampler[list[Key]]):
    """A rank's batches. Every rank and every epoch has equally many.

    Their number is that of the rank and epoch that need most; others halve their batches of most tokens and, without
    rows left, have batches without. With `drop_last` it is that of the rank and epoch that have fewest full batches;
    others leave out the batches at their end. If epochs exceed `PLANNED_ORDERS`, or rows × epochs `PLANNED_ROWS`, later
    epochs repeat the batches of the first. Counts are kept with the data, for every EpochBatches of them.
    """

    def __init__(
        self,
        data: TrainingData,
        batching: Batching,
        shard: tuple[int, int] = (0, 1),
        drop_last: bool = False,
        *,
        shuffle: bool = False,
        seed: int = 0,
        num_epochs: int = 1,
    ) -> None:
        """Raises UserError for a sequence that fits into no batch."""
        batching.check(data)
        self._data, self._batching, self._shard, self._drop_last = data, batching, shard, drop_last
        self._shuffle, self._seed = shuffle, seed
        self.num_epochs = num_epochs
        self._orders = max(1, min(num_epochs, PLANNED_ORDERS // shard[1], PLANNED_ROWS // max(len(data), 1)))
        self._epoch = 0
        self._latest: tuple[int, Plan] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next iteration."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[list[Key]]:
        for batch in range(len(self)):
            yield [Key(self._epoch, batch)]

    def order(self, epoch: int) -> int:
        """Return the epoch whose order of rows this epoch has."""
        return epoch % self._orders if self._batching.needs_lengths else epoch

    def plan(self, epoch: int) -> Plan:
        """Plan the rank's batches of an epoch, of rows of `data.stream(order(epoch), …)`; the last plan is kept."""
        order = self.order(epoch)
        latest = self._latest  # read once: a thread plans the next epoch while this one is read
        if latest is None or latest[0] != order:
            latest = self._latest = order, self._planned(order)
        return latest[1]

    def _planned(self, order: int) -> Plan:
        if self._batching.needs_lengths:
            return self._listed(order, self._shard).of_length(len(self))
        return FixedPlan(self._data.num_rows(self._shard), self._batching.batch_size, len(self))

    def _listed(self, order: int, shard: tuple[int, int]) -> ListedPlan:
        batching = self._batching
        lengths = self._data.lengths(order, shuffle=self._shuffle, seed=self._seed, shard=shard)
        drawn = (self._seed, order) if self._shuffle else None
        if batching.packed_length:
            return packed_plan(lengths, batching.packed_length, batching.batch_size, drawn)
        if batching.group_by_length:
            return grouped_plan(lengths, batching.batch_size, batching.tokens_per_batch, drawn)
        assert batching.tokens_per_batch
        return consecutive_plan(lengths, batching.tokens_per_batch)

    @cached_property
    def _num_batches(self) -> int:
        batch_size = self._batching.batch_size
        shards = [(rank, self._shard[1]) for rank in range(self._shard[1])]
        if self._batching.needs_lengths:
            counts = [self._count(order, shard) for order in range(self._orders) for shard in shards]
        else:
            rows = [self._data.num_rows(shard) for shard in shards]
            counts = [count // batch_size if self._drop_last else math.ceil(count / batch_size) for count in rows]
        return min(counts) if self._drop_last else max(counts)

    def _count(self, order: int, shard: tuple[int, int]) -> int:
        """Count the batches of a rank in an epoch, with `drop_last` the full ones."""
        counted = self._data.counted_batches
        key = (self._batching, self._shuffle, self._seed, order, shard)
        if key not in counted:
            counted[key] = self._num_planned(self._listed(order, shard))
        every, full = counted[key]
        return full if self._drop_last else every

    def _num_planned(self, plan: ListedPlan) -> tuple[int, int]:
        """Count the batches of a plan, and the full ones among them."""
        if self._batching.tokens_per_batch or not len(plan):
            return len(plan), len(plan)
        rows, bins = plan.rows(len(plan) - 1), plan.bins(len(plan) - 1)
        last = len(rows) if bins is None else int(bins[-1]) + 1
        return len(plan), len(plan) - (last < self._batching.batch_size)


def batching_of(config: DistillConfig, data: TrainingData) -> Batching:
    """Return the settings' content of a batch of a device."""
    return Batching(
        config.per_device_train_batch_size,
        config.tokens_per_batch,
        (config.packed_length or max(PACKED_LENGTH, data.longest)) if config.packing else None,
        config.train_sampling_strategy == "group_by_length",
    )


def is_shuffled(config: DistillConfig) -> bool:
    """Tell whether rows come in another order in every epoch."""
    return config.train_sampling_strategy != "sequential"


def data_seed(config: DistillConfig) -> int:
    """Return the seed from which the order of rows is drawn."""
    return config.seed if config.data_seed is None else config.data_seed


def num_epochs(config: DistillConfig, data: TrainingData) -> int:
    """Count the epochs of a run, the last one perhaps incomplete, as transformers' Trainer does for --max_steps.

    Under --dataloader_drop_last, planning more epochs may leave fewer batches to each, which again takes more epochs.
    """
    if config.max_steps <= 0:
        return math.ceil(config.num_train_epochs)
    epochs, needed = 0, 1
    while needed > epochs:
        epochs = needed
        steps = math.ceil(_planned(config, data, epochs) / config.gradient_accumulation_steps)
        needed = math.ceil(config.max_steps / max(steps, 1))
    return epochs


def num_batches(config: DistillConfig, data: TrainingData) -> int:
    """Count the batches of each rank in each epoch. Raises UserError if a sequence fits into no batch."""
    return _planned(config, data, num_epochs(config, data))


def _planned(config: DistillConfig, data: TrainingData, epochs: int) -> int:
    return len(
        EpochBatches(
            data,
            batching_of(config, data),
            (config.process_index, config.world_size),
            config.dataloader_drop_last,
            shuffle=is_shuffled(config),
            seed=data_seed(config),
            num_epochs=epochs,
        )
    )

"""Caches → batches of tensors: shuffled by epoch, sharded by rank, resumable at any batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from logitcache import LogitCache, UserError
from trainer.data.collator import Batch, Collator
from trainer.data.rows import EpochRows
from trainer.data.sampler import Batching, EpochBatches
from trainer.data.training_data import TrainingData


class BatchLoader(DataLoader[Batch]):
    """A DataLoader whose batches depend on data, seed, epoch and shard only, not on its worker processes.

    Rows are decoded, and batches collated, in the background in any case: without worker processes by one thread. With
    W worker processes each decodes every row of the rank and collates one batch in W.
    """

    dataset: EpochRows

    def __init__(
        self,
        data: LogitCache | TrainingData,
        batching: Batching | int,
        collator: Collator,
        *,
        shuffle: bool = False,
        seed: int = 0,
        shard: tuple[int, int] = (0, 1),
        drop_last: bool = False,
        num_epochs: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
        **options: Any,
    ) -> None:
        """batching: a number is a batch size.  shard: (rank, world).

        num_epochs: of the run; every one has as many batches as the one that needs most.  num_workers, pin_memory
        and options: of torch's DataLoader.

        Raises UserError for a sequence that fits into no batch.
        """
        data = TrainingData.of(data)
        batching = Batching(batching) if isinstance(batching, int) else batching
        batches = EpochBatches(data, batching, shard, drop_last, shuffle=shuffle, seed=seed, num_epochs=num_epochs)
        pins_ahead = pin_memory and not num_workers  # torch's loader would pin in the thread that trains
        rows = EpochRows(data, batches, collator, shuffle=shuffle, seed=seed, shard=shard, pin_memory=pins_ahead)
        super().__init__(
            rows,
            batch_sampler=batches,
            collate_fn=only,
            num_workers=num_workers,
            pin_memory=pin_memory and not pins_ahead,
            **options,
        )

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """Batches. Raises UserError as it was raised, in a worker process too: torch would put its traceback before it."""
        try:
            yield from super().__iter__()
        except UserError as error:
            raise UserError(str(error).rpartition("UserError: ")[2].strip()) from error
        finally:
            self.dataset.close()

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next iteration."""
        assert isinstance(self.batch_sampler, EpochBatches)
        self.batch_sampler.set_epoch(epoch)


def only(batches: list[Batch]) -> Batch:
    """For a DataLoader whose dataset gives whole batches."""
    [batch] = batches
    return batch

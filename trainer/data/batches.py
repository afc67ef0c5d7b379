"""LogitCache → padded batches of tensors: shuffled by epoch, sharded by rank, resumable at any batch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

import logitcache
from logitcache import CachedSequence, LogitCache, SparseTargets, UserError
from logitcache.cache import SequenceStream
from logitcache.format.scaling import scaled_beside_tail, scaled_to_tail, scaled_within_tail
from logitcache.format.targets import concatenate

Batch = dict[str, Tensor]
Key = tuple[int, int]  # epoch, row of this rank's stream in that epoch


@dataclass(frozen=True)
class Collator:
    """Makes one right-padded batch of sequences.

    With B sequences, T tokens in the longest, C columns of logits that any sequence stores, N stored positions:

    input_ids, attention_mask: int64 [B, T].  columns: int64 [C], ascending.  rows: int64 [N], ascending, into the
    logits of `columns` flattened to [B·C, V].  labels: int64 [N], the token that follows.
    token_ids: int32 [N, k].  logprobs: float32 [N, k], `scaled_beside_tail`.  tail_logprob: float32 [N].
    group_logprobs: float32 [N, G], `scaled_to_tail`, with `tail_groups`.  tempered_tail: float32 [N], where `temperature`
    is stored.  tail_entropy: float32 [N], with `tail_entropy`.  sample_ids, sample_logprobs: int32 and float32 [N, s],
    `scaled_within_tail`, with `tail_samples`.
    """

    tail_groups: bool = False
    temperature: float = 1.0
    tail_entropy: bool = False
    tail_samples: bool = False

    def __call__(self, sequences: Sequence[CachedSequence]) -> Batch:
        """The batch that the class describes."""
        lengths = np.array([len(s.input_ids) for s in sequences])
        input_ids = np.zeros((len(sequences), lengths.max()), dtype=np.int64)
        for row, sequence in enumerate(sequences):
            input_ids[row, : lengths[row]] = sequence.input_ids
        sequence_of = np.repeat(np.arange(len(sequences)), [len(s.positions) for s in sequences])  # [N]
        positions = np.concatenate([s.positions for s in sequences])  # [N]
        stored = np.zeros(input_ids.shape[1], dtype=bool)
        stored[positions] = True
        columns = np.flatnonzero(stored)
        column_of = np.cumsum(stored) - 1
        targets = concatenate([self._needed(s.targets) for s in sequences])
        arrays = {
            "input_ids": input_ids,
            "attention_mask": (np.arange(input_ids.shape[1]) < lengths[:, None]).astype(np.int64),
            "columns": columns,
            "rows": sequence_of * len(columns) + column_of[positions],
            "labels": input_ids[sequence_of, positions + 1],
            "token_ids": targets.token_ids,
            "logprobs": scaled_beside_tail(targets.logprobs, targets.tail_logprob),
            "tail_logprob": targets.tail_logprob,
            "group_logprobs": scaled_to_tail(targets.group_logprobs, targets.tail_logprob),
            "tempered_tail": targets.tempered_tail.get(self.temperature),
            "tail_entropy": targets.tail_entropy,
            "sample_ids": targets.sample_ids,
            "sample_logprobs": scaled_within_tail(targets.sample_logprobs, targets.sample_ids, targets.tail_logprob),
        }
        writable = {
            name: np.require(array, requirements=["C", "W"]) for name, array in arrays.items() if array is not None
        }
        return {name: torch.from_numpy(array) for name, array in writable.items()}

    def _needed(self, targets: SparseTargets) -> SparseTargets:
        return SparseTargets(
            targets.token_ids,
            targets.logprobs,
            targets.tail_logprob,
            group_logprobs=targets.group_logprobs if self.tail_groups else None,
            tempered_tail={T: tail for T, tail in targets.tempered_tail.items() if self.temperature == T},
            tail_entropy=targets.tail_entropy if self.tail_entropy else None,
            sample_ids=targets.sample_ids if self.tail_samples else None,
            sample_logprobs=targets.sample_logprobs if self.tail_samples else None,
        )


class EpochRows(Dataset[CachedSequence]):
    """A rank's rows in the order of each epoch. Reading forward streams; going back or to another epoch reopens.

    len: rows of the whole cache.
    """

    def __init__(self, cache: LogitCache, shuffle: bool, seed: int, shard: tuple[int, int]) -> None:
        self._cache = cache
        self._shuffle, self._seed, self._shard = shuffle, seed, shard
        self._epoch = -1
        self._stream: SequenceStream | None = None

    def __len__(self) -> int:
        return len(self._cache)

    def __getitems__(self, keys: list[Key]) -> list[CachedSequence]:
        """The rows of one batch: consecutive rows of one epoch.

        No keys give a row without its stored positions: a rank whose rows ran out still computes with the others.
        """
        if not keys:
            row = self._cache[0]
            return [replace(row, positions=row.positions[:0], targets=row.targets[:0])]
        epoch, first = keys[0]
        if self._stream is None or epoch != self._epoch or first < self._stream.position:
            seed = int(np.random.SeedSequence([self._seed, epoch]).generate_state(1)[0])
            self._stream = self._cache.iter_sequences(self._shuffle, seed, self._shard, start=first)
            self._epoch = epoch
        while self._stream.position < first:  # batches of the other worker processes
            next(self._stream)
        return [next(self._stream) for _ in keys]

    def __getstate__(self) -> dict[str, Any]:
        """For worker processes that are not forked: each opens the cache itself."""
        return self.__dict__ | {"_cache": self._cache.path, "_stream": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state | {"_cache": logitcache.open(state["_cache"])}


class EpochBatches(Sampler[list[Key]]):
    """Keys of a rank's batches. All ranks have equally many; the last batch of a rank may be smaller, or empty."""

    def __init__(self, cache: LogitCache, batch_size: int, shard: tuple[int, int], drop_last: bool) -> None:
        self._batch_size = batch_size
        self._num_rows = len(cache.iter_sequences(shard=shard))
        fewest, most = len(cache) // shard[1], math.ceil(len(cache) / shard[1])  # rows of a rank
        self._num_batches = fewest // batch_size if drop_last else math.ceil(most / batch_size)
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next iteration."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[list[Key]]:
        for first in range(0, self._num_batches * self._batch_size, self._batch_size):
            yield [(self._epoch, row) for row in range(first, min(first + self._batch_size, self._num_rows))]


class BatchLoader(DataLoader[CachedSequence]):
    """A DataLoader whose batches depend on the seed, the epoch and the shard only, not on its worker processes.

    Rows are decoded in the background in any case. With W worker processes each decodes every row of the rank and collates
    one batch in W; one is what it takes to collate, too, while an accelerator computes.
    """

    def __init__(
        self,
        cache: LogitCache,
        batch_size: int,
        collator: Collator,
        *,
        shuffle: bool = False,
        seed: int = 0,
        shard: tuple[int, int] = (0, 1),
        drop_last: bool = False,
        **options: Any,
    ) -> None:
        """shard: (rank, world).  options: of torch's DataLoader, such as num_workers and pin_memory."""
        rows = EpochRows(cache, shuffle, seed, shard)
        batches = EpochBatches(cache, batch_size, shard, drop_last)
        super().__init__(rows, batch_sampler=batches, collate_fn=collator, **options)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Batches. Raises UserError as it was raised, in a worker process too: torch would put its traceback before it."""
        try:
            yield from super().__iter__()
        except UserError as error:
            raise UserError(str(error).rpartition("UserError: ")[2].strip()) from error

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next iteration."""
        assert isinstance(self.batch_sampler, EpochBatches)
        self.batch_sampler.set_epoch(epoch)

"""Sequences → one batch of tensors: each padded, or several packed into a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from logitcache import CachedSequence, SparseTargets
from logitcache.format.scaling import scaled_beside_tail, scaled_to_tail, scaled_within_tail
from logitcache.format.targets import concatenate

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Collator:
    """Makes one right-padded batch of sequences.

    With B sequences or packed rows, T tokens in the longest, C columns of logits that any of them stores, N stored
    positions:

    num_tokens: int64 [], without padding.  input_ids: int64 [B, T].  attention_mask: int64 [B, T], without packing.
    position_ids: int64 [B, T], packed only, from 0 in every sequence and in the padding after the last: by them, and
    by the missing attention mask, transformers tells sequences apart.
    columns: int64 [C], ascending.  rows: int64 [N], ascending, into the logits of `columns` flattened to [B·C, V].
    labels: int64 [N], the token that follows.
    token_ids: int32 [N, k].  logprobs: float32 [N, k], `scaled_beside_tail`.  tail_logprob: float32 [N].
    group_logprobs: float32 [N, G], `scaled_to_tail`, with `tail_groups`.  tempered_tail_T: float32 [N], for each T of
    `temperatures`.  tail_entropy: float32 [N], with `tail_entropy`.
    sample_ids, sample_logprobs: int32 and float32 [N, s], `scaled_within_tail`, with `tail_samples`.
    """

    tail_groups: bool = False
    temperatures: tuple[float, ...] = ()
    tail_entropy: bool = False
    tail_samples: bool = False
    flat: bool = False
    """Packed rows one after the other in a single row, unpadded: all that transformers' flash attention tells apart."""

    def __call__(self, sequences: Sequence[CachedSequence], packed_rows: np.ndarray | None = None) -> Batch:
        """The batch that the class describes.

        packed_rows: of each sequence, the packed row that it goes into, int [n], ascending from 0.
        """
        if self.flat and packed_rows is not None:
            packed_rows = np.zeros_like(packed_rows)
        lengths = np.array([len(s.input_ids) for s in sequences])
        rows = np.arange(len(sequences)) if packed_rows is None else packed_rows
        begins = _begins(lengths, rows)
        input_ids = np.zeros((rows[-1] + 1, (begins + lengths).max()), dtype=np.int64)
        for row, begin, sequence in zip(rows, begins, sequences, strict=True):
            input_ids[row, begin : begin + len(sequence.input_ids)] = sequence.input_ids
        num_stored = [len(s.positions) for s in sequences]
        row_of = np.repeat(rows, num_stored)  # [N]
        positions = np.concatenate([s.positions for s in sequences]) + np.repeat(begins, num_stored)  # [N]
        stored = np.zeros(input_ids.shape[1], dtype=bool)
        stored[positions] = True
        columns = np.flatnonzero(stored)
        column_of = np.cumsum(stored) - 1
        targets = concatenate([self._needed(s.targets) for s in sequences])
        arrays = {
            "input_ids": input_ids,
            "attention_mask": _attention_mask(input_ids.shape, lengths) if packed_rows is None else None,
            "position_ids": None if packed_rows is None else _position_ids(input_ids.shape, rows, begins + lengths),
            "packed_mask": None if packed_rows is None else _packed_mask(input_ids.shape, rows, begins + lengths),
            "columns": columns,
            "rows": row_of * len(columns) + column_of[positions],
            "labels": input_ids[row_of, positions + 1],
            "token_ids": targets.token_ids,
            "logprobs": scaled_beside_tail(targets.logprobs, targets.tail_logprob),
            "tail_logprob": targets.tail_logprob,
            "group_logprobs": scaled_to_tail(targets.group_logprobs, targets.tail_logprob),
            "num_tokens": np.array(lengths.sum()),
            "tail_entropy": targets.tail_entropy,
            "sample_ids": targets.sample_ids,
            "sample_logprobs": scaled_within_tail(targets.sample_logprobs, targets.sample_ids, targets.tail_logprob),
        }
        arrays |= {f"tempered_tail_{T:g}": targets.tempered_tail[T] for T in self.temperatures}
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
            tempered_tail={T: targets.tempered_tail[T] for T in self.temperatures},
            tail_entropy=targets.tail_entropy if self.tail_entropy else None,
            sample_ids=targets.sample_ids if self.tail_samples else None,
            sample_logprobs=targets.sample_logprobs if self.tail_samples else None,
        )


def _begins(lengths: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The column where each sequence begins, int64 [n]: after those before it in its row."""
    before = np.cumsum(lengths) - lengths
    first_of_row = np.flatnonzero(np.diff(rows, prepend=-1))
    return before - before[first_of_row][rows]


def _attention_mask(shape: tuple[int, int], lengths: np.ndarray) -> np.ndarray:
    return (np.arange(shape[1]) < lengths[:, None]).astype(np.int64)


def _packed_mask(shape: tuple[int, int], rows: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """1 up to the end of the last sequence of each row."""
    return _attention_mask(shape, ends[np.flatnonzero(np.diff(rows, append=rows[-1] + 1))])


def _position_ids(shape: tuple[int, int], rows: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """0, 1, … from the start of each row and from the end of each sequence, so also in the padding after the last."""
    columns = np.arange(shape[1])
    begins = np.zeros(shape, dtype=np.int64)
    inside = ends < shape[1]
    begins[rows[inside], ends[inside]] = ends[inside]
    return columns - np.maximum.accumulate(begins, axis=1)

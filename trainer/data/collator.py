"""Sequences → one batch of tensors: each padded, or several packed into a bin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logitcache import CachedSequence
from logitcache.format.tail_basis import TailBasis as StoredBasis
from logitcache.format.tail_parts import TailParts, rescaled
from logitcache.format.targets import concatenate
from trainer.losses.targets import TailBasis, TeacherTargets


@dataclass(frozen=True)
class Batch:
    """A batch of sequences as tensors, padded on the right, and what the cache stores of the teacher.

    B is the number of sequences or, with packing, of bins that they are packed into; T the tokens of the longest; C the
    number of columns in which any of them has a stored position; N the number of stored positions.

    BatchLoader pins a batch by its method `pin_memory`, and DistillTrainer moves it by `to`.
    """

    input_ids: Tensor
    """int64 [B, T]."""
    logits_to_keep: Tensor
    """int64 [C], ascending: the columns of `input_ids` whose logits are needed."""
    logit_indices: Tensor
    """int64 [N], ascending: the place of each stored position in the logits of those columns, flattened to [B·C, V]."""
    labels: Tensor
    """int64 [N], the token that follows each stored position."""
    targets: TeacherTargets
    """The teacher at the stored positions, without its tail at other temperatures and what is of the whole cache."""
    tempered_tail: dict[float, Tensor]
    """The teacher's tail at each temperature of the collator, float32 [N]."""
    num_tokens: int
    """Tokens of the sequences, without padding."""
    attention_mask: Tensor | None = None
    """int64 [B, T], without packing."""
    position_ids: Tensor | None = None
    """int64 [B, T], with packing: from 0 in every sequence, and in the padding at the end of a bin. By them, and by the
    missing attention mask, transformers tells sequences apart."""
    packed_mask: Tensor | None = None
    """int64 [B, T], with packing: 1 for tokens, 0 for padding."""

    @property
    def num_positions(self) -> int:
        """The number of stored positions, N."""
        return len(self.labels)

    def model_inputs(self, *, keep_logits: bool = False) -> dict[str, Tensor]:
        """Return the arguments of the model's forward. keep_logits: with `logits_to_keep`, if the model takes it."""
        inputs = {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
            "logits_to_keep": self.logits_to_keep if keep_logits else None,
        }
        return {name: tensor for name, tensor in inputs.items() if tensor is not None}

    def at_stored_positions(self, output: Tensor, *, kept_logits: bool) -> Tensor:
        """Select the stored positions [N, …] of what a model gives for the batch.

        Args:
            output: hidden states or logits, [B, T, …], or [B, C, …] with `kept_logits`.
            kept_logits: whether the model was given `logits_to_keep`.
        """
        flat = (output if kept_logits else output[:, self.logits_to_keep]).flatten(0, 1)
        return flat if len(flat) == self.num_positions else flat[self.logit_indices]

    def targets_at(
        self, temperature: float, tail_groups: Tensor | None = None, tail_basis: TailBasis | None = None
    ) -> TeacherTargets:
        """Return the targets with the teacher's tail at a temperature.

        Args:
            temperature: of the loss; if the batch does not hold it, the targets have no `tempered_tail`.
            tail_groups: int64 [V], the group of each token id.
            tail_basis: the basis of the coefficients.
        """
        tempered_tail = self.tempered_tail.get(temperature)
        return replace(self.targets, tempered_tail=tempered_tail, tail_groups=tail_groups, tail_basis=tail_basis)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Return the batch with all tensors on a device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """Return the batch with all tensors in page-locked memory."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        changed: dict[str, Any] = {name: change(of) for name, of in vars(self).items() if isinstance(of, Tensor)}
        targets = self.targets.each(lambda _, tensor: change(tensor))
        tempered_tail = {T: change(tail) for T, tail in self.tempered_tail.items()}
        return replace(self, **changed, targets=targets, tempered_tail=tempered_tail)


@dataclass(frozen=True)
class Collator:
    """Makes one batch of sequences."""

    tail_parts: TailParts = field(default_factory=TailParts)
    """The parts of the teacher's tail that a batch has; the sequences hold them all."""
    flat: bool = False
    """With packing, one bin for all sequences of a batch, as transformers' flash attention needs it to tell them apart."""

    def __call__(self, sequences: Sequence[CachedSequence], bins: np.ndarray | None = None) -> Batch:
        """Collate sequences, at least one. bins: int [n], the bin of each, ascending from 0; None without packing."""
        packed = bins is not None
        if bins is None:
            bins = np.arange(len(sequences))
        elif self.flat:
            bins = np.zeros_like(bins)
        lengths = np.array([len(s.input_ids) for s in sequences])
        begins = _begins(lengths, bins)
        ends = begins + lengths
        input_ids = np.zeros((bins[-1] + 1, ends.max()), dtype=np.int64)
        for into, begin, end, sequence in zip(bins, begins, ends, sequences, strict=True):
            input_ids[into, begin:end] = sequence.input_ids
        num_stored = [len(s.positions) for s in sequences]
        bin_of = np.repeat(bins, num_stored)  # [N]
        columns = np.concatenate([s.positions for s in sequences]) + np.repeat(begins, num_stored)  # [N]
        is_kept = np.zeros(input_ids.shape[1], dtype=bool)
        is_kept[columns] = True
        kept_before = np.cumsum(is_kept) - 1
        targets = rescaled(concatenate([self.tail_parts.of(s.targets) for s in sequences]))
        teacher = {name: part for name, part in vars(targets).items() if part is not None}
        tempered_tail = teacher.pop("tempered_tail")
        tensors: dict[str, Any] = {name: _tensor(array) for name, array in teacher.items()}
        mask = _tensor(_mask(input_ids.shape, bins, ends))
        return Batch(
            input_ids=_tensor(input_ids),
            logits_to_keep=_tensor(np.flatnonzero(is_kept)),
            logit_indices=_tensor(bin_of * is_kept.sum() + kept_before[columns]),
            labels=_tensor(input_ids[bin_of, columns + 1]),
            targets=TeacherTargets(**tensors),
            tempered_tail={T: _tensor(tail) for T, tail in tempered_tail.items()},
            num_tokens=int(lengths.sum()),
            attention_mask=None if packed else mask,
            position_ids=_tensor(_position_ids(input_ids.shape, bins, ends)) if packed else None,
            packed_mask=mask if packed else None,
        )


def basis_tensors(basis: StoredBasis, device: torch.device | str) -> TailBasis:
    """Make the tensors of a cache's tail basis, float32 on a device."""
    return TailBasis(*(torch.tensor(part, device=device) for part in (basis.offset, basis.directions, basis.weights)))


def _tensor(array: np.ndarray) -> Tensor:
    """Make a tensor of an array, which is copied where it belongs to a row group's memory."""
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


def _begins(lengths: np.ndarray, bins: np.ndarray) -> np.ndarray:
    """Find the column in which each sequence begins, int64 [n]: after the sequences before it in its bin."""
    before = np.cumsum(lengths) - lengths
    first_of_bin = np.flatnonzero(np.diff(bins, prepend=-1))
    begins: np.ndarray = before - before[first_of_bin][bins]
    return begins


def _mask(shape: tuple[int, int], bins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Mark the tokens of each bin, up to the end of its last sequence, int64 [B, T]."""
    last_of_bin = np.flatnonzero(np.diff(bins, append=bins[-1] + 1))
    return (np.arange(shape[1]) < ends[last_of_bin, None]).astype(np.int64)


def _position_ids(shape: tuple[int, int], bins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Count from 0 at the begin of each bin and after each sequence, also in the padding after the last."""
    columns = np.arange(shape[1])
    begins = np.zeros(shape, dtype=np.int64)
    inside = ends < shape[1]
    begins[bins[inside], ends[inside]] = ends[inside]
    positions: np.ndarray = columns - np.maximum.accumulate(begins, axis=1)
    return positions

"""SparseTargets are the teacher's distributions at some positions, in the one in-memory shape that everything hands on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

PAD_ID = -1
"""Fills `token_ids` beyond a position's entries; `logprobs` holds −inf there."""


@dataclass(frozen=True)
class SparseTargets:
    """The stored part of the teacher's next-token distribution at M positions.

    Log-probabilities are natural logarithms at temperature 1, normalised over the teacher's full vocabulary, descending
    along an entry list. Positions may have fewer than k entries: the rest is `PAD_ID` and −inf.

    token_ids: int32 [M, k].  logprobs: float32 [M, k].  tail_logprob: float32 [M], log of the mass outside the entries.
    group_logprobs: float32 [M, G] or None, log mass of each tail group outside the entries (−inf where it has none).
    tempered_tail: {T: float32 [M]}, log Σ p^(1/T) over the tail, for each captured temperature T ≠ 1.
    tail_entropy: float32 [M] or None, Σ p log p over the tail divided by the tail mass (nats, ≤ 0).
    sample_ids, sample_logprobs: int32 / float32 [M, s] or None, ids drawn with replacement from the tail, their log p.
    tail_coefficients: float32 [M, R] or None, the logits' coefficients in the directions of the cache's tail basis.
    probe_residuals: float32 [M, P] or None, what these leave of the logits of the probe tokens (nats).
    probe_ids: int32 [M, P] or None, the probe tokens; nowhere stored, whoever decodes rows derives them (`format.probes`).
    """

    token_ids: np.ndarray
    logprobs: np.ndarray
    tail_logprob: np.ndarray
    group_logprobs: np.ndarray | None = None
    tempered_tail: Mapping[float, np.ndarray] = field(default_factory=dict)
    tail_entropy: np.ndarray | None = None
    sample_ids: np.ndarray | None = None
    sample_logprobs: np.ndarray | None = None
    tail_coefficients: np.ndarray | None = None
    probe_residuals: np.ndarray | None = None
    probe_ids: np.ndarray | None = None

    @property
    def num_positions(self) -> int:
        """M, the number of positions."""
        return len(self.token_ids)

    @property
    def num_entries(self) -> np.ndarray:
        """Entries of each position, int32 [M]."""
        counts: np.ndarray = np.count_nonzero(self.token_ids != PAD_ID, axis=1).astype(np.int32)
        return counts

    def cut_to_width(self, k: int) -> SparseTargets:
        """Returns the same targets with entry lists of width k, as a view. No position may have more than k entries."""
        return replace(self, token_ids=self.token_ids[:, :k], logprobs=self.logprobs[:, :k])

    def to_torch(self, device: Any = None) -> dict[str, Any]:
        """Returns the fields that are not None as tensors of the same dtypes and shapes, by name; `tempered_tail` as a dict.

        Args:
            device: As `torch.device` takes it, see `tensor`. On a CPU nothing is copied.
        """
        stored = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        tempered = {temperature: tensor(values, device) for temperature, values in stored.pop("tempered_tail").items()}
        return {name: tensor(values, device) for name, values in stored.items()} | {"tempered_tail": tempered}

    def __len__(self) -> int:
        return self.num_positions

    def __getitem__(self, rows: slice | np.ndarray) -> SparseTargets:
        """Returns the positions that `rows` selects, as views if numpy gives views."""
        selected: dict[str, Any] = {f.name: _select(getattr(self, f.name), rows) for f in fields(self)}
        return SparseTargets(**selected)


def concatenate(parts: Sequence[SparseTargets]) -> SparseTargets:
    """Joins targets along the positions. The widest entry list sets k; optional fields are kept that all parts have."""
    if len(parts) == 1:
        return parts[0]
    k = max(part.token_ids.shape[1] for part in parts)
    values = {f.name: [getattr(part, f.name) for part in parts] for f in fields(SparseTargets)}
    values["token_ids"] = [_widen(ids, k, PAD_ID) for ids in values["token_ids"]]
    values["logprobs"] = [_widen(logprobs, k, -np.inf) for logprobs in values["logprobs"]]
    return SparseTargets(**{name: _joined(arrays) for name, arrays in values.items()})


def find_defect(
    targets: SparseTargets, vocab_size: int, *, mass_tolerance: float | np.ndarray = 1e-4
) -> tuple[int, str] | None:
    """Finds the first position that no teacher can have produced, and the reason; None if there is no such position.

    Ids are checked (range, duplicates, padding at the end only), log-probabilities (finite, ≤ 0, descending), and that entries
    and tail add up to 1.  mass_tolerance: by how much the sum may miss 1, one number, or one of each position [M].
    """
    ids, logprobs = targets.token_ids, targets.logprobs
    is_entry = ids != PAD_ID
    probs = np.exp(logprobs, dtype=np.float64, where=is_entry, out=np.zeros(logprobs.shape))
    ordered_ids = np.sort(ids, axis=1)
    both_entries = is_entry[:, 1:] & is_entry[:, :-1]
    ascending = np.greater(
        logprobs[:, 1:], logprobs[:, :-1], where=both_entries, out=np.zeros(both_entries.shape, dtype=bool)
    )
    checks = [
        ("a token id outside the vocabulary", ((ids < PAD_ID) | (ids >= vocab_size)).any(axis=1)),
        ("the same token id twice", ((np.diff(ordered_ids, axis=1) == 0) & (ordered_ids[:, 1:] != PAD_ID)).any(axis=1)),
        ("padding that has a log-probability", (~is_entry & ~np.isneginf(logprobs)).any(axis=1)),
        ("an entry after padding", (is_entry[:, 1:] & ~is_entry[:, :-1]).any(axis=1)),
        ("a log-probability that is not finite", (is_entry & ~np.isfinite(logprobs)).any(axis=1)),
        ("a log-probability above 0", (is_entry & (logprobs > 1e-6)).any(axis=1)),
        ("log-probabilities that do not descend", ascending.any(axis=1)),
        ("a tail log-probability that is not a number", np.isnan(targets.tail_logprob)),
        (
            "entries and tail that do not sum to 1",
            np.abs(probs.sum(axis=1) + np.exp(targets.tail_logprob.astype(np.float64)) - 1) > mass_tolerance,
        ),
    ]
    found = [(int(np.argmax(wrong)), reason) for reason, wrong in checks if wrong.any()]
    return min(found, key=lambda defect: defect[0], default=None)


def _select(value: object, rows: slice | np.ndarray) -> object:
    if isinstance(value, np.ndarray):
        return value[rows]
    if isinstance(value, Mapping):
        return {key: array[rows] for key, array in value.items()}
    return value


def _joined(values: Sequence[Any]) -> Any:
    first = values[0]
    if isinstance(first, Mapping):
        return {key: np.concatenate([value[key] for value in values]) for key in first}
    return None if any(value is None for value in values) else np.concatenate(values)


def _widen(array: np.ndarray, k: int, fill: float) -> np.ndarray:
    missing = k - array.shape[1]
    return np.pad(array, ((0, 0), (0, missing)), constant_values=fill) if missing else array


class _Writable:
    """The memory of an array whose owner, here Arrow, lets nobody write; torch has no tensors that cannot be written."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array  # lives as long as what looks into it
        pointer, _ = array.__array_interface__["data"]
        self.__array_interface__ = {**array.__array_interface__, "data": (pointer, False)}


def tensor(array: np.ndarray, device: Any = None) -> torch.Tensor:
    """Returns an array as a tensor of the same dtype and shape.

    On the CPU, the default device, the tensor shares the array's memory, which belongs to a whole row group: do not write into
    it. A copy to CUDA goes through pinned memory, without waiting.
    """
    import torch

    shared = torch.from_numpy(array if array.flags.writeable else np.asarray(_Writable(array)))
    if device is None:
        return shared
    if torch.device(device).type == "cuda":
        return shared.pin_memory().to(device, non_blocking=True)
    return shared.to(device)

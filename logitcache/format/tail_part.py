"""TailPart is the interface of an optional number that a cache stores of the tail. `tail_parts` has the table of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from logitcache.format.codebook import Codebook
from logitcache.format.quantization import QuantizationSpec, rounded
from logitcache.format.targets import SparseTargets

Rounding = QuantizationSpec | None
Arrays = Mapping[str, np.ndarray]
Defects = Iterator[tuple[str, np.ndarray]]
"""Each is what may be wrong, and at which positions it is, bool [M]."""


class Column(NamedTuple):
    """A Parquet column. width: its values per stored position. meaning: for people who read the file.  level: zstd's."""

    arrow_type: pa.DataType
    width: int
    meaning: str
    level: int = 6


class Field(NamedTuple):
    """A field of SparseTargets. step: the step of QuantizationSpec that its numbers are rounded to, empty for ids."""

    name: str
    step: str
    meaning: str
    dtype: type[np.generic] = np.float32


@dataclass(frozen=True)
class Leaving:
    """Entries D that leave their positions' lists and join the tails T, of masses t; all is float64.

    targets: before that, M positions.  leaves: which entries do, bool [M, k].  logprobs: their log-probabilities, −inf for the
    others [M, k].  mass: log of their sum [M].  tail: log mass of the new tail [M].  tail_groups: group of each id, int [V];
    needed by targets with tail groups.  random: decides tail samples.
    """

    targets: SparseTargets
    leaves: np.ndarray
    logprobs: np.ndarray
    mass: np.ndarray
    tail: np.ndarray
    tail_groups: np.ndarray | None
    random: np.random.Generator | None


class TailPart(ABC):
    """A part that is stored as it is: each field one column of the same name. Others override what differs.

    name: in `TailParts`.  option: of `build` and of `--drop`, in fingerprints too.  layout_key, shape: in the JSON of a layout.
    absent: value of the part in a cache without it.  fields: what it fills.  per_position: a field is [M], not [M, width].
    file: beside the shards, what holds for all positions of the cache; empty if there is nothing.
    since: the cache format that the part came with. JSON names a part of a later one only where it is stored.
    needs: the option without which the part says nothing; empty if it stands alone.
    """

    name: str
    option: str
    layout_key: str
    shape: Any = int
    absent: Any = 0
    fields: tuple[Field, ...]
    per_position = False
    file = ""
    since = 1
    needs = ""

    @property
    def dtypes(self) -> dict[str, type[np.generic]]:
        """The fields' names and dtypes."""
        return {field.name: field.dtype for field in self.fields}

    @property
    def flag(self) -> str:
        """The option as it is typed."""
        return f"--{self.option.replace('_', '-')}"

    def width(self, value: Any) -> int:
        """Returns how many numbers a field holds of one position.  value: of the part in `TailParts`."""
        return len(value) if isinstance(value, tuple) else int(value)

    def refusals(self, value: Any, vocab_size: int) -> Iterator[str]:
        """Yields why a teacher of `vocab_size` tokens cannot give so much: one line each."""
        if value < 0:
            yield f"{self.flag} {value}: must not be negative"

    def shared(self, values: Sequence[Any]) -> Any:
        """Returns what all of several caches hold, given the value of each."""
        return values[0] if all(value == values[0] for value in values) else self.absent

    def describe(self, value: Any) -> str:
        """Says in a few words what is stored."""
        return f"{value} {self.name}"

    def columns(self, value: Any, quantization: Rounding) -> dict[str, Column]:
        """Returns the columns on disk by name."""
        return {f.name: Column(pa.from_numpy_dtype(f.dtype), self.width(value), f.meaning) for f in self.fields}

    def is_in(self, targets: SparseTargets) -> bool:
        """Tells whether the targets hold this part."""
        values = getattr(targets, self.fields[0].name)
        return bool(values) if isinstance(values, Mapping) else values is not None

    def of(self, targets: SparseTargets, value: Any) -> dict[str, Any]:
        """Returns this part's fields of targets that hold it."""
        return {field.name: getattr(targets, field.name) for field in self.fields}

    def encode(self, targets: SparseTargets, quantization: Rounding, codebook: Codebook) -> dict[str, np.ndarray]:
        """Returns the columns of M positions, [M] or [M, width] each."""
        return {f.name: to_step(getattr(targets, f.name), quantization, f.step) for f in self.fields}

    def decode(
        self, columns: Arrays, value: Any, tail_logprob: np.ndarray, quantization: Rounding, codebook: Codebook | None
    ) -> dict[str, Any]:
        """Returns the fields of encoded columns, [M, width] each."""
        return self.unpack(columns, value)

    def unpack(self, arrays: Arrays, value: Any) -> dict[str, Any]:
        """Returns the fields in the form that SparseTargets has, of arrays [M, width] by name of the field."""
        return {f.name: arrays[f.name][:, 0] if self.per_position else arrays[f.name] for f in self.fields}

    @abstractmethod
    def truncate(self, leaving: Leaving) -> dict[str, Any]:
        """Returns the fields once entries have joined the tail."""

    def rescaled(self, targets: SparseTargets) -> dict[str, Any]:
        """Returns the fields that a batch holds otherwise: masses that were rounded one by one and add up to the tail again."""
        return {}

    def defects(self, targets: SparseTargets, quantization: Rounding) -> Defects:
        """Yields what may be wrong, and at which positions it is, bool [M]: quick enough for whatever is decoded."""
        yield from ()

    def close_defects(self, targets: SparseTargets, vocab_size: int) -> Defects:
        """Yields the same of what takes longer to see."""
        yield from ()


def logsumexp(logprobs: np.ndarray) -> np.ndarray:
    """Returns the log of the sum of each row of [M, k], −inf for an empty one: [M]."""
    total: np.ndarray = np.logaddexp.reduce(logprobs, axis=1, initial=-np.inf)
    return total


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Returns exp(part − whole), 0 if both are nothing."""
    quotient: np.ndarray = np.exp(part - np.where(np.isneginf(whole), 0.0, whole))
    return quotient


def to_step(values: np.ndarray, quantization: Rounding, step: str) -> np.ndarray:
    """Returns the nearest multiples of that step of the quantization, float32; the values themselves without a step."""
    if not step:
        return values
    return rounded(values, getattr(quantization, step) if quantization else None)

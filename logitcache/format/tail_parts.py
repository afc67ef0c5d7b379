"""The optional numbers that a cache stores of the tail, beside its mass: one entry of `PARTS` each.

A part is what one option of `logitcache build` adds. It fills fields of SparseTargets, which have the same names in the wire
format, in a batch and in TeacherTargets. Capture, layout, codec, truncation, recode, merge, checks, descriptions and the
trainer's batches ask this table. A new number is thus a field of `TailParts` and of SparseTargets, a class here, the code
that computes it in `logitcache.capture.selection`, and the loss that uses it.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from logitcache.format.codebook import Codebook
from logitcache.format.probes import MOST_PROBES
from logitcache.format.quantization import rounded
from logitcache.format.scaling import scaled_beside_tail, scaled_to_tail, scaled_within_tail
from logitcache.format.tail_part import (
    Arrays,
    Column,
    Defects,
    Field,
    Leaving,
    Rounding,
    TailPart,
    logsumexp,
    ratio,
    to_step,
)
from logitcache.format.targets import PAD_ID, SparseTargets

TAIL_GROUPS_NAME = "tail_groups.parquet"
TAIL_BASIS_NAME = "tail_basis.parquet"
TEMPERED_PREFIX = "tail_log_norm_T"
GROUP_STEP_OF_FORMAT_1 = 2.0**-5
GROUP_TOLERANCE_NATS = 0.01
"""Beyond rounding, between the log of the tail and that of its groups' sum: float32 sums over a vocabulary."""


class _Groups(TailPart):
    """Mass of each group of a partition of the vocabulary."""

    name, option, layout_key = "groups", "tail_groups", "num_tail_groups"
    file = TAIL_GROUPS_NAME
    fields = (
        Field(
            "group_logprobs",
            "group_step",
            "log of the probability outside the entries, by tail group; groups in `tail_groups.parquet`",
        ),
    )

    def refusals(self, value: int, vocab_size: int) -> Iterator[str]:
        if not 0 <= value <= vocab_size:
            yield f"--tail-groups {value}: choose 0…{vocab_size}, the teacher's vocabulary"

    def columns(self, value: int, quantization: Rounding) -> dict[str, Column]:
        if quantization is None:
            return super().columns(value, quantization)
        meaning = "log of a tail group's share of the tail, by group as above; groups in `tail_groups.parquet`"
        return {"group_levels": Column(pa.int32(), value, meaning)}

    def encode(self, targets: SparseTargets, quantization: Rounding, codebook: Codebook) -> dict[str, np.ndarray]:
        """Encodes 0 for a group without mass, otherwise 1 + the zigzag code of its difference from the profile."""
        groups = targets.group_logprobs
        assert groups is not None
        if quantization is None:
            return {"group_logprobs": groups}
        tail = rounded(targets.tail_logprob, quantization.tail_step)[:, None]
        has_mass = np.isfinite(groups) & np.isfinite(tail)
        with np.errstate(invalid="ignore"):
            steps = np.where(has_mass, np.rint((groups - tail) / np.float32(quantization.group_step)), 0)
        difference = steps.astype(np.int32) - codebook.group_profile
        return {"group_levels": np.where(has_mass, 1 + ((difference << 1) ^ (difference >> 31)), 0)}

    def decode(
        self, columns: Arrays, value: int, tail_logprob: np.ndarray, quantization: Rounding, codebook: Codebook | None
    ) -> dict[str, Any]:
        if quantization is None:
            return self.unpack(columns, value)
        assert codebook is not None
        levels, profile = columns["group_levels"], codebook.group_profile
        if profile.shape != levels.shape[1:]:
            raise ValueError(f"its codebook is of {profile.size} tail groups, its layout of {levels.shape[1]}")
        code = levels - 1
        steps = ((code >> 1) ^ -(code & 1)) + profile
        logprobs = tail_logprob[:, None] + steps.astype(np.float32) * np.float32(quantization.group_step)
        logprobs[levels == 0] = -np.inf
        return {"group_logprobs": logprobs}

    def truncate(self, leaving: Leaving) -> dict[str, Any]:
        """Computes log(t + Σ_D p) of each group."""
        targets, logprobs, tail_groups = leaving.targets, leaving.logprobs, leaving.tail_groups
        assert targets.group_logprobs is not None and tail_groups is not None
        scaled = scaled_to_tail(targets.group_logprobs, targets.tail_logprob)
        changes = leaving.leaves.any(axis=1, keepdims=True)
        before: np.ndarray = np.where(changes, scaled, targets.group_logprobs)
        num_positions, num_groups = before.shape
        groups = tail_groups[np.where(targets.token_ids == PAD_ID, 0, targets.token_ids)]
        cells = (groups + num_groups * np.arange(num_positions)[:, None]).reshape(-1)
        added = np.bincount(cells, weights=np.exp(logprobs).reshape(-1), minlength=before.size)
        with np.errstate(divide="ignore"):
            joined = np.logaddexp(before, np.log(added).reshape(before.shape))
        return {"group_logprobs": joined.astype(np.float32)}

    def rescaled(self, targets: SparseTargets) -> dict[str, Any]:
        assert targets.group_logprobs is not None
        return {"group_logprobs": scaled_to_tail(targets.group_logprobs, targets.tail_logprob)}

    def defects(self, targets: SparseTargets, quantization: Rounding) -> Defects:
        assert targets.group_logprobs is not None
        mass = np.exp(targets.tail_logprob, dtype=np.float64)
        groups = np.exp(targets.group_logprobs, dtype=np.float64).sum(axis=1)
        step = quantization.group_step if quantization else GROUP_STEP_OF_FORMAT_1
        factor = np.exp(step + GROUP_TOLERANCE_NATS)  # half a step as captured, and half for entries that joined later
        fits = (groups <= mass * factor + 1e-7) & (groups >= mass / factor - 1e-7)
        yield "tail groups that do not add up to the tail", ~fits


class _Temperatures(TailPart):
    """log Σ p^(1/T) over the tail for each T, a dict by T in memory and a column for each T on disk."""

    name = option = layout_key = "temperatures"
    shape, absent = [float], ()
    fields = (Field("tempered_tail", "tail_step", "log Σ p^(1/T) over the tail, T = "),)

    def refusals(self, value: tuple[float, ...], vocab_size: int) -> Iterator[str]:
        given = f"--temperatures {', '.join(map(str, value))}"
        if not all(0 < t < math.inf for t in value):
            yield f"{given}: all must be positive and finite"
        elif len({tempered_column(t) for t in value}) < len(value):
            yield f"{given}: columns are named by six digits of them, in which all must differ"

    def shared(self, values: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
        return tuple(sorted(set.intersection(*map(set, values))))

    def describe(self, value: tuple[float, ...]) -> str:
        return f"normalisers at T = {', '.join(f'{t:g}' for t in value)}"

    def columns(self, value: tuple[float, ...], quantization: Rounding) -> dict[str, Column]:
        meaning = self.fields[0].meaning
        return {tempered_column(t): Column(pa.float32(), 1, f"{meaning}{t:g}") for t in value}

    def of(self, targets: SparseTargets, value: tuple[float, ...]) -> dict[str, Any]:
        return {"tempered_tail": {t: targets.tempered_tail[t] for t in value}}

    def encode(self, targets: SparseTargets, quantization: Rounding, codebook: Codebook) -> dict[str, np.ndarray]:
        tempered = targets.tempered_tail.items()
        return {tempered_column(t): to_step(values, quantization, "tail_step") for t, values in tempered}

    def decode(
        self,
        columns: Arrays,
        value: tuple[float, ...],
        tail_logprob: np.ndarray,
        quantization: Rounding,
        codebook: Codebook | None,
    ) -> dict[str, Any]:
        return {"tempered_tail": {t: columns[tempered_column(t)][:, 0] for t in value}}

    def unpack(self, arrays: Arrays, value: tuple[float, ...]) -> dict[str, Any]:
        return {"tempered_tail": dict(zip(value, arrays["tempered_tail"].T, strict=True))}

    def truncate(self, leaving: Leaving) -> dict[str, Any]:
        """Computes log(Σ_T p^(1/τ) + Σ_D p^(1/τ))."""
        tempered = {
            t: np.logaddexp(before, logsumexp(leaving.logprobs / t)).astype(np.float32)
            for t, before in leaving.targets.tempered_tail.items()
        }
        return {"tempered_tail": tempered}

    def defects(self, targets: SparseTargets, quantization: Rounding) -> Defects:
        for tempered in targets.tempered_tail.values():
            yield "a tempered tail that is not a number", ~(tempered < np.inf)


class _Entropy(TailPart):
    """Σ p log p over the tail, divided by its mass."""

    name, option, layout_key = "entropy", "tail_entropy", "tail_entropy"
    shape, absent = bool, False
    fields = (Field("tail_entropy", "tail_step", "Σ p log p over the tail, divided by its mass"),)
    per_position = True

    def describe(self, value: bool) -> str:
        return "entropy"

    def truncate(self, leaving: Leaving) -> dict[str, Any]:
        """Computes (t·e + Σ_D p log p) / (t + Σ_D p)."""
        targets, logprobs, tail = leaving.targets, leaving.logprobs, leaving.tail
        finite = np.where(np.isneginf(logprobs), 0.0, logprobs)
        before = ratio(targets.tail_logprob.astype(np.float64), tail) * targets.tail_entropy
        added = (ratio(logprobs, tail[:, None]) * finite).sum(axis=1)
        return {"tail_entropy": (before + added).astype(np.float32)}

    def defects(self, targets: SparseTargets, quantization: Rounding) -> Defects:
        assert targets.tail_entropy is not None
        yield "a tail entropy that is not ≤ 0", ~(targets.tail_entropy <= 1e-6)


class _Samples(TailPart):
    """Ids drawn with replacement from the tail, and their log-probabilities."""

    name, option, layout_key = "samples", "tail_samples", "num_tail_samples"
    fields = (
        Field("sample_ids", "", "ids drawn from the tail", np.int32),
        Field("sample_logprobs", "sample_step", "their log-probabilities"),
    )

    def truncate(self, leaving: Leaving) -> dict[str, Any]:
        """Keeps each sample with probability t / (t + Σ_D p), otherwise draws another from D in proportion to p."""
        targets, logprobs, random = leaving.targets, leaving.logprobs, leaving.random
        assert targets.sample_ids is not None and targets.sample_logprobs is not None and random is not None
        replaced = random.random(targets.sample_ids.shape) < ratio(leaving.mass, leaving.tail)[:, None]
        drawn = _draw(ratio(logprobs, leaving.mass[:, None]), targets.sample_ids.shape[1], random)
        rows = np.arange(len(drawn))[:, None]
        return {
            "sample_ids": np.where(replaced, targets.token_ids[rows, drawn], targets.sample_ids),
            "sample_logprobs": np.where(replaced, targets.logprobs[rows, drawn], targets.sample_logprobs),
        }

    def rescaled(self, targets: SparseTargets) -> dict[str, Any]:
        assert targets.sample_ids is not None and targets.sample_logprobs is not None
        scaled = scaled_within_tail(targets.sample_logprobs, targets.sample_ids, targets.tail_logprob)
        return {"sample_logprobs": scaled}

    def defects(self, targets: SparseTargets, quantization: Rounding) -> Defects:
        assert targets.sample_logprobs is not None
        yield "a sampled log-probability above 0", np.any(~(targets.sample_logprobs <= 1e-6), axis=1)

    def close_defects(self, targets: SparseTargets, vocab_size: int) -> Defects:
        ids = targets.sample_ids
        assert ids is not None
        yield "a sampled id outside the vocabulary", np.any((ids < PAD_ID) | (ids >= vocab_size), axis=1)
        entries = [((column[:, None] == targets.token_ids) & (column >= 0)[:, None]).any(axis=1) for column in ids.T]
        yield "a sampled id that is an entry", np.any(entries, axis=0)


class _Integers(TailPart):
    """A field of the whole vocabulary's logits, stored in zigzag code as small integers, and in an exact cache as it is.

    Zstd finds repetitions in them that cost more to describe than they save: its lowest level, which looks for few, gives the
    fewest bytes but for levels 18 and above, which take thirty times as long.  counts: what the integers count, for people who
    read the file.
    """

    since = 3
    stored_type: pa.DataType
    counts: str

    def columns(self, value: int, quantization: Rounding) -> dict[str, Column]:
        if quantization is None:
            return super().columns(value, quantization)
        return {f.name: Column(self.stored_type, value, f"{f.meaning}, {self.counts}", level=1) for f in self.fields}

    def encode(self, targets: SparseTargets, quantization: Rounding, codebook: Codebook) -> dict[str, np.ndarray]:
        name, step, *_ = self.fields[0]
        values = getattr(targets, name)
        if quantization is None:
            return {name: values}
        counted, unsigned = getattr(quantization, step), np.dtype(self.stored_type.to_pandas_dtype())
        assert counted, "Layout.with_coefficient_step comes first"
        most, bits = np.iinfo(unsigned).max >> 1, 8 * unsigned.itemsize
        steps = np.rint(values / np.float32(counted)).clip(-most, most).astype(f"i{unsigned.itemsize}")
        return {name: ((steps << 1) ^ (steps >> (bits - 1))).view(unsigned)}

    def decode(
        self, columns: Arrays, value: int, tail_logprob: np.ndarray, quantization: Rounding, codebook: Codebook | None
    ) -> dict[str, Any]:
        name, step, *_ = self.fields[0]
        if quantization is None:
            return self.unpack(columns, value)
        codes = columns[name]
        steps = ((codes >> 1) ^ -(codes & 1)).view(f"i{codes.itemsize}")
        return {name: np.multiply(steps, np.float32(getattr(quantization, step)), dtype=np.float32)}

    def defects(self, targets: SparseTargets, quantization: Rounding) -> Defects:
        name, step, *_ = self.fields[0]
        values = getattr(targets, name)
        if quantization is None:
            yield f"{name} that are not finite", ~np.isfinite(values).all(axis=1)
        else:
            most = (np.iinfo(self.stored_type.to_pandas_dtype()).max >> 1) * getattr(quantization, step)
            yield f"{name} below what is stored", values.min(axis=1) < -most * (1 + 1e-6)


class _LowRank(_Integers):
    """Coefficients of the logits in the first R directions of the cache's tail basis."""

    name, option, layout_key = "rank", "tail_rank", "tail_rank"
    file = TAIL_BASIS_NAME
    stored_type, counts = pa.uint16(), "zigzag code of steps that the layout has"
    fields = (Field("tail_coefficients", "coefficient_step", "coefficients of the logits in `tail_basis.parquet`"),)

    def refusals(self, value: int, vocab_size: int) -> Iterator[str]:
        if not 0 <= value < vocab_size:
            yield f"--tail-rank {value}: choose 0…{vocab_size - 1}, less than the teacher's vocabulary"

    def shared(self, values: Sequence[int]) -> int:
        """Returns how many first coefficients all of several caches hold."""
        return min(values)

    def describe(self, value: int) -> str:
        return f"rank {value}"

    def of(self, targets: SparseTargets, value: int) -> dict[str, Any]:
        assert targets.tail_coefficients is not None
        return {"tail_coefficients": targets.tail_coefficients[:, :value]}

    def truncate(self, leaving: Leaving) -> dict[str, Any]:
        return {"tail_coefficients": leaving.targets.tail_coefficients}


class _Probes(_Integers):
    """What the coefficients leave of the logits at P tokens that row and position determine."""

    name, option, layout_key, needs = "probes", "tail_probes", "tail_probes", "tail_rank"
    stored_type, counts = pa.uint8(), "zigzag code of quarters of a nat"
    fields = (Field("probe_residuals", "probe_step", "what the coefficients leave of the logits of the probe tokens"),)

    def refusals(self, value: int, vocab_size: int) -> Iterator[str]:
        if not 0 <= value <= MOST_PROBES:
            yield f"--tail-probes {value}: choose 0…{MOST_PROBES}"

    def of(self, targets: SparseTargets, value: int) -> dict[str, Any]:
        return {"probe_residuals": targets.probe_residuals, "probe_ids": targets.probe_ids}

    def truncate(self, leaving: Leaving) -> dict[str, Any]:
        return self.of(leaving.targets, 0)


PARTS: tuple[TailPart, ...] = (_Groups(), _Temperatures(), _Entropy(), _Samples(), _LowRank(), _Probes())
"""In the order of the columns."""
TAIL_FILES = tuple(part.file for part in PARTS if part.file)


@dataclass(frozen=True)
class TailParts:
    """The optional numbers that a cache stores of the tail at each position, and how many of each.

    groups: G, the number of tail groups, or 0.  temperatures: each T ≠ 1 at which the tail is stored.  entropy: whether the
    tail's entropy is.  samples: s, ids drawn from the tail, or 0.  rank: R, the coefficients of the logits in the directions
    of a basis, or 0.  probes: P, the tokens at which it is known what these leave, or 0.
    """

    groups: int = 0
    temperatures: tuple[float, ...] = ()
    entropy: bool = False
    samples: int = 0
    rank: int = 0
    probes: int = 0

    def stored(self) -> Iterator[tuple[TailPart, Any]]:
        """Yields the parts that there are, each with its value."""
        return ((part, value) for part in PARTS if (value := getattr(self, part.name)))

    @property
    def files(self) -> list[str]:
        """The files beside the shards."""
        return [part.file for part, _ in self.stored() if part.file]

    def without(self, options: Container[str]) -> TailParts:
        """Returns the parts but for those whose options are named, and those that need them."""
        left_out = [part for part in PARTS if part.option in options or part.needs in options]
        return replace(self, **{part.name: part.absent for part in left_out})

    def of(self, targets: SparseTargets) -> SparseTargets:
        """Returns the same positions with these parts alone, of targets that hold them all."""
        kept = [part.of(targets, value) for part, value in self.stored()]
        fields = {name: values for fields in kept for name, values in fields.items()}
        return SparseTargets(targets.token_ids, targets.logprobs, targets.tail_logprob, **fields)

    def to_json(self, names: Literal["option", "layout_key"]) -> dict[str, Any]:
        """Returns plain JSON types, by the parts' options, as in a fingerprint, or by their keys in a layout.

        Later parts that are not stored are left out: caches and fingerprints from before them stay as they are.
        """
        written = [part for part in PARTS if part.since == 1 or getattr(self, part.name)]
        values = {getattr(part, names): getattr(self, part.name) for part in written}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], names: Literal["option", "layout_key"]) -> TailParts:
        """Returns the parts of `to_json`; other names beside theirs do not matter. Raises KeyError for a missing one."""
        data = {getattr(part, names): part.absent for part in PARTS if part.since > 1} | dict(data)
        values = {part.name: data[getattr(part, names)] for part in PARTS}
        return cls(**values | {"temperatures": tuple(values["temperatures"])})


def shared_parts(caches: Sequence[TailParts]) -> TailParts:
    """Returns what all of several caches hold. Groups count as the same if there are equally many."""
    return TailParts(**{part.name: part.shared([getattr(parts, part.name) for parts in caches]) for part in PARTS})


def parts_of(targets: SparseTargets) -> list[TailPart]:
    """Lists the parts that the targets hold."""
    return [part for part in PARTS if part.is_in(targets)]


def rescaled(targets: SparseTargets) -> SparseTargets:
    """Scales masses that were stored rounded: entries, groups and samples agree with the tail again."""
    fields = {name: values for part in parts_of(targets) for name, values in part.rescaled(targets).items()}
    return replace(targets, logprobs=scaled_beside_tail(targets.logprobs, targets.tail_logprob), **fields)


def tail_ids(targets: SparseTargets) -> list[np.ndarray]:
    """Lists the fields of the targets that hold ids of the tail, int32 [M, width] each, `PAD_ID` pads."""
    names = [field.name for part in PARTS for field in part.fields if field.dtype is np.int32]
    return [ids for name in names if (ids := getattr(targets, name)) is not None]


def tempered_column(temperature: float) -> str:
    """Returns the name of the column of log Σ p^(1/T) over the tail."""
    return f"{TEMPERED_PREFIX}{temperature:g}"


def _draw(weights: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """Draws columns in proportion to weights [M, k], with replacement: int [M, count]; anything if all are 0."""
    cumulated = weights.cumsum(axis=1)
    wanted = random.random((len(weights), count)) * cumulated[:, -1:]
    columns = np.stack([(cumulated <= wanted[:, [i]]).sum(axis=1) for i in range(count)], axis=1)
    last = weights.shape[1] - 1 - np.argmax(weights[:, ::-1] > 0, axis=1)  # rounding may carry a draw past the last
    drawn: np.ndarray = np.minimum(columns, last[:, None])
    return drawn

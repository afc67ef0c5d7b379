"""SparseTargets ↔ Arrow columns, and the Parquet settings that make them small.

One row per sequence. What belongs to positions is flattened over the row's stored positions, so that every column is
one list of numbers that any Parquet reader opens:

    row_id            string              32 hexadecimal digits
    input_ids         list<int32>   [T]
    loss_mask         list<bool>    [T]   True where the token is trained
    num_entries       list<int32>   [M]   entries of each stored position
    token_ids         list<int32>   [Σ num_entries]
    logprobs          list<float>   [Σ num_entries]   descending within a position
    tail_logprob      list<float>   [M]   log of the mass outside the entries, as captured
    group_logprobs    list<float>   [M·G] log mass of each tail group             (captured with tail groups)
    tail_log_norm_T2  list<float>   [M]   log Σ p^(1/T) over the tail, here T = 2  (captured with temperatures)
    tail_entropy      list<float>   [M]   Σ p log p over the tail / its mass
    sample_ids        list<int32>   [M·s] ids drawn from the tail                 (captured with tail samples)
    sample_logprobs   list<float>   [M·s]

and the kept columns of the source after them. Log-probabilities of entries and samples are rounded to multiples of
`LOGPROB_STEP` (an error of at most 3.1e-5 nats), log masses of groups to multiples of `GROUP_STEP` (0.016 nats, which
changes the gradient by less than what 32 groups leave open: `tools/bench_fidelity.py`). They stay plain floats: there is
nothing to undo, while the zeroed low bits compress away under BYTE_STREAM_SPLIT and zstd. The tail is not rounded;
a reader scales the groups of a position so that they add up to it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from logitcache.errors import UserError
from logitcache.format.sequences import CachedSequence, TokenSequence, trained_positions
from logitcache.format.targets import PAD_ID, SparseTargets, concatenate

FORMAT_VERSION = 1
LOGPROB_STEP = 2.0**-14
GROUP_STEP = 2.0**-5
METADATA_KEY = b"logitcache"
TEMPERED_PREFIX = "tail_log_norm_T"


def tempered_column(temperature: float) -> str:
    """Column name of log Σ p^(1/T) over the tail."""
    return f"{TEMPERED_PREFIX}{temperature:g}"


@dataclass(frozen=True)
class Layout:
    """Which columns a cache holds; JSON in each shard's schema metadata and in the manifest.

    vocab_size: V of the teacher.  num_tail_groups: G or 0.  temperatures: captured T ≠ 1.  num_tail_samples: s or 0.
    columns: Arrow type name of each kept source column.
    """

    vocab_size: int
    num_tail_groups: int = 0
    temperatures: tuple[float, ...] = ()
    tail_entropy: bool = False
    num_tail_samples: int = 0
    columns: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types, with the settings that a reader of the bytes needs."""
        settings = asdict(self) | {"temperatures": list(self.temperatures), "columns": dict(self.columns)}
        return {"format_version": FORMAT_VERSION, "logprob_step": LOGPROB_STEP, "group_step": GROUP_STEP, **settings}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Layout:
        """Inverse of `to_json`."""
        return cls(
            vocab_size=data["vocab_size"],
            num_tail_groups=data["num_tail_groups"],
            temperatures=tuple(data["temperatures"]),
            tail_entropy=data["tail_entropy"],
            num_tail_samples=data["num_tail_samples"],
            columns=data["columns"],
        )

    def values_per_position(self) -> dict[str, tuple[pa.DataType, int]]:
        """Columns with a fixed number of values per stored position: name → (Arrow type, that number)."""
        columns = {"num_entries": (pa.int32(), 1), "tail_logprob": (pa.float32(), 1)}
        if self.num_tail_groups:
            columns["group_logprobs"] = (pa.float32(), self.num_tail_groups)
        for temperature in self.temperatures:
            columns[tempered_column(temperature)] = (pa.float32(), 1)
        if self.tail_entropy:
            columns["tail_entropy"] = (pa.float32(), 1)
        if self.num_tail_samples:
            columns["sample_ids"] = (pa.int32(), self.num_tail_samples)
            columns["sample_logprobs"] = (pa.float32(), self.num_tail_samples)
        return columns

    def schema(self) -> pa.Schema:
        """The Arrow schema of every shard, metadata included."""
        lists = {
            "input_ids": pa.int32(),
            "loss_mask": pa.bool_(),
            "token_ids": pa.int32(),
            "logprobs": pa.float32(),
        }
        lists |= {name: arrow_type for name, (arrow_type, _) in self.values_per_position().items()}
        fields = [pa.field("row_id", pa.string())]
        fields += [pa.field(name, pa.list_(arrow_type)) for name, arrow_type in lists.items()]
        fields += [pa.field(name, pa.type_for_alias(alias)) for name, alias in self.columns.items()]
        return pa.schema(fields, metadata={METADATA_KEY: json.dumps(self.to_json())})

    def parquet_options(self) -> dict[str, Any]:
        """Keyword arguments of `pyarrow.parquet.ParquetWriter`: the encodings that this module's docstring names."""
        floats = [f.name for f in self.schema() if pa.types.is_list(f.type) and pa.types.is_float32(f.type.value_type)]
        split = [*floats, "token_ids", "input_ids"]
        return {
            "compression": "zstd",
            "compression_level": 3,
            "use_dictionary": ["num_entries.list.element"],
            "column_encoding": {f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in split},
            "write_statistics": ["row_id"],
            "write_page_checksum": True,
        }


RESERVED_COLUMNS = frozenset(
    Layout(vocab_size=1, num_tail_groups=1, tail_entropy=True, num_tail_samples=1).schema().names
)
"""Names that kept source columns cannot have (nor any that begins with `TEMPERED_PREFIX`)."""


def encode(sequences: Sequence[TokenSequence], targets: Sequence[SparseTargets], layout: Layout) -> pa.Table:
    """Rows of a shard. `targets[i]` holds the stored positions of `sequences[i]`, in order."""
    schema = layout.schema()
    lengths = np.array([len(s.input_ids) for s in sequences])
    positions = np.array([len(t) for t in targets])
    joined = concatenate(targets)
    held = joined.token_ids != PAD_ID
    num_entries = held.sum(axis=1).astype(np.int32)
    entries = np.diff(_offsets(num_entries)[_offsets(positions)])
    per_position = {
        "num_entries": num_entries,
        "tail_logprob": joined.tail_logprob,
        "group_logprobs": _rounded(joined.group_logprobs, GROUP_STEP),
        **{tempered_column(t): values for t, values in joined.tempered_tail.items()},
        "tail_entropy": joined.tail_entropy,
        "sample_ids": joined.sample_ids,
        "sample_logprobs": _rounded(joined.sample_logprobs, LOGPROB_STEP),
    }
    arrays: dict[str, pa.Array] = {
        "row_id": pa.array([s.row_id for s in sequences], pa.string()),
        "input_ids": _lists(np.concatenate([s.input_ids for s in sequences]), lengths, pa.int32()),
        "loss_mask": _lists(np.concatenate([s.loss_mask for s in sequences]), lengths, pa.bool_()),
        "token_ids": _lists(joined.token_ids[held], entries, pa.int32()),
        "logprobs": _lists(_rounded(joined.logprobs[held], LOGPROB_STEP), entries, pa.float32()),
    }
    for name, (arrow_type, count) in layout.values_per_position().items():
        arrays[name] = _lists(np.asarray(per_position[name]).reshape(-1), positions * count, arrow_type)
    for name, alias in layout.columns.items():
        arrays[name] = pa.array([s.columns.get(name) for s in sequences], pa.type_for_alias(alias))
    return pa.table([arrays[name] for name in schema.names], schema=schema)


class DecodedRows(Sequence[CachedSequence]):
    """Rows of a shard as numpy; indexing gives `CachedSequence`s that are views."""

    def __init__(self, table: pa.Table, layout: Layout) -> None:
        self._row_ids = table["row_id"].to_pylist()
        self._columns = {name: table[name].to_pylist() for name in layout.columns}
        self._tokens, self._token_offsets = flat(table["input_ids"])
        self._mask, _ = flat(table["loss_mask"])
        ids, _ = flat(table["token_ids"])
        logprobs, _ = flat(table["logprobs"])
        fixed: dict[str, np.ndarray] = {}
        for name, (_, count) in layout.values_per_position().items():
            values, offsets = flat(table[name])
            fixed[name] = values.reshape(-1, count) if count > 1 or name in _MATRICES else values
            self._offsets = offsets // count
        self._num_entries = fixed["num_entries"]
        self._targets = SparseTargets(
            token_ids=_padded(ids, self._num_entries, PAD_ID),
            logprobs=_padded(logprobs, self._num_entries, -np.inf),
            tail_logprob=fixed["tail_logprob"],
            group_logprobs=_shared_out(fixed.get("group_logprobs"), fixed["tail_logprob"]),
            tempered_tail={t: fixed[tempered_column(t)] for t in layout.temperatures},
            tail_entropy=fixed.get("tail_entropy"),
            sample_ids=fixed.get("sample_ids"),
            sample_logprobs=fixed.get("sample_logprobs"),
        )

    def __len__(self) -> int:
        return len(self._row_ids)

    def __getitem__(self, row: int) -> CachedSequence:  # type: ignore[override]
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        tokens = slice(self._token_offsets[row], self._token_offsets[row + 1])
        stored = slice(self._offsets[row], self._offsets[row + 1])
        mask = self._mask[tokens]
        return CachedSequence(
            row_id=self._row_ids[row],
            input_ids=self._tokens[tokens],
            loss_mask=mask,
            positions=trained_positions(mask),
            targets=self._targets[stored].narrowed(int(self._num_entries[stored].max(initial=0))),
            columns={name: values[row] for name, values in self._columns.items()},
        )

    def __iter__(self) -> Iterator[CachedSequence]:
        return (self[row] for row in range(len(self)))


def read_layout(metadata: Mapping[bytes, bytes] | None, where: str) -> Layout:
    """Layout from a shard's schema metadata. Raises UserError for foreign and altered files and for newer formats."""
    if not metadata or METADATA_KEY not in metadata:
        raise UserError(f"{where} is not a shard of a logitcache (no such schema metadata)")
    try:
        data = json.loads(metadata[METADATA_KEY])
        check_version(data["format_version"], where)
        return Layout.from_json(data)
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{where} was altered: its schema metadata is unreadable ({error!r})") from error


def check_version(found: int, where: str) -> None:
    """Raises UserError where a file was written in a newer format than this code reads."""
    if found > FORMAT_VERSION:
        raise UserError(
            f"{where} is written in cache format {found}, this logitcache reads up to format {FORMAT_VERSION}: "
            f"install a logitcache that reads format {found}"
        )


_MATRICES = {"group_logprobs", "sample_ids", "sample_logprobs"}


def _rounded(values: np.ndarray | None, step: float) -> np.ndarray | None:
    if values is None:
        return None
    scaled: np.ndarray = np.rint(values.astype(np.float32) / np.float32(step))
    return scaled * np.float32(step)


def _shared_out(group_logprobs: np.ndarray | None, tail_logprob: np.ndarray) -> np.ndarray | None:
    """Rounded log masses [M, G], each row scaled so that it adds up to the tail [M]."""
    if group_logprobs is None:
        return None
    largest = group_logprobs.max(axis=1, initial=-np.inf)
    reference = np.where(np.isneginf(largest), 0, largest)
    with np.errstate(divide="ignore", invalid="ignore"):
        total = np.log(np.exp(group_logprobs - reference[:, None]).sum(axis=1)) + reference
        shift = np.where(np.isfinite(total), tail_logprob - total, 0).astype(np.float32)
    return group_logprobs + shift[:, None]


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _lists(values: np.ndarray | None, lengths: np.ndarray, arrow_type: pa.DataType) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(_offsets(lengths), pa.int32()), pa.array(values, arrow_type))


def flat(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Values of a list column and its row offsets [rows + 1]."""
    lists = column.combine_chunks()
    offsets = lists.offsets.to_numpy().astype(np.int64)
    values = lists.values.to_numpy(zero_copy_only=False)
    return values[offsets[0] : offsets[-1]], offsets - offsets[0]


def _padded(flat: np.ndarray, num_entries: np.ndarray, fill: float) -> np.ndarray:
    """[Σ num_entries] → [M, max num_entries]; a view where all positions have equally many."""
    k = int(num_entries.max(initial=0))
    if len(flat) == len(num_entries) * k:
        return flat.reshape(len(num_entries), k)
    padded = np.full((len(num_entries), k), fill, dtype=flat.dtype)
    padded[np.arange(k) < num_entries[:, None]] = flat
    return padded

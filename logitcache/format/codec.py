"""SparseTargets are encoded to Arrow columns, and decoded.

One row per sequence. What belongs to positions is flattened over the row's stored positions, so that every column is
one list of numbers that any Parquet reader opens:

    row_id              string              32 hexadecimal digits
    input_ids           list<int32>   [T]
    loss_mask           list<bool>    [T]   True where the token is trained
    num_entries         list<int32>   [M]   entries of each stored position
    tail_logprob        list<float>   [M]   log of the mass outside the entries, as captured
    tail_log_norm_T2    list<float>   [M]   log Σ p^(1/T) over the tail, here T = 2  (captured with temperatures)
    tail_entropy        list<float>   [M]   Σ p log p over the tail / its mass
    sample_ids          list<int32>   [M·s] ids drawn from the tail                 (captured with tail samples)
    sample_logprobs     list<float>   [M·s]

and the kept columns of the source after them. Entries, tail groups and coefficients of an exact cache are

    token_ids           list<int32>   [Σ num_entries]   most probable first
    logprobs            list<float>   [Σ num_entries]
    group_logprobs      list<float>   [M·G] log mass of each tail group             (captured with tail groups)
    tail_coefficients   list<float>   [M·R] of the logits, in the tail basis        (captured with a rank)
    probe_residuals     list<float>   [M·P] what these leave of the probe tokens' logits

and of a balanced or compact one

    id_gaps             list<int32>   [Σ num_entries]   ranks between an entry and the one before it, ascending
    levels_above_lowest list<int32>   [Σ num_entries]   levels from the position's least probable entry up to this one
    lowest_level        list<int32>   [M]               level of that entry
    group_levels        list<int32>   [M·G]             share of the tail, as difference from the profile
    tail_coefficients   list<uint16>  [M·R]             in steps of the layout's rounding, zigzag code
    probe_residuals     list<uint8>   [M·P]             in quarters of a nat, zigzag code

where `codebook` says what a rank and the profile are, `quantization` what a level is. Why so: the set of entries costs a third of
the bytes when it is stored in ascending order of an order in which frequent ids come first; the order of probability then
need not be stored, as the levels give it; and levels counted from the position's lowest are alike in all positions, and
small: nineteen of twenty fit a byte. `tools/bench_codec.py` shows bytes and errors of this and of the alternatives. There
is nothing to undo in the other columns: where they are rounded, their zeroed low bits compress away.

Encoding what was decoded gives the same numbers again: copying rows between caches loses nothing.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from logitcache.format.codebook import Codebook
from logitcache.format.layout import Layout
from logitcache.format.probes import probe_ids_of_rows
from logitcache.format.quantization import MOST_LEVELS, QuantizationSpec, rounded
from logitcache.format.sequences import CachedSequence, TokenSequence, trained_positions
from logitcache.format.targets import PAD_ID, SparseTargets, concatenate


def encode(
    sequences: Sequence[TokenSequence], targets: Sequence[SparseTargets], layout: Layout, codebook: Codebook
) -> pa.Table:
    """Encodes rows of a shard. `targets[i]` holds the stored positions of `sequences[i]`, in order."""
    schema = layout.schema()
    lengths = np.array([len(s.input_ids) for s in sequences])
    positions = np.array([len(t) for t in targets])
    joined = concatenate(targets)
    num_entries = joined.num_entries
    quantization = layout.quantization
    values: dict[str, np.ndarray] = {
        "num_entries": num_entries,
        "tail_logprob": rounded(joined.tail_logprob, quantization.tail_step if quantization else None),
    }
    for part, _ in layout.tail_parts.stored():
        values |= part.encode(joined, quantization, codebook)
    if quantization:
        values |= _levelled_entries(joined, quantization, codebook.ranks_of_ids(layout.vocab_size))
    else:
        is_entry = joined.token_ids != PAD_ID
        values |= {"token_ids": joined.token_ids[is_entry], "logprobs": joined.logprobs[is_entry]}
    arrays: dict[str, pa.Array] = {
        "row_id": pa.array([s.row_id for s in sequences], pa.string()),
        "input_ids": lists_of(pa.array(np.concatenate([s.input_ids for s in sequences]), pa.int32()), lengths),
        "loss_mask": lists_of(pa.array(np.concatenate([s.loss_mask for s in sequences]), pa.bool_()), lengths),
    }
    entries = np.diff(_offsets(num_entries)[_offsets(positions)])
    for name, arrow_type in layout.values_per_entry().items():
        arrays[name] = lists_of(pa.array(values[name], arrow_type), entries)
    for name, (arrow_type, count) in layout.values_per_position().items():
        arrays[name] = lists_of(pa.array(values[name].reshape(-1), arrow_type), positions * count)
    for name, alias in layout.columns.items():
        arrays[name] = pa.array([s.columns.get(name) for s in sequences], pa.type_for_alias(alias))
    return pa.table([arrays[name] for name in schema.names], schema=schema)


class DecodedRows(Sequence[CachedSequence]):
    """Rows of a shard as numpy; indexing gives `CachedSequence`s that are views.

    row_ids: one of each row.  input_ids, loss_mask: int32 and bool, of all tokens of all rows, one row after the other;
    token_offsets: the first token of each row and the number of all, int64 [rows + 1].  targets: SparseTargets of all
    positions of all rows; offsets: the first position of each row and the number of all, int64 [rows + 1].  num_entries: of
    each position, int32 [M].
    """

    def __init__(self, table: pa.Table, layout: Layout) -> None:
        """Decodes a table with the file's metadata. Raises KeyError or ValueError if that or a number makes no sense."""
        check_columns(table, layout.schema(), layout.columns)
        self.row_ids = table["row_id"].to_pylist()
        self._columns = {name: table[name].to_pylist() for name in layout.columns}
        self.input_ids, self.token_offsets = flat(table["input_ids"])
        self.loss_mask, mask_offsets = flat(table["loss_mask"])
        _check_offsets("loss_mask", mask_offsets, self.token_offsets)
        self.num_entries, self.offsets = flat(table["num_entries"])
        _check_range("a number of entries that no position has", self.num_entries, 0, layout.vocab_size)
        values: dict[str, np.ndarray] = {}
        for name in layout.values_per_entry():
            values[name], offsets = flat(table[name])
            _check_offsets(name, offsets, _offsets(self.num_entries)[self.offsets])
        for name, (_, count) in layout.values_per_position().items():
            column, offsets = flat(table[name])
            _check_offsets(name, offsets, self.offsets * count)
            values[name] = column.reshape(-1, count) if name in layout.tail_columns else column
        tail_logprob, quantization, codebook = values["tail_logprob"], layout.quantization, None
        if quantization:
            codebook = Codebook.from_metadata(table.schema.metadata)
            token_ids, logprobs = _entries_of_levels(values, quantization, codebook.ids_of_ranks(layout.vocab_size))
        else:
            token_ids = _padded(values["token_ids"], self.num_entries, PAD_ID)
            logprobs = _padded(values["logprobs"], self.num_entries, -np.inf)
        fields: dict[str, Any] = {}
        for part, value in layout.tail_parts.stored():
            fields |= part.decode(values, value, tail_logprob, quantization, codebook)
        self.targets = SparseTargets(token_ids, logprobs, tail_logprob, **fields, probe_ids=self._probe_ids(layout))

    def _probe_ids(self, layout: Layout) -> np.ndarray | None:
        """Returns the probe tokens, int32 [M, P]; None without, and for masks that contradict the number of positions."""
        if not layout.tail_parts.probes:
            return None
        starts, lengths = self.token_offsets[:-1], np.diff(self.offsets)
        predicted = self.loss_mask.copy()
        predicted[starts[starts < len(predicted)]] = False
        tokens = np.flatnonzero(predicted)
        if len(tokens) != self.offsets[-1]:
            return None
        positions = tokens - np.repeat(starts, lengths) - 1
        return probe_ids_of_rows(self.row_ids, lengths, positions, layout.tail_parts.probes, layout.vocab_size)

    def __len__(self) -> int:
        return len(self.row_ids)

    def __getitem__(self, row: int) -> CachedSequence:  # type: ignore[override]
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        tokens = slice(self.token_offsets[row], self.token_offsets[row + 1])
        stored = slice(self.offsets[row], self.offsets[row + 1])
        mask = self.loss_mask[tokens]
        return CachedSequence(
            row_id=self.row_ids[row],
            input_ids=self.input_ids[tokens],
            loss_mask=mask,
            positions=trained_positions(mask),
            targets=self.targets[stored].cut_to_width(int(self.num_entries[stored].max(initial=0))),
            columns={name: values[row] for name, values in self._columns.items()},
        )

    def __iter__(self) -> Iterator[CachedSequence]:
        return (self[row] for row in range(len(self)))


MOST_PADDED, MOST_PADDING = 1 << 26, 4
"""Places of a row group in [M, k] arrays, and, of more than that, places for each entry."""


def _levelled_entries(
    targets: SparseTargets, quantization: QuantizationSpec, ranks_of_ids: np.ndarray
) -> dict[str, np.ndarray]:
    """Returns entries in ascending order of rank: gaps and levels [Σ num_entries], lowest level [M]."""
    is_entry = targets.token_ids != PAD_ID
    levels = quantization.levels(targets.logprobs)
    lowest = levels.max(axis=1, initial=-1)
    above = lowest[:, None] - levels  # lowest + 1 where the probability is 0
    ranks = np.where(is_entry, ranks_of_ids[np.where(is_entry, targets.token_ids, 0)], np.int32(len(ranks_of_ids) << 1))
    ranks, above = _sorted_pairs(ranks, above)
    gaps = np.diff(ranks, axis=1, prepend=np.int32(-1)) - 1
    is_entry = np.arange(is_entry.shape[1]) < targets.num_entries[:, None]
    return {"id_gaps": gaps[is_entry], "levels_above_lowest": above[is_entry], "lowest_level": lowest}


def _entries_of_levels(
    values: dict[str, np.ndarray], quantization: QuantizationSpec, ids_of_ranks: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns ids and log-probabilities [M, k], most probable first, padded."""
    num_entries, lowest = values["num_entries"], values["lowest_level"]
    _check_range("entries that do not ascend", values["id_gaps"], 0, np.iinfo(np.int32).max)
    gaps = _padded(values["id_gaps"], num_entries, 0)
    above = _padded(values["levels_above_lowest"], num_entries, 0)
    ranks = np.cumsum(gaps, axis=1, dtype=np.int32)
    ranks += np.arange(gaps.shape[1], dtype=np.int32)
    is_entry = np.arange(gaps.shape[1]) < num_entries[:, None] if len(values["id_gaps"]) != gaps.size else None
    if is_entry is not None:
        ranks = np.where(is_entry, ranks, 0)
    _check_range("an id that is in no vocabulary", ranks, 0, len(ids_of_ranks) - 1)
    _check_range("a level that does not exist", lowest, -1, MOST_LEVELS - 1)
    levels = lowest[:, None] - above
    _check_range("a level that does not exist", levels, -1, MOST_LEVELS - 1)
    impossible = int(lowest.max(initial=-1)) + 1
    if levels.size and levels.min() < 0:
        levels = np.where(levels < 0, impossible, levels)
    if is_entry is not None:
        levels = np.where(is_entry, levels, impossible + 1)
    token_ids = ids_of_ranks[ranks]
    _check_range("an id that is in no vocabulary", token_ids, 0, len(ids_of_ranks))
    levels, token_ids = _sorted_pairs(levels, token_ids)
    logprobs = np.append(quantization.logprobs(impossible), np.float32(-np.inf))[levels]
    if is_entry is not None:
        token_ids[levels > impossible] = PAD_ID
    return token_ids, logprobs


def _check_range(what: str, values: np.ndarray, low: int, high: int) -> None:
    if values.size and not low <= values.min() <= values.max() <= high:
        raise ValueError(what)


def _sorted_pairs(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorts pairs of numbers ≥ 0, int32 [M, k], in each row: by the first number, then by the second."""
    if not first.size:
        return first, second
    bits = int(second.max()).bit_length()
    wide = int(first.max()).bit_length() + bits > 31
    dtype: Any = np.int64 if wide else np.int32
    keys = first.astype(dtype)
    keys <<= bits
    keys |= second
    keys.sort(axis=1)
    second = (keys & ((1 << bits) - 1)).astype(np.int32, copy=False)
    keys >>= bits
    return keys.astype(np.int32, copy=False), second


def _offsets(lengths: np.ndarray | list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def lists_of(values: pa.Array, lengths: np.ndarray | list[int]) -> pa.ListArray:
    """Returns values as lists of these lengths."""
    return pa.ListArray.from_arrays(pa.array(_offsets(lengths), pa.int32()), values)


def flat(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the values of a list column and its row offsets, [rows + 1]."""
    lists = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()  # which copies
    offsets = lists.offsets.to_numpy().astype(np.int64)
    values = lists.values.to_numpy(zero_copy_only=False)
    return values[offsets[0] : offsets[-1]], offsets - offsets[0]


def check_columns(table: pa.Table, wanted: Iterable[pa.Field], kept: Container[str]) -> None:
    """Raises ValueError if a column is missing, is of another type or, unless it is in `kept`, lacks a value."""
    for field in wanted:
        index = table.schema.get_field_index(field.name)
        if index < 0:
            raise ValueError(f"column {field.name} is missing")
        if table.schema.field(index).type != field.type:
            raise ValueError(f"column {field.name} is of another type than the layout says")
        if field.name not in kept:
            lists = pa.types.is_list(field.type)
            if any(part.null_count or (lists and part.values.null_count) for part in table.column(index).chunks):
                raise ValueError(f"values of column {field.name} are missing")


def _check_offsets(name: str, offsets: np.ndarray, expected: np.ndarray) -> None:
    if not np.array_equal(offsets, expected):
        raise ValueError(f"column {name} has not as many values as the rows need")


def _padded(values: np.ndarray, num_entries: np.ndarray, fill: float) -> np.ndarray:
    """Spreads [Σ num_entries] over [M, max num_entries]; a view if all positions have equally many."""
    k = int(num_entries.max(initial=0))
    if len(num_entries) * k > max(MOST_PADDED, MOST_PADDING * len(values)):
        raise ValueError(f"{len(num_entries):,} positions of up to {k:,} entries hold only {len(values):,}")
    if len(values) == len(num_entries) * k:
        return values.reshape(len(num_entries), k)
    padded = np.full((len(num_entries), k), fill, dtype=values.dtype)
    padded[np.arange(k) < num_entries[:, None]] = values
    return padded

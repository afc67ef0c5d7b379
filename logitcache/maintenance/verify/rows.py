"""The rows of a row group are checked: do they agree with themselves, and can a teacher have given their targets?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from logitcache.errors import one_line
from logitcache.format.codec import DecodedRows, flat
from logitcache.format.layout import Layout
from logitcache.format.sequences import CachedSequence, row_id
from logitcache.format.soundness import find_wrong
from logitcache.maintenance.verify.findings import Finding

SeenRows = Callable[[np.ndarray, int, int], None]
"""Told the row ids of a row group, S16 [n], the number of the first one in its file, and the stored positions of all."""


@dataclass
class Counts:
    """Sums over the rows of a shard. tail_mass: of all positions.  complete: every row group was read."""

    num_sequences: int = 0
    num_tokens: int = 0
    num_positions: int = 0
    num_entries: int = 0
    longest: int = 0
    tail_mass: float = 0.0
    complete: bool = True


def empty_lists(table: pa.Table, layout: Layout) -> list[str]:
    """Lists the columns of the layout in which a row or a number is null."""
    return [
        name
        for name in layout.schema().names
        if table[name].null_count or any(part.values.null_count for part in table[name].chunks if name != "row_id")
    ]


def check_rows(
    table: pa.Table, layout: Layout, file: str, row_group: int, first: int, counts: Counts, seen: SeenRows
) -> Iterator[Finding]:
    """Yields findings about the rows of a row group without nulls; `first` is the number of its first row in the file."""
    lists = _Lists(table, layout)
    counts.num_tokens += len(lists.values["input_ids"])
    counts.num_positions += len(lists.values["num_entries"])
    counts.num_entries += int(lists.values["num_entries"].sum())
    counts.longest = max(counts.longest, int(lists.lengths["input_ids"].max(initial=0)))
    counts.tail_mass += float(np.exp(lists.values["tail_logprob"], dtype=np.float64).sum())

    stored_ids = table["row_id"].to_pylist()

    def finding(row: int, what: str, kind: str = "rows", position: int | None = None) -> Finding:
        return Finding(kind, file, what, row_group, first + row, stored_ids[row], position)

    ids = [row_id(lists.row("input_ids", row), lists.row("loss_mask", row)) for row in range(len(table))]
    seen(np.frombuffer(b"".join(map(bytes.fromhex, ids)), "S16"), first, len(lists.values["num_entries"]))
    for row, (stored, computed) in enumerate(zip(stored_ids, ids, strict=True)):
        if stored != computed:
            yield finding(row, f"the row id of its tokens and mask is {computed}")
    sound = np.ones(len(table), dtype=bool)
    for wrong, described in lists.contradictions():
        for row in np.flatnonzero(wrong).tolist():
            yield finding(row, described(row))
        sound &= ~wrong
    for row in np.flatnonzero(lists.tokens_outside(layout.vocab_size)).tolist():
        yield finding(row, f"an input id outside the vocabulary of {layout.vocab_size:,}")
    rows = np.flatnonzero(sound)
    for row, result in _decoded(table, rows, layout):
        if isinstance(result, Exception):
            yield finding(row, f"its targets cannot be decoded ({one_line(result)})")
            continue
        for position, what in _defects(result, layout):
            yield finding(row, what, "targets", int(result.positions[position]))


class _Lists:
    """List columns of a row group as values and lengths [rows]."""

    def __init__(self, table: pa.Table, layout: Layout) -> None:
        self._layout = layout
        names = [name for name in layout.schema().names if name != "row_id"]
        columns = {name: flat(table[name]) for name in names}
        self.values = {name: values for name, (values, _) in columns.items()}
        self._offsets = {name: offsets for name, (_, offsets) in columns.items()}
        self.lengths = {name: np.diff(offsets) for name, (_, offsets) in columns.items()}

    def row(self, name: str, row: int) -> np.ndarray:
        return self.values[name][self._offsets[name][row] : self._offsets[name][row + 1]]

    def contradictions(self) -> Iterator[tuple[np.ndarray, Callable[[int], str]]]:
        """Yields which rows [rows] have lists of lengths that cannot be, and what to say of one."""
        tokens, mask = self.lengths["input_ids"], self.lengths["loss_mask"]
        yield mask != tokens, lambda row: f"{tokens[row]} input ids, a loss mask of {mask[row]}"
        trained = self._sums(self.values["loss_mask"], "loss_mask")
        positions = self.lengths["num_entries"]
        yield (
            trained != positions,
            lambda row: f"its loss mask trains {trained[row]} tokens, num_entries has {positions[row]} positions",
        )
        negative = self._sums(self.values["num_entries"] < 0, "num_entries") > 0
        yield negative, lambda row: "a negative number of entries"
        entries = self._sums(self.values["num_entries"], "num_entries")
        expected = dict.fromkeys(self._layout.values_per_entry(), entries)
        for name, (_, count) in self._layout.values_per_position().items():
            expected[name] = positions * count
        for name, lengths in expected.items():

            def what(row: int, name: str = name, lengths: np.ndarray = lengths) -> str:
                return f"{name} has {self.lengths[name][row]} values, {lengths[row]} are wanted"

            yield self.lengths[name] != lengths, what

    def tokens_outside(self, vocab_size: int) -> np.ndarray:
        tokens = self.values["input_ids"]
        return self._sums((tokens < 0) | (tokens >= vocab_size), "input_ids") > 0

    def _sums(self, values: np.ndarray, name: str) -> np.ndarray:
        """Sums each row's list, int64 [rows]."""
        running = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
        return np.diff(running[self._offsets[name]])


def _decoded(table: pa.Table, rows: np.ndarray, layout: Layout) -> Iterator[tuple[int, CachedSequence | Exception]]:
    """Yields row and content of the rows with something wrong in their targets, or the error with which they are decoded."""
    if not len(rows):
        return
    if len(rows) < len(table):
        table = table.take(rows)
    decoded = _decode(table, layout)
    if not isinstance(decoded, Exception):
        if find_wrong(decoded.targets, layout):
            yield from ((int(row), sequence) for row, sequence in zip(rows, decoded, strict=True))
        return
    for i, row in enumerate(rows.tolist()):
        alone = _decode(table.slice(i, 1), layout)
        yield row, alone if isinstance(alone, Exception) else alone[0]


def _decode(table: pa.Table, layout: Layout) -> DecodedRows | Exception:
    try:
        return DecodedRows(table, layout)
    except MemoryError:
        raise
    except Exception as error:  # numbers that were never meant to be decoded fail in any way
        return error


def _defects(sequence: CachedSequence, layout: Layout) -> Iterator[tuple[int, str]]:
    """Yields (row of its targets, what is wrong) for every position of a row with something wrong."""
    targets = sequence.targets
    if find_wrong(targets, layout):
        for position in range(len(targets)):
            if found := find_wrong(targets[position : position + 1], layout):
                yield position, found[1]

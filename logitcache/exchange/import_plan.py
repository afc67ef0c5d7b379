"""The plan of an import decides from the tokens alone which of the sources' rows make which shard.

    OUT/.build/written/00000.json   what writing shard 0 came to, see `Written`; there before the shard counts as complete
    OUT/.build/ids/00000            row ids of shard 0, 16 bytes each

See `logitcache.assembly.plan` for what else the build directory holds.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from logitcache.assembly.plan import Plan, PlannedShard
from logitcache.errors import UserError
from logitcache.exchange.sequences import SequenceReader
from logitcache.exchange.source_files import SourceFile
from logitcache.exchange.source_rows import SourceRow, read_rows
from logitcache.exchange.values import BadRow
from logitcache.format.layout import Layout
from logitcache.format.manifest import BUILD_DIRECTORY
from logitcache.format.sequences import ColumnTypes, TokenSequence
from logitcache.progress import Progress
from logitcache.storage.folder import Folder


@dataclass
class Written:
    """The record of a written shard: rows left out, by reason, the first bad one, the most entries of any position.

    num_scaled, num_approximate: positions whose entries were scaled, and whose tail was approximated.
    """

    skipped: Counter[str] = field(default_factory=Counter)
    first_bad: str | None = None
    num_scaled: int = 0
    num_approximate: int = 0
    most_entries: int = 0

    def record(self, folder: Folder, shard: int, row_ids: Sequence[str]) -> None:
        """Records it beside the shard until the cache is finished."""
        folder.write(f"{BUILD_DIRECTORY}/ids/{shard:05d}", bytes.fromhex("".join(row_ids)))
        folder.write(f"{BUILD_DIRECTORY}/written/{shard:05d}.json", json.dumps(vars(self)))

    @classmethod
    def of(cls, folder: Folder, shard: int) -> tuple[Written, str]:
        """Returns the record of a shard, and its row ids, 32 hexadecimal digits each, one after the other."""
        data = json.loads(folder.read(f"{BUILD_DIRECTORY}/written/{shard:05d}.json"))
        return cls(**{**data, "skipped": Counter(data["skipped"])}), folder.read(
            f"{BUILD_DIRECTORY}/ids/{shard:05d}"
        ).hex()

    def add(self, other: Written) -> None:
        """Adds the record of another shard."""
        self.skipped += other.skipped
        self.first_bad = self.first_bad or other.first_bad
        self.num_scaled += other.num_scaled
        self.num_approximate += other.num_approximate
        self.most_entries = max(self.most_entries, other.most_entries)


@dataclass(frozen=True, kw_only=True)
class ImportPlan(Plan):
    """The plan of an import.  tokenizer: its fingerprint, which `finish` needs. Empty in a plan that an earlier version wrote."""

    tokenizer: Mapping[str, Any] = field(default_factory=dict)

    @property
    def cache_layout(self) -> Layout:
        """The columns of every shard."""
        return Layout(self.spec["vocab_size"], columns=self.column_types, precision=self.spec["precision"])


def cut(
    folder: Folder,
    spec: Mapping[str, Any],
    files: Sequence[SourceFile],
    reader: SequenceReader,
    tokenizer: Mapping[str, Any],
) -> ImportPlan:
    """Reads the tokens of all rows and deals the rows to shards: each takes rows until it has `shard_positions`.

    Raises UserError for a bad row that is not skipped, if nothing is trained, and for a kept column that no row has.
    """
    shards: list[PlannedShard] = []
    types, never_kept = ColumnTypes(), set(reader.keep)
    begins = (0, 0)
    num_rows = num_positions = total = 0
    progress = Progress("reading", None, 0, "positions")
    try:
        for number, row_number, row in rows_from(files, reader.columns, (0, 0)):
            begins = begins if num_rows else (number, row_number)
            num_rows += 1
            total += 1
            never_kept -= {name for name in never_kept if name in row.values}
            tokens = _tokens(row, reader, spec["skip_bad"])
            if tokens is not None:
                types.see(tokens.columns)
                num_positions += len(tokens.positions)
                progress.advance(len(tokens.positions))
            if num_positions >= spec["shard_positions"]:
                shards.append(PlannedShard(num_positions, num_rows, file=begins[0], row=begins[1]))
                num_rows = num_positions = 0
    finally:
        progress.close()
    if num_positions:
        shards.append(PlannedShard(num_positions, num_rows, file=begins[0], row=begins[1]))
    elif num_rows and shards:  # so that they are counted as left out
        last = shards[-1]
        shards[-1] = replace(last, num_sequences=last.num_sequences + num_rows)
    if not shards:
        raise UserError(
            f"the sources hold no row to train on: {total:,} rows, all of them bad, empty or without a trained token"
        )
    if never_kept:
        raise UserError(f"--keep {', '.join(sorted(never_kept))}: no row has this column")
    return ImportPlan(folder=folder, spec=spec, shards=tuple(shards), column_types=types.names(), tokenizer=tokenizer)


def rows_from(
    files: Sequence[SourceFile], columns: Sequence[str], begin: tuple[int, int]
) -> Iterator[tuple[int, int, SourceRow]]:
    """Yields (file number, row number in it, row) from a file's row on to the end of the last file."""
    first_file, first_row = begin
    for number in range(first_file, len(files)):
        skipped = first_row if number == first_file else 0
        for index, row in enumerate(read_rows(files[number], columns, skipped), start=skipped):
            yield number, index, row


def _tokens(row: SourceRow, reader: SequenceReader, skip_bad: bool) -> TokenSequence | None:
    try:
        return reader.read(row)
    except BadRow as error:
        if skip_bad:
            return None
        raise bad_row(row, error) from error


def bad_row(row: SourceRow, error: Exception) -> UserError:
    """Returns the error that stops an import without --skip-bad."""
    return UserError(f"{row.where}: {error}; mend it, or leave such rows out with --skip-bad")


def no_positions(tokens: TokenSequence) -> str | None:
    """Returns the reason in `Manifest.skipped` why a row has nothing to store, or None."""
    if len(tokens.input_ids) < 2:
        return "empty"
    return None if np.any(tokens.loss_mask) else "untrainable"

"""The plan of a build: the corpus is tokenised once and cut into shards, which lie beside the cache until it is finished.

    OUT/.build/tokens/00000.parquet token sequences of shard 0, and so on
    OUT/.build/left_out/00000.json  rows of shard 0 for which the teacher gave NaN, only with --skip-bad
    OUT/.build/tail_groups.parquet  the partition, once it is made; and tail_basis.parquet
    OUT/.build/ranges               locked by the processes of shard ranges
    OUT/.build/answers              what the teacher answered, see `completions`; only with --generate
    OUT/.build/places, copied       rows that are copied from other caches, see `reuse`; only with --reuse

See `logitcache.assembly.plan` for what else the build directory holds. A resumed build reads its tokens from here: the corpus
is not tokenised again, and every shard holds the same rows.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from logitcache.assembly.plan import Plan, PlannedShard, new_plan
from logitcache.assembly.workspace import ANSWERS_NAME
from logitcache.capture.calibration import calibration_sequences
from logitcache.capture.settings import CaptureSettings
from logitcache.errors import UserError
from logitcache.format.codec import flat
from logitcache.format.layout import Layout
from logitcache.format.manifest import BUILD_DIRECTORY
from logitcache.format.sequences import ColumnTypes, TokenSequence, columns_text, stored_columns
from logitcache.format.tail_basis import TailBasis, read_tail_basis
from logitcache.format.tail_parts import TAIL_BASIS_NAME, TAIL_GROUPS_NAME, TailParts
from logitcache.progress import Progress
from logitcache.storage.folder import Folder

LEFT_OUT_NAME = f"{BUILD_DIRECTORY}/left_out"
PARTITION_NAME = f"{BUILD_DIRECTORY}/{TAIL_GROUPS_NAME}"
BASIS_NAME = f"{BUILD_DIRECTORY}/{TAIL_BASIS_NAME}"

TOKENS_SCHEMA = pa.schema(
    {"input_ids": pa.list_(pa.int32()), "loss_mask": pa.list_(pa.bool_()), "columns": pa.string(), "where": pa.string()}
)
ROWS_PER_GROUP = 1024

logger = logging.getLogger("logitcache")


@dataclass(frozen=True, kw_only=True)
class BuildPlan(Plan):
    """The plan of a build.

    layout: type of the documents.  longest: tokens of the longest sequence.  num_documents, skipped, first_bad: see `Corpus`.
    """

    layout: str
    longest: int
    num_documents: int
    skipped: Mapping[str, int]
    first_bad: str | None

    @property
    def num_tokens(self) -> int:
        """The tokens that the teacher reads, prompts included: the time of a build goes there."""
        return sum(shard.num_tokens for shard in self.shards)

    @property
    def settings(self) -> CaptureSettings:
        """The part of the teacher's distributions that is captured."""
        return CaptureSettings.from_json(self.spec["capture"])

    @property
    def cache_layout(self) -> Layout:
        """The columns of every shard; known once the tail basis is made, if the settings have a rank."""
        layout = cache_layout(self.settings, self.spec["teacher"]["vocab_size"], self.column_types)
        return layout.with_coefficient_step(self.tail_basis.step) if layout.tail_parts.rank else layout

    @cached_property
    def tail_basis(self) -> TailBasis:
        """The basis of the coefficients, once it is made."""
        with self.folder.open(BASIS_NAME) as file:
            return read_tail_basis(file).first(self.settings.tail_parts.rank)

    def sequences(self, index: int) -> Iterator[TokenSequence]:
        """Yields the token sequences of a shard, in order."""
        with self.folder.open(_tokens_name(index)) as source:
            for sequence in read_tokens(source):
                yield replace(sequence, columns=stored_columns(self.column_types, sequence.columns))

    def calibration_sequences(self) -> list[TokenSequence]:
        """Returns the first sequences of the corpus, from which the tail groups and the tail basis are made."""
        corpus = chain.from_iterable(map(self.sequences, range(len(self.shards))))
        return calibration_sequences(corpus, self.settings.tail_parts.rank)

    @property
    def skips_bad(self) -> bool:
        """Whether rows that cannot be used are left out."""
        return bool(self.spec["corpus"]["skip_bad"])

    def record_left_out(self, index: int, rows: Mapping[int, str]) -> None:
        """Records the rows of a shard that could not be scored, number to reason, before the shard itself is recorded."""
        name = f"{LEFT_OUT_NAME}/{index:05d}.json"
        if rows:
            self.folder.write(name, json.dumps(list(rows.items()), ensure_ascii=False))
        else:
            self.folder.remove(name)

    def left_out(self) -> dict[int, dict[int, str]]:
        """Returns the rows that could not be scored, number to reason, by shard."""
        names = self.folder.names(LEFT_OUT_NAME)
        return {int(name[:5]): dict(json.loads(self.folder.read(f"{LEFT_OUT_NAME}/{name}"))) for name in sorted(names)}


def calibration_files(parts: TailParts) -> list[str]:
    """Lists the files of a build with what holds for all positions: the engine that starts first makes them."""
    return [f"{BUILD_DIRECTORY}/{name}" for name in parts.files]


def cache_layout(settings: CaptureSettings, vocab_size: int, column_types: Mapping[str, str]) -> Layout:
    """Returns the columns of the shards that a capture with these settings makes."""
    return Layout(vocab_size, settings.tail_parts, column_types, settings.precision)


class TokensWriter:
    """A context manager that writes sequences to a file. Kept columns become JSON text; types unknown to JSON become strings."""

    def __init__(self, path: Path) -> None:
        self._parquet = pq.ParquetWriter(path, TOKENS_SCHEMA, compression="zstd")
        self._rows: list[dict[str, Any]] = []

    def write(self, sequence: TokenSequence) -> None:
        """Appends a sequence."""
        self._rows.append(
            {
                "input_ids": sequence.input_ids,
                "loss_mask": sequence.loss_mask,
                "columns": columns_text(sequence.columns),
                "where": sequence.where,
            }
        )
        if len(self._rows) == ROWS_PER_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._parquet.write_table(pa.Table.from_pylist(self._rows, TOKENS_SCHEMA))
            self._rows.clear()

    def __enter__(self) -> TokensWriter:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        with self._parquet:
            if kind is None:
                self._flush()


def read_tokens(source: BinaryIO) -> Iterator[TokenSequence]:
    """Yields the sequences of a file that a TokensWriter wrote, in order."""
    with pq.ParquetFile(source) as file:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group)
            ids, offsets = flat(table["input_ids"])
            mask, _ = flat(table["loss_mask"])
            # A build that an earlier version began has no places.
            places = table["where"].to_pylist() if "where" in table.column_names else [""] * len(table)
            for row, columns in enumerate(table["columns"].to_pylist()):
                tokens = slice(offsets[row], offsets[row + 1])
                yield TokenSequence(ids[tokens], mask[tokens], json.loads(columns), places[row])


class ReadCorpus(Protocol):
    """Yields the sequences of a corpus and counts as `Corpus` does."""

    document_type: str | None
    num_documents: int
    skipped: Counter[str]
    notes: Counter[str]
    first_bad: str | None
    never_kept: set[str]

    def __iter__(self) -> Iterator[TokenSequence]: ...


def make_plan(
    folder: Folder,
    spec: Mapping[str, Any],
    corpus: ReadCorpus,
    shard_positions: int,
    fit: Callable[[BuildPlan], BuildPlan] | None = None,
) -> BuildPlan:
    """Tokenises the corpus into `folder` and cuts it into shards of about `shard_positions` positions.

    fit: sees the plan before it is written, and may replace it or raise UserError. Raises UserError for bad documents and for
    a corpus in which nothing can be trained.
    """

    def cut() -> BuildPlan:
        plan = _cut(folder, spec, corpus, shard_positions)
        return fit(plan) if fit else plan

    return new_plan(folder, cut, keep=ANSWERS_NAME if "generation" in spec else None)


def check_read(corpus: ReadCorpus, found: bool, what: str) -> None:
    """Logs the notes of a corpus that was read to its end.

    Raises UserError if nothing that was wanted was found, or a column of --keep never was.
    """
    for note, count in corpus.notes.items():
        logger.warning("%s %s", f"{count:,}", note)
    if not found:
        left_out = ", ".join(f"{count} {reason}" for reason, count in corpus.skipped.items()) or "none at all"
        raise UserError(f"the corpus holds no {what}: {corpus.num_documents} documents ({left_out})")
    if corpus.never_kept:
        raise UserError(f"--keep {', '.join(sorted(corpus.never_kept))}: no document has this column")


def _cut(folder: Folder, spec: Mapping[str, Any], corpus: ReadCorpus, shard_positions: int) -> BuildPlan:
    progress = Progress("reading", None, 0, "positions")
    shards: list[PlannedShard] = []
    digest, longest = hashlib.sha256(), 0
    types = ColumnTypes()
    sequences = iter(corpus)
    pending = next(sequences, None)
    while pending is not None:
        counts = {"num_sequences": 0, "num_positions": 0, "num_tokens": 0}
        with folder.writing(_tokens_name(len(shards))) as path, TokensWriter(path) as writer:
            while pending is not None and counts["num_positions"] < shard_positions:
                writer.write(pending)
                types.see(pending.columns)
                digest.update(pending.row_id.encode())
                longest = max(longest, len(pending.input_ids))
                counts["num_sequences"] += 1
                counts["num_positions"] += len(pending.positions)
                counts["num_tokens"] += len(pending.input_ids)
                progress.advance(len(pending.positions))
                pending = next(sequences, None)
        shards.append(PlannedShard(**counts))
    progress.close()
    check_read(corpus, bool(shards), "sequence to train on")
    return BuildPlan(
        folder=folder,
        spec=spec,
        layout=str(corpus.document_type),
        shards=tuple(shards),
        longest=longest,
        column_types=types.names(),
        num_documents=corpus.num_documents,
        skipped=dict(corpus.skipped),
        first_bad=corpus.first_bad,
        sequences_sha256=digest.hexdigest(),
    )


def _tokens_name(index: int) -> str:
    return f"{BUILD_DIRECTORY}/tokens/{index:05d}.parquet"

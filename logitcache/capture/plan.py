"""The plan of a build: the corpus tokenised once and cut into shards, kept beside the cache until it is finished.

    OUT/.build/logitcache           marks the folder as ours
    OUT/.build/plan.json            settings, shards, counts; its presence means that planning is complete
    OUT/.build/tokens/00000.parquet token sequences of shard 0, and so on
    OUT/.build/shards/00000.json    what the manifest will say of shard 0, once it is written
    OUT/.build/left_out/00000.json  rows of shard 0 for which the teacher gave NaN, only with --skip-bad
    OUT/.build/tail_groups.parquet  the partition, once it is made
    OUT/.build/ranges               held by the processes of shard ranges
    OUT/.build/answers              what the teacher answered, see `answers`; only with --generate
    OUT/.build/places, copied       rows that are copied from other caches, see `reuse`; only with --reuse

A resumed build reads its tokens from here: the corpus is not tokenised again, and every shard holds the same rows.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from logitcache.assembly.unfinished import PLAN_NAME, finished_shard, record_shard
from logitcache.assembly.workspace import ANSWERS_NAME, abandon, begin
from logitcache.capture.settings import CaptureSettings
from logitcache.capture.tokens import TokensWriter, read_tokens
from logitcache.errors import UserError
from logitcache.format.layout import Layout
from logitcache.format.manifest import BUILD_DIRECTORY
from logitcache.format.sequences import ColumnTypes, TokenSequence, stored_columns
from logitcache.format.shards import ShardInfo, shard_name
from logitcache.format.tail_groups import TAIL_GROUPS_NAME
from logitcache.progress import Progress
from logitcache.storage.folder import Folder

LEFT_OUT_NAME = f"{BUILD_DIRECTORY}/left_out"
PARTITION_NAME = f"{BUILD_DIRECTORY}/{TAIL_GROUPS_NAME}"

logger = logging.getLogger("logitcache")


@dataclass(frozen=True)
class PlannedShard:
    """Counts of one shard's rows, known before any is scored."""

    num_sequences: int
    num_positions: int
    num_tokens: int


@dataclass(frozen=True)
class Plan:
    """What a build will do. folder: the cache's. request: the settings that a resumed build must share."""

    folder: Folder
    request: Mapping[str, Any]
    layout: str
    shards: tuple[PlannedShard, ...]
    longest: int
    column_types: Mapping[str, str]
    num_documents: int
    skipped: Mapping[str, int]
    first_bad: str | None
    sequences_sha256: str

    @property
    def num_positions(self) -> int:
        """Positions of all shards."""
        return sum(shard.num_positions for shard in self.shards)

    @property
    def num_tokens(self) -> int:
        """Tokens that the teacher reads, prompts included: what a build takes its time for."""
        return sum(shard.num_tokens for shard in self.shards)

    @property
    def cache_layout(self) -> Layout:
        """Columns of every shard."""
        capture = {name: value for name, value in self.request["capture"].items() if name != "shard_positions"}
        return cache_layout(
            CaptureSettings.from_json(capture), self.request["teacher"]["vocab_size"], self.column_types
        )

    def shard_name(self, index: int) -> str:
        """Final name of a shard, relative to the cache."""
        return shard_name(index, len(self.shards))

    def missing(self, shards: Iterable[int]) -> list[int]:
        """Which of the shards are not complete."""
        return [index for index in shards if self.finished(index) is None]

    def sequences(self, index: int) -> Iterator[TokenSequence]:
        """The token sequences of a shard, in order."""
        with self.folder.open(_tokens_name(index)) as source:
            for sequence in read_tokens(source):
                yield replace(sequence, columns=stored_columns(self.column_types, sequence.columns))

    def finished(self, index: int) -> ShardInfo | None:
        """What was recorded of a shard, if it is complete."""
        return finished_shard(self.folder, index)

    @property
    def skips_bad(self) -> bool:
        """Whether rows that cannot be used are left out."""
        return bool(self.request["corpus"]["skip_bad"])

    def record_left_out(self, index: int, rows: Mapping[int, str]) -> None:
        """Writes down the rows of a shard that could not be scored, number to reason, before the shard is recorded."""
        name = f"{LEFT_OUT_NAME}/{index:05d}.json"
        if rows:
            self.folder.write(name, json.dumps(list(rows.items()), ensure_ascii=False))
        else:
            self.folder.remove(name)

    def left_out(self) -> dict[int, dict[int, str]]:
        """What was written down of the rows that could not be scored, by shard."""
        names = self.folder.names(LEFT_OUT_NAME)
        return {int(name[:5]): dict(json.loads(self.folder.read(f"{LEFT_OUT_NAME}/{name}"))) for name in sorted(names)}

    def record(self, index: int, info: ShardInfo) -> None:
        """Marks a shard as complete."""
        record_shard(self.folder, index, info)

    def write(self) -> None:
        """Writes plan.json atomically."""
        data = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "folder"}
        data["shards"] = [asdict(shard) for shard in self.shards]
        self.folder.write(PLAN_NAME, json.dumps(data, indent=2, ensure_ascii=False))


def cache_layout(settings: CaptureSettings, vocab_size: int, column_types: Mapping[str, str]) -> Layout:
    """Columns of the shards that a capture with these settings makes."""
    return Layout(vocab_size, settings.tail_parts, column_types, settings.precision)


def read_plan(folder: Folder) -> Plan:
    """The plan of an unfinished build whose request is this format's."""
    data = json.loads(folder.read(PLAN_NAME))
    shards = tuple(PlannedShard(**shard) for shard in data.pop("shards"))
    return Plan(folder=folder, shards=shards, **data)


class ReadCorpus(Protocol):
    """What yields the sequences of a corpus and counts as it does: see `Corpus`."""

    layout: str | None
    num_documents: int
    skipped: Counter[str]
    notes: Counter[str]
    first_bad: str | None
    never_kept: set[str]

    def __iter__(self) -> Iterator[TokenSequence]: ...


def make_plan(folder: Folder, request: Mapping[str, Any], corpus: ReadCorpus, shard_positions: int) -> Plan:
    """Tokenises the corpus into `folder` and cuts it into shards of about `shard_positions` positions.

    Raises UserError for bad documents and for a corpus in which nothing can be trained.
    """
    keep = ANSWERS_NAME if "generation" in request else None
    begin(folder, keep)
    try:
        return _cut(folder, request, corpus, shard_positions)
    except BaseException:
        abandon(folder, keep)
        raise


def check_read(corpus: ReadCorpus, found: bool, what: str) -> None:
    """Says what is to be known of a corpus that was read to its end.

    Raises UserError where it held none of what was wanted, or never a column of --keep.
    """
    for note, count in corpus.notes.items():
        logger.warning("%s %s", f"{count:,}", note)
    if not found:
        left_out = ", ".join(f"{count} {reason}" for reason, count in corpus.skipped.items()) or "none at all"
        raise UserError(f"the corpus holds no {what}: {corpus.num_documents} documents ({left_out})")
    if corpus.never_kept:
        raise UserError(f"--keep {', '.join(sorted(corpus.never_kept))}: no document has this column")


def _cut(folder: Folder, request: Mapping[str, Any], corpus: ReadCorpus, shard_positions: int) -> Plan:
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
    plan = Plan(
        folder=folder,
        request=request,
        layout=str(corpus.layout),
        shards=tuple(shards),
        longest=longest,
        column_types=types.names(),
        num_documents=corpus.num_documents,
        skipped=dict(corpus.skipped),
        first_bad=corpus.first_bad,
        sequences_sha256=digest.hexdigest(),
    )
    plan.write()
    return plan


def _tokens_name(index: int) -> str:
    return f"{BUILD_DIRECTORY}/tokens/{index:05d}.parquet"

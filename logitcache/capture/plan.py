"""The plan of a build: the corpus tokenised once and cut into shards, kept beside the cache until it is finished.

    OUT/.build/logitcache           marks the folder as ours
    OUT/.build/plan.json            settings, shards, counts; its presence means that planning is complete
    OUT/.build/tokens/00000.parquet token sequences of shard 0, and so on
    OUT/.build/shards/00000.json    what the manifest will say of shard 0, once it is written
    OUT/.build/tail_groups.parquet  the partition, once it is made

A resumed build reads its tokens from here: the corpus is not tokenised again, and every shard holds the same rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from logitcache.capture.corpus.tokenize import Corpus
from logitcache.capture.progress import Progress
from logitcache.capture.workspace import abandon, begin
from logitcache.errors import UserError
from logitcache.format.atomic import atomic_path, write_json
from logitcache.format.codec import flat
from logitcache.format.manifest import BUILD_DIRECTORY
from logitcache.format.sequences import TokenSequence
from logitcache.format.shards import ShardInfo, shard_name

TOKENS_SCHEMA = pa.schema(
    {"input_ids": pa.list_(pa.int32()), "loss_mask": pa.list_(pa.bool_()), "columns": pa.string()}
)
ROWS_PER_GROUP = 1024


@dataclass(frozen=True)
class PlannedShard:
    """Counts of one shard's rows, known before any is scored."""

    num_sequences: int
    num_positions: int


@dataclass(frozen=True)
class Plan:
    """What a build will do. root: the cache's folder. request: the settings that a resumed build must share."""

    root: Path
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

    def shard_name(self, index: int) -> str:
        """Final name of a shard, relative to the cache."""
        return shard_name(index, len(self.shards))

    def sequences(self, index: int) -> Iterator[TokenSequence]:
        """The token sequences of a shard, in order."""
        with pq.ParquetFile(_tokens_path(self.root, index)) as file:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group)
                ids, offsets = flat(table["input_ids"])
                mask, _ = flat(table["loss_mask"])
                for row, columns in enumerate(table["columns"].to_pylist()):
                    tokens = slice(offsets[row], offsets[row + 1])
                    kept = {name: _as(self.column_types[name], value) for name, value in json.loads(columns).items()}
                    yield TokenSequence(ids[tokens], mask[tokens], kept)

    def finished(self, index: int) -> ShardInfo | None:
        """What was recorded of a shard, if it is complete."""
        path = _sidecar_path(self.root, index)
        if not path.exists():
            return None
        info = ShardInfo.from_json(json.loads(path.read_text()))
        shard = self.root / info.name
        return info if shard.exists() and shard.stat().st_size == info.num_bytes else None

    def record(self, index: int, info: ShardInfo) -> None:
        """Marks a shard as complete."""
        write_json(_sidecar_path(self.root, index), info.to_json())

    def write(self) -> None:
        """Writes plan.json atomically."""
        data = {key: value for key, value in asdict(self).items() if key != "root"}
        write_json(self.root / BUILD_DIRECTORY / "plan.json", data)


def read_request(root: Path) -> dict[str, Any] | None:
    """What an unfinished build was asked to do, if it got as far as a plan."""
    path = root / BUILD_DIRECTORY / "plan.json"
    if not path.exists():
        return None
    request: dict[str, Any] = json.loads(path.read_text())["request"]
    return request


def read_plan(root: Path) -> Plan:
    """The plan of an unfinished build whose request is this format's."""
    data = json.loads((root / BUILD_DIRECTORY / "plan.json").read_text())
    shards = tuple(PlannedShard(**shard) for shard in data.pop("shards"))
    return Plan(root=root, shards=shards, **data)


def make_plan(root: Path, request: Mapping[str, Any], corpus: Corpus, shard_positions: int) -> Plan:
    """Tokenises the corpus into `root` and cuts it into shards of about `shard_positions` positions.

    Raises UserError for bad documents and for a corpus in which nothing can be trained.
    """
    try:
        return _cut(root, request, corpus, shard_positions)
    except BaseException:
        abandon(root)
        raise


def _cut(root: Path, request: Mapping[str, Any], corpus: Corpus, shard_positions: int) -> Plan:
    begin(root)
    (root / BUILD_DIRECTORY / "tokens").mkdir()
    (root / BUILD_DIRECTORY / "shards").mkdir()
    progress = Progress("reading", None, 0, "positions")
    shards: list[PlannedShard] = []
    digest, longest = hashlib.sha256(), 0
    types = _ColumnTypes()
    sequences = iter(corpus)
    pending = next(sequences, None)
    while pending is not None:
        counts = {"num_sequences": 0, "num_positions": 0}
        with atomic_path(_tokens_path(root, len(shards))) as path, _TokensWriter(path) as writer:
            while pending is not None and counts["num_positions"] < shard_positions:
                writer.write(pending)
                types.see(pending.columns)
                digest.update(pending.row_id.encode())
                longest = max(longest, len(pending.input_ids))
                counts["num_sequences"] += 1
                counts["num_positions"] += len(pending.positions)
                progress.advance(len(pending.positions))
                pending = next(sequences, None)
        shards.append(PlannedShard(**counts))
    progress.close()
    if not shards:
        left_out = ", ".join(f"{count} {reason}" for reason, count in corpus.skipped.items()) or "none at all"
        raise UserError(f"the corpus holds no sequence to train on: {corpus.num_documents} documents ({left_out})")
    if corpus.never_kept:
        raise UserError(f"--keep {', '.join(sorted(corpus.never_kept))}: no document has this column")
    plan = Plan(
        root=root,
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


class _TokensWriter:
    def __init__(self, path: Path) -> None:
        self._parquet = pq.ParquetWriter(path, TOKENS_SCHEMA, compression="zstd")
        self._rows: list[dict[str, Any]] = []

    def write(self, sequence: TokenSequence) -> None:
        columns = json.dumps(dict(sequence.columns), ensure_ascii=False, default=str)
        self._rows.append({"input_ids": sequence.input_ids, "loss_mask": sequence.loss_mask, "columns": columns})
        if len(self._rows) == ROWS_PER_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._parquet.write_table(pa.Table.from_pylist(self._rows, TOKENS_SCHEMA))
            self._rows.clear()

    def __enter__(self) -> _TokensWriter:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        with self._parquet:
            if kind is None:
                self._flush()


class _ColumnTypes:
    """Arrow type of each kept column: the one that all its values share, otherwise string, non-strings as JSON text."""

    def __init__(self) -> None:
        self._seen: dict[str, set[str]] = {}

    def see(self, columns: Mapping[str, Any]) -> None:
        for name, value in columns.items():
            types = self._seen.setdefault(name, set())
            if value is not None:
                types.add({bool: "bool", int: "int64", float: "double"}.get(type(value), "string"))
            if type(value) is int and not -(2**63) <= value < 2**63:
                types.add("string")

    def names(self) -> dict[str, str]:
        return {name: min(types) if len(types) == 1 else "string" for name, types in self._seen.items()}


def _as(column_type: str, value: Any) -> Any:
    if column_type != "string" or value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


def _tokens_path(root: Path, index: int) -> Path:
    return root / BUILD_DIRECTORY / "tokens" / f"{index:05d}.parquet"


def _sidecar_path(root: Path, index: int) -> Path:
    return root / BUILD_DIRECTORY / "shards" / f"{index:05d}.json"

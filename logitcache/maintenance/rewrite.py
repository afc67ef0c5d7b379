"""Rows of finished caches become a new cache beside them.

    OUT/.build/rows/00000       numbers of the source rows of shard 0, little-endian int64, and so on

See `logitcache.assembly.plan` for what else the build directory holds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from logitcache.assembly.card import common_licenses
from logitcache.assembly.finalize import finalize_cache, history_step, trusted_files
from logitcache.assembly.make import Work, make_cache
from logitcache.assembly.placement import Placement
from logitcache.assembly.plan import PLAN_NAME, Plan, PlannedShard
from logitcache.assembly.write import RowsOf, StoredRow
from logitcache.errors import UserError
from logitcache.format.layout import Layout
from logitcache.format.manifest import (
    BUILD_DIRECTORY,
    MANIFEST_NAME,
    TOKENIZER_DIRECTORY,
    Manifest,
    check_shape,
    source_of,
    without_secrets_of_sources,
)
from logitcache.format.sequences import CachedSequence, TokenSequence
from logitcache.format.shards import ShardInfo
from logitcache.format.tail_parts import TAIL_FILES
from logitcache.format.targets import SparseTargets
from logitcache.format.trusted import read_trusted
from logitcache.maintenance.row_scan import Rows
from logitcache.reading.cache import LogitCache, opened
from logitcache.storage.folder import Folder, refuse_overlap
from logitcache.version import CREATED_BY

_FINGERPRINT = {
    "teacher": dict.fromkeys(["name", "architecture", "dtype", "engine", "engine_version"], object),
    "corpus": {"sources": [{"name": str}]},
    "capture": {"top_k": int, "top_p": (float,), "min_k": (int,)},
}
"""What rewriting needs of a fingerprint, see `check_shape`."""


def open_source(path: LogitCache | str | Path, against: str | None = None) -> LogitCache:
    """Opens a cache to rewrite. Raises UserError as `open_cache` does, and for a fingerprint that no build wrote."""
    cache = opened(path, against)
    without_secrets_of_sources(cache.manifest)  # as the new manifest will hold them, before any work is done
    try:
        check_shape(cache.manifest.fingerprint, _FINGERPRINT, "fingerprint")
    except (KeyError, TypeError) as error:
        raise UserError(f"{cache.path}/{MANIFEST_NAME}: its fingerprint is of no build ({error!r})") from error
    return cache


Transform = Callable[[CachedSequence], SparseTargets]
"""Gives what is stored of a row."""


def _as_it_is(source: LogitCache) -> Transform:
    return lambda sequence: sequence.targets


@dataclass(frozen=True)
class Rewrite:
    """The work of a command that makes a new cache of finished ones.

    command, settings: plain JSON, for the history.  layout, fingerprint, skipped: of the new cache; the fingerprint without
    what follows from its rows.  select: the rows to keep, in ascending order.  transform: gives, of the first source, what is
    stored of a row; it travels to other hosts.  left_out: what the history calls the rows that are not kept.
    """

    command: str
    settings: Mapping[str, Any]
    sources: Sequence[LogitCache]
    layout: Layout
    fingerprint: Mapping[str, Any]
    skipped: Mapping[str, int]
    select: Callable[[Folder], Generator[Rows]]
    transform: Callable[[LogitCache], Transform] = _as_it_is
    left_out: str = "left_out"

    @property
    def merged(self) -> bool:
        """Tells whether there are several sources."""
        return len(self.sources) > 1

    def draft(self, sequences_sha256: str, shard_positions: int) -> dict[str, Any]:
        """Returns in plain JSON the new cache's manifest without shards, files and last step, and what else is said of it."""
        fingerprint = {
            **self.fingerprint,
            "corpus": {**self.fingerprint["corpus"], "sequences_sha256": sequences_sha256},
            "capture": {**self.fingerprint["capture"], "shard_positions": shard_positions},
            "format": {**self.fingerprint.get("format", {}), **self.layout.stored_format},
        }
        history = () if self.merged else self.sources[0].manifest.history
        manifest = Manifest(self.layout, fingerprint, (), self.skipped, CREATED_BY, {}, history)
        return {
            "manifest": without_secrets_of_sources(manifest).to_json(),
            "licenses": common_licenses(source.folder for source in self.sources),
            "num_sequences": sum(len(source) for source in self.sources),
            "left_out": self.left_out,
        }


@dataclass(frozen=True, kw_only=True)
class RewritePlan(Plan):
    """The plan of a rewrite.  draft: see `Rewrite.draft`; `finish` needs it. Empty in a plan that an earlier version wrote."""

    draft: Mapping[str, Any] = field(default_factory=dict)


def rewrite(
    work: Rewrite, out: str | Path, shard_positions: int, overwrite: bool, placement: Placement
) -> LogitCache | None:
    """Does the work, from where an interrupted call with the same arguments left it.

    out: a folder, or a URL that fsspec writes.  shard_positions: stored positions of a shard.  overwrite: replace what `out`
    holds, once the rows are chosen. Returns the cache; None with a shard range. Raises UserError if `out` is, holds or lies in a
    source, for a source that is damaged or selects no row, and as `make_cache` does.
    """
    if shard_positions < 1:
        raise UserError(f"--shard-positions {shard_positions}: at least 1 is needed")
    folder = Folder(out)
    for source in work.sources:
        refuse_overlap(f"--out {folder}", folder, source.folder)
    origins = [_origin(source, work.merged) for source in work.sources]
    spec = {"command": work.command, **work.settings, "shard_positions": shard_positions, "from": origins}
    making = Work(
        kind=RewritePlan,
        spec=spec,
        label=work.command,
        cut=lambda folder: _cut(folder, spec, work, shard_positions),
        prepare=lambda folder: _copy_files(work.sources[0], folder, work.layout),
        layout=lambda plan: work.layout,
        open_rows=_SourceRows(
            work.layout, work.transform, [_Source.of(source) for source in work.sources], work.sources
        ),
        finish=lambda plan, shards: finish_rewrite(
            replace(plan, draft=work.draft(plan.sequences_sha256, shard_positions)), shards
        ),
    )
    return make_cache(making, folder, placement, overwrite)


def _cut(folder: Folder, spec: Mapping[str, Any], work: Rewrite, shard_positions: int) -> RewritePlan:
    """Chooses the rows and deals them to shards: each takes rows until it has `shard_positions`."""
    digest = hashlib.sha256()
    shards: list[PlannedShard] = []
    pending: list[np.ndarray] = []
    num_positions = 0

    def close() -> None:
        numbers = np.concatenate(pending).astype("<i8")
        folder.write(_rows_name(len(shards)), numbers.tobytes())
        shards.append(PlannedShard(num_positions, len(numbers)))
        pending.clear()

    with closing(work.select(folder)) as selected:
        for rows in selected:
            digest.update(rows.ids.tobytes().hex().encode())
            numbers, counts = rows.numbers, rows.num_positions
            while len(numbers):
                reached = num_positions + counts.cumsum()
                take = int(np.searchsorted(reached, shard_positions)) + 1
                pending.append(numbers[:take])
                num_positions = int(reached[:take][-1])
                numbers, counts = numbers[take:], counts[take:]
                if num_positions >= shard_positions:
                    close()
                    num_positions = 0
    if pending:
        close()
    sha256 = digest.hexdigest()
    draft = work.draft(sha256, shard_positions)
    plan = RewritePlan(folder=folder, spec=spec, shards=tuple(shards), sequences_sha256=sha256, draft=draft)
    if not plan.num_positions:
        raise UserError(f"logitcache {work.command}: no row with a stored position is selected, nothing is written")
    return plan


def _rows_name(shard: int) -> str:
    return f"{BUILD_DIRECTORY}/rows/{shard:05d}"


class _Source(NamedTuple):
    """A source as another host opens it.  path: with the secrets that this needs."""

    path: str
    identity: str
    is_checked: bool

    @classmethod
    def of(cls, cache: LogitCache) -> _Source:
        return cls(str(cache.folder.local or cache.folder.path), cache.identity, cache.is_checked)

    def opened(self) -> LogitCache:
        cache = open_source(self.path, self.identity if self.is_checked else None)
        if cache.identity != self.identity:
            raise UserError(f"{cache.path}: on this host lies another cache than where the command was started")
        return cache


@dataclass(frozen=True)
class _SourceRows:
    """Opens what gives the rows of shards; it travels to other hosts, where the sources are opened anew by their paths."""

    layout: Layout
    transform: Callable[[LogitCache], Transform]
    sources: Sequence[_Source]
    opened: Sequence[LogitCache] = ()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "opened": ()}

    def __call__(self, plan: Plan) -> RowsOf:
        sources = self.opened or [source.opened() for source in self.sources]
        return partial(_rows, plan.folder, self.layout, sources, self.transform(sources[0]))


def _rows(
    folder: Folder, layout: Layout, sources: Sequence[LogitCache], transform: Transform, shard: int
) -> Iterator[StoredRow]:
    """Yields what is stored of the source rows of a shard. Raises UserError for a row whose id is not that of its tokens."""
    for sequence in _sequences(sources, np.frombuffer(folder.read(_rows_name(shard)), "<i8")):
        kept = {name: sequence.columns.get(name) for name in layout.columns}
        tokens = TokenSequence(sequence.input_ids, sequence.loss_mask, kept)
        if tokens.row_id != sequence.row_id:
            where = ", ".join(source.path for source in sources)
            raise UserError(
                f"{where}: row {sequence.row_id} was altered: the hash of its tokens is {tokens.row_id}. "
                "`logitcache verify` lists all that is wrong"
            )
        yield tokens, transform(sequence)


def _sequences(sources: Sequence[LogitCache], numbers: np.ndarray) -> Iterator[CachedSequence]:
    first = np.cumsum([0] + [len(source) for source in sources])
    owners = np.searchsorted(first, numbers, side="right") - 1
    for owner, row in zip(owners.tolist(), (numbers - first[owners]).tolist(), strict=True):
        yield sources[owner][row]


def _copy_files(source: LogitCache, folder: Folder, layout: Layout) -> None:
    """Copies the tokenizer's and the tail's files, checked against the source's manifest, in place of any others."""
    for name in (TOKENIZER_DIRECTORY, *TAIL_FILES):
        folder.remove(name)
    for name in source.manifest.files:
        if name not in TAIL_FILES or name in layout.tail_parts.files:
            folder.write(name, read_trusted(source.folder, source.manifest, name))


def finish_rewrite(plan: RewritePlan, shards: tuple[ShardInfo, ...]) -> LogitCache:
    """Makes a cache of all shards: what follows from its rows joins the fingerprint and the history of its source."""
    draft = plan.draft
    if not draft:
        raise UserError(f"{plan.folder} was begun by an earlier version: run the same command again")
    after = sum(shard.num_sequences for shard in shards)
    step = history_step(plan.spec, shards, **{draft["left_out"]: draft["num_sequences"] - after})
    planned = Manifest.from_json(draft["manifest"], plan.folder.where(PLAN_NAME))
    manifest = replace(
        planned,
        shards=shards,
        created_by=CREATED_BY,
        files=trusted_files(plan.folder),
        history=(*planned.history, step),
    )
    return finalize_cache(plan.folder, manifest, draft["licenses"])


def _origin(source: LogitCache, merged: bool) -> dict[str, Any]:
    """Returns the record of a source in the history; if there are several, also what each was made from."""
    manifest = source.manifest
    own = {name: manifest.fingerprint[name] for name in ("corpus", "generation") if name in manifest.fingerprint}
    return {
        **source_of(source.folder, source.identity, manifest),
        **({**own, "history": list(manifest.history)} if merged else {}),
    }

"""Rows of finished caches → a new cache beside them: planned, written shard by shard, sealed; resumed where it stopped.

    OUT/.build/plan.json        what was asked for, the stored positions of every shard; see `format.unfinished`
    OUT/.build/rows/00000       numbers of the source rows of shard 0, little-endian int64, and so on
    OUT/.build/shards/…         the shards that are complete

What is written of a row depends on nothing but the row, and the rows of a shard are decided before the first is written: a
rewrite that was interrupted anywhere ends in the same bytes as one that was not.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from logitcache.assembly.card import common_licenses
from logitcache.assembly.finalize import seal, trusted_files
from logitcache.assembly.resume import begun_plan, finished_cache
from logitcache.assembly.unfinished import PLAN_NAME, finished_shard, record_shard
from logitcache.assembly.workspace import abandon, begin, remove_former, workspace
from logitcache.errors import UserError
from logitcache.format.layout import FORMAT_VERSION, Layout
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
from logitcache.format.shards import ShardInfo, ShardWriter, shard_name
from logitcache.format.tail_groups import TAIL_GROUPS_NAME
from logitcache.format.targets import SparseTargets
from logitcache.format.trusted import read_trusted
from logitcache.maintenance.row_scan import Rows
from logitcache.progress import Progress
from logitcache.reading.cache import LogitCache, open_cache
from logitcache.storage.atomic import space_needed
from logitcache.storage.folder import Folder
from logitcache.version import __version__

logger = logging.getLogger("logitcache")


_FINGERPRINT = {
    "teacher": dict.fromkeys(["name", "architecture", "dtype", "engine", "engine_version"], object),
    "corpus": {"sources": [{"name": str}]},
    "capture": {"top_k": int, "top_p": (float,), "min_k": (int,)},
}
"""What rewriting needs of a fingerprint, see `check_shape`."""


def open_source(path: str | Path, against: str | None = None) -> LogitCache:
    """Opens a cache to rewrite. Raises UserError as `open_cache` does, and for a fingerprint that no build wrote."""
    cache = open_cache(path, against)
    without_secrets_of_sources(cache.manifest)  # as the new manifest will hold them, before any work is done
    try:
        check_shape(cache.manifest.fingerprint, _FINGERPRINT, "fingerprint")
    except (KeyError, TypeError) as error:
        raise UserError(f"{cache.path}/{MANIFEST_NAME}: its fingerprint is of no build ({error!r})") from error
    return cache


@dataclass(frozen=True)
class Rewrite:
    """What a command makes of its sources.

    command, settings: plain JSON, for the history.  layout, fingerprint, skipped: of the new cache; the fingerprint without
    what follows from its rows.  select: the rows to keep, in ascending order.  transform: what to store of a row.
    left_out: what the history calls the rows that are not kept.
    """

    command: str
    settings: Mapping[str, Any]
    sources: Sequence[LogitCache]
    layout: Layout
    fingerprint: Mapping[str, Any]
    skipped: Mapping[str, int]
    select: Callable[[Folder], Generator[Rows]]
    transform: Callable[[CachedSequence], SparseTargets] = lambda sequence: sequence.targets
    left_out: str = "left_out"

    @property
    def merged(self) -> bool:
        """Whether there are several sources."""
        return len(self.sources) > 1


def rewrite(work: Rewrite, out: str | Path, shard_positions: int, overwrite: bool) -> LogitCache:
    """Does the work, from where an interrupted call with the same arguments left it.

    out: a folder, or a URL that fsspec writes.  shard_positions: stored positions of a shard.  overwrite: replace what `out`
    holds, once the rows are chosen.

    Raises UserError where `out` is, holds or lies in a source, where it holds something else, for a source that is
    damaged or selects no row, and when the disk is full; whatever is complete by then stays for the next call.
    """
    if shard_positions < 1:
        raise UserError(f"--shard-positions {shard_positions}: at least 1 is needed")
    folder = Folder(out)
    for source in work.sources:
        _refuse_overlap(folder, source.folder)
    origins = [_origin(source, work.merged) for source in work.sources]
    request = {"command": work.command, **work.settings, "shard_positions": shard_positions, "from": origins}
    with workspace(folder), space_needed(out):
        if not overwrite and (finished := finished_cache(folder, request)):
            logger.info("%s is already complete", folder)
            return finished
        begun = begun_plan(folder, request, overwrite)
        if begun is not None:
            plan = _Plan(folder, **begun)
        else:
            plan = _make_plan(folder, request, work, shard_positions)
            remove_former(folder)
        _copy_files(work.sources[0], folder, work.layout)
        shards = _write_shards(plan, work)
        _finish(plan, work, shards)
    return open_cache(folder.path)


@dataclass(frozen=True)
class _Plan:
    """num_positions: stored positions of each shard.  sequences_sha256: of the row ids."""

    folder: Folder
    request: Mapping[str, Any]
    num_positions: list[int]
    sequences_sha256: str

    def rows(self, shard: int) -> np.ndarray:
        """Source rows of a shard, int64, ascending."""
        return np.frombuffer(self.folder.read(_rows_name(shard)), "<i8")


def _make_plan(folder: Folder, request: Mapping[str, Any], work: Rewrite, shard_positions: int) -> _Plan:
    begin(folder)
    try:
        return _cut(folder, request, work, shard_positions)
    except BaseException:
        abandon(folder)
        raise


def _cut(folder: Folder, request: Mapping[str, Any], work: Rewrite, shard_positions: int) -> _Plan:
    """Chooses the rows and deals them to shards: each takes rows until it has `shard_positions`."""
    digest = hashlib.sha256()
    num_positions: list[int] = []
    pending: list[np.ndarray] = []
    held = 0

    def close() -> None:
        folder.write(_rows_name(len(num_positions)), np.concatenate(pending).astype("<i8").tobytes())
        num_positions.append(held)
        pending.clear()

    with closing(work.select(folder)) as selected:
        for rows in selected:
            digest.update(rows.ids.tobytes().hex().encode())
            numbers, counts = rows.numbers, rows.num_positions
            while len(numbers):
                reached = held + counts.cumsum()
                take = int(np.searchsorted(reached, shard_positions)) + 1
                pending.append(numbers[:take])
                held = int(reached[:take][-1])
                numbers, counts = numbers[take:], counts[take:]
                if held >= shard_positions:
                    close()
                    held = 0
    if pending:
        close()
    if not sum(num_positions):
        raise UserError(f"logitcache {work.command}: no row with a stored position is selected, nothing is written")
    plan = _Plan(folder, request, num_positions, digest.hexdigest())
    data = {"request": request, "num_positions": num_positions, "sequences_sha256": plan.sequences_sha256}
    folder.write(PLAN_NAME, json.dumps(data, ensure_ascii=False))
    return plan


def _rows_name(shard: int) -> str:
    return f"{BUILD_DIRECTORY}/rows/{shard:05d}"


def _write_shards(plan: _Plan, work: Rewrite) -> tuple[ShardInfo, ...]:
    folder, count = plan.folder, len(plan.num_positions)
    shards = [finished_shard(folder, index) for index in range(count)]
    missing = [index for index, shard in enumerate(shards) if shard is None]
    if 0 < len(missing) < count:
        logger.info("continuing: %d of %d shards are complete", count - len(missing), count)
    total, left = sum(plan.num_positions), sum(plan.num_positions[index] for index in missing)
    progress = Progress(work.command, total, total - left, "positions")
    try:
        for index in missing:
            with ShardWriter(folder, shard_name(index, count), work.layout) as writer:
                for sequence in _sequences(work.sources, plan.rows(index)):
                    kept = {name: sequence.columns.get(name) for name in work.layout.columns}
                    tokens = TokenSequence(sequence.input_ids, sequence.loss_mask, kept)
                    if tokens.row_id != sequence.row_id:
                        where = ", ".join(source.path for source in work.sources)
                        raise UserError(
                            f"{where}: row {sequence.row_id} was altered: the hash of its tokens is {tokens.row_id}. "
                            "`logitcache verify` lists all that is wrong"
                        )
                    writer.write(tokens, work.transform(sequence))
                    progress.advance(len(sequence.positions))
            record_shard(folder, index, writer.info)
            shards[index] = writer.info
    finally:
        progress.close()
    return tuple(shard for shard in shards if shard is not None)


def _sequences(sources: Sequence[LogitCache], numbers: np.ndarray) -> Iterator[CachedSequence]:
    first = np.cumsum([0] + [len(source) for source in sources])
    owners = np.searchsorted(first, numbers, side="right") - 1
    for owner, row in zip(owners.tolist(), (numbers - first[owners]).tolist(), strict=True):
        yield sources[owner][row]


def _copy_files(source: LogitCache, folder: Folder, layout: Layout) -> None:
    """Tokenizer and tail groups, checked against the source's manifest, in place of any others."""
    folder.remove(TOKENIZER_DIRECTORY)
    folder.remove(TAIL_GROUPS_NAME)
    for name in source.manifest.files:
        if name != TAIL_GROUPS_NAME or layout.tail_parts.groups:
            folder.write(name, read_trusted(source.folder, source.manifest, name))


def _finish(plan: _Plan, work: Rewrite, shards: tuple[ShardInfo, ...]) -> None:
    folder = plan.folder
    before = sum(len(source) for source in work.sources)
    after = sum(shard.num_sequences for shard in shards)
    step = {
        **plan.request,
        "created_by": f"logitcache {__version__}",
        "sequences": after,
        "positions": sum(shard.num_positions for shard in shards),
        work.left_out: before - after,
    }
    quantization = work.layout.quantization
    stored = {"version": FORMAT_VERSION, "rounding": quantization.to_json() if quantization else None}
    fingerprint = {
        **work.fingerprint,
        "corpus": {**work.fingerprint["corpus"], "sequences_sha256": plan.sequences_sha256},
        "capture": {**work.fingerprint["capture"], "shard_positions": plan.request["shard_positions"]},
        "format": {**work.fingerprint.get("format", {}), **stored},
    }
    former = () if work.merged else work.sources[0].manifest.history
    manifest = Manifest(
        layout=work.layout,
        fingerprint=fingerprint,
        shards=shards,
        skipped=work.skipped,
        created_by=f"logitcache {__version__}",
        files=trusted_files(folder),
        history=(*former, step),
    )
    seal(folder, manifest, common_licenses(source.folder for source in work.sources))
    folder.remove(PLAN_NAME)  # without it nothing asks what else is left, should this be cut off
    folder.remove(BUILD_DIRECTORY)


def _origin(source: LogitCache, merged: bool) -> dict[str, Any]:
    """What a history says of a source; of one of several also what it was made from."""
    manifest = source.manifest
    own = {name: manifest.fingerprint[name] for name in ("corpus", "generation") if name in manifest.fingerprint}
    return {
        **source_of(source.folder, source.identity, manifest),
        **({**own, "history": list(manifest.history)} if merged else {}),
    }


def _refuse_overlap(out: Folder, source: Folder) -> None:
    """The source must outlive what is done to `out`."""
    inside, around = out.lies_in(source), source.lies_in(out)
    if inside and around:
        raise UserError(f"--out {out} is the cache that is read: choose another folder")
    if inside or around:
        inner, outer = (out, source) if inside else (source, out)
        raise UserError(f"--out {out}: {inner} lies in {outer}; choose a folder beside the cache that is read")

"""`logitcache build --reuse`: rows that finished caches have already are copied, only the others are scored.

    OUT/.build/places/00000       place of each row of shard 0 in the other caches, −1 if it is to be scored
    OUT/.build/copied/00000.json  what was copied to shard 0 and from where, once it is written

Nothing of a row says whether it was copied, so `--reuse` is no setting that a resumed build must repeat: places are looked up
anew by every call, for the shards that are left to it. Tail groups and tail basis are the other cache's; a build that has
its own already refuses a cache with different ones.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from logitcache.assembly.resume import compared, first_of
from logitcache.capture.plan import BuildPlan
from logitcache.errors import UserError
from logitcache.format.layout import Layout
from logitcache.format.manifest import BUILD_DIRECTORY, source_of
from logitcache.format.sequences import CachedSequence
from logitcache.format.tail_basis import TailBasis, read_tail_basis
from logitcache.format.tail_groups import read_tail_groups
from logitcache.format.tail_parts import TAIL_BASIS_NAME, TAIL_GROUPS_NAME, TailParts
from logitcache.reading.cache import LogitCache, open_cache
from logitcache.reading.row_index import RowIndex, id_bytes
from logitcache.storage.folder import Folder
from logitcache.urls import public_url
from logitcache.version import CREATED_BY

WINDOW_BYTES = 64 << 20
"""Bytes of decoded rows that are read in the other cache's order before they are written in ours."""

PLACES_NAME = f"{BUILD_DIRECTORY}/places"
COPIED_NAME = f"{BUILD_DIRECTORY}/copied"

logger = logging.getLogger("logitcache")


class ReusedCaches:
    """Finished caches whose rows a build copies. A row's place is its number, counted through all of them.

    They are opened when they are first needed, so that another process opens them itself.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = tuple(paths)

    def __reduce__(self) -> Any:
        return ReusedCaches, (self.paths,)

    def __str__(self) -> str:
        return ", ".join(map(public_url, self.paths))

    @cached_property
    def caches(self) -> list[LogitCache]:
        """The caches. Raises UserError for one that is not finished, or damaged."""
        return [_opened(path) for path in self.paths]

    @property
    def capture(self) -> Mapping[str, Any]:
        """The settings that the first cache was captured with."""
        manifest = self.caches[0].manifest
        return {"precision": manifest.layout.precision, **manifest.fingerprint.get("capture", {})}

    @cached_property
    def _first_places(self) -> np.ndarray:
        return np.cumsum([0] + [len(cache) for cache in self.caches])

    def check(self, spec: Mapping[str, Any], layout: Layout) -> None:
        """Raises UserError, naming what differs, for a cache whose rows are not those that a build with this spec would make."""
        wanted = _comparable(spec, layout)
        for cache in self.caches:
            found = list(compared(_comparable(cache.manifest.fingerprint, cache.manifest.layout), wanted))
            if found:
                what = first_of([f"{name} is {there} there, {here} here" for name, there, here in found])
                raise UserError(
                    f"--reuse {cache.path}: {what}. Its rows are not what this build would make: repeat its settings "
                    "(`logitcache recode` can bring it to fewer entries or a coarser precision) or leave --reuse out"
                )
            for kind in _calibrations(layout.tail_parts):
                if not _same(kind.of(self.caches[0]), kind.of(cache)):
                    raise UserError(f"--reuse {self.caches[0].path} {cache.path}: their {kind.words} not the same")

    def take_calibration(self, folder: Folder, parts: TailParts) -> None:
        """Makes tail groups and basis those of the build in `folder`, unless it has them. Raises UserError if it has others."""
        source = self.caches[0]
        for kind in _calibrations(parts):
            name, theirs = f"{BUILD_DIRECTORY}/{kind.name}", kind.of(source)
            if not folder.exists(name):
                folder.write(name, source.folder.read(kind.name))
                continue
            with folder.open(name) as file:
                if not _same(kind.read(file), theirs):
                    raise UserError(
                        f"--reuse {source.path}: its {kind.words} not those that {folder} was begun with: leave --reuse out, "
                        "or choose another --out"
                    )

    def match(self, plan: BuildPlan, shards: Sequence[int]) -> dict[int, int]:
        """Looks the rows of shards up, writes down their places, and returns the tokens of each shard that are left to score.

        All but the rows of one shard goes to disk: about 24 bytes for each row of the caches, for the time of the call.
        """
        local = plan.folder.local
        tokens_left = {}
        rows, copied = np.zeros(2, np.int64), np.zeros(2, np.int64)  # [sequences, positions]
        with tempfile.TemporaryDirectory(prefix="row-index-", dir=local and local / BUILD_DIRECTORY) as directory:
            index = RowIndex(Path(directory), self._row_ids(), int(self._first_places[-1]))
            for shard in shards:
                ids, positions, tokens = _counted(plan, shard)
                places = index.find(ids)
                plan.folder.write(_places_name(shard), np.stack([places, positions]).astype("<i8").tobytes())
                found = places >= 0
                tokens_left[shard] = int(tokens[~found].sum())
                rows += len(ids), positions.sum()
                copied += found.sum(), positions[found].sum()
        if copied[0]:
            share = f"{100 * copied[1] / rows[1]:.0f} % of the positions"
            logger.info("reusing %s of %s sequences (%s) from %s", f"{copied[0]:,}", f"{rows[0]:,}", share, self)
        else:
            logger.warning("warning: --reuse %s: no row of this corpus is there, all are scored", self)
        return tokens_left

    def _row_ids(self) -> Iterator[np.ndarray]:
        for cache in self.caches:
            for table in cache.iter_columns(["row_id"]):
                try:
                    yield id_bytes(table["row_id"].to_pylist())
                except (TypeError, ValueError) as error:
                    raise UserError(f"--reuse {cache.path}: {error}: fetch or build it again") from error

    def rows(self, places: np.ndarray, positions: np.ndarray) -> Iterator[CachedSequence]:
        """Yields the rows at places, int64 [n], in that order.  positions: how many stored positions each row has, int64 [n].

        Rows are read in windows of about `WINDOW_BYTES`, each in the order of the caches: a row group is decoded once for all
        the rows of a window, so rows in the caches' own order cost no more than a stream of them.
        """
        manifest = self.caches[0].manifest
        values = sum(count for _, count in manifest.layout.values_per_position().values())
        position_bytes = 4 * values + 8 * manifest.fingerprint["capture"]["top_k"]
        window = positions.cumsum() * position_bytes // WINDOW_BYTES
        for part in np.split(places, np.flatnonzero(np.diff(window)) + 1):
            decoded = {place: self._row(place) for place in np.unique(part).tolist()}
            yield from (decoded[place] for place in part.tolist())

    def _row(self, place: int) -> CachedSequence:
        owner = int(np.searchsorted(self._first_places, place, side="right")) - 1
        cached = self.caches[owner][place - int(self._first_places[owner])]
        # A copy: a view would keep its whole row group.
        return CachedSequence(
            cached.row_id,
            cached.input_ids,
            cached.loss_mask,
            cached.positions,
            cached.targets[np.arange(len(cached.targets))],
        )

    def sources(self, places: np.ndarray, positions: np.ndarray) -> list[dict[str, Any]]:
        """Returns what a history says about copied rows: each cache with any, and how much is from there."""
        owners = np.searchsorted(self._first_places, places, side="right") - 1
        return [
            {
                **self._origins[owner],
                "sequences": int((owners == owner).sum()),
                "positions": int(positions[owners == owner].sum()),
            }
            for owner in np.unique(owners).tolist()
        ]

    @cached_property
    def _origins(self) -> list[dict[str, Any]]:
        return [_origin(cache) for cache in self.caches]


def read_places(folder: Folder, shard: int) -> np.ndarray:
    """Returns the place of each row of a shard, −1 for none, and its stored positions: int64 [2, n]."""
    return np.frombuffer(folder.read(_places_name(shard)), "<i8").reshape(2, -1)


def record_copied(folder: Folder, shard: int, sources: list[dict[str, Any]]) -> None:
    """Writes down from where rows of a shard, which was just written, were copied."""
    name = f"{COPIED_NAME}/{shard:05d}.json"
    if sources:
        folder.write(name, json.dumps(sources))
    else:
        folder.remove(name)


def copied_history(folder: Folder) -> tuple[dict[str, Any], ...]:
    """Returns the step of the history for rows copied to the shards of a build; none if nothing was copied."""
    sources: dict[str, dict[str, Any]] = {}
    for name in folder.names(COPIED_NAME):
        for source in json.loads(folder.read(f"{COPIED_NAME}/{name}")):
            known = sources.setdefault(source["manifest_sha256"], {**source, "sequences": 0, "positions": 0})
            known["sequences"] += source["sequences"]
            known["positions"] += source["positions"]
    if not sources:
        return ()
    step = {
        "command": "build --reuse",
        "created_by": CREATED_BY,
        "sequences": sum(source["sequences"] for source in sources.values()),
        "positions": sum(source["positions"] for source in sources.values()),
        "from": list(sources.values()),
    }
    return (step,)


class _Calibration(NamedTuple):
    """A file beside the shards that holds for all rows.  of, read: of a cache and of a file, its content."""

    name: str
    words: str
    of: Callable[[LogitCache], Any]
    read: Callable[[BinaryIO], Any]


def _calibrations(parts: TailParts) -> Iterator[_Calibration]:
    """Yields those that a cache with these parts has."""
    if parts.groups:
        yield _Calibration(TAIL_GROUPS_NAME, "tail groups are", lambda cache: cache.tail_groups, read_tail_groups)
    if parts.rank:
        yield _Calibration(
            TAIL_BASIS_NAME,
            "tail basis is",
            lambda cache: cache.tail_basis,
            lambda file: read_tail_basis(file).first(parts.rank),
        )


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, TailBasis):
        return all(np.array_equal(values, vars(other)[name]) for name, values in vars(one).items())
    return np.array_equal(one, other)


def _opened(path: str) -> LogitCache:
    try:
        return open_cache(path)
    except UserError as error:
        raise UserError(f"--reuse {path}: {error}, or leave --reuse out: its rows are then scored") from error


def _comparable(fingerprint: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """Returns what must be the same for rows to be the same."""
    # The layout says the precision, also of caches that were written before there was a choice.
    elsewhere = {"shard_positions", "precision"}
    return {
        "teacher": fingerprint["teacher"],
        "tokenizer": fingerprint.get("tokenizer"),
        "precision": layout.precision,
        "rounding": layout.stored_format["rounding"],
        "capture": {name: value for name, value in fingerprint["capture"].items() if name not in elsewhere},
    }


def _counted(plan: BuildPlan, shard: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the id (as bytes, S16), stored positions and tokens (int64) of each row of a shard, all [n]."""
    rows = [(s.row_id, len(s.positions), len(s.input_ids)) for s in plan.sequences(shard)]
    ids, positions, tokens = zip(*rows, strict=True)
    return id_bytes(ids), np.array(positions), np.array(tokens)


def _origin(cache: LogitCache) -> dict[str, Any]:
    origin = source_of(cache.folder, cache.identity, cache.manifest)
    del origin["bytes"]  # of all its rows, few of which may be copied
    return {**origin, "history": list(cache.manifest.history)}


def _places_name(shard: int) -> str:
    return f"{PLACES_NAME}/{shard:05d}"

"""LogitCache reads a finished cache by row or as a stream. numpy only."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from io import BytesIO
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import BinaryIO, TypeVar

import numpy as np
import pyarrow as pa

from logitcache.errors import UserError
from logitcache.format.codec import DecodedRows
from logitcache.format.manifest import (
    MANIFEST_NAME,
    TOKENIZER_DIRECTORY,
    Manifest,
    check_identity,
    manifest_content,
    parse_manifest,
)
from logitcache.format.sequences import CachedSequence
from logitcache.format.tail_basis import MAX_TAIL_BASIS_BYTES, TailBasis, check_tail_basis, read_tail_basis
from logitcache.format.tail_groups import MAX_TAIL_GROUPS_BYTES, read_tail_groups
from logitcache.format.tail_parts import TAIL_BASIS_NAME, TAIL_GROUPS_NAME
from logitcache.format.tokenizer import read_tokenizer
from logitcache.format.trusted import read_trusted
from logitcache.reading.local_copies import LocalCopies
from logitcache.reading.order import Step, rank_part, steps
from logitcache.reading.shard_reader import ShardReader, TemporaryCopies
from logitcache.storage.folder import Folder
from logitcache.storage.prefetch import begun_ahead, prefetched

T = TypeVar("T")

SHUFFLE_ROW_GROUPS = 16
"""Row groups that a shuffled stream mixes at any time: its memory is about 16 × 4 MiB, and what is read ahead."""
COPIED_AHEAD = 16
"""Row groups whose shards are being copied from a store before they are needed: shuffled, the first are all of other shards."""
COPYING_THREADS = 4


def open_cache(path: str | Path, against: str | None = None) -> LogitCache:
    """Opens a finished cache.

    Streams of a remote cache copy its shards to this machine, see `reading.local_copies`, and check their SHA-256. Single rows,
    and streams of shards for which copies have no room, are read by ranges, of which only each page's CRC is checked: that finds
    damage, but not what somebody altered. With `against`, shards are copied whole and checked for every read; shards for which
    local copies have no room lie in a temporary folder until the cache object is gone.

    Args:
        path: Folder, or any URL that fsspec reads.
        against: Identity that the cache must have, as `logitcache build` and `push` print it.

    Returns:
        The cache, of which nothing but the manifest has been read.

    Raises:
        UserError: The cache is missing or unfinished, has another identity or a newer format, or a shard is missing or truncated.
    """
    return LogitCache(str(path), against)


def opened(cache: LogitCache | str | Path, against: str | None = None) -> LogitCache:
    """Returns the cache, opened unless it is open; with `against` it is opened anew, as its files are then checked."""
    if isinstance(cache, LogitCache) and against is None:
        return cache
    return open_cache(path_of(cache), against)


def path_of(cache: LogitCache | str | Path) -> str:
    """Returns the path or URL of a cache, with the secrets that opening it needs."""
    return str(cache.folder.path if isinstance(cache, LogitCache) else cache)


class LogitCache(Sequence[CachedSequence]):
    """A finished cache: `len(cache)` rows, `cache[i]`, `cache.iter_sequences(...)`, `cache.iter_row_groups(...)`.

    path: where it lies, without the secrets of a URL; `folder` opens it again.
    manifest: fingerprint, layout, shards.  num_positions: stored positions of all rows.  identity: SHA-256 of the manifest as
    it was read, by which a cache is told from an altered one.  is_checked: whether it was opened with an identity.
    """

    def __init__(self, path: str, against: str | None = None) -> None:
        self.folder = Folder(path)
        self.path = str(self.folder)
        content = manifest_content(self.folder)
        self.identity = hashlib.sha256(content).hexdigest()
        check_identity(self.identity, against, path)
        self.is_checked = against is not None
        self.manifest: Manifest = parse_manifest(content, self.folder.where(MANIFEST_NAME))
        self._copies = None if self.folder.local else LocalCopies(self.manifest.shards)
        whole = TemporaryCopies() if self._copies is not None and against is not None else None
        self._shards = [
            ShardReader(self.folder, info, self.manifest.layout, self._copies, whole) for info in self.manifest.shards
        ]
        for parent in {str(PurePosixPath(info.name).parent) for info in self.manifest.shards}:
            with suppress(Exception):  # a store that lists a folder knows its sizes then; others are asked for each
                self.folder.names(parent)
        for shard in self._shards:
            shard.check_size()
        self._first_rows = np.cumsum([0] + [info.num_sequences for info in self.manifest.shards])
        self._recent: tuple[int, DecodedRows] | None = None

    def __repr__(self) -> str:
        return f"LogitCache({self.path!r}, {len(self)} sequences, {self.num_positions} positions)"

    def __len__(self) -> int:
        return int(self._first_rows[-1])

    @property
    def num_positions(self) -> int:
        """Number of stored positions of all rows."""
        return self.manifest.num_positions

    @property
    def vocab_size(self) -> int:
        """Number of tokens of the teacher's vocabulary, V."""
        return self.manifest.layout.vocab_size

    @property
    def tokenizer_path(self) -> str:
        """Folder (or URL) of the teacher's tokenizer."""
        return f"{self.path.rstrip('/')}/{TOKENIZER_DIRECTORY}"

    @cached_property
    def tail_groups(self) -> np.ndarray | None:
        """Tail group of each token id, int32 [V]; None if the cache holds no tail groups."""
        layout = self.manifest.layout

        def read(file: BinaryIO) -> np.ndarray:
            groups = read_tail_groups(file)
            if len(groups) != layout.vocab_size or not 0 <= groups.min() <= groups.max() < layout.tail_parts.groups:
                raise ValueError(f"it is not of {layout.vocab_size:,} ids in {layout.tail_parts.groups:,} groups")
            return groups

        return self._beside(TAIL_GROUPS_NAME, MAX_TAIL_GROUPS_BYTES, read) if layout.tail_parts.groups else None

    @cached_property
    def tail_basis(self) -> TailBasis | None:
        """The basis of the tail's coefficients, with as many directions as the cache has of these; None in a cache without."""
        layout = self.manifest.layout
        rank = layout.tail_parts.rank

        def read(file: BinaryIO) -> TailBasis:
            basis = read_tail_basis(file)
            check_tail_basis(basis, layout)
            return basis.first(rank)

        return self._beside(TAIL_BASIS_NAME, MAX_TAIL_BASIS_BYTES, read) if rank else None

    def _beside(self, name: str, at_most: int, read: Callable[[BinaryIO], T]) -> T:
        """Reads a file that holds for all positions. Raises UserError if it is not the manifest's, or `read` ValueError."""
        content = read_trusted(self.folder, self.manifest, name, at_most)
        try:
            return read(BytesIO(content))
        except ValueError as error:
            raise UserError(
                f"{self.folder.where(name)} was altered ({error}): fetch it or build the cache again"
            ) from error

    def tokenizer_files(self) -> dict[str, bytes] | None:
        """Returns the checked files of the teacher's tokenizer by their names in `tokenizer/`; None without a tokenizer.

        Raises:
            UserError: As `tokenizer.read_tokenizer` does.
        """
        return read_tokenizer(self.folder, self.manifest)

    @cached_property
    def _row_groups(self) -> np.ndarray:
        """(shard, row group, first row, rows) of every row group: int64 [R, 4]."""
        counts = np.array([len(info.row_group_sizes) for info in self.manifest.shards], dtype=np.int64)
        sizes = chain.from_iterable(info.row_group_sizes for info in self.manifest.shards)
        rows = np.fromiter(sizes, dtype=np.int64, count=int(counts.sum()))
        index = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.stack([np.repeat(np.arange(len(counts)), counts), index, np.cumsum(rows) - rows, rows], axis=1)

    def __getitem__(self, row: int) -> CachedSequence:  # type: ignore[override]
        if row < 0:
            row += len(self)
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a cache of {len(self)}")
        row_group, row_in_it = self.row_group_of(row)
        return self._read(row_group)[row_in_it]

    def row_group_of(self, row: int) -> tuple[int, int]:
        """Returns the number of the row group of row 0 ≤ `row` < len, counted through all shards, and the row's place in it."""
        index = int(np.searchsorted(self._row_groups[:, 2], row, side="right")) - 1
        return index, row - int(self._row_groups[index, 2])

    def _read(self, index: int) -> DecodedRows:
        """Returns row group `index`. The row group that was read last is kept."""
        recent = self._recent  # read once: another thread may replace it at any time
        if recent is None or recent[0] != index:
            recent = self._recent = (index, self._decode(index))
        return recent[1]

    def _decode(self, index: int) -> DecodedRows:
        shard, row_group = (int(value) for value in self._row_groups[index, :2])
        return self._shards[shard].read_row_group(row_group)

    def read_row_group(self, index: int) -> DecodedRows:
        """Decodes a row group. A remote shard is copied whole: streams need all of it sooner or later.

        Args:
            index: Its number, counted through all shards.
        """
        self._copy(index)
        return self._decode(index)

    def _copy(self, index: int) -> None:
        self._shards[int(self._row_groups[index, 0])].copy()

    def __iter__(self) -> Iterator[CachedSequence]:
        return self.iter_sequences()

    def iter_sequences(
        self, shuffle: bool = False, seed: int = 0, shard: tuple[int, int] = (0, 1), start: int = 0
    ) -> SequenceStream:
        """Streams the rows once, reading row groups ahead in the background.

        Args:
            shuffle: Row groups come in an order drawn from `seed`, rows are drawn from 16 row groups at a time.
            seed: Decides the order.
            shard: (rank, world). Every rank gets len/world rows (±1), no row twice, and reads its own row groups only (two
                ranks share the row group at their border).
            start: Rows of this stream that are left out at its beginning. The stream's `position` counts on from it, so that
                `iter_sequences(..., start=stream.position)` continues exactly where `stream` was.

        Raises:
            UserError: If `start` is below 0 or `shard` is no part of a whole; while it is read, if a shard is altered.
        """
        if start < 0:
            raise UserError(f"start={start}: 0 or more rows can be left out")
        part = self._part(shuffle, seed, shard)
        rows = _rows(self, self._steps(part, shuffle, seed, start), _window(shuffle))
        return SequenceStream(rows, int((part[:, 2] - part[:, 1]).sum()), start)

    def stream_order(self, shuffle: bool = False, seed: int = 0, shard: tuple[int, int] = (0, 1)) -> np.ndarray:
        """Returns the numbers of the rows that `iter_sequences` streams, in its order: int64 [n], from the manifest alone.

        Args:
            shuffle: As for `iter_sequences`.
            seed: As for `iter_sequences`.
            shard: As for `iter_sequences`.
        """
        part = self._part(shuffle, seed, shard)
        rows = [step.rows for step in self._steps(part, shuffle, seed)]
        row_group, row = np.concatenate([np.empty((0, 2), np.int64), *rows]).T
        numbers: np.ndarray = self._row_groups[row_group, 2] + row
        return numbers

    def iter_columns(self, columns: Sequence[str], first: int = 0, end: int | None = None) -> Iterator[pa.Table]:
        """Streams columns of some rows as they are stored, by row groups.

        Nothing else is read or decoded, nor row groups without such a row.

        Args:
            columns: The names of the columns.
            first: The first row.
            end: The row after the last one; None: all rows from `first` on.
        """
        end = len(self) if end is None else end
        begins, sizes = self._row_groups[:, 2], self._row_groups[:, 3]
        wanted = (begins + sizes > first) & (begins < end)
        for shard, row_group, begin, _ in self._row_groups[wanted].tolist():
            table = self._shards[shard].read_columns(row_group, columns)
            skipped = max(first - begin, 0)
            yield table.slice(skipped, end - begin - skipped)

    def iter_row_groups(
        self, shuffle: bool = False, seed: int = 0, shard: tuple[int, int] = (0, 1)
    ) -> Iterator[DecodedRows]:
        """Streams whole row groups, reading ahead: for what needs [M, k] arrays of some thousand positions and no single rows.

        Each has `row_ids`, `input_ids`, `loss_mask` and `targets` of all its rows, with offsets, and is a sequence of them.

        Args:
            shuffle: Row groups come in an order drawn from `seed`; the rows of a row group stay in theirs.
            seed: Decides the order.
            shard: (rank, world). Every rank gets its share of the row groups.
        """
        rank, world = _checked(shard)
        order = self._order(shuffle, seed)[rank::world].tolist()
        return prefetched(self.read_row_group, self._copied_ahead(order, lambda index: index))

    def _copied_ahead(self, items: Iterable[T], row_group: Callable[[T], int | None]) -> Iterator[T]:
        """Passes items on. Meanwhile the shards of the next items' row groups are copied, if the cache is remote."""
        if self._copies is None:
            return iter(items)

        def copy(item: T) -> None:
            if (index := row_group(item)) is not None:
                self._copy(index)

        return begun_ahead(copy, items, COPIED_AHEAD, COPYING_THREADS)

    def _part(self, shuffle: bool, seed: int, shard: tuple[int, int]) -> np.ndarray:
        return rank_part(self._row_groups[:, 3], self._order(shuffle, seed), *_checked(shard))

    def _steps(self, part: np.ndarray, shuffle: bool, seed: int, start: int = 0) -> Iterator[Step]:
        return steps(part, _window(shuffle), seed if shuffle else None, start)

    def _order(self, shuffle: bool, seed: int) -> np.ndarray:
        count = len(self._row_groups)
        return np.random.default_rng(seed).permutation(count) if shuffle else np.arange(count)


class SequenceStream(Iterator[CachedSequence]):
    """One pass over a rank's part of a cache. Dropping it ends its threads and frees its row groups.

    position: rows handed out so far, those before `start` included.  len: rows of the whole pass.
    """

    def __init__(self, rows: Iterator[CachedSequence], length: int, start: int) -> None:
        self._rows = rows
        self._length = length
        self.position = start

    def __len__(self) -> int:
        return self._length

    def __next__(self) -> CachedSequence:
        sequence = next(self._rows)
        self.position += 1
        return sequence


def _rows(cache: LogitCache, order: Iterator[Step], window: int) -> Iterator[CachedSequence]:
    def read(step: Step) -> tuple[Step, DecodedRows | None]:
        return step, None if step.row_group is None else cache.read_row_group(step.row_group)

    open_groups: dict[int | None, DecodedRows] = {}
    for step, decoded in prefetched(read, cache._copied_ahead(order, lambda step: step.row_group)):
        if decoded is not None:
            if len(open_groups) == window:
                del open_groups[next(iter(open_groups))]
            open_groups[step.row_group] = decoded
        for row_group, row in step.rows.tolist():
            yield open_groups[row_group][row]


def _window(shuffle: bool) -> int:
    return SHUFFLE_ROW_GROUPS if shuffle else 1


def _checked(shard: tuple[int, int]) -> tuple[int, int]:
    rank, world = shard
    if not 0 <= rank < world:
        raise UserError(f"shard=({rank}, {world}): the rank must lie in 0…world−1")
    return shard

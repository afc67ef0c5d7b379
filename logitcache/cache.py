"""LogitCache: a finished cache, read by row or as a stream. numpy only."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from io import BytesIO
from pathlib import Path

import numpy as np

from logitcache.errors import UserError
from logitcache.format.codec import DecodedRows
from logitcache.format.manifest import TOKENIZER_DIRECTORY, Manifest, read_manifest
from logitcache.format.sequences import CachedSequence
from logitcache.format.shard_reader import ShardReader
from logitcache.format.storage import Folder
from logitcache.format.tail_groups import TAIL_GROUPS_NAME, read_tail_groups

SHUFFLE_ROW_GROUPS = 16
"""Row groups that a shuffled stream mixes at a time: its memory is about 16 × 4 MiB."""


def open_cache(path: str | Path) -> LogitCache:
    """Opens a finished cache, local or at any URL that fsspec reads.

    Raises UserError for a missing or unfinished cache, a newer format, and a shard that is missing or truncated.
    """
    return LogitCache(str(path))


class LogitCache(Sequence[CachedSequence]):
    """A finished cache: `len(cache)` rows, `cache[i]`, `cache.iter_sequences(...)`.

    manifest: fingerprint, layout, shards.  num_positions: stored positions of all rows.
    """

    def __init__(self, path: str) -> None:
        self._folder = Folder(path)
        self.path = path
        self.manifest: Manifest = read_manifest(self._folder)
        self._shards = [ShardReader(self._folder, info) for info in self.manifest.shards]
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
        """Stored positions of all rows."""
        return self.manifest.num_positions

    @property
    def vocab_size(self) -> int:
        """V of the teacher."""
        return self.manifest.layout.vocab_size

    @property
    def tokenizer_path(self) -> str:
        """Folder (or URL) of the teacher's tokenizer."""
        return f"{self.path.rstrip('/')}/{TOKENIZER_DIRECTORY}"

    @cached_property
    def tail_groups(self) -> np.ndarray | None:
        """Tail group of each token id, int32 [V], or None where the cache holds no tail groups."""
        if not self.manifest.layout.num_tail_groups:
            return None
        path = self._folder.where(TAIL_GROUPS_NAME)
        try:
            content = self._folder.read(TAIL_GROUPS_NAME)
            if self.manifest.files.get(TAIL_GROUPS_NAME) != hashlib.sha256(content).hexdigest():
                raise ValueError("its SHA-256 is not the manifest's")
            return read_tail_groups(BytesIO(content))
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is missing or was altered ({error}): fetch it or build the cache again") from error

    @cached_property
    def _row_groups(self) -> np.ndarray:
        """(shard, row group, first row, rows) of every row group: int64 [R, 4]."""
        table = []
        first = 0
        for shard, info in enumerate(self.manifest.shards):
            for index, rows in enumerate(info.row_group_sizes):
                table.append((shard, index, first, rows))
                first += rows
        return np.array(table, dtype=np.int64).reshape(-1, 4)

    def __getitem__(self, row: int) -> CachedSequence:  # type: ignore[override]
        if row < 0:
            row += len(self)
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a cache of {len(self)}")
        index = int(np.searchsorted(self._row_groups[:, 2], row, side="right")) - 1
        return self._read(index)[row - int(self._row_groups[index, 2])]

    def _read(self, index: int) -> DecodedRows:
        """Row group `index`; the last one read is kept."""
        recent = self._recent  # read once: another thread may replace it at any time
        if recent is None or recent[0] != index:
            shard, group = (int(value) for value in self._row_groups[index, :2])
            recent = self._recent = (index, self._shards[shard].read_row_group(group))
        return recent[1]

    def __iter__(self) -> Iterator[CachedSequence]:
        return self.iter_sequences()

    def iter_sequences(
        self, shuffle: bool = False, seed: int = 0, shard: tuple[int, int] = (0, 1), start: int = 0
    ) -> SequenceStream:
        """Streams the rows once.

        shuffle: row groups in an order drawn from `seed`, rows drawn from 16 row groups at a time.
        shard: (rank, world); every rank gets len/world rows (±1), no row twice, reading its own row groups only
        (two ranks share the one at their border).
        start: rows of this stream to leave out at its beginning; the stream's `position` counts on from it, so that
        `iter_sequences(..., start=stream.position)` continues exactly where `stream` was.
        """
        rank, world = shard
        if not 0 <= rank < world:
            raise UserError(f"shard=({rank}, {world}): the rank must lie in 0…world−1")
        return SequenceStream(self, shuffle, seed, rank, world, start)


class SequenceStream(Iterator[CachedSequence]):
    """One pass over a rank's part of a cache.

    position: rows handed out so far, `start` included.  len: rows of the whole pass.
    """

    def __init__(self, cache: LogitCache, shuffle: bool, seed: int, rank: int, world: int, start: int) -> None:
        self.position = start
        self._length = (len(cache) * (rank + 1)) // world - (len(cache) * rank) // world
        self._rows = self._generate(cache, shuffle, seed, (len(cache) * rank) // world, start)

    def __len__(self) -> int:
        return self._length

    def __next__(self) -> CachedSequence:
        sequence = next(self._rows)
        self.position += 1
        return sequence

    def _generate(
        self, cache: LogitCache, shuffle: bool, seed: int, first: int, start: int
    ) -> Iterator[CachedSequence]:
        random = np.random.default_rng(seed)
        groups = cache._row_groups
        order = random.permutation(len(groups)) if shuffle else np.arange(len(groups))
        ends = np.cumsum(groups[order, 3])
        window = SHUFFLE_ROW_GROUPS if shuffle else 1
        # The rank's rows are [first, first + length) of the row groups laid end to end in `order`.
        mine = np.flatnonzero((ends > first) & (ends - groups[order, 3] < first + self._length))
        handed_out = 0
        for at in range(0, len(mine), window):
            slots = mine[at : at + window]
            rows = []  # (slot, row in its row group) of every row of this window that is the rank's
            for slot in slots:
                begin = int(ends[slot] - groups[order[slot], 3])
                low, high = max(first, begin) - begin, min(first + self._length, int(ends[slot])) - begin
                rows += [(slot, row) for row in range(low, high)]
            drawn = random.permutation(len(rows)) if shuffle else np.arange(len(rows))
            skip = min(max(start - handed_out, 0), len(rows))
            handed_out += len(rows)
            if skip == len(rows):
                continue
            decoded = {slot: cache._read(int(order[slot])) for slot in {rows[i][0] for i in drawn[skip:]}}
            for i in drawn[skip:]:
                slot, row = rows[i]
                yield decoded[slot][row]
            decoded.clear()  # before the next window is read

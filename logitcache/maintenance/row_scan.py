"""Rows of caches are listed by number, id and length, without reading a target."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from logitcache.errors import UserError, one_line
from logitcache.progress import Progress
from logitcache.reading.cache import LogitCache
from logitcache.reading.row_index import id_bytes


@dataclass(frozen=True)
class Rows:
    """Some rows of the sources, in order.

    numbers: int64 [n], counted through all sources.  ids: S16 [n], the row ids' bytes.  num_positions: int64 [n], stored
    positions.
    """

    numbers: np.ndarray
    ids: np.ndarray
    num_positions: np.ndarray

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, kept: np.ndarray) -> Rows:
        """Selects rows by a mask, bool [n], or by indices, int [m]."""
        return Rows(self.numbers[kept], self.ids[kept], self.num_positions[kept])

    @classmethod
    def joined(cls, parts: Sequence[Rows]) -> Rows:
        """Joins parts, one after the other."""
        return cls(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls)))


def scan(
    sources: Sequence[LogitCache], columns: Sequence[str] = (), first: int = 0, end: int | None = None
) -> Generator[tuple[Rows, pa.Table]]:
    """Yields rows first … end − 1, counted through all sources (default: all), by row groups, with loss masks and `columns`.

    Of other columns and of row groups without such rows nothing is read.
    """
    begin, number = 0, first
    end = sum(len(source) for source in sources) if end is None else end
    progress = Progress("reading", end - first, 0, "sequences")
    try:
        for source in sources:
            for table in source.iter_columns(["row_id", "loss_mask", *columns], first - begin, end - begin):
                mask = table["loss_mask"].combine_chunks()
                trained = pc.list_flatten(mask).to_numpy(zero_copy_only=False)
                rows = Rows(
                    numbers=np.arange(number, number + len(table)),
                    ids=_ids(table["row_id"], source),
                    num_positions=np.bincount(pc.list_parent_indices(mask).to_numpy()[trained], minlength=len(table)),
                )
                yield rows, table
                number += len(table)
                progress.advance(len(table))
            begin += len(source)
    finally:
        progress.close()


def _ids(row_ids: pa.ChunkedArray, source: LogitCache) -> np.ndarray:
    try:
        return id_bytes(row_ids.to_pylist())
    except (TypeError, ValueError) as error:
        raise UserError(f"{source.path} holds {one_line(error)}: fetch or build it again") from error

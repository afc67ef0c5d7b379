"""Which rows a cache has, by id: memory does not grow with them."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from logitcache import LogitCache, UserError
from logitcache.reading.row_index import RowIndex, id_bytes


def row_ids(cache: LogitCache) -> Iterator[np.ndarray]:
    """The bytes of the row ids, S16 arrays in row order; reads nothing else. Raises UserError for what is no row id."""
    for table in cache.iter_columns(["row_id"]):
        try:
            yield id_bytes(table["row_id"].to_pylist())
        except (TypeError, ValueError) as error:
            raise UserError(f"{cache.path}: {error}: fetch or build it again") from error


class RowNumbers:
    """Row id → row number of a cache, 24 bytes a row in a temporary folder that goes with this object."""

    def __init__(self, cache: LogitCache) -> None:
        folder = tempfile.mkdtemp(prefix="row-ids-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._index = RowIndex(Path(folder), row_ids(cache), len(cache))

    def find(self, ids: np.ndarray) -> np.ndarray:
        """Row number of each id, int64 [n], −1 where there is none. ids: S16 [n]."""
        return self._index.find(ids)


def rows_held(caches: Sequence[LogitCache], cache: LogitCache) -> int:
    """How many rows of `cache` one of `caches` holds too."""
    numbers = RowNumbers(cache)
    shared = np.zeros(len(cache) + 1, bool)  # the last for ids that are not there
    for other in caches:
        for ids in row_ids(other):
            shared[numbers.find(ids)] = True
    shared[-1] = False
    return sum(int(shared[numbers.find(ids)].sum()) for ids in row_ids(cache))

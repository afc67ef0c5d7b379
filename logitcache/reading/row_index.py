"""An index finds the row number of a row id. It is sorted on disk: memory does not grow with the rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

ROWS_PER_BUCKET = 1 << 20
"""Rows that are sorted at a time, 24 MiB of them."""
ROWS_PER_BATCH = 1 << 16

RECORD = np.dtype([("id", "S16"), ("row", "<i8")])


def id_bytes(row_ids: Sequence[str]) -> np.ndarray:
    """Returns the 16 bytes of each row id, S16 [n]. Raises ValueError for an id that is not 32 hexadecimal digits."""
    content = bytes.fromhex("".join(row_ids))
    if len(content) != 16 * len(row_ids) or any(len(row_id) != 32 for row_id in row_ids):
        raise ValueError("a row id that is not 32 hexadecimal digits")
    return np.frombuffer(content, "S16")


class RowIndex:
    """Rows of caches by their ids.  directory: an empty one, to keep as long as the index is used.

    row_ids: S16 arrays that together hold `count` ids, in row order. Ids are hashes, so dealing them by their first bits gives
    buckets of about equal size; each is sorted in memory.
    """

    def __init__(self, directory: Path, row_ids: Iterable[np.ndarray], count: int) -> None:
        num_buckets = max(1, -(-count // ROWS_PER_BUCKET))
        first = 0
        for ids in _batches(row_ids):
            records = np.empty(len(ids), RECORD)
            records["id"], records["row"] = ids, np.arange(first, first + len(ids))
            first += len(ids)
            leading = ids.view(">u4")[::4].astype(np.uint64)
            deal(directory, records, (leading * np.uint64(num_buckets)) >> np.uint64(32))
        with (directory / "ids").open("wb") as sorted_ids, (directory / "rows").open("wb") as rows:
            for path in (directory / str(bucket) for bucket in range(num_buckets)):
                if path.exists():
                    bucket = np.fromfile(path, RECORD)
                    order = np.argsort(bucket["id"], kind="stable")  # of equal ids the first row comes first
                    sorted_ids.write(bucket["id"][order].tobytes())
                    rows.write(bucket["row"][order].tobytes())
                    path.unlink()
        self._ids = _mapped(directory / "ids", "S16")
        self._rows = _mapped(directory / "rows", "<i8")

    def find(self, ids: np.ndarray) -> np.ndarray:
        """Returns the first row of each id, int64 [n]; −1 for an id that no row has. ids: S16 [n]."""
        if not len(self._ids):
            return np.full(len(ids), -1)
        at = np.minimum(np.searchsorted(self._ids, ids), len(self._ids) - 1)
        return np.where(self._ids[at] == ids, self._rows[at], -1)


def _batches(arrays: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Joins the arrays of ids to fewer ones: row groups have few rows, and each array touches every bucket."""
    batch: list[np.ndarray] = []
    count = 0
    for array in arrays:
        batch.append(array)
        count += len(array)
        if count >= ROWS_PER_BATCH:
            yield np.concatenate(batch)
            batch, count = [], 0
    if batch:
        yield np.concatenate(batch)


def deal(directory: Path, records: np.ndarray, buckets: np.ndarray) -> None:
    """Appends records [n], each to the file of `directory` with the number of its bucket, int [n]."""
    order = np.argsort(buckets, kind="stable")
    numbers, starts = np.unique(buckets[order], return_index=True)
    for number, part in zip(numbers.tolist(), np.split(records[order], starts[1:]), strict=True):
        with (directory / str(number)).open("ab") as file:
            file.write(part.tobytes())


def _mapped(path: Path, dtype: str) -> np.ndarray:
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)

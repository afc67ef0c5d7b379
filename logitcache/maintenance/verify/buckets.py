"""More records than memory holds, dealt to files, so that those of one file can be compared in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np


class Buckets:
    """Records of a structured type in numbered files of a directory."""

    def __init__(self, directory: Path, fields: list[tuple[str, str]]) -> None:
        directory.mkdir()
        self._directory, self._type = directory, np.dtype(fields)

    def add(self, buckets: np.ndarray, *columns: np.ndarray) -> None:
        """Appends records, given by columns [n], each to the bucket [n] of its own."""
        records = np.empty(len(buckets), self._type)
        for name, column in zip(self._type.names or (), columns, strict=True):
            records[name] = column
        order = np.argsort(buckets, kind="stable")
        numbers, starts = np.unique(buckets[order], return_index=True)
        for number, part in zip(numbers.tolist(), np.split(records[order], starts[1:]), strict=True):
            with (self._directory / str(number)).open("ab") as file:
                file.write(part.tobytes())

    def read(self, bucket: int) -> np.ndarray:
        """All records of a bucket, in the order in which they came."""
        path = self._directory / str(bucket)
        return np.fromfile(path, self._type) if path.exists() else np.empty(0, self._type)

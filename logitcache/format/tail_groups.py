"""The partition of the vocabulary into tail groups, as a cache stores it: tail_groups.parquet, columns id and group."""

from __future__ import annotations

from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from logitcache.format.storage import Folder

TAIL_GROUPS_NAME = "tail_groups.parquet"


def write_tail_groups(folder: Folder, groups: np.ndarray, name: str = TAIL_GROUPS_NAME) -> None:
    """Writes the group of each id, int32 [V]."""
    table = pa.table({"id": np.arange(len(groups), dtype=np.int32), "group": groups.astype(np.int32)})
    with folder.writing(name) as path:
        pq.write_table(table, path, compression="zstd")


def read_tail_groups(file: BinaryIO) -> np.ndarray:
    """Group of each id, int32 [V]."""
    return pq.read_table(file)["group"].to_numpy()

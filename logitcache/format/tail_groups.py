"""The partition of the vocabulary into tail groups, as a cache stores it: tail_groups.parquet, columns id and group."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from logitcache.format.atomic import atomic_path

TAIL_GROUPS_NAME = "tail_groups.parquet"


def write_tail_groups(path: Path, groups: np.ndarray) -> None:
    """Writes the group of each id, int32 [V], atomically."""
    table = pa.table({"id": np.arange(len(groups), dtype=np.int32), "group": groups.astype(np.int32)})
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def read_tail_groups(file: Path | BinaryIO) -> np.ndarray:
    """Group of each id, int32 [V]."""
    return pq.read_table(file)["group"].to_numpy()

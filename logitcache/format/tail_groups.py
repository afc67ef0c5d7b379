"""The partition of the vocabulary into tail groups is stored as tail_groups.parquet, with the columns id and group."""

from __future__ import annotations

import os
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from logitcache.errors import one_line
from logitcache.format.footer import check_pages, open_parquet, read_footer
from logitcache.format.tail_parts import TAIL_GROUPS_NAME
from logitcache.storage.folder import Folder

MAX_TAIL_GROUPS_BYTES = 1 << 27
"""Of the file: two numbers for each id of the largest vocabulary."""


def write_tail_groups(folder: Folder, groups: np.ndarray, name: str = TAIL_GROUPS_NAME) -> None:
    """Writes the group of each id, int32 [V]."""
    table = pa.table({"id": np.arange(len(groups), dtype=np.int32), "group": groups.astype(np.int32)})
    with folder.writing(name) as path:
        pq.write_table(table, path, compression="zstd")


def read_tail_groups(file: BinaryIO) -> np.ndarray:
    """Reads the group of each id, int32 [V]. Raises ValueError if the file holds anything else."""
    footer = read_footer(file, file.seek(0, os.SEEK_END))
    for group in footer.row_groups:
        check_pages(file, group)
    try:
        groups = open_parquet(file, footer.metadata).read(["group"], use_threads=False)["group"].combine_chunks()
    except (OSError, LookupError, pa.ArrowException) as error:
        raise ValueError(one_line(error)) from error
    if groups.type != pa.int32() or groups.null_count:
        raise ValueError(f"its groups are {groups.type}, int32 is wanted" + ", none missing" * bool(groups.null_count))
    numbers: np.ndarray = groups.to_numpy()
    return numbers

"""The footers of some of a cache's shards: where its bytes go, without reading them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from logitcache.errors import UserError
from logitcache.format.shards import ShardInfo
from logitcache.format.storage import Folder

READ_SHARDS = 32
"""Footers that are read, evenly spread over the cache: a few requests, however large it is."""


def column_bytes(folder: Folder, shards: Sequence[ShardInfo]) -> Counter[str]:
    """Compressed bytes of each column in these shards. What is missing to their sizes is in the footers."""
    sizes: Counter[str] = Counter()
    for shard in shards:
        with folder.open(shard.name, shard.num_bytes) as source:
            metadata = open_footer(source, folder, shard).metadata
            for group in range(metadata.num_row_groups):
                for index in range(metadata.num_columns):
                    column = metadata.row_group(group).column(index)
                    sizes[column.path_in_schema.removesuffix(".list.element")] += column.total_compressed_size
    return sizes


def open_footer(source: Any, folder: Folder, shard: ShardInfo) -> pq.ParquetFile:
    """A shard of which only the footer is read yet. Raises UserError where that is damaged."""
    try:
        return pq.ParquetFile(source)
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"{folder.where(shard.name)} cannot be read ({error}): `logitcache verify` says what else is wrong"
        ) from error


def spread(shards: Sequence[ShardInfo]) -> list[ShardInfo]:
    """At most `READ_SHARDS` of them, first and last included."""
    picked = np.unique(np.linspace(0, len(shards) - 1, min(len(shards), READ_SHARDS)).astype(int))
    return [shards[i] for i in picked.tolist()]

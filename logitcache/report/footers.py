"""The footers of some of a cache's shards tell where its bytes go, without reading them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
import pyarrow as pa

from logitcache.errors import UserError, one_line
from logitcache.format.codec import flat
from logitcache.format.footer import Footer, check_footer, open_parquet, read_footer
from logitcache.format.layout import Layout
from logitcache.format.shards import ShardInfo
from logitcache.report.statistics import evenly_spread
from logitcache.storage.folder import Folder

READ_SHARDS = 32
"""Footers that are read, evenly spread over the cache: a few requests, however large it is."""


def column_bytes(folder: Folder, shards: Sequence[ShardInfo], layout: Layout) -> Counter[str]:
    """Counts the compressed bytes of each column in these shards; footers are the rest of their sizes."""
    sizes: Counter[str] = Counter()
    for shard in shards:
        with _opened(folder, shard, layout) as (_, footer):
            for group in footer.row_groups:
                for chunk in group.chunks:
                    sizes[chunk.name] += chunk.compressed_bytes
    return sizes


def entry_counts(folder: Folder, shards: Sequence[ShardInfo], layout: Layout) -> Counter[int]:
    """Counts the positions of these shards by their number of entries."""
    counts: Counter[int] = Counter()
    for shard in shards:
        with _opened(folder, shard, layout) as (source, footer), open_parquet(source, footer.metadata) as file:
            for group in range(len(footer.row_groups)):
                column = file.read_row_group(group, ["num_entries"], use_threads=False)["num_entries"]
                values, found = np.unique(flat(column)[0], return_counts=True)
                counts.update(dict(zip(values.tolist(), found.tolist(), strict=True)))
    return counts


@contextmanager
def _opened(folder: Folder, shard: ShardInfo, layout: Layout) -> Iterator[tuple[BinaryIO, Footer]]:
    """Opens a shard and reads its footer only. Raises UserError if it is damaged or contradicts the manifest."""
    try:
        with folder.open(shard.name, shard.num_bytes) as source:
            footer = read_footer(source, shard.num_bytes)
            check_footer(footer, shard, layout)
            yield source, footer
    except (UserError, MemoryError):
        raise
    except (OSError, ValueError, LookupError, pa.ArrowException) as error:
        raise UserError(
            f"{folder.where(shard.name)} cannot be read ({one_line(error)}): `logitcache verify` says what else is wrong"
        ) from error


def spread(shards: Sequence[ShardInfo]) -> list[ShardInfo]:
    """Chooses at most `READ_SHARDS` of the shards, evenly spread, first and last included."""
    return [shards[i] for i in evenly_spread(len(shards), READ_SHARDS)]

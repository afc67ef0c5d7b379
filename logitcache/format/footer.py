"""A shard's footer, compared with the manifest before a page is decompressed: what it claims bounds the memory of its reader."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from logitcache.format.layout import Layout
from logitcache.format.shards import ShardInfo

FREE_BYTES = 1 << 28
"""What a row group may take uncompressed however small its shard is: those of the writer take 4 MiB, or hold one sequence."""
MOST_EXPANSION = 64
"""Beyond that, uncompressed bytes of a row group for each byte of its shard."""


def open_parquet(source: Any, metadata: pq.FileMetaData | None = None, **options: Any) -> pq.ParquetFile:
    """Opens a Parquet file. Raises ValueError where it is none, whatever Arrow raises of it."""
    try:
        file = pq.ParquetFile(source, metadata=metadata, page_checksum_verification=True, **options)
        _ = file.schema_arrow.names
    except (MemoryError, FileNotFoundError):
        raise
    except (OSError, ValueError, LookupError, pa.ArrowException) as error:
        raise ValueError(f"no footer of a Parquet file can be read ({' '.join(str(error).split())})") from error
    return file


def check_expansion(metadata: pq.FileMetaData, num_bytes: int) -> None:
    """Raises ValueError where a row group claims to take far more memory than a file of `num_bytes` can be meant to."""
    most = max(FREE_BYTES, MOST_EXPANSION * num_bytes)
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        chunks = [group.column(column) for column in range(metadata.num_columns)]
        claimed = sum(max(chunk.total_uncompressed_size, 4 * chunk.num_values) for chunk in chunks)
        if claimed > most:
            raise ValueError(f"row group {index} takes {claimed:,} bytes uncompressed, at most {most:,} are read")


def check_footer(metadata: pq.FileMetaData, info: ShardInfo, layout: Layout) -> None:
    """Raises ValueError where a shard claims other rows or more values than the manifest says, or as `check_expansion` does."""
    sizes = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
    if sizes != list(info.row_group_sizes):
        raise ValueError(f"it has {len(sizes)} row groups of {sum(sizes):,} rows, not those of the manifest")
    check_expansion(metadata, info.num_bytes)
    most_values = _most_values(info, layout)
    seen = dict.fromkeys(most_values, 0)
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        for column in range(metadata.num_columns):
            chunk = group.column(column)
            if (name := _column(chunk.path_in_schema, seen)) is not None:
                seen[name] += chunk.num_values
    for name, most in most_values.items():
        if seen[name] > most:
            raise ValueError(f"column {name} has {seen[name]:,} values, the manifest allows {most:,}")


def _column(path: str, names: Container[str]) -> str | None:
    """The column that a leaf belongs to, or None. Names of kept columns may hold points."""
    return next((name for name in (path, path.rpartition(".list.")[0]) if name in names), None)


def _most_values(info: ShardInfo, layout: Layout) -> dict[str, int]:
    """Values of each column in a shard with these counts; an empty list counts as one."""
    lists = {"input_ids": info.num_tokens, "loss_mask": info.num_tokens}
    lists |= dict.fromkeys(layout.values_per_entry(), info.num_entries)
    lists |= {name: info.num_positions * count for name, (_, count) in layout.values_per_position().items()}
    most = {name: count + info.num_sequences for name, count in lists.items()}
    return most | dict.fromkeys(["row_id", *layout.columns], info.num_sequences)

"""A Parquet file's footer is compared with the manifest before a page is decompressed: its claims bound a reader's memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from logitcache.errors import one_line
from logitcache.format.layout import Layout
from logitcache.format.shards import ShardInfo
from logitcache.format.thrift import parse_struct

FREE_BYTES = 1 << 28
"""What a row group may take uncompressed however small its shard is: those of the writer take 4 MiB, or hold one sequence."""
MOST_EXPANSION = 64
"""Beyond that, uncompressed bytes of a row group for each byte of its file."""
TAIL_BYTES = 1 << 16
"""Asked for in the first request for a footer, which is longer in shards of many row groups."""
PAGE_HEADER_BYTES = 1 << 12
_DICTIONARY = 2
_PAGE_KINDS = {0: 5, _DICTIONARY: 7, 3: 8}
"""Kind of a page → the field of its header that tells of its values."""
NO_FOOTER = "no footer of a Parquet file can be read"
_MAGIC = b"PAR1"


@dataclass(frozen=True)
class Chunk:
    """A column of a row group. name: of a list of numbers, without what Parquet calls its parts.  begin: of its pages."""

    name: str
    begin: int
    num_values: int
    num_bytes: int
    compressed_bytes: int


@dataclass(frozen=True)
class RowGroup:
    """The claims of a footer about a row group."""

    num_rows: int
    chunks: tuple[Chunk, ...]

    @property
    def claimed_bytes(self) -> int:
        """Bytes that its pages, and its values, take uncompressed."""
        return sum(max(chunk.num_bytes, 4 * chunk.num_values) for chunk in self.chunks)


@dataclass(frozen=True)
class Footer:
    """The footer of a file.  metadata: as Arrow has it; none of its row groups' columns are to be asked for, see `thrift`."""

    row_groups: tuple[RowGroup, ...]
    metadata: pq.FileMetaData

    @property
    def row_group_sizes(self) -> list[int]:
        """Rows of each row group."""
        return [group.num_rows for group in self.row_groups]


def read_footer(file: BinaryIO, num_bytes: int) -> Footer:
    """Reads the footer of a Parquet file of so many bytes. Raises ValueError if it has none, or claims too much memory."""
    content = _content(file, num_bytes)
    try:
        footer = Footer(_row_groups(content), pq.read_metadata(pa.BufferReader(content)))
        num_columns = len(footer.metadata.schema.to_arrow_schema().names)
    except MemoryError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, OSError, pa.ArrowException) as error:
        raise ValueError(f"{NO_FOOTER} ({one_line(error)})") from error
    most = max(FREE_BYTES, MOST_EXPANSION * num_bytes)
    for index, group in enumerate(footer.row_groups):
        if group.claimed_bytes > most:
            raise ValueError(
                f"row group {index} takes {group.claimed_bytes:,} bytes uncompressed, at most {most:,} are read"
            )
        if len(group.chunks) < num_columns:
            raise ValueError(f"row group {index} has {len(group.chunks)} columns, the file {num_columns}")
    return footer


def _content(file: BinaryIO, num_bytes: int) -> bytes:
    """Reads the footer, its length and the four letters."""
    file.seek(max(num_bytes - TAIL_BYTES, 0))
    tail = file.read(TAIL_BYTES)
    if len(tail) < 12 or tail[-4:] != _MAGIC:
        raise ValueError(f"{NO_FOOTER} (it ends with {tail[-4:]!r}, not with {_MAGIC!r})")
    length = int.from_bytes(tail[-8:-4], "little") + 8
    if length > num_bytes:
        raise ValueError(f"{NO_FOOTER} (of {length:,} bytes in a file of {num_bytes:,})")
    if length > len(tail):
        file.seek(num_bytes - length)
        tail = file.read(length - len(tail)) + tail
    return tail[-length:]


def _row_groups(content: bytes) -> tuple[RowGroup, ...]:
    groups = []
    for group in parse_struct(content)[0].get(4, []):
        chunks = []
        for column in group[1]:
            data = column[3]
            path = [part.decode() for part in data[3]]
            name = ".".join(path[:-2] if path[-2:] in (["list", "element"], ["list", "item"]) else path)
            begin = min(_count(data[9]), _count(data.get(11) or data[9]))
            chunks.append(Chunk(name, begin, _count(data[5]), _count(data[6]), _count(data[7])))
        groups.append(RowGroup(_count(group[3]), tuple(chunks)))
    return tuple(groups)


def _count(value: Any) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} of something")
    return value


def read_metadata(file: BinaryIO, num_bytes: int) -> pq.FileMetaData:
    """Reads the footer, as Arrow has it, of a file that was checked before."""
    return pq.read_metadata(pa.BufferReader(_content(file, num_bytes)))


def open_parquet(source: Any, metadata: pq.FileMetaData, **options: Any) -> pq.ParquetFile:
    """Opens a Parquet file whose footer was read."""
    return pq.ParquetFile(source, metadata=metadata, page_checksum_verification=True, **options)


def check_footer(footer: Footer, info: ShardInfo, layout: Layout) -> None:
    """Raises ValueError if a shard claims other rows, or more values, than the manifest says of it."""
    sizes = footer.row_group_sizes
    if sizes != list(info.row_group_sizes):
        raise ValueError(f"it has {len(sizes)} row groups of {sum(sizes):,} rows, not those of the manifest")
    seen: dict[str, int] = {}
    for group in footer.row_groups:
        for chunk in group.chunks:
            seen[chunk.name] = seen.get(chunk.name, 0) + chunk.num_values
    for name, most in _most_values(info, layout).items():
        if seen.get(name, 0) > most:
            raise ValueError(f"column {name} has {seen[name]:,} values, the manifest allows {most:,}")


def check_pages(file: BinaryIO, group: RowGroup) -> None:
    """Raises ValueError if pages claim more values, or more bytes uncompressed, than the footer says of their column."""
    for chunk in group.chunks:
        try:
            num_values, num_bytes = _claims_of_pages(file, chunk)
        except (LookupError, TypeError, ValueError) as error:
            raise ValueError(f"column {chunk.name}: a page that is none ({one_line(error)})") from error
        if num_values > chunk.num_values or num_bytes > chunk.num_bytes:
            raise ValueError(
                f"column {chunk.name}: pages of {num_values:,} values in {num_bytes:,} bytes uncompressed, the footer says "
                f"{chunk.num_values:,} in {chunk.num_bytes:,}"
            )


def _claims_of_pages(file: BinaryIO, chunk: Chunk) -> tuple[int, int]:
    """Returns values and uncompressed bytes, a dictionary's included, by the headers of a column's pages."""
    at, end = chunk.begin, chunk.begin + chunk.compressed_bytes
    num_values = num_bytes = 0
    while at < end:
        file.seek(at)
        header, size = parse_struct(file.read(min(PAGE_HEADER_BYTES, end - at)))
        values = _count(header[_PAGE_KINDS[header[1]]][1])
        num_bytes += _count(header[2])
        if header[1] == _DICTIONARY:
            if values > header[2]:
                raise ValueError(f"a dictionary of {values:,} values in {header[2]:,} bytes")
        else:
            num_values += values
        at += size + _count(header[3])
    return num_values, num_bytes


def _most_values(info: ShardInfo, layout: Layout) -> dict[str, int]:
    """Returns the values of each column in a shard with these counts; an empty list counts as one."""
    lists = {"input_ids": info.num_tokens, "loss_mask": info.num_tokens}
    lists |= dict.fromkeys(layout.values_per_entry(), info.num_entries)
    lists |= {name: info.num_positions * count for name, (_, count) in layout.values_per_position().items()}
    most = {name: count + info.num_sequences for name, count in lists.items()}
    return most | dict.fromkeys(["row_id", *layout.columns], info.num_sequences)

"""A shard is read through, row group by row group: damage in one does not hide what is in the others."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from logitcache.assembly.resume import compared
from logitcache.errors import UserError, one_line
from logitcache.format.codebook import Codebook
from logitcache.format.footer import check_pages, open_parquet, read_footer
from logitcache.format.layout import Layout, read_layout
from logitcache.format.shards import ShardInfo
from logitcache.maintenance.verify.findings import Finding
from logitcache.maintenance.verify.rows import Counts, SeenRows, check_rows, empty_lists
from logitcache.storage.atomic import file_sha256, space_needed
from logitcache.storage.folder import Folder, Stored
from logitcache.storage.prefetch import prefetched
from logitcache.storage.retries import RetriedFile

CHUNK_BYTES = 8 << 20
"""Held in memory, and of a remote file asked for in one request."""
TAIL_MASS_TOLERANCE = 1e-4
"""Between the mean tail mass as captured and as stored: a rounded tail is off by 3e-5 of itself at most."""


@dataclass(frozen=True)
class Claimed:
    """The claims of a manifest about all shards. by_sha256: the shard of each content."""

    layout: Layout | None
    by_sha256: Mapping[str, ShardInfo]


def shard_files(folder: Folder, names: Iterable[str], stored: Mapping[str, Stored]) -> Generator[Path | Exception]:
    """Yields the shards on this machine, or why they cannot be fetched.

    Shards at a URL are fetched ahead, two at a time, to temporary files; each is removed when the next is asked for.  stored:
    what the store's listing says of its files. Raises UserError for a store that stops answering, and for a full disk.
    """
    if folder.local is not None:
        for name in names:
            try:
                yield folder.on_disk(name)
            except (UserError, OSError) as error:
                yield error
        return
    ended = Event()
    try:
        for copy in prefetched(lambda name: _fetched(folder, name, stored.get(name), ended), names):
            if isinstance(copy, Exception):
                yield copy
            else:
                with copy:
                    yield Path(copy.name)
    finally:
        ended.set()


def _fetched(folder: Folder, name: str, stored: Stored | None, ended: Event) -> IO[bytes] | Exception:
    """Fetches a shard to a temporary file; once the verification has ended, the rest of it is not fetched any more."""
    try:
        stored = stored or folder.look_up(name)
        if stored is None:
            return FileNotFoundError(name)
        num_bytes = folder.num_bytes(name) if stored.num_bytes is None else stored.num_bytes
        with ExitStack() as on_failure, space_needed(tempfile.gettempdir()):
            copy = on_failure.enter_context(tempfile.NamedTemporaryFile(prefix="logitcache-"))
            with RetriedFile(folder, name, num_bytes) as source:
                while not ended.is_set() and (chunk := source.read(CHUNK_BYTES)):
                    copy.write(chunk)
            copy.flush()
            on_failure.pop_all()
            return copy
    except (UserError, MemoryError):
        raise
    except Exception as error:  # every store has its own kinds
        return error


def check_shard(
    path: Path | Exception, name: str, info: ShardInfo | None, claimed: Claimed, seen: SeenRows
) -> Iterator[Finding]:
    """Yields findings about a file of `shard_files` and its content; `info` is what the manifest says of it, if anything."""
    if isinstance(path, UserError):
        yield Finding("damaged", name, str(path))
        return
    try:
        if isinstance(path, Exception):
            raise path
        if info is not None:
            digest, size = file_sha256(path), path.stat().st_size
            same = claimed.by_sha256.get(digest)
            if digest == info.sha256:
                if size != info.num_bytes:
                    yield Finding("counts", name, f"{size:,} bytes, the manifest says {info.num_bytes:,}")
            elif same is not None:
                yield Finding("swapped", name, f"this is what the manifest calls {same.name}")
                info = same
            else:
                yield Finding("altered", name, _how_altered(size, digest, info))
        yield from _check_content(path, name, info, claimed.layout, seen)
    except (UserError, MemoryError):
        raise
    except FileNotFoundError:
        yield Finding("missing", name, "the manifest names it, it is not there")
    except Exception as error:  # of a disk, or of a store, each of which has its own kinds
        yield Finding("damaged", name, f"cannot be read ({_words(error)})")


def _how_altered(size: int, digest: str, info: ShardInfo) -> str:
    if size != info.num_bytes:
        short = f", {info.num_bytes - size:,} too few" if size < info.num_bytes else ""
        return f"{size:,} bytes, the manifest says {info.num_bytes:,}{short}"
    return f"its SHA-256 is {digest[:12]}…, the manifest says {info.sha256[:12]}…"


def _check_content(
    path: Path, name: str, info: ShardInfo | None, layout: Layout | None, seen: SeenRows
) -> Iterator[Finding]:
    with ExitStack() as opened:
        source = opened.enter_context(path.open("rb"))
        try:
            footer = read_footer(source, path.stat().st_size)
            file = opened.enter_context(open_parquet(source, footer.metadata))
        except ValueError as error:
            yield Finding("damaged", name, _words(error))
            return
        sizes = footer.row_group_sizes
        if info is not None and sizes != list(info.row_group_sizes):
            what = f"{len(sizes)} row groups of {_list(sizes)} rows, the manifest says {_list(info.row_group_sizes)}"
            yield Finding("counts", name, what)
        try:
            own = read_layout(file.schema_arrow.metadata, name)
            expected = own.schema()
        except UserError as error:
            kind = "newer" if "is written in cache format" in str(error) else "layout"
            yield Finding(kind, name, str(error).removeprefix(f"{name} "))
            return
        except (ValueError, TypeError, AttributeError) as error:
            yield Finding("layout", name, f"its schema metadata was altered ({_words(error)})")
            return
        if layout is not None:
            for part, here, there in compared(own.to_json(), layout.to_json()):
                yield Finding("layout", name, f"{part} is {here}, the manifest says {there}")
        foreign = [
            *_check_codebook(file.metadata.metadata, own, name),
            *_check_columns(file.schema_arrow, expected, name),
        ]
        yield from foreign
        if foreign:
            return
        counts = Counts()
        for index, group in enumerate(footer.row_groups):
            try:
                check_pages(source, group)
            except ValueError as error:
                yield Finding("damaged", name, _words(error), row_group=index)
                counts.num_sequences += group.num_rows
                counts.complete = False
                continue
            yield from _check_row_group(file, index, group.num_rows, name, own, counts, seen)
    if info is not None and counts.complete:
        yield from _check_counts(name, counts, info)


def _check_codebook(metadata: Mapping[bytes, bytes] | None, layout: Layout, name: str) -> Iterator[Finding]:
    if layout.quantization is None:
        return
    try:
        codebook = Codebook.from_metadata(metadata)
    except ValueError as error:
        yield Finding("layout", name, _words(error))
        return
    ids = codebook.frequent_ids
    if ids.size and not 0 <= ids.min() <= ids.max() < layout.vocab_size:
        yield Finding("layout", name, f"its codebook has ids outside the vocabulary of {layout.vocab_size:,}")
    if codebook.group_profile.shape != (layout.tail_parts.groups,):
        what = f"its codebook is of {codebook.group_profile.size} tail groups, its layout of {layout.tail_parts.groups}"
        yield Finding("layout", name, what)


def _check_columns(schema: pa.Schema, expected: pa.Schema, name: str) -> Iterator[Finding]:
    for column in expected:
        index = schema.get_field_index(column.name)
        if index < 0:
            yield Finding("layout", name, f"column {column.name} is missing")
        elif schema.field(index).type != column.type:
            what = f"column {column.name} is of type {schema.field(index).type}, {column.type} is wanted"
            yield Finding("layout", name, what)
    for column_name in schema.names:
        if column_name not in expected.names:
            yield Finding("layout", name, f"column {column_name} is none of its layout's")


def _check_row_group(
    file: pq.ParquetFile, index: int, rows: int, name: str, layout: Layout, counts: Counts, seen: SeenRows
) -> Iterator[Finding]:
    needed = replace(layout, columns={})
    first = counts.num_sequences
    counts.num_sequences += rows
    table = None
    try:
        table = file.read_row_group(index, use_threads=False)
    except MemoryError:
        raise
    except Exception as error:
        damaged = _damaged_columns(file, index)
        columns = f"column {', '.join(damaged)}: " if damaged else ""
        yield Finding("damaged", name, f"{columns}{_words(error)}", row_group=index)
        if damaged and not set(damaged) & set(needed.schema().names):
            table = file.read_row_group(index, columns=needed.schema().names, use_threads=False)
    if table is not None and (nulls := empty_lists(table, needed)):
        yield Finding("damaged", name, f"column {', '.join(nulls)}: values that are missing", row_group=index)
        table = None
    if table is None:
        counts.complete = False
        return
    yield from check_rows(table, needed, name, index, first, counts, seen)


def _damaged_columns(file: pq.ParquetFile, index: int) -> list[str]:
    damaged = []
    for column in file.schema_arrow.names:
        try:
            file.read_row_group(index, columns=[column], use_threads=False)
        except MemoryError:
            raise
        except Exception:
            damaged.append(column)
    return damaged


def _check_counts(name: str, counts: Counts, info: ShardInfo) -> Iterator[Finding]:
    for part in ("num_sequences", "num_tokens", "num_positions", "num_entries", "longest"):
        if getattr(counts, part) != getattr(info, part):
            yield Finding(
                "counts", name, f"{part} is {getattr(counts, part):,}, the manifest says {getattr(info, part):,}"
            )
    mean = counts.tail_mass / max(counts.num_positions, 1)
    if not abs(mean - info.mean_tail_mass) <= TAIL_MASS_TOLERANCE:
        yield Finding("counts", name, f"mean_tail_mass is {mean:.6f}, the manifest says {info.mean_tail_mass:.6f}")


def _list(sizes: object) -> str:
    text = ", ".join(map(str, sizes)) if isinstance(sizes, list | tuple) else ""
    return text if len(text) <= 40 else f"{text[:40]}…"


def _words(error: BaseException) -> str:
    return one_line(error).rstrip(".") or type(error).__name__


def fetched_sha256(folder: Folder, name: str) -> str:
    """Returns the SHA-256 of a file at a path or a URL, read as a stream."""
    digest = hashlib.sha256()
    with RetriedFile(folder, name, folder.num_bytes(name)) as source:
        while chunk := source.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()

"""A shard is read; whatever is not what the manifest says is refused."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from threading import Lock
from typing import BinaryIO, NoReturn, cast

import pyarrow as pa
import pyarrow.parquet as pq

from logitcache.errors import UserError, one_line
from logitcache.format.codec import DecodedRows, check_columns
from logitcache.format.footer import check_footer, check_pages, open_parquet, read_footer, read_metadata
from logitcache.format.layout import Layout, read_layout
from logitcache.format.shards import ShardInfo
from logitcache.format.soundness import check_rows
from logitcache.reading.local_copies import LocalCopies
from logitcache.storage.atomic import file_sha256, space_needed
from logitcache.storage.folder import Folder
from logitcache.storage.retries import RetriedFile

RECENT_FOOTERS = 64
"""Parsed footers that are kept, some 200 KiB each: streams in order parse each one once."""
COPIED_AT_ONCE_BYTES = 8 << 20
"""Asked for in one request while a shard is copied, and held in memory."""


class TemporaryCopies:
    """Whole shards of a remote cache in a temporary folder, which is removed with this object."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._files: dict[str, Path] = {}

    def path(self, shard: ShardInfo, fill: Callable[[BinaryIO], None]) -> Path:
        """Returns the copy of a shard, which is made if there is none. fill: as of `LocalCopies.path`."""
        with _verifying(os.getpid()):
            copy = self._files.get(shard.name)
            if copy is None or not copy.exists():
                copy = self._files[shard.name] = self._filled(fill)
        return copy

    def _filled(self, fill: Callable[[BinaryIO], None]) -> Path:
        if self._folder is None or not self._folder.exists():
            self._folder = Path(tempfile.mkdtemp(prefix="logitcache-"))
            weakref.finalize(self, _remove_own, self._folder, os.getpid())
        descriptor, name = tempfile.mkstemp(dir=self._folder)
        try:
            with space_needed(self._folder), os.fdopen(descriptor, "wb") as file:
                fill(file)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        return Path(name)


def _remove_own(folder: Path, process: int) -> None:
    """Removes the folder, unless this is a forked process, which leaves it to its parent."""
    if process == os.getpid():
        shutil.rmtree(folder, ignore_errors=True)


class ShardReader:
    """A shard; a local file is checked against its SHA-256 when first read, pages are checked against their CRC.

    A remote shard that is read by ranges is checked against the CRC alone, which is stored beside it: that finds damage, and
    not what somebody altered. No file stays open: a cache may have thousands of shards. Threads may read at the same time.
    copies: where a remote shard may be copied to, see `copy`.  whole: where it is copied to otherwise; given, nothing is read
    by ranges, only from copies whose SHA-256 was checked.
    """

    def __init__(
        self,
        folder: Folder,
        info: ShardInfo,
        layout: Layout,
        copies: LocalCopies | None = None,
        whole: TemporaryCopies | None = None,
    ) -> None:
        self._folder = folder
        self.path = folder.where(info.name)
        self._info = info
        self._layout = layout
        self._verified = False
        self._copies = copies
        self._whole = whole
        self._copy: Path | None = None
        self._claims_checked = False

    @cached_property
    def _schema(self) -> pa.Schema:
        """The columns; made when the shard is read, for a cache may have many that are not."""
        return self._layout.schema()

    def check_size(self) -> None:
        """Raises UserError if the file is missing or does not have the manifest's size."""
        try:
            size = self._folder.num_bytes(self._info.name)
        except FileNotFoundError:
            self._missing()
        if size != self._info.num_bytes:
            self._refuse(f"truncated or altered: {size} bytes, the manifest says {self._info.num_bytes}")

    def copy(self) -> None:
        """Copies a remote shard to this machine if there is room; from then on it is read there.

        Raises UserError if the content is not what the manifest says, and if it cannot be fetched.
        """
        copy = self._copies.path(self._info, self._fill) if self._copies is not None else None
        if copy is None and self._whole is not None:
            copy = self._whole.path(self._info, self._fill)
        self._copy = copy

    def _fill(self, copy: BinaryIO) -> None:
        digest = hashlib.sha256()
        try:
            with RetriedFile(self._folder, self._info.name, self._info.num_bytes) as source:
                while chunk := source.read(COPIED_AT_ONCE_BYTES):
                    digest.update(chunk)
                    copy.write(chunk)
        except FileNotFoundError:
            self._missing()
        if digest.hexdigest() != self._info.sha256:
            self._refuse("altered: its SHA-256 is not the manifest's")

    def read_row_group(self, index: int) -> DecodedRows:
        """Decodes a row group. Raises UserError if the file is not the file that the manifest names."""
        table = self.read_columns(index)
        try:
            rows = DecodedRows(table, self._layout)
            check_rows(rows, self._layout)
        except (KeyError, ValueError) as error:
            self._refuse(f"altered: {error} (row group {index})")
        return rows

    def read_columns(self, index: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Reads the named columns of a row group, or all, as they are stored. Raises UserError as `read_row_group` does."""
        if self._whole is not None:
            self.copy()
        elif self._copy is None:
            with _verifying(os.getpid()):
                if not self._verified:
                    self._verify()
        with self._folder.answering():
            try:
                # A footer that is kept keeps its reader, and so the temporary folder.
                footer = _footer(self) if self._whole is None else self.metadata()
                with self._source() as source, open_parquet(source, footer, pre_buffer=not self._path) as file:
                    table: pa.Table = file.read_row_group(index, columns or self._schema.names, use_threads=False)
            except (UserError, MemoryError):
                raise
            except FileNotFoundError:
                self._missing()
            except (OSError, ValueError, LookupError, pa.ArrowException) as error:
                self._refuse(f"altered: {one_line(error)} (row group {index})")
        if len(table) != self._info.row_group_sizes[index]:
            self._refuse(f"altered: {len(table)} rows in row group {index}")
        try:
            check_columns(table, map(self._schema.field, columns or self._schema.names), self._layout.columns)
        except ValueError as error:
            self._refuse(f"altered: {error} (row group {index})")
        if read_layout(table.schema.metadata, self.path) != self._layout:
            self._refuse("made with another layout than the manifest says: it is of another cache")
        return table

    def _verify(self) -> None:
        self.check_size()
        if self._folder.local and file_sha256(self._folder.local / self._info.name) != self._info.sha256:
            self._refuse("altered: its SHA-256 is not the manifest's")
        self._verified = True

    def _source(self) -> BinaryIO:
        """Opens the file. A row group of a remote file is fetched in one request."""
        if path := self._path:
            return path.open("rb")
        return cast(BinaryIO, RetriedFile(self._folder, self._info.name, self._info.num_bytes))

    def metadata(self) -> pq.FileMetaData:
        """Reads the footer. Raises ValueError if the file contradicts the manifest or claims more memory than it may."""
        with self._source() as source:
            if self._claims_checked and self._path:
                return read_metadata(source, self._info.num_bytes)
            footer = read_footer(source, self._info.num_bytes)
            check_footer(footer, self._info, self._layout)
            for group in footer.row_groups if self._path else ():  # of a store every page would be a request
                check_pages(source, group)
        self._claims_checked = True
        return footer.metadata

    @property
    def _path(self) -> Path | None:
        """Returns the file on this machine, if there is one."""
        if self._folder.local:
            return self._folder.local / self._info.name
        copy = self._copy
        return copy if copy is not None and (self._whole is not None or copy.exists()) else None

    def _missing(self) -> NoReturn:
        raise UserError(f"{self.path} is missing, though the manifest names it: {self._remedy.lower()} again") from None

    def _refuse(self, what: str) -> NoReturn:
        raise UserError(f"{self.path} was {what}. {self._remedy} again")

    @property
    def _remedy(self) -> str:
        return "Fetch or build this shard" if self._folder.local else "Fetch or push it"


@lru_cache(1)
def _verifying(process: int) -> Lock:
    """Returns the lock by which threads take turns, so that no two hash one shard. A forked process has its own."""
    return Lock()


@lru_cache(RECENT_FOOTERS)
def _footer(shard: ShardReader) -> pq.FileMetaData:
    return shard.metadata()

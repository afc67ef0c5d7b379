"""Shard files read: whatever is not what the manifest says is refused."""

from __future__ import annotations

from typing import NoReturn

import pyarrow as pa
import pyarrow.parquet as pq

from logitcache.errors import UserError
from logitcache.format.atomic import file_sha256
from logitcache.format.codec import DecodedRows, read_layout
from logitcache.format.shards import ShardInfo
from logitcache.format.storage import Folder


class ShardReader:
    """One shard; a local file is checked against its SHA-256 when first read, pages are checked against their CRC.

    Holds no file open: a cache may have thousands of shards.
    """

    def __init__(self, folder: Folder, info: ShardInfo) -> None:
        self._folder = folder
        self.path = folder.where(info.name)
        self._info = info
        self._verified = False

    def check_size(self) -> None:
        """Raises UserError when the file is missing or has not the manifest's size."""
        if not self._folder.exists(self._info.name):
            raise UserError(f"{self.path} is missing, though the manifest names it: fetch or build this shard again")
        size = self._folder.num_bytes(self._info.name)
        if size != self._info.num_bytes:
            self._refuse(f"truncated or altered: {size} bytes, the manifest says {self._info.num_bytes}")

    def read_row_group(self, index: int) -> DecodedRows:
        """Decodes a row group. Raises UserError where the file is not the one that the manifest names."""
        if not self._verified:
            self.check_size()
            if self._folder.local and file_sha256(self._folder.local / self._info.name) != self._info.sha256:
                self._refuse("altered: its SHA-256 is not the manifest's")
            self._verified = True
        try:
            with (
                self._folder.open(self._info.name) as source,
                pq.ParquetFile(source, page_checksum_verification=True, pre_buffer=True) as file,
            ):
                table = file.read_row_group(index, use_threads=False)
        except (OSError, pa.ArrowException) as error:
            self._refuse(f"altered: {error} (row group {index})")
        layout = read_layout(table.schema.metadata, self.path)
        if len(table) != self._info.row_group_sizes[index]:
            self._refuse(f"altered: {len(table)} rows in row group {index}")
        return DecodedRows(table, layout)

    def _refuse(self, what: str) -> NoReturn:
        raise UserError(f"{self.path} was {what}. Fetch or build this shard again")

"""Remote files are read through a connection that may break."""

from __future__ import annotations

import io
import logging
import os
import time

from logitcache.errors import UserError
from logitcache.storage.folder import Folder, Unreachable

RETRIES_AFTER_S = (1.0, 4.0)
"""Seconds until a broken read is tried again, beside what a store's own library tries."""

logger = logging.getLogger("logitcache")


class RetriedFile(io.RawIOBase):
    """A remote file to read from anywhere in it; each read is one request, and is asked for again if a connection breaks.

    num_bytes: its size. `read` raises FileNotFoundError if there is no such file, and UserError for a connection that is cut
    for good.
    """

    def __init__(self, folder: Folder, name: str, num_bytes: int) -> None:
        self._folder, self._name, self._num_bytes = folder, name, num_bytes
        self._position = 0
        self._source = folder.open(name, num_bytes)

    def read(self, size: int | None = -1) -> bytes:
        """Reads the next `size` bytes, all that are left for −1."""
        left = max(self._num_bytes - self._position, 0)
        wanted = left if size is None or size < 0 else min(size, left)
        content = self._read(wanted) if wanted else b""
        self._position += len(content)
        return content

    def _read(self, wanted: int) -> bytes:
        for wait_s in (*RETRIES_AFTER_S, None):
            try:
                with self._folder.answering():
                    if self._source.closed:
                        self._source = self._folder.open(self._name, self._num_bytes)
                    self._source.seek(self._position)
                    content = self._source.read(wanted)
            except Unreachable as error:
                if wait_s is None:
                    message = f"{error}, tried {len(RETRIES_AFTER_S) + 1} times: run the same command again"
                    raise UserError(message) from error
                logger.info("%s: trying again", error)
            else:
                if len(content) == wanted or wait_s is None:
                    break
            time.sleep(wait_s)
            self._source.close()
        return content

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Moves as in any file."""
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._num_bytes}[whence]
        return self._position

    def tell(self) -> int:
        """Returns the position."""
        return self._position

    def readable(self) -> bool:
        """Returns True."""
        return True

    def seekable(self) -> bool:
        """Returns True."""
        return True

    def close(self) -> None:
        """Closes the connection's file too."""
        if not self.closed:
            self._source.close()
        super().close()

"""Memory that ran out, of this machine or of a device."""

from __future__ import annotations


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out; torch, which is not imported for this, has two errors of its own for it."""
    of_device = type(error).__name__ == "OutOfMemoryError"
    return isinstance(error, MemoryError) or of_device or "can't allocate memory" in str(error)

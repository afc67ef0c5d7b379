"""Streams of integers of any number of bits, and floats of two bytes, as numpy arrays."""

from __future__ import annotations

import numpy as np

FLOAT_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
"""Accepted kinds of floats."""


def read_integers(packed: np.ndarray, num_bits: int, count: int) -> np.ndarray:
    """Returns the first `count` unsigned integers of each row's bit stream: uint64 [N, count].

    packed: uint8 [N, ≥ ceil(count · num_bits / 8)].  num_bits: 1 … 64, the most significant bit of an integer first.
    """
    first = np.arange(count) * num_bits
    byte, skipped = first // 8, (first % 8).astype(np.uint64)
    # An integer begins within `byte`; it ends within the next 3 where it has 25 bits or fewer, within the next 8 in any case.
    num_bytes = -(-count * num_bits // 8)
    padded = np.pad(packed[:, :num_bytes], ((0, 0), (0, 9)))
    if num_bits <= 25:
        window = np.zeros((len(packed), count), dtype=np.uint32)
        for following in range(4):
            window = (window << np.uint32(8)) | padded[:, byte + following]
        last = np.uint32(32 - num_bits) - skipped.astype(np.uint32)
        return ((window >> last) & np.uint32((1 << num_bits) - 1)).astype(np.uint64)
    whole = np.zeros((len(packed), count), dtype=np.uint64)
    for following in range(8):
        whole = (whole << np.uint64(8)) | padded[:, byte + following]
    aligned = (whole << skipped) | (padded[:, byte + 8].astype(np.uint64) >> (np.uint64(8) - skipped))
    return aligned >> np.uint64(64 - num_bits)


def read_floats(content: np.ndarray, dtype: str) -> np.ndarray:
    """Reads little-endian floats: uint8 [N, n · size] → [N, n], float64 for float64, otherwise float32."""
    content = np.ascontiguousarray(content)
    if dtype == "bfloat16":
        return (content.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    values = content.view(f"<f{FLOAT_BYTES[dtype]}")
    return values.astype(np.float32) if dtype == "float16" else values.astype(values.dtype.newbyteorder("="))


def rounded_to(values: np.ndarray, dtype: str) -> np.ndarray:
    """Returns values as they are when stored as `dtype`: float64 for float64, otherwise float32."""
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        nearest = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
        return np.where(np.isfinite(values), nearest.view(np.float32), values).astype(np.float32)
    with np.errstate(over="ignore"):
        stored = values.astype(dtype)
    return stored.astype(np.float32) if dtype == "float16" else stored

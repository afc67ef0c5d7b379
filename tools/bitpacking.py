"""The baseline: entry lists packed into opaque bytes, as DistillKit's recommended capture lays them out.

Per position: k ids of ⌈log2 V⌉ bits, most significant first, padded to a byte, in order of probability; then the first 16
log-probabilities as bfloat16 and six float32 coefficients of a curve through the others, Σ coefficient · x^term at x = 0, 1, ….
The tail's mass is not stored: a reader takes 1 − Σp. Our own encoder and decoder, plain numpy over all positions at once.
"""

from __future__ import annotations

import numpy as np

EXACT_ENTRIES = 16
TERMS = (0.0, 1.0, 2.0, 3.0, 4.0, 0.5)


def bytes_per_position(k: int, vocab_size: int) -> int:
    """By arithmetic, before compression."""
    return -(-k * id_bits(vocab_size) // 8) + 2 * min(k, EXACT_ENTRIES) + 4 * len(TERMS)


def id_bits(vocab_size: int) -> int:
    """⌈log2 V⌉."""
    return (vocab_size - 1).bit_length()


def encode(token_ids: np.ndarray, logprobs: np.ndarray, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Packed ids and packed log-probabilities, uint8 [M, bytes] each. token_ids, logprobs: [M, k], most probable first."""
    bits = id_bits(vocab_size)
    of_ids = (token_ids[:, :, None].astype(np.int64) >> np.arange(bits - 1, -1, -1)) & 1  # [M, k, bits]
    packed_ids = np.packbits(of_ids.astype(np.uint8).reshape(len(token_ids), -1), axis=1)
    exact = _bfloat16(logprobs[:, :EXACT_ENTRIES])
    # Least squares through the rest, in float64: the columns of powers differ by orders of magnitude.
    curve, *_ = np.linalg.lstsq(
        _powers(logprobs.shape[1]), logprobs[:, EXACT_ENTRIES:].T.astype(np.float64), rcond=None
    )
    coefficients = np.ascontiguousarray(curve.T.astype("<f4"))
    return packed_ids, np.concatenate([exact.view(np.uint8), coefficients.view(np.uint8)], axis=1)


def decode(
    packed_ids: np.ndarray, packed_logprobs: np.ndarray, k: int, vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ids, int32 [M, k], and log-probabilities, float32 [M, k]."""
    bits = id_bits(vocab_size)
    of_ids = np.unpackbits(packed_ids, axis=1, count=k * bits).reshape(-1, k, bits)
    token_ids = of_ids.astype(np.float32) @ (2.0 ** np.arange(bits - 1, -1, -1, dtype=np.float32))  # exact below 2^24
    exact = np.ascontiguousarray(packed_logprobs[:, : 2 * EXACT_ENTRIES]).view("<u2").astype(np.uint32) << 16
    coefficients = np.ascontiguousarray(packed_logprobs[:, 2 * EXACT_ENTRIES :]).view("<f4")
    curve = coefficients @ _powers(k).T.astype(np.float32)
    return token_ids.astype(np.int32), np.concatenate([exact.view(np.float32), curve], axis=1)


def _powers(k: int) -> np.ndarray:
    """x^term, [k − EXACT_ENTRIES, terms]."""
    x = np.arange(k - EXACT_ENTRIES, dtype=np.float64)
    return np.stack([x**term for term in TERMS], axis=1)


def _bfloat16(values: np.ndarray) -> np.ndarray:
    """Upper halves of float32, rounded to the nearest: uint16."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")

"""DistillKit's compressed distributions → ids and log-probabilities.

A position is two strings of bytes. The ids are k integers of ceil(log2 d) bits. The log-probabilities are, one after the other,

    exact_k values of exact_dtype
    a coefficient per polynomial term, of term_dtype
    per residual bin a scale, of scale_dtype, and its integers

where value j beyond the exact ones is Σ coefficient · j^term + residual. Numbers are rounded on the way as DistillKit
rounds them (github.com/arcee-ai/DistillKit, compression), so that the result is the same to the last bit; but for a curve over
[0, 1], whose places and roots torch itself computes differently from processor to processor.
"""

from __future__ import annotations

import numpy as np

from logitcache.exchange.bits import FLOAT_BYTES, read_floats, read_integers, rounded_to
from logitcache.exchange.distillkit_config import FUNCTIONS, CompressionConfig
from logitcache.exchange.source_rows import SourceRow
from logitcache.exchange.values import BadRow, Ragged, ragged

IDS = "bytepacked_indices"
LOGPROBS = "compressed_logprobs"
POSITIONS_AT_A_TIME = 4096
"""What is unpacked of them, 8 MiB at k = 64, stays in a processor's cache."""


def decode(
    packed_ids: np.ndarray, packed_logprobs: np.ndarray, config: CompressionConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Returns token ids, int64, and log-probabilities, float32, both [N, k], in the order in which they are stored.

    packed_ids: uint8 [N, config.id_bytes].  packed_logprobs: uint8 [N, config.logprob_bytes].
    """
    ids = np.empty((len(packed_ids), config.k), dtype=np.int64)
    logprobs = np.empty(ids.shape, dtype=np.float32)
    for first in range(0, len(ids), POSITIONS_AT_A_TIME):
        part = slice(first, first + POSITIONS_AT_A_TIME)
        ids[part] = read_integers(packed_ids[part], config.id_bits, config.k)
        with np.errstate(over="ignore", invalid="ignore"):
            logprobs[part] = _logprobs(packed_logprobs[part], config)
    return ids, logprobs


def read_entries(
    row: SourceRow, positions: np.ndarray, num_tokens: int, config: CompressionConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Returns ids and log-probabilities of some positions of a row, as `decode` does.

    Raises BadRow if the row has not a position for every token but the first, or not the bytes that a position needs.
    """
    ids = _bytes(row, IDS, num_tokens, config.id_bytes)
    logprobs = _bytes(row, LOGPROBS, num_tokens, config.logprob_bytes)
    return decode(ids[positions], logprobs[positions], config)


def _bytes(row: SourceRow, name: str, num_tokens: int, width: int) -> np.ndarray:
    """Returns a column as uint8 [positions, width]."""
    packed = ragged(row.value(name), name, "iu")
    check_length(packed, name, num_tokens)
    wrong = np.flatnonzero(packed.lengths != width)
    if len(wrong):
        raise BadRow(
            f"position {wrong[0]}: {packed.lengths[wrong[0]]} bytes in {name}, by the configuration there are {width}; "
            "is it the configuration of this file?"
        )
    if len(packed.values) and not 0 <= packed.values.min() <= packed.values.max() <= 255:
        raise BadRow(f"column {name!r} holds numbers that are no bytes")
    return packed.values.astype(np.uint8, copy=False).reshape(-1, width)


def check_length(lists: Ragged, name: str, num_tokens: int) -> None:
    """Raises BadRow if a row has neither a list for every token but the first nor one for each."""
    if len(lists.lengths) not in (num_tokens - 1, num_tokens):
        raise BadRow(
            f"{name} has {len(lists.lengths)} positions for {num_tokens} tokens, {num_tokens - 1} are wanted: "
            "one for every token but the first (or one more, which is not used)"
        )


def _logprobs(content: np.ndarray, config: CompressionConfig) -> np.ndarray:
    """Decodes [N, logprob_bytes] to [N, k], float32 or float64."""
    reader = _Reader(content)
    exact = reader.floats(config.exact_k, config.exact_dtype)
    coefficients = reader.floats(len(config.polynomial_terms), config.term_dtype)
    on_curve = np.zeros((len(content), config.k - config.exact_k), dtype=exact.dtype)
    first = 0
    for part in config.residual_bins:
        scale = reader.floats(1, part.scale_dtype)
        stored = reader.integers(part.num_elements, part.element_bits)
        residual = _signed(stored, part.element_bits) * scale
        on_curve[:, first : first + part.num_elements] = rounded_to(residual, config.exact_dtype)
        first += part.num_elements
    if config.polynomial_terms:
        on_curve = _curve(coefficients, on_curve.shape[1], config) + on_curve
        if config.term_dtype == config.exact_dtype:  # of two kinds the sum is of the finer one
            on_curve = rounded_to(on_curve, config.exact_dtype)
    values: np.ndarray = np.concatenate([exact, on_curve], axis=1)
    if config.delta_encoding:
        summed = np.cumsum(values.astype(np.float32), axis=1, dtype=np.float64).astype(np.float32)
        return rounded_to(summed, config.exact_dtype)
    return values


def _signed(stored: np.ndarray, num_bits: int) -> np.ndarray:
    """Returns the signed numbers that unsigned integers, uint64, stand for, float32."""
    if num_bits == 1:
        return stored.astype(np.float32) * np.float32(2) - np.float32(1)
    return (stored - np.uint64(1 << (num_bits - 1))).view(np.int64).astype(np.float32)  # 2^64 wraps around


def _curve(coefficients: np.ndarray, count: int, config: CompressionConfig) -> np.ndarray:
    """Returns Σ coefficient · x^term at `count` places, [N, count]; every product and the sum is rounded to term_dtype."""
    terms = _terms(count, config)  # [terms, count]
    partial: list[np.ndarray] = []
    # The order in which torch adds up: four running sums, the first of which also takes what is left over, then their sum.
    for number, term in enumerate(terms):
        product = rounded_to(coefficients[:, number, None] * term, config.term_dtype)
        if number < min(4, len(terms)) and len(terms) >= 4:
            partial.append(product)
        elif number < len(terms) - len(terms) % 4:
            partial[number % 4] = partial[number % 4] + product
        else:
            partial[:1] = [partial[0] + product] if partial else [product]
    total = partial[0]
    for other in partial[1:]:
        total = total + other
    return rounded_to(total, config.term_dtype)


def _terms(count: int, config: CompressionConfig) -> list[np.ndarray]:
    """Returns every term at every place, rounded to term_dtype: [terms] of [count]."""
    dtype = config.term_dtype
    places = rounded_to(np.arange(count, dtype=np.float64), dtype)
    if config.normalize_t:  # counted from the nearer end, as torch does
        step = rounded_to(np.array(1 / max(count - 1, 1)), dtype)
        from_end = 1 - step * places[::-1] if count > 1 else places
        places = rounded_to(np.where(np.arange(count) < count // 2, step * places, from_end), dtype)
    return [_term(places, term, dtype) for term in config.polynomial_terms]


def _term(places: np.ndarray, term: int | str, dtype: str) -> np.ndarray:
    if isinstance(term, str):
        return rounded_to(FUNCTIONS[term](places.astype(np.float64)), dtype)
    if term == 3:  # the one power that torch multiplies out in two steps
        return rounded_to(rounded_to(places * places, dtype) * places, dtype)
    return rounded_to(places.astype(np.float64) ** term, dtype)


class _Reader:
    """Takes columns off bytes [N, n], from the left."""

    def __init__(self, content: np.ndarray) -> None:
        self._content, self._at = content, 0

    def _take(self, num_bytes: int) -> np.ndarray:
        taken = self._content[:, self._at : self._at + num_bytes]
        self._at += num_bytes
        return taken

    def floats(self, count: int, dtype: str) -> np.ndarray:
        return read_floats(self._take(count * FLOAT_BYTES[dtype]), dtype)

    def integers(self, count: int, num_bits: int) -> np.ndarray:
        return read_integers(self._take(-(-count * num_bits // 8)), num_bits, count)

"""The names and the request that the build's process and vLLM's processes share. Neither torch nor vLLM is imported here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

SIGNALS_FILE = "LOGITCACHE_SIGNALS_FILE"
"""Environment variable with the file to which vLLM's processes add a line for each child that a signal ended."""
SCORE_LOGITS = "LOGITCACHE_SCORE_LOGITS"
"""Environment variable, set if models are to be loaded as pooling models that give packed positions (`capture.wire_format`)."""
TASK: Final = "token_embed"
"""vLLM's name for what such a model does: a tensor for each token."""
TAIL_GROUPS = "tail_groups"
"""Key of a request that sets the tail groups, with the group of each id, int32 [V], as bytes."""
TAIL_BASIS = "tail_basis"
"""Key of a request that sets the tail basis: directions, offset and weights, of `to_bytes`."""
COVARIANCE = "covariance"
"""Key of a request that begins a covariance product, with block, offset and weights of `to_bytes`, or ends it, with nothing.

As a request's settings: the stored positions are to be added to it.
"""
PROBABILITIES = "probabilities"
"""As a request's settings: wanted is the sum of the full distributions over the stored positions."""


@dataclass(frozen=True)
class ScoringRequest:
    """The question about a sequence. It travels as `PoolingParams.extra_kwargs`, so its fields are of msgpack's types.

    settings: JSON of CaptureSettings, `PROBABILITIES` or `COVARIANCE`.
    stored: bit mask of the stored positions, as `np.packbits` makes it.  vocab_size: columns beyond are padding.
    """

    settings: str
    vocab_size: int
    stored: bytes
    row_id: str


def to_bytes(directions: np.ndarray, offset: np.ndarray, weights: np.ndarray) -> list[bytes]:
    """Returns arrays [V, R], [V] and [V] for a request."""
    return [array.astype(np.float32).tobytes() for array in (directions, offset, weights)]


def from_bytes(contents: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the arrays of `to_bytes`, float32."""
    directions, offset, weights = (np.frombuffer(content, np.float32) for content in contents)
    return directions.reshape(len(weights), -1), offset, weights

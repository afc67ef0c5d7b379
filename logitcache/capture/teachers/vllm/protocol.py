"""The names and the request that the build's process and vLLM's processes share. Neither torch nor vLLM is imported here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

SIGNALS_FILE = "LOGITCACHE_SIGNALS_FILE"
"""Environment variable with the file to which vLLM's processes add a line for each child that a signal ended."""
SCORE_LOGITS = "LOGITCACHE_SCORE_LOGITS"
"""Environment variable, set if models are to be loaded as pooling models that give packed positions (`capture.wire_format`)."""
TASK: Final = "token_embed"
"""vLLM's name for what such a model does: a tensor for each token."""
TAIL_GROUPS = "tail_groups"
"""Key of a request that sets the tail groups, with the group of each id, int32 [V], as bytes."""


@dataclass(frozen=True)
class ScoringRequest:
    """The question about a sequence. It travels as `PoolingParams.extra_kwargs`, so its fields are of msgpack's types.

    settings: JSON of CaptureSettings; None asks for the sum of the full distributions over the stored positions.
    stored: bit mask of the stored positions, as `np.packbits` makes it.  vocab_size: columns beyond are padding.
    """

    settings: str | None
    vocab_size: int
    stored: bytes
    row_id: str

"""How many tokens each row of a cache has."""

from __future__ import annotations

import numpy as np
import pyarrow.compute as pc

from logitcache import LogitCache


def token_lengths(cache: LogitCache) -> np.ndarray:
    """int32 [rows], in the cache's order; reads the loss masks, a bit a token, and nothing else."""
    lengths = [np.empty(0, np.int32)]
    for table in cache.iter_columns(["loss_mask"]):
        lengths += [pc.list_value_length(mask).to_numpy() for mask in table["loss_mask"].chunks]
    return np.concatenate(lengths)

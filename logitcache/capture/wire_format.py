"""Everything captured of a position as one line of int32, so that it leaves a device, or an engine's process, in one tensor.

Floats are bit-cast. `fields` is the only place that knows the order.
"""

from __future__ import annotations

from functools import cache
from itertools import accumulate, pairwise

import numpy as np

from logitcache.capture.settings import CaptureSettings
from logitcache.format.targets import SparseTargets


@cache
def fields(settings: CaptureSettings) -> dict[str, slice]:
    """Returns the place of each captured quantity in a packed position, by its name in SparseTargets."""
    widths = {"token_ids": settings.top_k, "logprobs": settings.top_k, "tail_logprob": 1}
    for part, value in settings.tail_parts.stored():
        widths |= dict.fromkeys(part.dtypes, part.width(value))
    edges = accumulate(widths.values(), initial=0)
    return {name: slice(*edge) for name, edge in zip(widths, pairwise(edges), strict=True) if edge[0] < edge[1]}


def position_width(settings: CaptureSettings) -> int:
    """Returns W, the number of int32 of a packed position."""
    return max(int(part.stop) for part in fields(settings).values())


def unpack(packed: np.ndarray, settings: CaptureSettings) -> SparseTargets:
    """Returns packed positions, int32 [N, W], as SparseTargets with k = `settings.top_k`, as views without copies.

    Raises ValueError for another shape or dtype.
    """
    if packed.dtype != np.int32 or packed.ndim != 2 or packed.shape[1] != position_width(settings):
        raise ValueError(
            f"packed positions: received {packed.dtype} {packed.shape}, these settings pack int32 [N, {position_width(settings)}]"
        )
    stored = list(settings.tail_parts.stored())
    dtypes = {"token_ids": np.int32} | {name: dtype for part, _ in stored for name, dtype in part.dtypes.items()}
    arrays = {name: packed[:, at].view(dtypes.get(name, np.float32)) for name, at in fields(settings).items()}
    tail = {name: values for part, value in stored for name, values in part.unpack(arrays, value).items()}
    return SparseTargets(arrays["token_ids"], arrays["logprobs"], arrays["tail_logprob"][:, 0], **tail)

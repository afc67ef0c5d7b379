"""What is captured of one position as one row of int32, so that it leaves a device, or an engine's process, in one tensor.

Floats are bit-cast. `columns` is the only place that knows the order.
"""

from __future__ import annotations

from itertools import accumulate, pairwise

import numpy as np

from logitcache.capture.settings import CaptureSettings
from logitcache.format.targets import SparseTargets


def columns(settings: CaptureSettings) -> dict[str, slice]:
    """Where each quantity stands in a row; those that are not captured have no columns."""
    widths = {
        "token_ids": settings.top_k,
        "logprobs": settings.top_k,
        "tail_logprob": 1,
        "group_logprobs": settings.tail_groups,
        "tempered_tail": len(settings.temperatures),
        "tail_entropy": int(settings.tail_entropy),
        "sample_ids": settings.tail_samples,
        "sample_logprobs": settings.tail_samples,
    }
    edges = accumulate(widths.values(), initial=0)
    return {name: slice(*edge) for name, edge in zip(widths, pairwise(edges), strict=True) if edge[0] < edge[1]}


def row_width(settings: CaptureSettings) -> int:
    """W, the int32 columns of a row."""
    return max(part.stop for part in columns(settings).values())


def unpack(rows: np.ndarray, settings: CaptureSettings) -> SparseTargets:
    """The positions that `rows`, int32 [N, W], hold: views, no copies; k is `settings.top_k`.

    Raises ValueError for another shape or dtype.
    """
    if rows.dtype != np.int32 or rows.ndim != 2 or rows.shape[1] != row_width(settings):
        raise ValueError(
            f"packed rows: received {rows.dtype} {rows.shape}, these settings pack int32 [N, {row_width(settings)}]"
        )
    part = {name: rows[:, where] for name, where in columns(settings).items()}
    floats = {name: values.view(np.float32) for name, values in part.items()}
    tempered = floats.get("tempered_tail")
    entropy = floats.get("tail_entropy")
    return SparseTargets(
        token_ids=part["token_ids"],
        logprobs=floats["logprobs"],
        tail_logprob=floats["tail_logprob"][:, 0],
        group_logprobs=floats.get("group_logprobs"),
        tempered_tail={} if tempered is None else dict(zip(settings.temperatures, tempered.T, strict=True)),
        tail_entropy=None if entropy is None else entropy[:, 0],
        sample_ids=part.get("sample_ids"),
        sample_logprobs=floats.get("sample_logprobs"),
    )

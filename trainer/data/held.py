"""What all caches of a run hold of the teacher's tail."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from logitcache import LogitCache


@dataclass(frozen=True)
class Held:
    """temperatures: T ≠ 1 at which the tail is stored, ascending.  num_tail_groups: G, or 0.  num_tail_samples: s, or 0."""

    temperatures: tuple[float, ...] = ()
    tail_entropy: bool = False
    num_tail_groups: int = 0
    num_tail_samples: int = 0


def held_by_all(caches: Sequence[LogitCache]) -> Held:
    """What targets of any of the caches can be used for; groups count where all caches have the same partition."""
    layouts = [cache.manifest.layout for cache in caches]
    samples = {layout.num_tail_samples for layout in layouts}
    groups = caches[0].tail_groups
    same_groups = groups is not None and all(_equal(groups, cache.tail_groups) for cache in caches[1:])
    return Held(
        temperatures=tuple(sorted(set.intersection(*(set(layout.temperatures) for layout in layouts)))),
        tail_entropy=all(layout.tail_entropy for layout in layouts),
        num_tail_groups=layouts[0].num_tail_groups if same_groups else 0,
        num_tail_samples=samples.pop() if len(samples) == 1 else 0,
    )


def _equal(groups: np.ndarray, others: np.ndarray | None) -> bool:
    return others is not None and np.array_equal(groups, others)

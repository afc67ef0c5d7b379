"""Which processes score the shards of a build."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from logitcache.errors import UserError

EXECUTORS = ("local", "ray")


@dataclass(frozen=True)
class Placement:
    """Where shards are scored.

    executor: "local", this process with one engine; or "ray", `engines` actors with an engine each in the cluster at
    `ray_address` (None: one is started on this machine; engines None: as many as its GPUs hold).
    shard_range: (i, n), this process is the i-th of n that share the folder: it scores shards i, i + n, … The first one
    reads the corpus and makes the tail groups, the others wait for it.
    """

    executor: str = "local"
    ray_address: str | None = None
    engines: int | None = None
    shard_range: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        """Raises UserError for contradictions, and where Ray is wanted and not installed."""
        if self.executor not in EXECUTORS:
            raise UserError(f"--executor {self.executor}: choose {' or '.join(EXECUTORS)}")
        if self.executor == "local" and (self.ray_address or self.engines):
            flag = "--ray-address" if self.ray_address else "--engines"
            raise UserError(f"{flag} needs --executor ray")
        if self.executor == "ray" and importlib.util.find_spec("ray") is None:
            raise UserError("--executor ray: Ray is not installed; pip install 'logitcache[ray]'")
        if self.engines is not None and self.engines < 1:
            raise UserError(f"--engines {self.engines}: at least 1 is needed")
        if self.shard_range is not None and not 0 <= self.shard_range[0] < self.shard_range[1]:
            index, count = self.shard_range
            raise UserError(f"--shard-range {index}/{count}: write i/n with i from 0 to n - 1")

    @property
    def is_first(self) -> bool:
        """Whether this process prepares what all share."""
        return self.shard_range is None or self.shard_range[0] == 0

    def shards(self, count: int) -> range:
        """The shards of this process, of `count` in all."""
        index, step = self.shard_range or (0, 1)
        return range(index, count, step)

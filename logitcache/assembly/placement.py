"""The processes that work on the shards of a cache: this one, one of several that share them out by number, or actors on Ray."""

from __future__ import annotations

import importlib.util
import logging
import time
from dataclasses import InitVar, dataclass
from typing import TypedDict

from logitcache.errors import UserError
from logitcache.storage.folder import Folder

logger = logging.getLogger("logitcache")

EXECUTORS = ("local", "ray")
LOOK_AGAIN_S = 2.0


class OutputOptions(TypedDict, total=False):
    """The options of every command that makes a cache without a teacher, but for its shard range."""

    shard_positions: int
    executor: str
    ray_address: str | None
    workers: int | None
    overwrite: bool


@dataclass(frozen=True)
class Placement:
    """The processes that work on shards, as a caller asks for them.

    executor: "local", this process; or "ray", `workers` actors in the cluster at `ray_address` (None: one is started on this
    machine; workers None: as many as it has room for).  shard_range: (i, n), this process is the i-th of n that share the work:
    it does shards i, i + n, … The first one prepares what all need, the others wait for it.  counted: the option that gives the
    number of workers.  overwrite: whether what is there is to be replaced, which processes that share it cannot do.
    """

    executor: str = "local"
    ray_address: str | None = None
    workers: int | None = None
    shard_range: tuple[int, int] | None = None
    counted: str = "--workers"
    overwrite: InitVar[bool] = False

    def __post_init__(self, overwrite: bool) -> None:
        if self.executor not in EXECUTORS:
            raise UserError(f"--executor {self.executor}: choose {' or '.join(EXECUTORS)}")
        if self.executor == "local" and (self.ray_address or self.workers):
            flag = "--ray-address" if self.ray_address else self.counted
            raise UserError(f"{flag} needs --executor ray")
        if self.workers is not None and self.workers < 1:
            raise UserError(f"{self.counted} {self.workers}: at least 1 is needed")
        if self.shard_range is not None and not 0 <= self.shard_range[0] < self.shard_range[1]:
            index, count = self.shard_range
            raise UserError(f"--shard-range {index}/{count}: write i/n with i from 0 to n - 1")
        if overwrite and self.shard_range is not None:
            raise UserError("--overwrite contradicts --shard-range: remove the old cache first")
        if self.executor == "ray" and importlib.util.find_spec("ray") is None:
            raise UserError("--executor ray: Ray is not installed; pip install 'logitcache[ray]'")

    @property
    def is_first(self) -> bool:
        """Whether this process prepares everything that all share."""
        return self.shard_range is None or self.shard_range[0] == 0

    def shards(self, count: int) -> range:
        """Returns the shards of this process, of `count` in all."""
        index, step = self.shard_range or (0, 1)
        return range(index, count, step)

    def tell_complete(self, folder: Folder) -> None:
        """Says that the shards of this range are complete, and what comes next."""
        assert self.shard_range is not None
        logger.info(
            "shards of range %d/%d are complete; when all ranges are: logitcache finish %s", *self.shard_range, folder
        )


class WorkerLost(UserError):
    """A worker ended while it was working: its last shard is lost, another worker can take it over."""


def wait_for(folder: Folder, name: str, what: str) -> None:
    """Waits until the process of the first shard range has written a file."""
    if not folder.exists(name):
        logger.info("waiting until --shard-range 0/… %s", what)
    while not folder.exists(name):
        time.sleep(LOOK_AGAIN_S)

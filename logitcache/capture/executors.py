"""The processes that score the shards of a build: this one, or Ray actors with an engine each."""

from __future__ import annotations

import importlib.util
import logging
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logitcache.capture.plan import BuildPlan
from logitcache.capture.teachers.base import EngineLost
from logitcache.capture.worker import Job, ShardWorker
from logitcache.errors import UserError, one_line
from logitcache.progress import Progress

logger = logging.getLogger("logitcache")

EXECUTORS = ("local", "ray")
STARTED_S = 60.0
"""Within this time an actor is there, unless the cluster has no room for it: then it waits, and that is told."""
VISIBLE_S = 90.0
"""Within this time a network file system shows a file of another host: longer than its caches last."""
LOOK_AGAIN_S = 1.0


@dataclass(frozen=True)
class Placement:
    """The processes that score shards, as a caller asks for them.

    executor: "local", this process with one engine; or "ray", `engines` actors with an engine each in the cluster at
    `ray_address` (None: one is started on this machine; engines None: as many as its GPUs hold).
    shard_range: (i, n), this process is the i-th of n that share the folder: it scores shards i, i + n, … The first one
    reads the corpus and makes tail groups and tail basis, the others wait for it.
    """

    executor: str = "local"
    ray_address: str | None = None
    engines: int | None = None
    shard_range: tuple[int, int] | None = None

    def __post_init__(self) -> None:
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
        """Whether this process prepares everything that all share."""
        return self.shard_range is None or self.shard_range[0] == 0

    def shards(self, count: int) -> range:
        """Returns the shards of this process, of `count` in all."""
        index, step = self.shard_range or (0, 1)
        return range(index, count, step)


def capture_here(job: Job, shards: Mapping[int, int], progress: Progress) -> None:
    """Scores shards with one engine in this process.  shards: of each the tokens that are read, which advance `progress`."""
    worker = ShardWorker(job)
    worker.start()
    try:
        worker.calibrate()
        progress.start()
        worker.capture(list(shards), progress.advance)
    finally:
        worker.close()


def capture_on_ray(
    job: Job,
    plan: BuildPlan,
    shards: Mapping[int, int],
    progress: Progress,
    address: str | None,
    num_engines: int | None,
) -> None:
    """Scores shards with several engines, each in an actor with the GPUs of one tensor-parallel group.

    A shard goes to whichever engine is free; the shard of an actor that died goes to another one.  shards, progress: as of
    `capture_here`.  address: of a running cluster; None: the cluster that Ray finds (RAY_ADDRESS, `ray start`), otherwise one
    that is started on this machine.  num_engines None: as many as the GPUs of the cluster allow. Raises UserError if no cluster
    answers, it has no room for a single engine, or all actors died.
    """
    import ray

    _connect(address)
    hosts = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    num_engines, resources = _resources(job, num_engines, hosts)
    logger.info("Ray: %d engine(s) with %s each", num_engines, _in_words(resources))
    actors: list[Any] = [ray.remote(**resources)(ShardWorker).remote(job) for _ in range(num_engines)]
    try:
        _ActorPool(plan, actors, progress).capture(shards)
    finally:
        for actor in actors:
            ray.kill(actor)


def _connect(address: str | None) -> None:
    import ray

    if ray.is_initialized():
        if address is not None:
            raise UserError(
                f"--ray-address {address}: this process is connected to a Ray cluster already; leave it out"
            )
        return
    found = address or os.environ.get("RAY_ADDRESS")
    try:
        try:
            _knock(found or _left_by_ray_start())
        except OSError:
            if found:
                raise
            found = "local"  # what `ray start` left is gone
        ray.init(address=found, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, RuntimeError) as error:
        if found in (None, "local"):
            raise UserError(f"--executor ray: Ray does not start here ({one_line(error)})") from error
        which = f"--ray-address {address}" if address else f"RAY_ADDRESS {found}"
        raise UserError(f"{which}: no Ray cluster answers there ({one_line(error)})") from error


def _left_by_ray_start() -> str | None:
    """Returns the address of the cluster that ran on this machine last, if Ray noted one; it may be gone."""
    noted = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")
    return noted.read_text().strip() if noted.exists() else None


def _knock(address: str | None) -> None:
    """Raises OSError if nothing listens at an address: Ray itself would go on trying for minutes."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if colon:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


class _ActorPool:
    """The engines of a build, which get shards as they become free."""

    def __init__(self, plan: BuildPlan, actors: Sequence[Any], progress: Progress) -> None:
        self._plan = plan
        self._actors = list(actors)
        self._progress = progress

    def capture(self, shards: Mapping[int, int]) -> None:
        """Returns when every shard is recorded."""
        import ray

        self._start()
        self._calibrate()
        self._progress.start()
        waiting = list(reversed(list(shards)))
        running: dict[Any, tuple[Any, int]] = {}
        free = list(self._actors)
        while waiting or running:
            while waiting and free:
                actor, index = free.pop(), waiting.pop()
                running[actor.capture.remote([index])] = (actor, index)
            (reference, *_), _ = ray.wait(list(running), num_returns=1)
            actor, index = running.pop(reference)
            try:
                self._finished(reference)
            except EngineLost as error:
                waiting.append(index)
                self._lose(actor, f"shard {index} goes to another one", error)
                continue
            if not self._is_visible(index):
                raise UserError(
                    f"--out {self._plan.folder}: shard {index} was written by an engine on another host and is not to be "
                    "seen from here; choose a directory that all hosts share, or a URL"
                )
            self._progress.advance(shards[index])
            free.append(actor)

    def _is_visible(self, index: int) -> bool:
        """Returns whether this host sees a shard that an engine has written, perhaps on another host."""
        deadline = time.monotonic() + VISIBLE_S
        while self._plan.finished(index) is None:
            if time.monotonic() > deadline:
                return False
            time.sleep(LOOK_AGAIN_S)
        return True

    def _start(self) -> None:
        import ray

        there = [actor.__ray_ready__.remote() for actor in self._actors]
        _, waiting = ray.wait(there, num_returns=len(there), timeout=STARTED_S)
        if waiting:
            logger.warning(
                "%d engine(s) wait for room in the Ray cluster: something else may be using it", len(waiting)
            )
        starting = [(actor, actor.start.remote()) for actor in self._actors]
        for actor, reference in starting:
            try:
                self._finished(reference)
            except EngineLost as error:
                self._lose(actor, "going on with the others", error)

    def _calibrate(self) -> None:
        """Lets one engine make the tail groups and the tail basis for all."""
        for actor in list(self._actors):
            try:
                return self._finished(actor.calibrate.remote())
            except EngineLost as error:
                self._lose(actor, "another one calibrates", error)

    def _finished(self, reference: Any) -> None:
        """Waits for a call. An error that the user can mend arrives as UserError, a lost actor or engine as EngineLost."""
        import ray

        try:
            ray.get(reference)
        except ray.exceptions.RayActorError as error:
            raise EngineLost(next(iter(str(error).strip().splitlines()), type(error).__name__)) from error
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from error
            raise

    def _lose(self, actor: Any, consequence: str, error: EngineLost) -> None:
        self._actors.remove(actor)
        if not self._actors:
            raise UserError(
                f"all engines were lost; the last one said: {error}. The finished shards are kept; the same command continues"
            ) from error
        logger.warning("an engine was lost (%s): %s", error, consequence)


def _resources(job: Job, wanted: int | None, hosts: Sequence[dict[str, float]]) -> tuple[int, dict[str, Any]]:
    """Returns the number of engines and the resources of each, on one host: GPUs of a tensor-parallel group, or some cores."""
    gpus = [int(host.get("GPU", 0)) for host in hosts]
    if not any(gpus):
        cores = [int(host.get("CPU", 0)) for host in hosts]
        if (wanted or 1) > sum(cores):
            raise UserError(
                f"--engines {wanted or 1}: the Ray cluster has no GPU and {sum(cores)} core(s); choose at most {sum(cores)}"
            )
        share = max(each for each in range(1, max(cores) + 1) if _room(cores, each) >= (wanted or 1))
        # vLLM would bind the threads of every engine to the same cores.
        unbound = {"env_vars": {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}}
        return wanted or 1, {"num_cpus": share, "runtime_env": unbound}
    options = job.engine.options
    each = int(options.get("tensor_parallel_size", 1)) * int(options.get("pipeline_parallel_size", 1))
    room = _room(gpus, each)
    if (wanted or 1) > room:
        raise UserError(
            f"--engines {wanted or 1}: with {each} GPU(s) each, of one host, they do not fit on the {sum(gpus)} of the Ray "
            f"cluster; it has room for {room}"
        )
    return wanted or room, {"num_gpus": each}


def _room(hosts: Sequence[int], each: int) -> int:
    """Returns how many engines fit on hosts, if each takes `each` of what a host has."""
    return sum(of_host // each for of_host in hosts)


def _in_words(resources: dict[str, Any]) -> str:
    return f"{resources['num_gpus']} GPU(s)" if "num_gpus" in resources else f"{resources['num_cpus']} core(s)"

"""Actors on Ray share the shards of a cache: a shard goes to whichever is free, that of an actor which died to another one."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from logitcache.assembly.placement import Placement, WorkerLost
from logitcache.errors import UserError, one_line

logger = logging.getLogger("logitcache")

STARTED_S = 60.0
"""Within this time an actor is there, unless the cluster has no room for it: then it waits, and that is told."""


def connect(address: str | None) -> list[dict[str, float]]:
    """Connects this process to a Ray cluster, unless it is connected. Returns the resources of each host.

    address: of a running cluster; None: the cluster that Ray finds (RAY_ADDRESS, `ray start`), otherwise one that is started on
    this machine. Raises UserError if no cluster answers.
    """
    import ray

    if not ray.is_initialized():
        _connect(address)
    elif address is not None:
        raise UserError(f"--ray-address {address}: this process is connected to a Ray cluster already; leave it out")
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _connect(address: str | None) -> None:
    import ray

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


@contextmanager
def workers(kind: type, arguments: Sequence[Any], placement: Placement, num_shards: int) -> Iterator[ActorPool]:
    """Yields actors of a class with a core each: as many as are asked for, or as the cluster has cores, but no more than shards.

    Raises UserError if no cluster answers or it has not so many cores.
    """
    cores = sum(int(host.get("CPU", 0)) for host in connect(placement.ray_address))
    if (placement.workers or 1) > cores:
        raise UserError(
            f"--workers {placement.workers or 1}: the Ray cluster has {cores} core(s); choose at most {cores}"
        )
    count = min(placement.workers or cores, num_shards)
    logger.info("Ray: %d worker(s) with a core each", count)
    with actor_pool(kind, arguments, {"num_cpus": 1}, count, "worker") as pool:
        yield pool


@contextmanager
def actor_pool(
    kind: type, arguments: Sequence[Any], resources: dict[str, Any], count: int, called: str
) -> Iterator[ActorPool]:
    """Yields `count` actors of a class; they end with the block.  called: what messages call an actor."""
    import ray

    actors: list[Any] = [ray.remote(**resources)(kind).remote(*arguments) for _ in range(count)]
    try:
        yield ActorPool(actors, called)
    finally:
        for actor in actors:
            ray.kill(actor)


class ActorPool:
    """Actors with a method `start`, which get shards as they become free.

    Every method raises UserError if all actors are lost, and what an actor raises for the user to mend.
    """

    def __init__(self, actors: Sequence[Any], called: str) -> None:
        self._actors = list(actors)
        self._called = called

    def start(self) -> None:
        """Returns when every actor has started, or is lost."""
        import ray

        there = [actor.__ray_ready__.remote() for actor in self._actors]
        _, waiting = ray.wait(there, num_returns=len(there), timeout=STARTED_S)
        if waiting:
            logger.warning(
                "%d %s(s) wait for room in the Ray cluster: something else may be using it", len(waiting), self._called
            )
        starting = [(actor, actor.start.remote()) for actor in self._actors]
        for actor, reference in starting:
            try:
                _result(reference)
            except WorkerLost as error:
                self._lose(actor, "going on with the others", error)

    def one(self, method: str, consequence: str) -> None:
        """Lets one actor do what is done for all.  consequence: what is said where it is lost and another one does it."""
        for actor in list(self._actors):
            try:
                _result(getattr(actor, method).remote())
                return
            except WorkerLost as error:
                self._lose(actor, consequence, error)

    def share(self, method: str, shards: Sequence[int], done: Callable[[int, Any], None]) -> None:
        """Calls a method of some actor with each shard.  done: told the shard and what the method returned, as they come."""
        import ray

        waiting = list(reversed(shards))
        running: dict[Any, tuple[Any, int]] = {}
        free = list(self._actors)
        while waiting or running:
            while waiting and free:
                actor, index = free.pop(), waiting.pop()
                running[getattr(actor, method).remote(index)] = (actor, index)
            (reference, *_), _ = ray.wait(list(running), num_returns=1)
            actor, index = running.pop(reference)
            try:
                result = _result(reference)
            except WorkerLost as error:
                waiting.append(index)
                self._lose(actor, f"shard {index} goes to another one", error)
                continue
            done(index, result)
            free.append(actor)

    def _lose(self, actor: Any, consequence: str, error: WorkerLost) -> None:
        self._actors.remove(actor)
        if not self._actors:
            raise UserError(
                f"all {self._called}s were lost; the last one said: {error}. The finished shards are kept; the same command "
                "continues"
            ) from error
        article = "an" if self._called[0] in "aeiou" else "a"
        logger.warning("%s %s was lost (%s): %s", article, self._called, error, consequence)


def _result(reference: Any) -> Any:
    """Waits for a call. An error that the user can mend arrives as UserError, a lost actor or engine as WorkerLost."""
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayActorError as error:
        raise WorkerLost(next(iter(str(error).strip().splitlines()), type(error).__name__)) from error
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from error
        raise

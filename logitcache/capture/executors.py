"""The engines that score the shards of a build: one in this process, or several in Ray actors."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from logitcache.assembly.ray_actors import actor_pool, connect
from logitcache.assembly.write import seen_here
from logitcache.capture.plan import BuildPlan
from logitcache.capture.worker import Job, ShardWorker
from logitcache.errors import UserError
from logitcache.progress import Progress

logger = logging.getLogger("logitcache")


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

    shards, progress: as of `capture_here`.  address: see `ray_actors.connect`.  num_engines None: as many as the GPUs of the
    cluster allow. Raises UserError if no cluster answers, it has no room for a single engine, or all actors died.
    """
    num_engines, resources = _resources(job, num_engines, connect(address))
    logger.info("Ray: %d engine(s) with %s each", num_engines, _in_words(resources))
    with actor_pool(ShardWorker, (job,), resources, num_engines, "engine") as pool:
        pool.start()
        pool.one("calibrate", "another one calibrates")
        progress.start()

        def done(index: int, _: None) -> None:
            seen_here(plan, index)
            progress.advance(shards[index])

        pool.share("capture_shard", list(shards), done)


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

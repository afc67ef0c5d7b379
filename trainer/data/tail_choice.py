"""Which tail treatment a run takes, and whether its cache holds the parts that it and the temperature need."""

from __future__ import annotations

from typing import TYPE_CHECKING

from logitcache import UserError
from logitcache.format.tail_parts import PARTS
from trainer.data.sources import basis_that_differs
from trainer.data.training_data import TrainingData

if TYPE_CHECKING:  # transformers takes seconds to import
    from trainer.config.config import DistillConfig

PARTS_OF_TAIL = {"groups": ("groups",), "samples": ("samples",), "low_rank": ("rank", "probes")}
"""The parts that a treatment uses, by their names in `TailParts`; it cannot do without the first."""


def resolve_tail(config: DistillConfig, data: TrainingData) -> str:
    """Choose the tail treatment of a run. Raises UserError if the cache lacks parts for --tail or --temperature."""
    parts = data.tail_parts
    tail = config.tail
    if tail is None:
        _check_same_basis(data)
        tail = "low_rank" if parts.rank else "groups" if parts.groups and config.temperatures == (1,) else "bucket"
    for temperature in config.temperatures:
        if approximates_tail(tail, data, temperature) and not (config.approximate_temperature and parts.entropy):
            _refuse_temperature(temperature, data)
    if tail in PARTS_OF_TAIL and not getattr(parts, PARTS_OF_TAIL[tail][0]):
        _refuse_tail(tail, data)
    return tail


def approximates_tail(tail: str, data: TrainingData, temperature: float) -> bool:
    """Tell whether a treatment needs the tail at a temperature at which the cache does not hold it."""
    return temperature not in (1, *data.tail_parts.temperatures) and tail not in ("renormalise", "low_rank")


def evaluation_tail(data: TrainingData) -> str:
    """Choose the tail treatment of a measurement: what is closest to the whole distribution of a held-out cache."""
    return "low_rank" if data.tail_parts.rank else "bucket"


def _check_same_basis(data: TrainingData) -> None:
    """Raise UserError if all caches hold coefficients, but of several bases."""
    other = None if data.averaged_with else basis_that_differs(data.caches)
    if other is not None:
        raise UserError(
            f"{data.caches[0].path} and {other.path} hold coefficients in different tail bases, which one run cannot learn "
            "from. Take --tail bucket, or build one with `--reuse` of the other's basis"
        )


def _refuse_tail(tail: str, data: TrainingData) -> None:
    _refuse_averaged(f"--tail {tail}", data)
    (part,) = (part for part in PARTS if part.name == PARTS_OF_TAIL[tail][0])
    what = "coefficients" if part.name == "rank" else part.name
    lacking = [cache for cache in data.caches if not getattr(cache.manifest.layout.tail_parts, part.name)]
    if not lacking:
        _check_same_basis(data)
        raise UserError(
            f"--tail {tail}: the caches of {data.path} do not hold the same tail {what}. Take --tail bucket"
        )
    raise UserError(
        f"--tail {tail}: {lacking[0].path} holds no tail {what}. Take --tail bucket, or build the cache with "
        f"`logitcache build {part.flag} {64 if part.name == 'rank' else 32}`"
    )


def _refuse_temperature(temperature: float, data: TrainingData) -> None:
    _refuse_averaged(f"--temperature {temperature:g}", data)
    lacking = next(cache for cache in data.caches if temperature not in cache.manifest.layout.tail_parts.temperatures)
    held = ", ".join(f"{t:g}" for t in sorted({1.0, *lacking.manifest.layout.tail_parts.temperatures}))
    build = f"build the cache with `logitcache build --temperatures {temperature:g}`"
    if data.tail_parts.entropy:
        ways = f"add --approximate_temperature (it holds the tail's entropy), or {build}"
    else:
        ways = f"or {build}, or with `--tail-entropy`, which is enough for --approximate_temperature"
    raise UserError(
        f"--temperature {temperature:g}: {lacking.path} holds the teacher's tail at T = {held} only. Take one of these, {ways}"
    )


def _refuse_averaged(what: str, data: TrainingData) -> None:
    if data.averaged_with:
        raise UserError(
            f"{what} --average_with {data.averaged_with[0].path}: the mean of several teachers is known by its entries "
            "and the mass of its tail at T = 1. Take --temperature 1 and --tail bucket or cap"
        )

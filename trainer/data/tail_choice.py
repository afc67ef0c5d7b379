"""Which tail treatment a run takes, and whether its cache holds the parts that it and the temperature need."""

from __future__ import annotations

from typing import TYPE_CHECKING

from logitcache import UserError
from logitcache.format.tail_part import TailPart
from logitcache.format.tail_parts import PARTS
from trainer.data.training_data import TrainingData

if TYPE_CHECKING:  # transformers takes seconds to import
    from trainer.config.config import DistillConfig


def resolve_tail(config: DistillConfig, data: TrainingData) -> str:
    """Choose the tail treatment of a run. Raises UserError if the cache lacks parts for --tail or --temperature."""
    parts = data.tail_parts
    for temperature in config.temperatures:
        if approximates_tail(config, data, temperature) and not (config.approximate_temperature and parts.entropy):
            _refuse_temperature(temperature, data)
    for part in PARTS:
        if config.tail == part.name and not getattr(parts, part.name):
            _refuse_tail(part, data)
    if config.tail is not None:
        return config.tail
    return "groups" if parts.groups and config.temperatures == (1,) else "bucket"


def approximates_tail(config: DistillConfig, data: TrainingData, temperature: float) -> bool:
    """Tell whether the run needs the tail at a temperature at which the cache does not hold it."""
    return temperature not in (1, *data.tail_parts.temperatures) and config.tail != "renormalise"


def _refuse_tail(part: TailPart, data: TrainingData) -> None:
    name = part.name
    _refuse_averaged(f"--tail {name}", data)
    lacking = [cache for cache in data.caches if not getattr(cache.manifest.layout.tail_parts, name)]
    if not lacking:
        raise UserError(
            f"--tail {name}: the caches of {data.path} do not hold the same tail {name}. Take --tail bucket"
        )
    raise UserError(
        f"--tail {name}: {lacking[0].path} holds no tail {name}. Take --tail bucket, or build the cache with "
        f"`logitcache build {part.flag} 32`"
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

"""A run in words: what was settled before it starts."""

from __future__ import annotations

import math

from logitcache import LogitCache
from trainer.config import DistillConfig, approximates_tail
from trainer.data.batches import EpochBatches


def describe_run(
    config: DistillConfig,
    cache: LogitCache,
    eval_cache: LogitCache | None,
    tail: str,
    whose_tokenizer: str,
    checkpoint: str | None,
) -> dict[str, str]:
    """Name → choice, in the order of printing."""
    return {
        "cache": _cache(cache),
        "held-out cache": _cache(eval_cache) if eval_cache else "none",
        "student": str(config.student) + (", weights drawn at random" if config.from_scratch else ""),
        "tokenizer": whose_tokenizer,
        "loss": _loss(config),
        "tail": tail + ("" if config.tail else f" (chosen: {_why(tail, config)})") + _estimate(config, cache),
        "device": f"{config.device}, {_precision(config)}" + (f", {config.world_size} ranks" * (config.world_size > 1)),
        "steps": _steps(config, cache),
        "output": str(config.output_dir) + (f", continued from {checkpoint}" if checkpoint else ""),
    }


def _cache(cache: LogitCache) -> str:
    return f"{cache.path}, {len(cache):,} sequences, {cache.num_positions:,} positions"


def _loss(config: DistillConfig) -> str:
    if config.kd_weight == 0:
        return "hard labels only"
    assert isinstance(config.loss_args, dict)
    options = ", ".join(f"{name}={value}" for name, value in config.loss_args.items())
    kd = config.loss + (f"({options})" if options else "")
    kd += "" if config.temperature == 1 else f" at T = {config.temperature:g}"
    factor = "·T²" if config.t_squared and config.temperature != 1 else ""
    return f"{1 - config.kd_weight:g}·CE + {config.kd_weight:g}{factor}·{kd}" if config.kd_weight < 1 else kd


def _why(tail: str, config: DistillConfig) -> str:
    if tail == "groups":
        return "the cache holds groups"
    return "the cache holds no groups" if config.temperature == 1 else "groups are known at T = 1 only"


def _estimate(config: DistillConfig, cache: LogitCache) -> str:
    if not approximates_tail(config, cache):
        return ""
    return f", at T = {config.temperature:g} estimated from its mass and entropy at T = 1"


def _precision(config: DistillConfig) -> str:
    return "bfloat16 autocast" if config.bf16 else "float16 autocast" if config.fp16 else "float32"


def _steps(config: DistillConfig, cache: LogitCache) -> str:
    batches = EpochBatches(
        cache,
        config.per_device_train_batch_size,
        (config.process_index, config.world_size),
        config.dataloader_drop_last,
    )
    per_epoch = math.ceil(len(batches) / config.gradient_accumulation_steps)
    steps = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * per_epoch)
    per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size
    positions = cache.num_positions * per_step / len(cache)
    return f"{steps:,} of {per_step} sequences, about {positions:,.0f} positions each"

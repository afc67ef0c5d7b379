"""A run in words: what was settled before it starts."""

from __future__ import annotations

import math

from logitcache import LogitCache
from trainer.config.config import DistillConfig
from trainer.data.batching import batching_of, num_batches
from trainer.data.tail_choice import approximates_tail
from trainer.data.training_data import TrainingData


def describe_run(
    config: DistillConfig,
    data: TrainingData,
    eval_cache: LogitCache | None,
    tail: str,
    whose_tokenizer: str,
    checkpoint: str | None,
) -> dict[str, str]:
    """Name → choice, in the order of printing."""
    return {
        "cache": _size(data) + "".join(f", averaged with {other.path}" for other in data.averaged_with),
        "held-out cache": _size(eval_cache) if eval_cache else "none",
        "student": str(config.student) + (", weights drawn at random" if config.from_scratch else ""),
        "tokenizer": whose_tokenizer,
        "loss": _loss(config),
        "tail": tail + ("" if config.tail else f" (chosen: {_why(tail, config)})") + _estimate(config, data),
        "device": f"{config.device}, {_precision(config)}" + (f", {config.world_size} ranks" * (config.world_size > 1)),
        "steps": _steps(config, data),
        "output": str(config.output_dir) + (f", continued from {checkpoint}" if checkpoint else ""),
    }


def _size(cache: LogitCache | TrainingData) -> str:
    return f"{cache.path}, {len(cache):,} sequences, {cache.num_positions:,} positions"


def _loss(config: DistillConfig) -> str:
    if config.kd_weights == (0,):
        return "hard labels only"
    assert isinstance(config.loss_args, dict)
    options = ", ".join(f"{name}={value}" for name, value in config.loss_args.items())
    kd = (config.loss_schedule or config.loss) + (f"({options})" if options else "")
    kd += "" if config.temperatures == (1,) else f" at T = {config.temperature_schedule or f'{config.temperature:g}'}"
    factor = "·T²" if config.t_squared and config.temperatures != (1,) else ""
    if config.kd_weight_schedule:
        return f"(1 − λ)·CE + λ{factor}·{kd}, λ = {config.kd_weight_schedule}"
    return f"{1 - config.kd_weight:g}·CE + {config.kd_weight:g}{factor}·{kd}" if config.kd_weight < 1 else kd


def _why(tail: str, config: DistillConfig) -> str:
    if tail == "groups":
        return "the cache holds groups"
    return "the cache holds no groups" if config.temperatures == (1,) else "groups are known at T = 1 only"


def _estimate(config: DistillConfig, data: TrainingData) -> str:
    estimated = [f"{T:g}" for T in config.temperatures if approximates_tail(config, data, T)]
    return f", at T = {', '.join(estimated)} estimated from its mass and entropy at T = 1" if estimated else ""


def _precision(config: DistillConfig) -> str:
    return "bfloat16 autocast" if config.bf16 else "float16 autocast" if config.fp16 else "float32"


def _steps(config: DistillConfig, data: TrainingData) -> str:
    batches = num_batches(config, data)
    per_epoch = math.ceil(batches / config.gradient_accumulation_steps)
    steps = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * per_epoch)
    batch = batching_of(config, data)
    accumulated = min(config.gradient_accumulation_steps, max(batches, 1))
    in_step = accumulated * config.world_size
    if batch.packed_length:
        rows = f"{batch.batch_size * in_step} rows of {batch.packed_length:,} packed tokens"
    elif batch.tokens_per_batch:
        rows = f"sequences of up to {batch.tokens_per_batch * in_step:,} tokens with padding"
    else:
        rows = f"{min(batch.batch_size * in_step, len(data))} sequences"
    positions = data.num_positions / max(batches, 1) * accumulated
    return f"{steps:,} of {rows}, about {positions:,.0f} positions each"

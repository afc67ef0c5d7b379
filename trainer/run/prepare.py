"""A run before it starts: everything opened, compared and said in words; only the student's weights are not loaded yet."""

from __future__ import annotations

import math
from dataclasses import dataclass

from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.trainer_utils import IntervalStrategy

import logitcache
from logitcache import LogitCache, UserError
from logitcache.attention import choose_attention, left_out
from trainer.config.config import DistillConfig
from trainer.data.averaging import shared_rows
from trainer.data.sampler import batching_of, num_batches
from trainer.data.tail_choice import approximates_tail, resolve_tail
from trainer.data.training_data import TrainingData, open_training_data
from trainer.model.adapters import check_adapter_student
from trainer.model.student import check_student, student_config
from trainer.model.tokenizers import cache_tokenizer, check_tokenizer, student_tokenizer
from trainer.run.resume import check_same_run, find_checkpoint


@dataclass(frozen=True)
class PreparedRun:
    """A run whose settings, caches and tokenizers agree; the student's weights are not loaded yet.

    Attributes:
        choices: the decisions of the run in words, by name, for people.
        warnings: sentences about problems that do not stop the run.
        checkpoint: the checkpoint from which the run continues, or None.
    """

    config: DistillConfig
    data: TrainingData
    eval_cache: LogitCache | None
    student_config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase | None
    choices: dict[str, str]
    warnings: list[str]
    checkpoint: str | None


def prepare(config: DistillConfig) -> PreparedRun:
    """Open and compare everything that a run needs, except for the student's weights.

    Raises:
        UserError: a setting, a cache or a checkpoint is missing, or two of them do not agree.
    """
    if not config.cache:
        raise UserError("--cache is missing: name the cache to learn from")
    if not config.student:
        raise UserError("--student is missing: name a model folder or a model on the Hub")
    if config.eval_strategy != "no" and not config.eval_cache:
        raise UserError(
            f"--eval_strategy {IntervalStrategy(config.eval_strategy).value}: name the held-out cache with --eval_cache"
        )
    data = open_training_data(config.cache, config.average_with or ())
    eval_cache = logitcache.open(config.eval_cache) if config.eval_cache else None
    _check_eval_cache(data, eval_cache)
    caches = [*data.caches, *data.averaged_with, *([eval_cache] if eval_cache else [])]
    tail = resolve_tail(config, data)
    checkpoint = find_checkpoint(config)
    warnings = check_same_run(checkpoint, config, data, tail) if checkpoint else []
    model_config = student_config(config.student)
    check_adapter_student(config)
    if config.attn_implementation:
        model_config._attn_implementation = choose_attention(
            model_config, config.attn_implementation, "--attn_implementation"
        )
    elif lost := left_out(model_config, None):
        attention = model_config._attn_implementation
        warnings.append(f"--student {config.student}: its attention is {attention}, since sdpa leaves out {lost}")
    for opened in caches:
        check_student(model_config, opened, config.student)
    tokenizer, whose_tokenizer, where = student_tokenizer(config.student), "the student's", config.student
    if tokenizer is None:
        tokenizer = cache_tokenizer(data.caches[0])
        whose_tokenizer = "the cache's (the student has none)" if tokenizer else "none"
        where = data.caches[0].tokenizer_path
    if tokenizer is not None:
        for opened in caches:
            warnings += check_tokenizer(tokenizer, opened, where)
    _check_batch(config, data)
    if eval_cache is not None and config.process_index == 0:  # one rank reads all row ids and tells
        warnings += _overlap(data, eval_cache)
    warnings += [
        f"{opened.path}: the mass of its tail is {about}; losses that weigh the tail, RKL above all, learn from that"
        for opened in caches
        if (about := opened.manifest.fingerprint.get("capture", {}).get("tail"))
    ]
    choices = describe_run(config, data, eval_cache, tail, whose_tokenizer, checkpoint)
    return PreparedRun(
        config, data, eval_cache, model_config, tokenizer, choices, list(dict.fromkeys(warnings)), checkpoint
    )


def _check_eval_cache(data: TrainingData, eval_cache: LogitCache | None) -> None:
    """Raises UserError for a held-out cache that is empty or has another vocabulary."""
    if eval_cache is not None and not len(eval_cache):
        raise UserError(f"{eval_cache.path} is an empty cache")
    if eval_cache is not None and eval_cache.vocab_size != data.vocab_size:
        raise UserError(
            f"--eval_cache {eval_cache.path}: its teacher has {eval_cache.vocab_size} tokens, that of {data.path} has "
            f"{data.vocab_size}. Both must come from one teacher"
        )


def _check_batch(config: DistillConfig, data: TrainingData) -> None:
    """Raises UserError for caches that hold fewer sequences than one batch."""
    whole_batch = 1 if config.packing or config.tokens_per_batch else config.per_device_train_batch_size
    if len(data) < whole_batch * config.world_size:
        ranks = f" on each of {config.world_size} ranks" if config.world_size > 1 else ""
        raise UserError(
            f"{data.path} holds {len(data)} sequences, fewer than one batch of {whole_batch}{ranks}: lower "
            "--per_device_train_batch_size, or build a larger cache"
        )
    if not num_batches(config, data):
        raise UserError(
            f"--dataloader_drop_last: {data.path} fills no whole batch. Leave it out, or lower "
            "--per_device_train_batch_size"
        )


def _overlap(data: TrainingData, eval_cache: LogitCache) -> list[str]:
    shared = shared_rows(data.caches, eval_cache)
    if not shared:
        return []
    return [
        f"--eval_cache {eval_cache.path}: {shared:,} of its {len(eval_cache):,} rows are trained on too, so it measures "
        "memory as well. `logitcache slice` makes a cache of other rows"
    ]


def describe_run(
    config: DistillConfig,
    data: TrainingData,
    eval_cache: LogitCache | None,
    tail: str,
    whose_tokenizer: str,
    checkpoint: str | None,
) -> dict[str, str]:
    """Describe the decisions of a run: name → choice, in the order of printing."""
    return {
        "cache": _size(data) + "".join(f", averaged with {other.path}" for other in data.averaged_with),
        "held-out cache": _size(eval_cache) if eval_cache else "none",
        "student": str(config.student) + (", weights drawn at random" if config.from_scratch else ""),
        "tokenizer": whose_tokenizer,
        "loss": _loss(config),
        "tail": tail + ("" if config.tail else f" (chosen: {_why(tail, config)})") + _estimate(tail, config, data),
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
    if tail != "bucket":
        return f"the cache holds {'coefficients' if tail == 'low_rank' else tail}"
    return "the cache holds no groups" if config.temperatures == (1,) else "groups are known at T = 1 only"


def _estimate(tail: str, config: DistillConfig, data: TrainingData) -> str:
    estimated = [f"{T:g}" for T in config.temperatures if approximates_tail(tail, data, T)]
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
        content = f"{batch.batch_size * in_step} rows of {batch.packed_length:,} packed tokens"
    elif batch.tokens_per_batch:
        content = f"sequences of up to {batch.tokens_per_batch * in_step:,} tokens with padding"
    else:
        content = f"{min(batch.batch_size * in_step, len(data))} sequences"
    positions = data.num_positions / max(batches, 1) * accumulated
    return f"{steps:,} of {content}, about {positions:,.0f} positions each"

"""A run before it starts: everything opened and compared but the student's weights."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.trainer_utils import IntervalStrategy

import logitcache
from logitcache import LogitCache, UserError
from logitcache.attention import choose_attention, left_out
from trainer.config.config import DistillConfig
from trainer.data.batching import num_batches
from trainer.data.tail_choice import choose_tail
from trainer.data.training_data import TrainingData, open_training_data, shared_rows
from trainer.model.adapters import check_adapter_student
from trainer.model.student import check_student, student_config
from trainer.model.tokenizers import cache_tokenizer, check_tokenizer, student_tokenizer
from trainer.run.description import describe_run
from trainer.run.resume import check_same_run, find_checkpoint


@dataclass(frozen=True)
class Run:
    """A run whose settings, caches and tokenizers agree; the student's weights are not loaded yet.

    choices: what was settled, for people.  warnings: what does not stop it.  checkpoint: where it continues from.
    """

    config: DistillConfig
    data: TrainingData
    eval_cache: LogitCache | None
    student_config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase | None
    choices: dict[str, str]
    warnings: list[str]
    checkpoint: str | None


def prepare(config: DistillConfig) -> Run:
    """Opens and compares everything that a run needs, but the student's weights.

    Raises UserError for a missing setting, a cache or checkpoint that is not there, and whatever does not agree.
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
    tail = choose_tail(config, data)
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
    return Run(config, data, eval_cache, model_config, tokenizer, choices, list(dict.fromkeys(warnings)), checkpoint)


def _check_eval_cache(data: TrainingData, eval_cache: LogitCache | None) -> None:
    """Raises UserError for one that is empty or of another vocabulary."""
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
    shared = shared_rows(data, eval_cache)
    if not shared:
        return []
    return [
        f"--eval_cache {eval_cache.path}: {shared:,} of its {len(eval_cache):,} rows are trained on too, so it measures "
        "memory as well. `logitcache slice` makes a cache of other rows"
    ]

"""How close is a model to the teacher of a held-out cache?"""

from __future__ import annotations

from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

import logitcache
from logitcache import LogitCache, UserError
from logitcache.format.atomic import write_json
from trainer.batches import BatchLoader, Collator
from trainer.losses.sparse import distillation_terms
from trainer.losses.tail import TeacherTargets
from trainer.metrics import Sums, evaluation_metrics, evaluation_sums
from trainer.student import StoredLogits, check_vocabulary, load_student, student_config
from trainer.tokenizers import check_tokenizer, student_tokenizer


@torch.no_grad()
def evaluate(
    model: PreTrainedModel, cache: LogitCache, *, batch_size: int = 8, name: str = "model"
) -> dict[str, float]:
    """`metrics.evaluation_metrics` of a model on a cache, on the model's device; holds one batch at a time."""
    stored_logits = StoredLogits(model, name)
    model.eval()
    model.config.use_cache = False
    sums = Sums()
    for batch in tqdm(BatchLoader(cache, batch_size, Collator()), desc="evaluating", unit="batch", disable=None):
        batch = {key: tensor.to(model.device) for key, tensor in batch.items()}
        logits = stored_logits(model, batch)
        targets = TeacherTargets(batch["token_ids"], batch["logprobs"], batch["tail_logprob"])
        try:
            terms = distillation_terms(logits, targets, batch["labels"], loss="fkl", vocab_size=cache.vocab_size)
        except ValueError as error:
            raise UserError(f"{cache.path} holds a batch that no teacher gives: {error}") from error
        sums.add(evaluation_sums(terms, logits, batch, cache.vocab_size))
    return evaluation_metrics(sums.totals())


def evaluate_folder(name: str, cache_path: str, *, batch_size: int = 8) -> dict[str, float]:
    """`evaluate` of a model folder or name, in the dtype it is stored in, on a GPU where there is one.

    Raises UserError where model, tokenizer and cache do not belong together.
    """
    cache = logitcache.open(cache_path)
    if not len(cache):
        raise UserError(f"{cache.path} is an empty cache")
    config = student_config(name)
    check_vocabulary(config, cache, name)
    tokenizer = student_tokenizer(name)
    if tokenizer is not None:
        check_tokenizer(tokenizer, cache, name)
    model = load_student(name, config, from_scratch=False, dtype="auto")
    if torch.cuda.is_available():
        model.cuda()  # type: ignore[call-arg]  # transformers' wrapper hides self
    return evaluate(model, cache, batch_size=batch_size, name=name)


def write_evaluation(path: Path, model: str, cache_path: str, metrics: dict[str, float]) -> None:
    """Writes metrics as JSON, with what they are of."""
    write_json(path, {"model": model, "cache": cache_path, "metrics": metrics})

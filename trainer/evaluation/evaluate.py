"""Measures how close a model is to the teacher of a held-out cache."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

import logitcache
from logitcache import LogitCache, UserError
from logitcache.format.tail_parts import TailParts
from logitcache.storage.atomic import write_json
from trainer.data.collator import Collator, basis_tensors
from trainer.data.loader import BatchLoader
from trainer.data.tail_choice import evaluation_tail
from trainer.data.training_data import TrainingData
from trainer.evaluation.identity import identities
from trainer.evaluation.metrics import Sums, evaluation_metrics, evaluation_sums
from trainer.losses.fused import Mixture
from trainer.losses.settings import LossSettings
from trainer.model.objective import objective_of
from trainer.model.student import check_student, load_student, student_config, warn_of_rotation
from trainer.model.tokenizers import check_tokenizer, student_tokenizer


@torch.no_grad()
def evaluate(
    student: PreTrainedModel | str | Path, cache: LogitCache | str | Path, *, batch_size: int = 8
) -> dict[str, float]:
    """Measures a student against the teacher of a held-out cache. One batch is in memory at a time.

    Args:
        student: A model, which is measured on its device, or a model folder or name, which is loaded in the dtype it is
            stored in, on a GPU if there is one.
        cache: The held-out cache, or its folder or URL.
        batch_size: Sequences at a time.

    Returns:
        Name of a metric (as in `trainer.config.metrics`) → value: cross-entropy, divergences and probabilities. The
        divergences are from the distribution that a cache with coefficients gives of the whole vocabulary, else bucketed.

    Raises:
        UserError: Student, tokenizer and cache do not belong together, or the cache is empty.
    """
    if not isinstance(cache, LogitCache):
        cache = logitcache.open(cache)
    name = "model"
    if isinstance(student, str | Path):
        name = str(student)
        model = _load(name, cache)
    else:
        model = student
    check_student(model.config, cache, name)
    if batch_size > 1:
        warn_of_rotation(model, cache.manifest.longest, "measured", "--batch_size 1")
    model.eval()
    model.config.use_cache = False
    objective, sums, data = objective_of(model), Sums(), TrainingData.of(cache)
    basis = None if data.tail_basis is None else basis_tensors(data.tail_basis, model.device)
    batches = BatchLoader(data, batch_size, Collator(TailParts(rank=data.tail_parts.rank)))
    for batch in tqdm(batches, desc="evaluating", unit="batch", disable=None):
        batch = batch.to(model.device)
        _, terms = objective(
            model,
            batch,
            batch.targets_at(1.0, tail_basis=basis),
            mixture=Mixture(kd_factor=1.0, ce_factor=0.0),
            settings=LossSettings("fkl", evaluation_tail(data)),
            vocab_size=cache.vocab_size,
            validate=True,
        )
        sums.add(evaluation_sums(terms, batch.targets))
    return evaluation_metrics(sums.totals())


def _load(name: str, cache: LogitCache) -> PreTrainedModel:
    """Loads a model. Raises UserError if the cache is empty, or does not suit the model or its tokenizer."""
    if not len(cache):
        raise UserError(f"{cache.path} is an empty cache")
    config = student_config(name)
    check_student(config, cache, name)
    tokenizer = student_tokenizer(name)
    if tokenizer is not None:
        check_tokenizer(tokenizer, cache, name)
    model = load_student(name, config, from_scratch=False, dtype="auto")
    if torch.cuda.is_available():
        model.cuda()  # type: ignore[call-arg]  # transformers' wrapper hides self
    return model


def check_overwrites_same_cache(path: Path, cache: LogitCache) -> None:
    """Raises UserError if `path` holds an evaluation on another cache."""
    if not path.exists():
        return
    try:
        former = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        former = {}
    if former.get("cache_sha256") not in identities(cache):
        raise UserError(
            f"{path} is the evaluation on another cache ({former.get('cache', 'unknown')}) than {cache.path}: name "
            "another file to write with --out"
        )


def write_evaluation(path: Path, model: str, cache: LogitCache, metrics: dict[str, float]) -> None:
    """Writes metrics as JSON, with model and cache."""
    write_json(path, {"model": model, "cache": cache.path, "cache_sha256": cache.identity, "metrics": metrics})

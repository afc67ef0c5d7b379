"""The papers' measurement: answers to prompts, generated with several seeds, and their ROUGE-L."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from logitcache import UserError
from logitcache.engines.vllm_process import why_not_vllm
from logitcache.storage.atomic import file_sha256
from logitcache.table import aligned
from trainer.evaluation.completion_files import (
    Scores,
    answers_name,
    means_of_runs,
    read_scores,
    run_name,
    runs_there,
    runs_with_answers,
    write_answers,
    write_scores,
)
from trainer.evaluation.generation import TransformersGenerator, end_ids
from trainer.evaluation.generation_settings import GenerationSettings
from trainer.evaluation.identity import model_identity
from trainer.evaluation.prompts import Prompt, data_stem, read_prompts
from trainer.evaluation.rouge import has_words
from trainer.evaluation.vllm_generation import VllmGenerator
from trainer.model.adapters import base_model
from trainer.model.student import load_student, student_config
from trainer.model.tokenizers import student_tokenizer


def generate_scores(
    model: str, folder: Path, settings: GenerationSettings, say: Callable[[str], None] = print
) -> dict[str, Scores]:
    """Generates the answers that `folder` does not hold yet, scores them and writes both there.

    model: a folder or a name.  say: gets a line for each seed that is made, and warnings.

    Returns the content of each data file's .json under the file's stem: `seeds` (of each run: `rouge_l` ×100, mean
    `answer_tokens`, share `ended`, file of `answers`, `engine`, `dtype` of the weights), the means of the first three over
    all runs that the folder holds, `spread` (standard deviation of `rouge_l` over runs, n − 1; None for one), `rows`,
    `too_long`, and what they are of: `model`, `data`, `settings` (with the backend), and SHA-256 of both.

    Raises UserError for a model that cannot answer, for bad rows, and if `folder` holds answers of other settings or of
    another model.
    """
    config = student_config(model)
    tokenizer = student_tokenizer(model)
    if tokenizer is None:
        raise UserError(f"{model}: it has no tokenizer, which prompts need; save the tokenizer of its cache there")
    template = settings.read_template()
    prompts = {
        path: read_prompts(path, tokenizer, settings.columns, settings.prompt_template, template, say)
        for path in settings.data
    }
    kept = {path: prompts_that_fit(found, model, config, settings) for path, found in prompts.items()}
    for path in settings.data:
        _check_rows(data_stem(path), prompts[path], kept[path], settings, say)
    backend = choose_backend(settings.backend, model)
    identity = model_identity(model, config)
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, Scores] = {}
    for path in settings.data:
        blank: Scores = {
            "model": str(Path(model).absolute()) if Path(model).is_dir() else model,
            "model_identity": identity,
            "data": path,
            "data_sha256": file_sha256(Path(path)),
            "settings": settings.decisive(backend),
            "rows": len(kept[path]),
            "too_long": len(prompts[path]) - len(kept[path]),
        }
        results[data_stem(path)] = blank | {"seeds": runs_there(folder, data_stem(path), blank, say)}
    missing = [
        (path, run, seed)
        for path in settings.data
        for run, seed in settings.runs.items()
        if run not in results[data_stem(path)]["seeds"]
    ]
    if missing:
        longest = max(len(prompt.token_ids) for path, _, _ in missing for prompt in kept[path])
        with _generator(backend, model, config, tokenizer, longest, settings) as generator:
            for path, run, seed in missing:
                stem = data_stem(path)
                label = f"{stem}, {run_name(run)}"
                answers = generator.answers(kept[path], seed, label)
                scores = write_answers(folder / answers_name(stem, run), kept[path], answers)
                results[stem]["seeds"][run] = scores | {"engine": generator.engine, "dtype": generator.dtype}
                results[stem] |= means_of_runs(results[stem]["seeds"])
                write_scores(folder, stem, results[stem])
                say(
                    f"{label}: ROUGE-L {scores['rouge_l']:.2f}, {scores['answer_tokens']:.0f} tokens, "
                    f"{scores['ended']:.0%} ended"
                )
    return {stem: found | means_of_runs(found["seeds"]) for stem, found in results.items()}


def scores_are_current(model: str, folder: Path, settings: GenerationSettings) -> bool:
    """Tells whether `generate_scores` would find everything in `folder`, by content, whatever the times of files.

    It compares the settings that answers depend on (with backend "auto", answers of either backend count), a score and a
    file of answers for every run, and the SHA-256 of each data file and of the model's files, so it reads all weights
    once. Raises UserError if `model` is none.
    """
    try:
        found = {path: read_scores(folder / f"{data_stem(path)}.json") for path in settings.data}
    except UserError:
        return False
    identities = set()
    for path, scores in found.items():
        if scores is None or settings.runs.keys() - runs_with_answers(folder, scores):
            return False
        backend = scores["settings"].get("backend") if settings.backend == "auto" else settings.backend
        if scores["settings"] != settings.decisive(backend) or scores.get("data_sha256") != file_sha256(Path(path)):
            return False
        identities.add(scores.get("model_identity"))
    return identities == {model_identity(model, student_config(model))}


def scores_table(scores: Mapping[str, Scores]) -> str:
    """Shows the scores of each data file on a line."""
    rows = [("", "rows", "runs", "ROUGE-L", "answer tokens", "ended")]
    for stem, found in scores.items():
        spread = "" if found["spread"] is None else f" ± {found['spread']:.2f}"
        counts = f"{found['rows']:,}", str(len(found["seeds"]))
        means = f"{found['rouge_l']:.2f}{spread}", f"{found['answer_tokens']:.1f}", f"{found['ended']:.1%}"
        rows.append((stem, *counts, *means))
    return aligned(rows)


def choose_backend(backend: str, model: str) -> str:
    """Resolves "auto": vLLM if it imports, CUDA is there and the model is no adapter. Raises UserError."""
    is_adapter = base_model(model) is not None
    if backend == "vllm":
        if reason := why_not_vllm():
            raise UserError(f"--backend vllm: {reason}; pip install 'logitcache[vllm]', or --backend transformers")
        if is_adapter:
            raise UserError(
                f"--backend vllm: {model} is an adapter: answer with --backend transformers, or merge it first"
            )
    if backend == "auto":
        return "vllm" if torch.cuda.is_available() and not is_adapter and why_not_vllm() is None else "transformers"
    return backend


def prompts_that_fit(
    prompts: Sequence[Prompt], model: str, config: PreTrainedConfig, settings: GenerationSettings
) -> list[Prompt]:
    """Selects the prompts within max_prompt_length. Raises UserError for a prompt that the model cannot take."""
    longest, new = settings.max_prompt_length, settings.max_new_tokens
    kept = [prompt for prompt in prompts if longest is None or len(prompt.token_ids) <= longest]
    text_config = config.get_text_config()
    positions = getattr(text_config, "max_position_embeddings", None)
    for prompt in kept:
        if positions is not None and len(prompt.token_ids) + new > positions:
            raise UserError(
                f"{prompt.where}: the prompt's {len(prompt.token_ids)} tokens and max_new_tokens {new} are more than the "
                f"{positions} that {model} takes: lower max_new_tokens"
                + (f", or leave longer prompts out with --max_prompt_length {positions - new}" * (positions > new))
            )
        if max(prompt.token_ids) >= text_config.vocab_size:
            raise UserError(
                f"{prompt.where}: token id {max(prompt.token_ids)}, but {model} knows {text_config.vocab_size}: is this its "
                "tokenizer?"
            )
    return kept


def _check_rows(
    stem: str,
    prompts: Sequence[Prompt],
    kept: Sequence[Prompt],
    settings: GenerationSettings,
    say: Callable[[str], None],
) -> None:
    """Says which prompts are left out and which cannot score. Raises UserError if none is left."""
    if not kept:
        raise UserError(f"--max_prompt_length {settings.max_prompt_length}: no prompt of {stem} is as short as that")
    if len(kept) < len(prompts):
        say(
            f"{stem}: {len(prompts) - len(kept):,} of {len(prompts):,} prompts are longer than --max_prompt_length "
            f"{settings.max_prompt_length} and left out"
        )
    unscored = sum(not has_words(prompt.references) for prompt in kept)
    if unscored:
        message = (
            f"{stem}: {unscored:,} of {len(kept):,} references have no word of a–z and 0–9, all that ROUGE-L counts"
        )
        if unscored == len(kept):
            raise UserError(f"{message}: every score would be 0")
        say(f"{message}; these score 0 whatever is answered")


@contextmanager
def _generator(
    backend: str,
    model: str,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    longest: int,
    settings: GenerationSettings,
) -> Iterator[TransformersGenerator | VllmGenerator]:
    """Loads the model, on a CPU in float32: half precision wins no time there, and answers would depend on batches."""
    ends = end_ids(base_model(model) or model, config, tokenizer)
    sampling: dict[str, Any] = {"temperature": settings.temperature, "max_new_tokens": settings.max_new_tokens}
    if backend == "vllm":
        gc.collect()  # of an earlier measurement on the same GPU
        torch.cuda.empty_cache()
        with closing(VllmGenerator(model, config, tokenizer, ends, longest=longest, **sampling)) as generator:
            yield generator
        return
    on_cuda = torch.cuda.is_available()
    loaded = load_student(model, config, from_scratch=False, dtype="auto" if on_cuda else torch.float32)
    if on_cuda:
        loaded.cuda()  # type: ignore[call-arg]  # transformers' wrapper hides self
    yield TransformersGenerator(loaded, tokenizer, ends, batch_size=settings.batch_size, **sampling)

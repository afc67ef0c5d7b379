"""The papers' measurement: answers to prompts, generated with several seeds, and their ROUGE-L."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from logitcache import UserError
from logitcache.format.atomic import file_sha256, write_json
from logitcache.table import aligned
from trainer.adapters import base_model
from trainer.evaluation.answer_files import Scores, answers_name, means_of_runs, run_name, runs_there, write_answers
from trainer.evaluation.generation import TransformersGenerator, end_ids
from trainer.evaluation.generation_settings import GenerationSettings
from trainer.evaluation.identity import model_identity
from trainer.evaluation.prompts import Prompt, data_stem, read_prompts
from trainer.evaluation.rouge import has_words
from trainer.evaluation.vllm_generation import VllmGenerator, why_not_vllm
from trainer.student import load_student, student_config
from trainer.tokenizers import student_tokenizer


def generate_scores(
    model: str, folder: Path, settings: GenerationSettings, say: Callable[[str], None] = print
) -> dict[str, Scores]:
    """Generates what `folder` does not hold yet, scores it and writes both there.

    model: a folder or a name.  say: gets a line for each seed that is made, and warnings.

    Returns the content of each data file's .json under the file's stem: `seeds` (of each run: `rouge_l` ×100, mean
    `answer_tokens`, share `ended`, file of `answers`, `engine`), the means of these three over all runs that the folder
    holds, `spread` (standard deviation of `rouge_l` over runs, n − 1; None for one), `rows`, `too_long`, and what they
    are of.

    Raises UserError for a model that cannot answer, for bad rows, and where `folder` holds answers of other settings.
    """
    config = student_config(model)
    tokenizer = student_tokenizer(model)
    if tokenizer is None:
        raise UserError(f"{model}: it has no tokenizer, which prompts need; save the tokenizer of its cache there")
    prompts = {
        path: read_prompts(path, tokenizer, settings.columns, settings.prompt_template) for path in settings.data
    }
    kept = {path: _that_fit(found, model, config, settings) for path, found in prompts.items()}
    for path in settings.data:
        _check_rows(data_stem(path), prompts[path], kept[path], settings, say)
    backend = choose_backend(settings.backend, model)
    identity = model_identity(model, config)
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, Scores] = {}
    for path in settings.data:
        blank: Scores = {
            "model": model,
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
        generator = _generator(backend, model, config, tokenizer, longest, settings)
        for path, run, seed in missing:
            stem = data_stem(path)
            label = f"{stem}, {run_name(run)}"
            answers = generator.answers(kept[path], seed, label)
            scores = write_answers(folder / answers_name(stem, run), kept[path], answers)
            results[stem]["seeds"][run] = scores | {"engine": generator.engine}
            results[stem] |= means_of_runs(results[stem]["seeds"])
            write_json(folder / f"{stem}.json", results[stem])
            say(
                f"{label}: ROUGE-L {scores['rouge_l']:.2f}, {scores['answer_tokens']:.0f} tokens, "
                f"{scores['ended']:.0%} ended"
            )
    return {stem: found | means_of_runs(found["seeds"]) for stem, found in results.items()}


def scores_table(scores: Mapping[str, Scores]) -> str:
    """A line for each data file."""
    rows = [("", "rows", "runs", "ROUGE-L", "answer tokens", "ended")]
    for stem, found in scores.items():
        spread = "" if found["spread"] is None else f" ± {found['spread']:.2f}"
        rows.append(
            (
                stem,
                f"{found['rows']:,}",
                str(len(found["seeds"])),
                f"{found['rouge_l']:.2f}{spread}",
                f"{found['answer_tokens']:.1f}",
                f"{found['ended']:.1%}",
            )
        )
    return aligned(rows)


def choose_backend(backend: str, model: str) -> str:
    """Resolves "auto": vLLM where it imports, CUDA is there and the model is no adapter. Raises UserError."""
    is_adapter = base_model(model) is not None
    if backend == "vllm":
        if reason := why_not_vllm():
            raise UserError(f"--backend vllm: {reason}; pip install 'logitcache[vllm]', or --backend transformers")
        if is_adapter:
            raise UserError(f"--backend vllm: {model} is an adapter, take --backend transformers or merge it first")
    if backend == "auto":
        return "vllm" if torch.cuda.is_available() and not is_adapter and why_not_vllm() is None else "transformers"
    return backend


def _that_fit(
    prompts: Sequence[Prompt], model: str, config: PreTrainedConfig, settings: GenerationSettings
) -> list[Prompt]:
    """The prompts within --max_prompt_length. Raises UserError for any that the model cannot take."""
    longest, new = settings.max_prompt_length, settings.max_new_tokens
    kept = [prompt for prompt in prompts if longest is None or len(prompt.token_ids) <= longest]
    text_config = config.get_text_config()
    positions = getattr(text_config, "max_position_embeddings", None)
    for prompt in kept:
        if positions is not None and len(prompt.token_ids) + new > positions:
            raise UserError(
                f"{prompt.where}: the prompt's {len(prompt.token_ids)} tokens and --max_new_tokens {new} are more than the "
                f"{positions} that {model} takes: lower --max_new_tokens"
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
    """Says what is left out and what cannot score. Raises UserError where nothing is left."""
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


def _generator(
    backend: str,
    model: str,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    longest: int,
    settings: GenerationSettings,
) -> TransformersGenerator | VllmGenerator:
    ends = end_ids(base_model(model) or model, config, tokenizer)
    sampling: dict[str, Any] = {"temperature": settings.temperature, "max_new_tokens": settings.max_new_tokens}
    if backend == "vllm":
        gc.collect()  # what was measured before on the same GPU
        torch.cuda.empty_cache()
        return VllmGenerator(model, config, tokenizer, ends, longest=longest, **sampling)
    loaded = load_student(model, config, from_scratch=False, dtype="auto")
    if torch.cuda.is_available():
        loaded.cuda()  # type: ignore[call-arg]  # transformers' wrapper hides self
    return TransformersGenerator(loaded, tokenizer, ends, batch_size=settings.batch_size, **sampling)

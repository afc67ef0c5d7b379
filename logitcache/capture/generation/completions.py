"""The first phase of a build with --generate: the teacher answers prompts, and its answers become the corpus.

    OUT/.build/answers/prompts.json            request, counts and batches; its presence means that all prompts are read
    OUT/.build/answers/prompts/00000.parquet   the prompts of batch 0, tokenised
    OUT/.build/answers/answered/00000.parquet  the same prompts with their answers, once all of them are there

An interruption costs the batches in flight. Every answer has a seed of its own, made from its prompt,
so that the same ones come again (and equal prompts get equal answers).
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from logitcache.assembly.workspace import ANSWERS_NAME, PROMPTS_NAME, abandon, begin
from logitcache.capture.generation.sampling import GenerationSettings
from logitcache.capture.inputs import Inputs
from logitcache.capture.plan import TokensWriter, check_read, read_tokens
from logitcache.capture.teachers.vllm.generate import Completion, VllmGenerator
from logitcache.format.sequences import TokenSequence
from logitcache.progress import Progress
from logitcache.storage.folder import Folder

COMPLETED_NAME = f"{ANSWERS_NAME}/answered"
COMPLETIONS_PER_BATCH = 256
"""About how many completions a batch has: the least that is kept."""

logger = logging.getLogger("logitcache")


@dataclass(frozen=True)
class Batches:
    """The prompts of a build, in batches. num_prompts: of each batch. Counts: see `Corpus`."""

    layout: str
    num_prompts: Sequence[int]
    longest: int
    num_documents: int
    skipped: Mapping[str, int]
    first_bad: str | None


class CompletedPrompts:
    """The corpus of prompts with their completions, which are trained. Completions without a token are left out.

    Counts: see `Corpus`.
    """

    def __init__(self, folder: Folder, batches: Batches) -> None:
        self._folder, self._batches = folder, batches
        self.document_type: str | None = batches.layout
        self.num_documents = batches.num_documents
        self.skipped = Counter(batches.skipped)
        self.first_bad = batches.first_bad
        self.never_kept: set[str] = set()
        self.notes: Counter[str] = Counter()

    def __iter__(self) -> Iterator[TokenSequence]:
        self.skipped = Counter(self._batches.skipped)
        reasons: Counter[str] = Counter()
        tokens = 0
        for index in range(len(self._batches.num_prompts)):
            with self._folder.open(_completed_name(index)) as source:
                for sequence in read_tokens(source):
                    if not len(sequence.positions):
                        self.skipped["empty answers"] += 1
                        continue
                    reasons[sequence.columns["finish_reason"]] += 1
                    tokens += len(sequence.positions)
                    yield sequence
        logger.info(
            "answers: %s with %s tokens; %s cut off for length",
            f"{reasons.total():,}",
            f"{tokens:,}",
            f"{reasons['length']:,}",
        )


def complete_prompts(folder: Folder, spec: Mapping[str, Any], inputs: Inputs) -> CompletedPrompts:
    """Lets the teacher answer every prompt that has no completions yet; completions in `folder` were made with this spec.

    Raises UserError for a bad document, for a corpus without prompts, and if vLLM does not start.
    """
    assert inputs.generation is not None
    if not folder.exists(PROMPTS_NAME):
        begin(folder)
        try:
            _read_prompts(folder, spec, inputs)
        except BaseException:
            abandon(folder)
            raise
    batches = _batches(folder)
    written = set(folder.names(COMPLETED_NAME))
    missing = [index for index in range(len(batches.num_prompts)) if _batch_name(index) not in written]
    left = sum(batches.num_prompts[index] for index in missing)
    total = sum(batches.num_prompts)
    logger.info(
        "answering %s prompts (layout %s, longest %d tokens): %s",
        f"{total:,}",
        batches.layout,
        batches.longest,
        inputs.generation,
    )
    if left < total:
        logger.info("continuing: %s prompts are answered", f"{total - left:,}")
    if missing:
        progress = Progress("answering", total, total - left, "prompts")
        try:
            _complete(folder, missing, batches, inputs, inputs.generation, progress)
        finally:
            progress.close()
    return CompletedPrompts(folder, batches)


def _read_prompts(folder: Folder, spec: Mapping[str, Any], inputs: Inputs) -> None:
    assert inputs.generation is not None
    corpus = inputs.prompts()
    progress = Progress("reading", None, 0, "prompts")
    per_batch = max(1, COMPLETIONS_PER_BATCH // inputs.generation.num_samples)
    counts: list[int] = []
    longest = 0
    prompts = iter(corpus)
    pending = next(prompts, None)
    while pending is not None:
        count = 0
        with folder.writing(_prompts_name(len(counts))) as path, TokensWriter(path) as writer:
            while pending is not None and count < per_batch:
                writer.write(pending)
                longest = max(longest, len(pending.input_ids))
                count += 1
                progress.advance(1)
                pending = next(prompts, None)
        counts.append(count)
    progress.close()
    check_read(corpus, bool(counts), "prompt to answer")
    data = {
        "request": spec,
        "layout": corpus.document_type,
        "num_prompts": counts,
        "longest": longest,
        "num_documents": corpus.num_documents,
        "skipped": dict(corpus.skipped),
        "first_bad": corpus.first_bad,
    }
    folder.write(PROMPTS_NAME, json.dumps(data, indent=2, ensure_ascii=False))


def _batches(folder: Folder) -> Batches:
    data = json.loads(folder.read(PROMPTS_NAME))
    del data["request"]
    return Batches(**data)


def _complete(
    folder: Folder,
    missing: Sequence[int],
    batches: Batches,
    inputs: Inputs,
    settings: GenerationSettings,
    progress: Progress,
) -> None:
    """Answers the missing batches, without a pause between them, and writes each when it is complete."""
    logger.info("starting vLLM to answer (tens of seconds)")
    generator = VllmGenerator(inputs.model, inputs.corpus_settings.max_length, inputs.engine.options)
    submitted: dict[int, tuple[int, TokenSequence]] = {}
    completed: dict[int, list[tuple[int, TokenSequence, list[Completion]]]] = {index: [] for index in missing}

    def prompts() -> Iterator[TokenSequence]:
        number = 0
        for index in missing:
            with folder.open(_prompts_name(index)) as source:
                for prompt in read_tokens(source):
                    submitted[number] = index, prompt
                    number += 1
                    yield prompt

    progress.start()
    try:
        for number, completions in generator.generate(prompts(), settings):
            index, prompt = submitted.pop(number)
            completed[index].append((number, prompt, completions))
            progress.advance(1)
            if len(completed[index]) == batches.num_prompts[index]:
                with folder.writing(_completed_name(index)) as path, TokensWriter(path) as writer:
                    for _, prompt, completions in sorted(completed.pop(index), key=lambda item: item[0]):
                        for sample, one in enumerate(completions):
                            writer.write(_sequence(prompt, sample, one, inputs.model.tokenizer))
    finally:
        generator.close()


def _sequence(prompt: TokenSequence, sample: int, completion: Completion, tokenizer: Any) -> TokenSequence:
    text = tokenizer.decode(completion.token_ids.tolist(), skip_special_tokens=True)
    return replace(
        prompt,
        input_ids=np.concatenate([prompt.input_ids, completion.token_ids]),
        loss_mask=np.concatenate([prompt.loss_mask, np.ones(len(completion.token_ids), dtype=bool)]),
        columns={**prompt.columns, "completion": text, "finish_reason": completion.finish_reason, "sample": sample},
    )


def _prompts_name(index: int) -> str:
    return f"{ANSWERS_NAME}/prompts/{_batch_name(index)}"


def _completed_name(index: int) -> str:
    return f"{COMPLETED_NAME}/{_batch_name(index)}"


def _batch_name(index: int) -> str:
    return f"{index:05d}.parquet"

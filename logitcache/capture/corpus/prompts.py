"""The prompts that the teacher answers: token sequences of documents, nothing of which is trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from logitcache.capture.corpus.document_types import DocumentTypes, read_input_ids
from logitcache.capture.corpus.documents import Source
from logitcache.capture.corpus.tokenize import Corpus, CorpusSettings
from logitcache.capture.corpus.tokens import Tokenization, Tokens
from logitcache.documents.chat_template import render
from logitcache.documents.document import BadDocument, Document
from logitcache.documents.masks import PADDING, find_padding, unused_masks
from logitcache.documents.messages import ASSISTANT, read_chat
from logitcache.errors import UserError
from logitcache.format.sequences import TokenSequence

COMPLETION_COLUMNS = ("completion", "finish_reason", "sample")
"""Columns that a completion adds to those of its prompt: text, reason of its end, number among the prompt's completions."""


def prompt_of_text(document: Mapping[str, Any], by: Tokenization) -> list[Tokens]:
    """Returns the tokens of `prompt`, with the special tokens that the tokenizer adds before a text."""
    if document["prompt"] == "":
        return [_prompt([])]
    return [_prompt(by.texts.of_prompt(document["prompt"]))]


def prompt_of_messages(document: Mapping[str, Any], by: Tokenization) -> list[Tokens]:
    """Returns the tokens of `messages` (and optional `tools`) without answers at their end.

    They are rendered by the tokenizer's chat template, with its generation prompt.
    """
    chat = read_chat(document)
    by.notes.update(chat.notes)
    messages = list(chat.messages)
    if not messages:
        return [_prompt([])]
    while messages and messages[-1]["role"] == ASSISTANT:
        messages.pop()
    if not messages:
        raise BadDocument("`messages` hold nothing to answer, only turns of the assistant")
    text = render(by.tokenizer, messages, chat.tools, add_generation_prompt=True)
    return [_prompt(by.texts.of_written(text))]


def prompt_of_input_ids(document: Mapping[str, Any], by: Tokenization) -> list[Tokens]:
    """Returns `input_ids` as they are, but for padding."""
    ids = read_input_ids(document["input_ids"])
    for name in unused_masks(document, (PADDING,), len(ids)):
        by.notes[f"documents have a column {name!r}, which is not used: all of `input_ids` is the prompt"] += 1
    return [_prompt(ids[find_padding(ids, document)])]


PROMPT_TYPES: DocumentTypes = {
    "input_ids": (("input_ids",), prompt_of_input_ids),
    "messages": (("messages",), prompt_of_messages),
    "prompt": (("prompt",), prompt_of_text),
}


@dataclass(frozen=True)
class PromptSettings(CorpusSettings):
    """The settings by which documents become prompts: as sequences do, but long ones are refused or skipped.

    max_length: tokens of the longest prompt and its completion together.
    """

    document_types: ClassVar[DocumentTypes] = PROMPT_TYPES
    long_policies: ClassVar[Sequence[str]] = ("skip",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if taken := [name for name in self.keep if name in COMPLETION_COLUMNS]:
            raise UserError(f"--keep {taken[0]}: --generate stores a column of that name itself; rename the source's")


class Prompts(Corpus):
    """The prompts of all sources, which are iterated once, in order, and counted as by `Corpus`.

    room: tokens, at least, that must be left for a completion.
    """

    def __init__(
        self, sources: Sequence[Source], tokenizer: Any, vocab_size: int, settings: CorpusSettings, room: int
    ) -> None:
        super().__init__(sources, tokenizer, vocab_size, settings)
        self._longest = settings.max_length - room

    def _sequences(self, document: Document) -> Iterator[TokenSequence]:
        [(ids, mask)] = self._tokens(document)
        if not len(ids):
            self.skipped["empty"] += 1
            return
        kept = self._kept(document)
        if len(ids) <= self._longest:
            yield TokenSequence(ids, mask, kept, document.where)
        elif self._settings.long == "skip":
            self.skipped["too long"] += 1
        else:
            raise BadDocument(
                f"{len(ids)} tokens leave no room for an answer within --max-length {self._settings.max_length}; "
                "raise it, or choose --long skip"
            )


def _prompt(ids: Any) -> Tokens:
    return np.array(ids, dtype=np.int32), np.zeros(len(ids), dtype=bool)

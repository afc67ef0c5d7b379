"""The types of documents: one function for each makes token ids and loss mask of a document."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from logitcache.capture.corpus.chat import tokenize_messages
from logitcache.capture.corpus.tokens import Tokenization, Tokens, tokens
from logitcache.documents.document import BadDocument
from logitcache.documents.masks import LOSS_MASKS, PADDING, read_masks, unused_masks
from logitcache.errors import UserError


def tokenize_text(document: Mapping[str, Any], by: Tokenization) -> list[Tokens]:
    """Returns the tokens of `text`, all of them trained.

    The tokenizer's own special tokens are added, and its end-of-text token at the end.
    """
    if document["text"] == "":
        return [tokens([], [])]
    ids = by.texts.of_text(document["text"])
    return [tokens(ids, [True] * len(ids))]


def tokenize_prompt_completion(document: Mapping[str, Any], by: Tokenization) -> list[Tokens]:
    """Returns the tokens of `prompt` and `completion`, of which the completion is trained, end-of-text token included.

    The two are tokenised apart and joined, as they are when the student later generates from the prompt.
    """
    prompt = by.texts.of_prompt(document["prompt"])
    completion = by.texts.of_completion(document["prompt"], document["completion"])
    return [tokens(prompt + completion, [False] * len(prompt) + [True] * len(completion))]


def tokenize_input_ids(document: Mapping[str, Any], by: Tokenization) -> list[Tokens]:
    """Returns `input_ids` as they are, but for padding.

    `loss_mask`, `labels` or another mask says which are trained, see `read_masks`; without one, every token is.
    """
    ids = read_input_ids(document["input_ids"])
    for name in unused_masks(document, (*LOSS_MASKS, PADDING), len(ids)):
        by.notes[f"documents have a column {name!r} that looks like a mask and is not used"] += 1
    unpadded, mask = read_masks(ids, document)
    return [tokens(ids[unpadded], mask[unpadded])]


def read_input_ids(value: Any) -> np.ndarray:
    """Returns token ids, int32 [T]. Raises BadDocument for any other value."""
    if not isinstance(value, list) or not all(type(i) is int for i in value):
        raise BadDocument("`input_ids` must be a list of integers")
    if value and not 0 <= min(value) <= max(value) < 2**31:
        raise BadDocument(f"`input_ids` must lie in 0…{2**31 - 1}, found {min(value)} and {max(value)}")
    return np.array(value, dtype=np.int32)


DocumentTypes = dict[str, tuple[tuple[str, ...], Callable[[Mapping[str, Any], Tokenization], list[Tokens]]]]
"""Name of a type → the columns that it needs and its tokenising function; the first whose columns are there is taken."""

DOCUMENT_TYPES: DocumentTypes = {
    "input_ids": (("input_ids",), tokenize_input_ids),
    "messages": (("messages",), tokenize_messages),
    "prompt-completion": (("prompt", "completion"), tokenize_prompt_completion),
    "text": (("text",), tokenize_text),
}


def find_document_type(
    columns: Mapping[str, Any], where: str, renamed: Collection[str] = (), types: DocumentTypes = DOCUMENT_TYPES
) -> str:
    """Returns the name of the type that a document's columns have, first of the types with `renamed` columns.

    Raises UserError if none fits.
    """
    for name, (needed, _) in sorted(types.items(), key=lambda item: not set(item[1][0]) & set(renamed)):
        if all(column in columns for column in needed):
            return name
    raise UserError(
        f"{where}: the columns {', '.join(columns) or '(none)'} fit no layout; one of "
        f"{'; '.join(' + '.join(needed) for needed, _ in types.values())} is wanted. "
        "Name yours with --columns, for example --columns prompt=question,completion=answer"
    )

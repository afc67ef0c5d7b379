"""What a document's columns mean: one function per layout, document → token ids + loss mask."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from logitcache.capture.corpus.chat import tokenize_messages
from logitcache.capture.corpus.tokens import Tokenization, Tokens, tokens
from logitcache.documents.document import BadDocument
from logitcache.errors import UserError


def tokenize_text(document: Mapping[str, Any], by: Tokenization) -> list[Tokens]:
    """`text`: every token is trained; the tokenizer's own special tokens, and its end-of-text token at the end."""
    if document["text"] == "":
        return [tokens([], [])]
    ids = by.texts.of_text(document["text"])
    return [tokens(ids, [True] * len(ids))]


def tokenize_prompt_completion(document: Mapping[str, Any], by: Tokenization) -> list[Tokens]:
    """`prompt` + `completion`: the completion is trained, end-of-text token included.

    The two are tokenised apart and joined, as they are when the student later generates from the prompt.
    """
    prompt = by.texts.of_prompt(document["prompt"])
    completion = by.texts.of_completion(document["prompt"], document["completion"])
    return [tokens(prompt + completion, [False] * len(prompt) + [True] * len(completion))]


def tokenize_input_ids(document: Mapping[str, Any], by: Tokenization) -> list[Tokens]:
    """`input_ids` and optional `loss_mask`: taken as they are; without a mask every token is trained."""
    ids = document["input_ids"]
    mask = document.get("loss_mask")
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise BadDocument("`input_ids` must be a list of integers")
    if mask is None:
        mask = [True] * len(ids)
    if not isinstance(mask, list) or len(mask) != len(ids) or not all(m in (0, 1) for m in mask):
        raise BadDocument(f"`loss_mask` must be a list of true and false as long as `input_ids`, {len(ids)}")
    if ids and not 0 <= min(ids) <= max(ids) < 2**31:
        raise BadDocument(f"`input_ids` must lie in 0…{2**31 - 1}, found {min(ids)} and {max(ids)}")
    return [tokens(ids, mask)]


Layouts = dict[str, tuple[tuple[str, ...], Callable[[Mapping[str, Any], Tokenization], list[Tokens]]]]
"""Layout name → the columns that it needs and its tokenising function; the first whose columns are there is taken."""

LAYOUTS: Layouts = {
    "input_ids": (("input_ids",), tokenize_input_ids),
    "messages": (("messages",), tokenize_messages),
    "prompt-completion": (("prompt", "completion"), tokenize_prompt_completion),
    "text": (("text",), tokenize_text),
}


def find_layout(
    columns: Mapping[str, Any], where: str, renamed: Collection[str] = (), layouts: Layouts = LAYOUTS
) -> str:
    """Name of the layout that a document's columns have, first of those with `renamed` columns.

    Raises UserError where none fits.
    """
    for name, (needed, _) in sorted(layouts.items(), key=lambda item: not set(item[1][0]) & set(renamed)):
        if all(column in columns for column in needed):
            return name
    raise UserError(
        f"{where}: the columns {', '.join(columns) or '(none)'} fit no layout; one of "
        f"{'; '.join(' + '.join(needed) for needed, _ in layouts.values())} is wanted. "
        "Name yours with --columns, for example --columns prompt=question,completion=answer"
    )

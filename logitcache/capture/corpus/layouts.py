"""What a document's columns mean: one function per layout, document → token ids + loss mask."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from logitcache.errors import UserError


class BadDocument(Exception):
    """The document cannot be turned into tokens; the message says why."""


Tokens = tuple[np.ndarray, np.ndarray]
"""Token ids int32 [T] and loss mask bool [T]."""


def tokenize_text(document: Mapping[str, Any], tokenizer: Any) -> Tokens:
    """`text`: every token is trained; the tokenizer's own special tokens, and its end-of-text token at the end."""
    if document["text"] == "":
        return _tokens([], [])
    ids = _ended(encode(tokenizer, document["text"], add_special_tokens=True), tokenizer)
    return _tokens(ids, [True] * len(ids))


def tokenize_prompt_completion(document: Mapping[str, Any], tokenizer: Any) -> Tokens:
    """`prompt` + `completion`: the completion is trained, end-of-text token included.

    The two are tokenised apart and joined, as they are when the student later generates from the prompt.
    """
    prompt = encode(tokenizer, document["prompt"], add_special_tokens=True)
    completion = encode(tokenizer, document["completion"], add_special_tokens=False)
    completion = _ended(completion, tokenizer) if completion else completion
    return _tokens(prompt + completion, [False] * len(prompt) + [True] * len(completion))


def tokenize_messages(document: Mapping[str, Any], tokenizer: Any) -> Tokens:
    """`messages` (and optional `tools`): the tokenizer's chat template; assistant turns are trained, nothing else.

    Uses the template's own generation mask where it marks one, otherwise what each assistant turn adds to the rendering
    of the turns before it.
    """
    messages = read_messages(document)
    if not messages:
        return _tokens([], [])
    template = tokenizer.get_chat_template(tools=document.get("tools"))
    try:
        if re.search(r"\{%-?\s*generation\b", template):
            rendered = tokenizer.apply_chat_template(
                messages, tools=document.get("tools"), return_dict=True, return_assistant_tokens_mask=True
            )
            return _tokens(rendered["input_ids"], rendered["assistant_masks"])
        return _tokens_by_prefix(messages, document.get("tools"), tokenizer)
    except BadDocument:
        raise
    except Exception as error:  # a template is a program: it may raise anything
        raise BadDocument(f"the chat template failed ({error})") from error


def read_messages(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The turns of a chat. Raises BadDocument where they are none."""
    messages = document["messages"]
    if not isinstance(messages, list) or not all(isinstance(m, dict) and "role" in m for m in messages):
        raise BadDocument("`messages` must be a list of objects with a `role`")
    # Arrow fills keys that other messages have with None; templates ask whether a key is there.
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def tokenize_input_ids(document: Mapping[str, Any], tokenizer: Any) -> Tokens:
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
    return _tokens(ids, mask)


Layouts = dict[str, tuple[tuple[str, ...], Callable[[Mapping[str, Any], Any], Tokens]]]
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


def _tokens_by_prefix(messages: list[dict[str, Any]], tools: Any, tokenizer: Any) -> Tokens:
    """Tokens that begin inside the text which an assistant turn adds to the rendering of the turns before it."""

    def render(count: int, add_generation_prompt: bool = False) -> str:
        text: str = tokenizer.apply_chat_template(
            messages[:count], tools=tools, add_generation_prompt=add_generation_prompt, tokenize=False
        )
        return text

    whole = render(len(messages))
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    starts = np.array([start for start, _ in encoded["offset_mapping"]])
    mask = np.zeros(len(starts), dtype=bool)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(turn, add_generation_prompt=True) if turn else ""
        after = render(turn + 1)
        if not after.startswith(before) or not whole.startswith(after):
            raise BadDocument(
                f"message {turn}: this chat template renders earlier turns differently once later ones follow, "
                "so the assistant's tokens cannot be told apart; use a template with {% generation %} marks"
            )
        mask |= (starts >= len(before)) & (starts < len(after))
    return _tokens(encoded["input_ids"], mask)


def encode(tokenizer: Any, text: Any, add_special_tokens: bool) -> list[int]:
    """Token ids of a text. Raises BadDocument for anything else."""
    if not isinstance(text, str):
        raise BadDocument(f"text is wanted, found {type(text).__name__}")
    ids: list[int] = tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
    return ids


def _ended(ids: list[int], tokenizer: Any) -> list[int]:
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def _tokens(ids: Any, mask: Any) -> Tokens:
    loss_mask = np.array(mask, dtype=bool)
    loss_mask[:1] = False
    return np.array(ids, dtype=np.int32), loss_mask

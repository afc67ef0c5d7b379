"""A chat → token ids and loss mask, through the tokenizer's chat template."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from logitcache.capture.corpus.tokens import Tokenization, Tokens, tokens
from logitcache.documents.document import BadDocument
from logitcache.documents.messages import read_messages


def tokenize_messages(document: Mapping[str, Any], by: Tokenization) -> list[Tokens]:
    """`messages` (and optional `tools`): the tokenizer's chat template; assistant turns are trained, nothing else.

    Uses the template's own generation mask where it marks one, otherwise what each assistant turn adds to the rendering
    of the turns before it.
    """
    messages = read_messages(document)
    if not messages:
        return [tokens([], [])]
    template = by.tokenizer.get_chat_template(tools=document.get("tools"))
    try:
        if re.search(r"\{%-?\s*generation\b", template):
            rendered = by.tokenizer.apply_chat_template(
                messages, tools=document.get("tools"), return_dict=True, return_assistant_tokens_mask=True
            )
            return [tokens(rendered["input_ids"], rendered["assistant_masks"])]
        return [_tokens_by_prefix(messages, document.get("tools"), by.tokenizer)]
    except BadDocument:
        raise
    except Exception as error:  # a template is a program: it may raise anything
        raise BadDocument(f"the chat template failed ({error})") from error


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
    return tokens(encoded["input_ids"], mask)

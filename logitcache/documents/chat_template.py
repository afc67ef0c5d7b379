"""A chat → text, by the chat template of a tokenizer or of a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from logitcache.documents.document import BadDocument
from logitcache.errors import UserError, one_line

MAX_TEMPLATE_BYTES = 1 << 20


def read_chat_template(path: str) -> str:
    """Reads the Jinja template in the file of `--chat-template`. Raises UserError if it cannot be read."""
    try:
        with Path(path).expanduser().open("rb") as file:
            content = file.read(MAX_TEMPLATE_BYTES + 1)
        text = content.decode()
    except OSError as error:
        raise UserError(f"--chat-template {path}: not readable ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--chat-template {path}: not UTF-8 text ({error})") from error
    if not text.strip() or len(content) > MAX_TEMPLATE_BYTES:
        raise UserError(f"--chat-template {path}: a Jinja template of 1 to {MAX_TEMPLATE_BYTES >> 20} MiB is wanted")
    return text


def render(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Any] | None,
    *,
    add_generation_prompt: bool = False,
    **more: Any,
) -> str:
    """Renders a chat as transformers does. Raises BadDocument if the template fails: it is a program and may raise anything."""
    try:
        text: str = tokenizer.apply_chat_template(
            list(messages), tools=tools, add_generation_prompt=add_generation_prompt, tokenize=False, **more
        )
    except Exception as error:
        raise BadDocument(f"the chat template failed ({one_line(error)})") from error
    return text

"""A chat as it lies in a document: the columns `messages` and `tools`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from logitcache.documents.document import BadDocument
from logitcache.documents.json_text import parse_json

ASSISTANT = "assistant"
ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": ASSISTANT,
    "model": ASSISTANT,
    "gpt": ASSISTANT,
    "chatgpt": ASSISTANT,
    "bot": ASSISTANT,
    "chatbot": ASSISTANT,
    "ai": ASSISTANT,
    "tool": "tool",
    "observation": "tool",
    "function": "function",
    "ipython": "ipython",
}
"""Roles by the names that data sets give them, in lower case → the name that chat templates know."""


@dataclass(frozen=True)
class Chat:
    """The turns of a chat.

    messages: as the template gets them, with roles that templates know.  trained: of each message, whether it is an
    answer that the student learns.  tools: or None.  notes: facts that the user is told once, see `Tokenization`.
    """

    messages: list[dict[str, Any]]
    trained: list[bool]
    tools: list[Any] | None = None
    notes: Counter[str] = field(default_factory=Counter)


def read_chat(document: Mapping[str, Any]) -> Chat:
    """Reads `messages` and the optional `tools` of a document, each a list of objects or its JSON text.

    A message has a `role` and mostly a `content`, or ShareGPT's `from` and `value`; names of roles are understood as ROLES
    says. `"weight": 0` and `"train": false` make an assistant's turn context. Everything else, null included, reaches
    transformers as it is. Raises BadDocument if the columns hold no chat, or the assistant's turns cannot be told.
    """
    notes: Counter[str] = Counter()
    messages, trained = [], []
    for number, given in enumerate(_objects(document["messages"], "messages")):
        message = _renamed(given)
        if not isinstance(message.get("role"), str):
            raise BadDocument(f"`messages` must be a list of objects with a `role`, message {number} has none")
        message["role"] = _role(message["role"], notes)
        trained.append(_learned(message, number) and message["role"] == ASSISTANT)
        messages.append(message)
    if unknown := sorted({message["role"] for message in messages} - set(ROLES.values())):
        if not any(message["role"] == ASSISTANT for message in messages):
            raise BadDocument(
                f"no turn is the assistant's, and the role {unknown[0]!r} is not known; known are {', '.join(ROLES)}"
            )
        notes.update({f"chats have turns of the role {role!r}, which is taken for context": 1 for role in unknown})
    tools = document.get("tools")
    if isinstance(tools, str) and tools.strip() in ("", "null"):
        tools = None
    return Chat(messages, trained, None if tools is None else _objects(tools, "tools"), notes)


def _objects(value: Any, column: str) -> list[dict[str, Any]]:
    """Returns copies of the objects of a column, which holds them or their JSON text."""
    wanted = f"`{column}` must be a list of objects" + (" with a `role`" if column == "messages" else "")
    value = _parsed(value, wanted)
    if not isinstance(value, list):
        raise BadDocument(f"{wanted}, found {type(value).__name__}")
    objects = [_parsed(item, wanted) for item in value]
    for number, item in enumerate(objects):
        if not isinstance(item, dict):
            raise BadDocument(f"{wanted}, number {number} is {type(item).__name__}")
    return [dict(item) for item in objects]


def _parsed(value: Any, wanted: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except ValueError as error:
        raise BadDocument(f"{wanted}, or its JSON text; found text that is {error}") from error


def _renamed(message: dict[str, Any]) -> dict[str, Any]:
    """Gives a message of ShareGPT the keys of other chats."""
    for ours, theirs in (("role", "from"), ("content", "value")):
        if ours not in message and theirs in message:
            message = {(ours if key == theirs else key): value for key, value in message.items()}
    return message


def _role(given: str, notes: Counter[str]) -> str:
    role = ROLES.get(given.strip().lower(), given)
    if role != given:
        notes[f"turns have the role {given!r}, read as {role!r}"] += 1
    return role


def _learned(message: dict[str, Any], number: int) -> bool:
    """Takes the keys out of a message that say whether it is trained, and tells whether it is."""
    learned = True
    for key in ("weight", "train"):
        value = message.pop(key, None)
        if value is not None and (not isinstance(value, int | float) or value not in (0, 1)):
            raise BadDocument(f"message {number}: `{key}` {value!r} must be 0 or 1, false or true")
        learned = learned and value in (None, 1)
    return learned

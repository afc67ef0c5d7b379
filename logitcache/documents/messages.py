"""The turns of a chat, as they lie in the columns `messages` and `tools`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from logitcache.documents.document import BadDocument


def read_messages(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The turns of a chat. Raises BadDocument where they are none."""
    messages = document["messages"]
    if not isinstance(messages, list) or not all(isinstance(m, dict) and "role" in m for m in messages):
        raise BadDocument("`messages` must be a list of objects with a `role`")
    # Arrow fills keys that other messages have with None; templates ask whether a key is there.
    return [{key: value for key, value in message.items() if value is not None} for message in messages]

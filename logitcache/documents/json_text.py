"""JSON text is read everywhere by the same strict rules."""

from __future__ import annotations

import json
from typing import Any


def parse_json(text: str) -> Any:
    """Parses JSON text. Raises ValueError if it is none, or holds half a surrogate pair."""
    try:
        value = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from error
    return value

"""Arguments as callers write them: ranges A:B, and one value in place of a list."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from logitcache.errors import UserError


def one_or_more(values: Any) -> list[Any]:
    """Lists the values; a text or a path is one value, not many letters."""
    return [values] if isinstance(values, str | Path) else list(values)


def parse_range(text: str | None, count: int, what: str) -> range:
    """Parses "A:B": the numbers from A up to B, which is left out, of `count`. A and B may be missing; None means all.

    what: the thing that is counted, "row" for the option --rows. Raises UserError for any other text and for numbers beyond.
    """
    if text is None:
        return range(count)
    match = re.fullmatch(r"(\d{0,18}):(\d{0,18})", text)
    if not match:
        raise UserError(f"--{what}s {text[:80]}: write A:B, for example 0:4; {what} B is left out")
    first, end = int(match[1] or 0), int(match[2] or count)
    if not first < end <= count:
        raise UserError(f"--{what}s {text}: the cache has {what}s 0…{count - 1}, so 0 ≤ A < B ≤ {count} is needed")
    return range(first, end)

"""A:B, as command lines name some of many."""

from __future__ import annotations

import re

from logitcache.errors import UserError


def span_of(text: str | None, count: int, what: str) -> range:
    """The numbers from A up to B, which is left out, of `count`; either may be missing, all where `text` is None.

    what: one of them, "row" for the option --rows. Raises UserError for anything else, and for numbers that are not there.
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

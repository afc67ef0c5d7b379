"""A page holds all that it needs: its scripts are allowed by their hashes only, and its data cannot end their element."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any


def source_hash(inline: str) -> str:
    """Returns the name of an inline script or style in a page's security policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()}'"


def embedded(data: Any) -> str:
    """Returns JSON that stands in a <script> element and cannot end it: ASCII, with <, > and & as escapes."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def filled(template: str, parts: Mapping[str, str]) -> str:
    """Puts parts into the places {{name}} of a template, in one pass: no part is looked through for more places."""
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], template)

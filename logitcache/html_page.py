"""Pages that hold all that they need: scripts allowed by their hashes only, data that cannot end its element."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any


def source_hash(inline: str) -> str:
    """Return how a page's security policy names an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()}'"


def embedded(data: Any) -> str:
    """Return JSON that stands in a <script> element and cannot end it: ASCII, with <, > and & as escapes."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def filled(template: str, parts: Mapping[str, str]) -> str:
    """Put parts into the places {{name}} of a template, in one pass: no part is looked through for more places."""
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], template)

"""Caches whose tokens have texts, odd ones among them, and what a page's data says, for the tests of `logitcache view`."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from logitcache import LogitCache
from logitcache.format.layout import Layout
from logitcache.format.sequences import TokenSequence
from logitcache.report.token_text import TOKENIZER_NAME
from logitcache.storage.atomic import file_sha256
from logitcache.storage.folder import Folder
from tests.helpers.smallcaches import full_distributions, sparse_targets, write_cache

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script>",
    "<img src=x onerror=alert(3)>",
    "]]>",
    "<!--",
    "-->",
    "&lt;b&amp;",
    "{{data}}",
    "${alert(4)}",
    "\"'`",
    "\u202eevil\u202c",
    "\u2067rtl",
    "שלום",
    "مرحبا",
    "e\u0301",
    "\u0301\u0302\u0303",
    "👩\u200d👩\u200d👧\u200d👦",
    "🇩🇪",
    "\x00",
    "\x1b[31m",
    "\ud800",
    "a\udfffb",
    "\u2028",
    "\u2029",
    "\ufeff",
    "\u200b",
    "long" * 60,
    "\n",
    "\r\n",
    "\t",
    "   ",
    " ",
    "",
    "javascript:alert(5)",
    "__proto__",
    "constructor",
]


def write_tokenizer(root: Path, texts: Sequence[str]) -> None:
    """tokenizer.json in which token i is texts[i], and its hash in the cache's manifest."""
    tokenizer = {
        "added_tokens": [{"id": i, "content": text} for i, text in enumerate(texts)],
        "decoder": None,
        "model": {"type": "BPE", "vocab": {}, "merges": []},
    }
    write_tokenizer_json(root, json.dumps(tokenizer))


def write_tokenizer_json(root: Path, content: str) -> None:
    """tokenizer.json of any content, and its hash in the cache's manifest."""
    path = root / TOKENIZER_NAME
    path.parent.mkdir(exist_ok=True)
    path.write_text(content, encoding="utf-8")
    manifest = LogitCache(str(root)).manifest
    replace(manifest, files={**manifest.files, TOKENIZER_NAME: file_sha256(path)}).write(Folder(root))


def readable_cache(
    root: Path,
    texts: Sequence[str],
    *,
    layout: Layout | None = None,
    num_rows: int = 6,
    length: int = 40,
    prompt: int = 5,
    entries: int = 20,
    order: Sequence[int] | None = None,
) -> LogitCache:
    """Rows of tokens in this order, default that of their ids, from a prompt on, under random teachers.

    Positions have `entries` entries, or down to half as many.
    """
    layout = layout or Layout(len(texts))
    random = np.random.default_rng(0)
    rows = []
    for number in range(num_rows):
        cycle = np.array(order or range(len(texts)), dtype=np.int32)
        ids = np.resize(np.roll(cycle, -number * length), length)
        full = full_distributions(random, length - prompt, layout.vocab_size)
        columns = {name: texts[number % len(texts)] for name in layout.columns}
        counts = random.integers((entries + 1) // 2, entries + 1, length - prompt).tolist()
        rows.append(
            (
                TokenSequence(ids, np.arange(length) >= prompt, columns),
                sparse_targets(full, counts, layout, seed=number),
            )
        )
    write_cache(root, rows, layout, rows_per_shard=4)
    write_tokenizer(root, texts)
    return LogitCache(str(root))


class Elements(HTMLParser):
    """Start tags of a page, and the text of its <script> and <style> elements."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=False)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inline: list[tuple[str, str]] = []
        self._inside = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, data: str) -> None:
        if self._inside in ("script", "style"):
            self.inline.append((self._inside, data))

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""


def page_data(path: Path) -> dict[str, Any]:
    """What a page embeds, its arrays as numpy."""
    found = re.search(
        r'<script type="application/json" id="data">(.*?)</script>', path.read_text(encoding="utf-8"), re.S
    )
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    data["arrays"] = {name: unpacked(array) for name, array in data["arrays"].items()}
    data["ids"] = unpacked(data["ids"])
    return data


def unpacked(array: dict[str, str]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(array["data"]), f"<{array['type']}")

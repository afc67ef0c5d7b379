"""An HTML page shows what is in a cache: it holds all that it needs, asks no network and runs nothing of the cache."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path, PurePosixPath
from typing import Any

from logitcache.errors import UserError
from logitcache.format.manifest import CARD_NAME, Manifest
from logitcache.html_page import embedded, filled, source_hash
from logitcache.ranges import one_or_more
from logitcache.reading.cache import LogitCache, opened
from logitcache.report.description import amounts, history, origin
from logitcache.report.footers import column_bytes, spread
from logitcache.report.samples import (
    NATS_STEP,
    SHOWN_CHARACTERS,
    SHOWN_ENTRIES,
    Samples,
    chosen_rows,
    legible,
    packed,
    read_samples,
    shortened,
)
from logitcache.report.statistics import Histogram, Statistics, statistics
from logitcache.report.token_text import Text, token_texts
from logitcache.storage.atomic import disk_is_full, write_text
from logitcache.storage.folder import Folder

NUM_SEQUENCES = 24
FACT_CHARACTERS = 1024
SHOWN_STEPS = 32
"""Of a cache's history, the last ones."""
SHOWN_COLUMN_SIZES = 24
TEXT_CHARACTERS = 4_000_000
"""Of all tokens of a page; 10 each of 400 000 of them."""
CARD_BYTES = 4 << 20
"""Of the card, whose licences stand at its beginning."""
GENERATOR = '<meta name="generator" content="logitcache view">'
"""By which a page of ours is told from another file."""


@dataclass(frozen=True)
class Page:
    """A page that was written. num_rows, num_tokens: what it shows of the cache's `of_rows` rows."""

    path: Path
    num_bytes: int
    num_rows: int
    of_rows: int
    num_tokens: int


def view(
    cache: LogitCache | str | Path,
    out: str | Path | None = None,
    *,
    rows: Sequence[str] = (),
    num_sequences: int = NUM_SEQUENCES,
) -> Page:
    """Writes one HTML page that shows a cache and some of its rows. Only parts of the cache are read.

    Args:
        cache: A cache, or its folder or URL.
        out: The page. None: the cache's name with .html, in this folder.
        rows: Rows to show: ranges "A:B", numbers and ids. Empty: `num_sequences` of them, evenly spread.
        num_sequences: Number of rows to show.

    Returns:
        Where the page is and what it shows.

    Raises:
        UserError: The cache does not open, does not have these rows, or `out` is something else than such a page.
    """
    cache = opened(cache)
    path = Path(f"{_name(cache)}.html" if out is None else out)
    _check_replaceable(path)
    Folder(path.parent).check_writable(path.name)
    samples = read_samples(cache, chosen_rows(cache, one_or_more(rows), num_sequences))
    text = page_html(cache, samples)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): choose another place with --out") from error
    except UserError as error:
        if error.__cause__ is None or not disk_is_full(error.__cause__):
            raise
        # Here is nothing to continue.
        raise UserError(f"no space left for {path}: free some or choose another place with --out") from error
    return Page(path, path.stat().st_size, len(samples.rows), len(cache), samples.num_tokens)


def page_html(cache: LogitCache, samples: Samples) -> str:
    """Returns the page: markup, style, script and data, each named by its hash in the page's security policy."""
    style = _resource("page.css")
    script = "\n".join(_resource(name) for name in ("charts.js", "tokens.js", "page.js"))
    allowed = f"script-src {source_hash(script)}; style-src {source_hash(style)}"
    policy = f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'"
    parts = {
        "generator": GENERATOR,
        "policy": policy,
        "title": html.escape(_name(cache)),
        "style": style,
        "script": script,
        "data": embedded(_data(cache, samples)),
    }
    return filled(_resource("page.html"), parts)


def _data(cache: LogitCache, samples: Samples) -> dict[str, Any]:
    """Returns all that the page shows, in plain JSON types."""
    folder, manifest = cache.folder, cache.manifest
    found = statistics(folder, manifest)
    texts, note = token_texts(folder, manifest, samples.ids.tolist())
    groups = cache.tail_groups
    corpus = dict(origin(manifest))["corpus"] or "?"
    facts = [
        *origin(manifest),
        *(item for item in amounts(manifest) if item[0] == "shards"),
        ("identity", cache.identity),
        *_licenses(folder),
    ]
    return {
        "name": _name(cache),
        "teacher": legible(str(manifest.fingerprint.get("teacher", {}).get("name", "?"))),
        "corpus": legible(corpus),
        "note": note,
        "tiles": _tiles(cache),
        "facts": [(label, legible(str(value), FACT_CHARACTERS)) for label, value in facts],
        "history": _history(manifest),
        "num_rows": len(cache),
        "statistics": _statistics_data(found),
        "column_bytes": _column_bytes(cache, folder),
        "group_sizes": [] if groups is None else [int((groups == g).sum()) for g in range(int(groups.max()) + 1)],
        "nats_step": NATS_STEP,
        "shown_entries": SHOWN_ENTRIES,
        "rows": samples.rows,
        "arrays": {name: packed(array) for name, array in samples.arrays.items()},
        "ids": packed(samples.ids),
        "texts": _texts_data(texts),
    }


def _tiles(cache: LogitCache) -> list[tuple[str, str, str]]:
    manifest = cache.manifest
    positions = max(manifest.num_positions, 1)
    tokens = sum(shard.num_tokens for shard in manifest.shards)
    return [
        (f"{manifest.num_positions:,}", "positions", f"of {tokens:,} tokens"),
        (f"{len(cache):,}", "rows", f"longest {manifest.longest:,} tokens"),
        (f"{1 - manifest.mean_tail_mass:.2%}", "mass covered", "by the entries, on average"),
        (f"{manifest.num_entries / positions:.1f}", "entries per position", f"vocabulary {cache.vocab_size:,}"),
        (_bytes(manifest.num_bytes), "on disk", f"{manifest.num_bytes / positions:.0f} bytes per position"),
    ]


def _statistics_data(found: Statistics) -> dict[str, Any]:
    data = asdict(found)
    data["entries_per_position"] = list(found.entries_per_position.items())
    for name in ("entropy_histogram", "tail_histogram"):
        histogram: Histogram = getattr(found, name)
        data[name] = {"edges": [_short(edge) for edge in histogram.edges], "counts": histogram.counts}
    for name in ("entropy", "tail_mass"):
        data[name] = {key: _short(value) for key, value in getattr(found, name).items()}
    data["mass_covered"] = [_short(mass) for mass in found.mass_covered]
    return data


def _column_bytes(cache: LogitCache, folder: Folder) -> dict[str, Any]:
    shards = spread(cache.manifest.shards)
    sizes = column_bytes(folder, shards, cache.manifest.layout)
    footers = sum(shard.num_bytes for shard in shards) - sizes.total()
    ordered = sizes.most_common()
    columns = [(legible(name), size) for name, size in ordered[:SHOWN_COLUMN_SIZES]]
    if others := ordered[SHOWN_COLUMN_SIZES:]:
        columns.append((f"{len(others)} more columns", sum(size for _, size in others)))
    return {
        "columns": [*columns, ("footers", footers)],
        "positions": sum(shard.num_positions for shard in shards),
        "shards": len(shards),
        "of_shards": len(cache.manifest.shards),
    }


def _licenses(folder: Folder) -> list[tuple[str, str]]:
    if not folder.exists(CARD_NAME):
        return []
    with folder.answering(), folder.open(CARD_NAME) as file:
        card = file.read(CARD_BYTES).decode(errors="replace")
    head = card.partition("---\n")[2].partition("\n---")[0]
    stated = dict(re.findall(r"^((?:teacher_|data_)?license):(.*)$", head, re.MULTILINE))
    return [
        (label.replace("license", "licence").replace("_", "'s "), value.strip().strip("'\""))
        for label, value in stated.items()
        if value.strip()
    ]


def _history(manifest: Manifest) -> list[str]:
    steps = [legible(step, FACT_CHARACTERS) for step in history(manifest)[-SHOWN_STEPS:]]
    earlier = len(manifest.history) - len(steps)
    return [*([f"{earlier:,} steps before:"] if earlier else []), *steps]


def _texts_data(texts: Sequence[Text]) -> list[str | list[int] | None]:
    """Cuts each text, and long texts further if all together are too much for a page."""
    most = SHOWN_CHARACTERS
    while most > 1 and sum(min(len(text or ""), most) for text in texts) > TEXT_CHARACTERS:
        most //= 2
    return [
        list(text[:most]) if isinstance(text, bytes) else None if text is None else shortened(text, most)
        for text in texts
    ]


def _name(cache: LogitCache) -> str:
    """Returns the folder's name, without its place: readers of the page need not know that."""
    folder = cache.folder
    name = folder.local.resolve().name if folder.local else PurePosixPath(cache.path).name
    return legible(name) or "cache"


def _check_replaceable(path: Path) -> None:
    try:
        if path.is_dir():
            raise UserError(f"--out {path} is a folder: name a file, for example {path / 'page.html'}")
        if not path.exists():
            return
        ours = False
        if path.is_file():
            with path.open("rb") as file:
                ours = GENERATOR.encode() in file.read(1000)
    except OSError as error:
        raise UserError(f"{path} cannot be looked at ({error.strerror}): choose another name with --out") from error
    if not ours:
        raise UserError(f"{path} exists and is not a page of `logitcache view`: choose another name with --out")


def _resource(name: str) -> str:
    return files("logitcache.report").joinpath(name).read_text(encoding="utf-8")


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def _bytes(count: float) -> str:
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"

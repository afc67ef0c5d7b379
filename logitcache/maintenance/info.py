"""A cache is described on one screen, from its manifest and the footers of some of its shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from logitcache.assembly.card import read_card
from logitcache.errors import UserError, one_line
from logitcache.format.manifest import Manifest
from logitcache.format.shards import ShardInfo
from logitcache.format.tail_parts import TAIL_BASIS_NAME
from logitcache.reading.cache import LogitCache, opened
from logitcache.report.description import amounts, history, origin
from logitcache.report.footers import column_bytes, entry_counts, spread
from logitcache.storage.folder import Folder
from logitcache.table import aligned

SHOWN_COLUMNS = 10
SHOWN_BARS = 8
SHOWN_STEPS = 4
BAR_WIDTH = 32


def info(cache: LogitCache | str | Path) -> str:
    """Describes what a cache holds and what it was made from, without reading its rows.

    It reads the tail groups, on this machine the tail basis too, the footers of at most `footers.READ_SHARDS` shards, and
    their column num_entries if positions have different numbers of entries.

    Args:
        cache: A cache, or its folder or URL.

    Returns:
        Aligned text that fits on one screen.

    Raises:
        UserError: The cache does not open.
    """
    cache = opened(cache)
    manifest, folder = cache.manifest, cache.folder
    chosen = spread(manifest.shards)
    paragraphs = [
        _labelled(
            [
                ("cache", cache.path),
                ("identity", cache.identity),
                *origin(manifest),
                *_damaged(cache),
                *_licenses(folder),
                *_last_steps(manifest),
            ]
        ),
        _labelled(amounts(manifest, _basis_bytes(cache))),
        _entries(manifest, folder, chosen),
        _bytes_by_column(manifest, folder, chosen),
    ]
    return "\n\n".join(paragraphs)


def _basis_bytes(cache: LogitCache) -> int:
    """Returns the bytes of the tail basis, 0 without one or if it is missing; of fewer coefficients it keeps all directions."""
    with suppress(FileNotFoundError):
        return cache.folder.num_bytes(TAIL_BASIS_NAME) if cache.manifest.layout.tail_parts.rank else 0
    return 0


def _damaged(cache: LogitCache) -> Iterator[tuple[str, str]]:
    """Says which of the files that all positions need is missing or damaged; of a URL, the basis is too long to be fetched."""
    for name in ("tail_groups", "tail_basis") if cache.folder.local else ("tail_groups",):
        try:
            getattr(cache, name)
        except UserError as error:
            yield "damaged", one_line(error)


def _licenses(folder: Folder) -> Iterator[tuple[str, str]]:
    stated = read_card(folder).licenses
    if stated:
        yield "licences", ", ".join(f"{name.replace('_license', '')} {value}" for name, value in stated.items())


def _last_steps(manifest: Manifest) -> Iterator[tuple[str, str]]:
    steps = history(manifest)
    shown = steps[-SHOWN_STEPS:]
    if len(steps) > len(shown):
        shown = [f"{len(steps) - len(shown)} steps, then", *shown]
    for number, step in enumerate(shown):
        yield "" if number else "history", step


def _entries(manifest: Manifest, folder: Folder, chosen: Sequence[ShardInfo]) -> str:
    """Says how many entries positions have: in one line, or as bars."""
    most = manifest.fingerprint.get("capture", {}).get("top_k")
    if manifest.num_positions and manifest.num_entries == manifest.num_positions * (most or -1):
        return f"entries  {most} at every position"
    counts = entry_counts(folder, chosen, manifest.layout)
    total = counts.total()
    if not total:
        return "entries  none"
    low, high = min(counts), max(counts)
    if low == high:
        return f"entries  {low} at every position{_of_some(manifest, chosen)}"
    width = -(-(high - low + 1) // SHOWN_BARS)
    bars: Counter[int] = Counter()
    for count, positions in counts.items():
        bars[(count - low) // width] += positions
    rows = [(f"entries{_of_some(manifest, chosen)}", "positions", "share")]
    for bar in range((high - low) // width + 1):
        first, last = low + bar * width, min(low + (bar + 1) * width - 1, high)
        rows.append((f"{first}" if first == last else f"{first}…{last}", f"{bars[bar]:,}", f"{bars[bar] / total:.1%}"))
    head, *lines = aligned(rows).splitlines()
    drawn = ["█" * round(BAR_WIDTH * bars[bar] / max(bars.values())) for bar in range(len(lines))]
    return "\n".join([head, *(f"{line}  {bar}".rstrip() for line, bar in zip(lines, drawn, strict=True))])


def _bytes_by_column(manifest: Manifest, folder: Folder, chosen: Sequence[ShardInfo]) -> str:
    """Says which columns take the bytes, by the compressed sizes in the footers."""
    sizes = column_bytes(folder, chosen, manifest.layout)
    total = sum(shard.num_bytes for shard in chosen)
    positions = max(sum(shard.num_positions for shard in chosen), 1)
    shown = sizes.most_common(SHOWN_COLUMNS)
    others = len(sizes) - len(shown)
    if others:
        shown.append((f"{others} others", sizes.total() - sum(size for _, size in shown)))
    shown.append(("footers", total - sizes.total()))
    rows = [(f"column{_of_some(manifest, chosen)}", "bytes", "per position", "share")]
    rows += [(name, f"{size:,}", f"{size / positions:.2f}", f"{size / max(total, 1):.1%}") for name, size in shown]
    return aligned(rows)


def _of_some(manifest: Manifest, chosen: Sequence[ShardInfo]) -> str:
    some = len(chosen) < len(manifest.shards)
    return f" (of {len(chosen)} of {len(manifest.shards):,} shards)" if some else ""


def _labelled(rows: Iterable[tuple[str, str]]) -> str:
    pairs = list(rows)
    width = max(len(label) for label, _ in pairs)
    return "\n".join(f"{label:{width}}  {' '.join(value.split())}" for label, value in pairs)

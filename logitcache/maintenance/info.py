"""A cache on one screen: from its manifest and the footers of some of its shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from logitcache.cache import LogitCache, open_cache
from logitcache.errors import UserError
from logitcache.format.codec import flat
from logitcache.format.manifest import Manifest, fingerprint_digest
from logitcache.format.shards import ShardInfo
from logitcache.format.storage import Folder
from logitcache.table import aligned

READ_SHARDS = 32
"""Footers that are read, evenly spread over the cache: a few requests, however large it is."""
SHOWN_COLUMNS = 10
SHOWN_BARS = 8
SHOWN_STEPS = 4
BAR_WIDTH = 32


def describe(cache: LogitCache | str | Path) -> str:
    """What a cache holds and what it was made from, as aligned text.

    Reads the footers of at most `READ_SHARDS` shards, and of these the column num_entries where positions have different
    numbers of entries. Raises UserError where the cache does not open.
    """
    if not isinstance(cache, LogitCache):
        cache = open_cache(cache)
    manifest, folder = cache.manifest, Folder(cache.path)
    chosen = _spread(manifest.shards)
    paragraphs = [
        _labelled([("cache", cache.path), *_origin(manifest)]),
        _labelled(_amounts(manifest)),
        _entries(manifest, folder, chosen),
        _bytes_by_column(manifest, folder, chosen),
    ]
    return "\n\n".join(paragraphs)


def _origin(manifest: Manifest) -> Iterator[tuple[str, str]]:
    fingerprint, layout = manifest.fingerprint, manifest.layout
    teacher, tokenizer, corpus, capture = (
        fingerprint.get(part, {}) for part in ("teacher", "tokenizer", "corpus", "capture")
    )
    version = fingerprint.get("format", {}).get("version")
    yield "created by", f"{manifest.created_by}{f', format {version}' if version else ''}, precision {layout.precision}"
    yield "fingerprint", fingerprint_digest(fingerprint)[:16]
    identity = teacher.get("revision") or teacher.get("content_sha256")
    which = "revision" if teacher.get("revision") else "content"
    details = [teacher.get("architecture"), teacher.get("dtype"), identity and f"{which} {identity[:12]}"]
    yield "teacher", f"{teacher.get('name', '?')} ({', '.join(detail for detail in details if detail)})"
    yield (
        "engine",
        " ".join(str(teacher[part]) for part in ("engine", "engine_version", "route") if teacher.get(part)) or "?",
    )
    if tokenizer:
        template = tokenizer.get("chat_template_sha256")
        yield (
            "tokenizer",
            f"{tokenizer['vocab_size']:,} tokens, vocabulary {tokenizer['vocabulary_sha256'][:12]}, "
            + (f"chat template {template[:12]}" if template else "no chat template"),
        )
    sources = [source["name"] for source in corpus.get("sources", [])]
    yield "corpus", ", ".join(sources[:3]) + (f" and {len(sources) - 3} more" if len(sources) > 3 else "")
    if "generation" in fingerprint:
        yield "generated with", _assignments(fingerprint["generation"])
    shown = {name: value for name, value in capture.items() if name not in _SHOWN_ELSEWHERE}
    yield "captured with", _assignments(shown)
    extras = [
        f"{layout.num_tail_groups} groups" if layout.num_tail_groups else "",
        f"normalisers at T = {', '.join(f'{t:g}' for t in layout.temperatures)}" if layout.temperatures else "",
        "entropy" if layout.tail_entropy else "",
        f"{layout.num_tail_samples} samples" if layout.num_tail_samples else "",
    ]
    yield "of the tail", ", ".join(["mass", *(extra for extra in extras if extra)])
    if layout.columns:
        yield "kept columns", ", ".join(f"{name} ({kind})" for name, kind in layout.columns.items())
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in manifest.skipped.items())
    yield "left out", left_out or "no document"
    steps = manifest.history[-SHOWN_STEPS:]
    if len(manifest.history) > len(steps):
        yield "history", f"{len(manifest.history) - len(steps)} steps, then"
    for number, step in enumerate(steps):
        yield "history" if not number and len(steps) == len(manifest.history) else "", _step(step)


_SHOWN_ELSEWHERE = {"tail_groups", "temperatures", "tail_entropy", "tail_samples", "precision", "shard_positions"}


def _step(step: Mapping[str, Any]) -> str:
    parts = [f"{name} {value}" for name, value in step.items() if name not in _NO_SETTING and _is_plain(value)]
    sources = step.get("from")
    if isinstance(sources, Sequence) and not isinstance(sources, str):
        paths = [source.get("path", "?") if isinstance(source, Mapping) else str(source) for source in sources]
        parts.append(f"from {', '.join(paths[:3])}" + (f" and {len(paths) - 3} more" if len(paths) > 3 else ""))
    return f"{step.get('command', '?')}: {', '.join(parts)}"


_NO_SETTING = {"command", "created_by", "from"}


def _is_plain(value: object) -> bool:
    return isinstance(value, str | int | float | list) and value not in ("", [])


def _assignments(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items() if value not in (None, [], False)) or "?"


def _amounts(manifest: Manifest) -> Iterator[tuple[str, str]]:
    positions, sizes = manifest.num_positions, [shard.num_bytes for shard in manifest.shards]
    tokens = sum(shard.num_tokens for shard in manifest.shards)
    yield "rows", f"{manifest.num_sequences:,}, the longest of {manifest.longest:,} tokens"
    yield "positions", f"{positions:,} of {tokens:,} tokens, vocabulary {manifest.layout.vocab_size:,}"
    yield (
        "mass covered",
        f"{1 - manifest.mean_tail_mass:.3%} by {manifest.num_entries / max(positions, 1):.1f} entries (means)",
    )
    yield "bytes", f"{manifest.num_bytes:,}, {manifest.num_bytes / max(positions, 1):.1f} per position"
    if sizes:
        between = f"{min(sizes):,} to {max(sizes):,}" if len(sizes) > 1 else f"{sizes[0]:,}"
        groups = sum(len(shard.row_group_sizes) for shard in manifest.shards)
        yield "shards", f"{len(sizes):,} of {between} bytes, {groups:,} row groups"


def _entries(manifest: Manifest, folder: Folder, chosen: Sequence[ShardInfo]) -> str:
    """How many entries positions have: one line, or bars."""
    most = manifest.fingerprint.get("capture", {}).get("top_k")
    if manifest.num_positions and manifest.num_entries == manifest.num_positions * (most or -1):
        return f"entries  {most} at every position"
    counts: Counter[int] = Counter()
    for shard in chosen:
        with folder.open(shard.name, shard.num_bytes) as source:
            for batch in _opened(source, folder, shard).iter_batches(columns=["num_entries"], use_threads=False):
                values, found = np.unique(flat(pa.chunked_array([batch["num_entries"]]))[0], return_counts=True)
                counts.update(dict(zip(values.tolist(), found.tolist(), strict=True)))
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
    """Where the bytes go, by the compressed sizes in the footers."""
    sizes: Counter[str] = Counter()
    for shard in chosen:
        with folder.open(shard.name, shard.num_bytes) as source:
            metadata = _opened(source, folder, shard).metadata
            for group in range(metadata.num_row_groups):
                for index in range(metadata.num_columns):
                    column = metadata.row_group(group).column(index)
                    sizes[column.path_in_schema.removesuffix(".list.element")] += column.total_compressed_size
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


def _opened(source: Any, folder: Folder, shard: ShardInfo) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(source)
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"{folder.where(shard.name)} cannot be read ({error}): `logitcache verify` says what else is wrong"
        ) from error


def _spread(shards: Sequence[ShardInfo]) -> list[ShardInfo]:
    """At most `READ_SHARDS` of them, first and last included."""
    picked = np.unique(np.linspace(0, len(shards) - 1, min(len(shards), READ_SHARDS)).astype(int))
    return [shards[i] for i in picked.tolist()]


def _of_some(manifest: Manifest, chosen: Sequence[ShardInfo]) -> str:
    some = len(chosen) < len(manifest.shards)
    return f" (of {len(chosen)} of {len(manifest.shards):,} shards)" if some else ""


def _labelled(rows: Iterator[tuple[str, str]] | list[tuple[str, str]]) -> str:
    pairs = list(rows)
    width = max(len(label) for label, _ in pairs)
    return "\n".join(f"{label:{width}}  {value}" for label, value in pairs)

"""Labelled lines say what a cache is and was made from: for a terminal, a card, a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from logitcache.format.manifest import Manifest, fingerprint_digest
from logitcache.format.tail_parts import PARTS
from logitcache.urls import public_url


def origin(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Yields (label, value) of what made the cache."""
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
    yield (
        "teacher",
        f"{public_url(str(teacher.get('name', '?')))} ({', '.join(detail for detail in details if detail)})",
    )
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
    sources = [public_url(source["name"]) for source in corpus.get("sources", [])]
    yield "corpus", ", ".join(sources[:3]) + (f" and {len(sources) - 3} more" if len(sources) > 3 else "")
    if "generation" in fingerprint:
        yield "generated with", _assignments(fingerprint["generation"])
    shown = {name: value for name, value in capture.items() if name not in _SHOWN_ELSEWHERE}
    yield "captured with", _assignments(shown)
    parts = [part.describe(value) for part, value in layout.tail_parts.stored()]
    yield "of the tail", ", ".join(["mass", *parts])
    if "tail" in capture:
        yield "tail", str(capture["tail"])
    if layout.columns:
        yield "kept columns", ", ".join(f"{name} ({kind})" for name, kind in layout.columns.items())
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in manifest.skipped.items())
    yield "left out", left_out or "no document"


_SHOWN_ELSEWHERE = {"tail", *(part.option for part in PARTS), "precision", "shard_positions"}


def history(manifest: Manifest) -> list[str]:
    """Describes the steps that changed the cache since the teacher was run, a line a step, oldest first."""
    return [_step(step) for step in manifest.history]


def _step(step: Mapping[str, Any]) -> str:
    parts = [f"{name} {value}" for name, value in step.items() if name not in _NO_SETTING and _is_plain(value)]
    sources = step.get("from")
    if isinstance(sources, Sequence) and not isinstance(sources, str):
        paths = [
            public_url(str(source.get("path", "?") if isinstance(source, Mapping) else source)) for source in sources
        ]
        parts.append(f"from {', '.join(paths[:3])}" + (f" and {len(paths) - 3} more" if len(paths) > 3 else ""))
    return f"{step.get('command', '?')}: {', '.join(parts)}"


_NO_SETTING = {"command", "created_by", "from"}


def _is_plain(value: object) -> bool:
    return isinstance(value, str | int | float | list) and value not in ("", [])


def _assignments(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items() if value not in (None, [], False)) or "?"


def amounts(manifest: Manifest, basis_bytes: int = 0) -> Iterator[tuple[str, str]]:
    """Yields (label, value) of how much it holds. basis_bytes: of its tail basis, if that is to be told."""
    positions, sizes = manifest.num_positions, [shard.num_bytes for shard in manifest.shards]
    tokens = sum(shard.num_tokens for shard in manifest.shards)
    yield "rows", f"{manifest.num_sequences:,}, the longest of {manifest.longest:,} tokens"
    yield "positions", f"{positions:,} of {tokens:,} tokens, vocabulary {manifest.layout.vocab_size:,}"
    yield (
        "mass covered",
        f"{1 - manifest.mean_tail_mass:.3%} by {manifest.num_entries / max(positions, 1):.1f} entries (means)",
    )
    basis = f"; the basis {basis_bytes:,} once" if basis_bytes else ""
    yield "bytes", f"{manifest.num_bytes:,}, {manifest.num_bytes / max(positions, 1):.1f} per position{basis}"
    if sizes:
        between = f"{min(sizes):,} to {max(sizes):,}" if len(sizes) > 1 else f"{sizes[0]:,}"
        groups = sum(len(shard.row_group_sizes) for shard in manifest.shards)
        yield "shards", f"{len(sizes):,} of {between} bytes, {groups:,} row groups"

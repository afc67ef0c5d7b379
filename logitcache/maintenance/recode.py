"""logitcache recode: a cache is written again with fewer entries, coarser numbers or fewer columns."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, Unpack, overload

import numpy as np

from logitcache.assembly.placement import OutputOptions, Placement
from logitcache.assembly.plan import SHARD_POSITIONS
from logitcache.errors import UserError
from logitcache.format.layout import Layout
from logitcache.format.manifest import MANIFEST_NAME
from logitcache.format.quantization import PRESETS, check_precision
from logitcache.format.sequences import CachedSequence
from logitcache.format.tail_basis import with_rank
from logitcache.format.tail_parts import TailParts
from logitcache.format.targets import SparseTargets
from logitcache.format.truncation import nucleus, truncate
from logitcache.maintenance.rewrite import Rewrite, open_source, rewrite
from logitcache.maintenance.row_scan import scan
from logitcache.ranges import one_or_more
from logitcache.reading.cache import LogitCache

DEFAULT_MIN_K = 32
"""Floor under a new --top-p, as when capturing."""


class RecodeOptions(OutputOptions, total=False):
    """The options of `recode`, but for its shard range."""

    top_k: int | None
    top_p: float | None
    min_k: int | None
    precision: str | None
    tail_rank: int | None
    drop: Sequence[str]


@overload
def recode(
    path: LogitCache | str | Path, out: str | Path, *, shard_range: None = None, **options: Unpack[RecodeOptions]
) -> LogitCache: ...
@overload
def recode(
    path: LogitCache | str | Path, out: str | Path, *, shard_range: tuple[int, int], **options: Unpack[RecodeOptions]
) -> None: ...
def recode(
    path: LogitCache | str | Path,
    out: str | Path,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    min_k: int | None = None,
    precision: str | None = None,
    tail_rank: int | None = None,
    drop: Sequence[str] = (),
    shard_positions: int = SHARD_POSITIONS,
    executor: str = "local",
    ray_address: str | None = None,
    workers: int | None = None,
    shard_range: tuple[int, int] | None = None,
    overwrite: bool = False,
) -> LogitCache | None:
    """Writes the rows of a cache to another with less of each position.

    What leaves the entries joins the tail, exactly. The same call continues an interrupted one.

    Args:
        path: A cache, or its folder or URL.
        out: The new cache: a folder, or a URL that fsspec writes.
        top_k: Entries that a position keeps at most. None: all that `top_p` leaves.
        top_p: Probability mass that the kept entries hold. None: as in the cache.
        min_k: Entries that `top_p` leaves at least. None: 32, or fewer if the cache has fewer.
        precision: The cache's own or a coarser one: "exact", "balanced" or "compact". None: the cache's own.
        tail_rank: Coefficients of the low-rank tail that a position keeps, the first. None: all.
        drop: What is left out: options of tail parts, such as "tail_groups", and kept columns; the probes go with "tail_rank".
        shard_positions: Stored positions of a shard.
        executor: "local", this process; "ray", several in a cluster.
        ray_address: HOST:PORT of a running Ray cluster. None: one is started on this machine.
        workers: Processes on Ray, with a core each. None: as many as the cluster has cores.
        shard_range: (i, n): this call writes the i-th of n parts of the shards, which n processes share; then call `finish`.
        overwrite: Replaces what `out` holds.

    Returns:
        The new cache; None with a `shard_range`.

    Raises:
        UserError: The cache does not hold what is asked for, is damaged, or `out` holds something else.
    """
    placement = Placement(executor, ray_address, workers, shard_range, overwrite=overwrite)
    if (top_k, top_p, min_k, precision, tail_rank) == (None,) * 5 and not drop:
        raise UserError("nothing to recode: give --top-k, --top-p, --min-k, --precision, --tail-rank or --drop")
    source = open_source(path)
    capture = source.manifest.fingerprint["capture"]
    captured = _Entries(capture["top_k"], capture.get("top_p", 1.0), capture.get("min_k", capture["top_k"]))
    entries = _fewer_entries(captured, top_k, top_p, min_k)
    dropped = _checked(one_or_more(drop), source.manifest.layout)
    layout = _with_precision(source, precision)
    columns = {name: alias for name, alias in layout.columns.items() if name not in dropped}
    tail_parts = layout.tail_parts.without(dropped)
    layout = replace(layout, tail_parts=replace(tail_parts, rank=_smaller_rank(tail_parts, tail_rank)), columns=columns)
    stored = entries._asdict() | {"precision": layout.precision}
    stored |= {} if tail_rank is None else {"tail_rank": tail_rank}
    gone = {part.option for part, _ in source.manifest.layout.tail_parts.stored()}
    gone -= {part.option for part, _ in layout.tail_parts.stored()}
    absent = {name: value for name, value in TailParts().to_json("option").items() if name in gone}
    unnamed = gone - absent.keys()
    kept = {name: value for name, value in capture.items() if name not in unnamed}
    work = Rewrite(
        command="recode",
        settings={**stored, "drop": dropped},
        sources=[source],
        layout=layout,
        fingerprint={**source.manifest.fingerprint, "capture": {**kept, **stored, **absent}},
        skipped=source.manifest.skipped,
        select=lambda folder: (rows for rows, _ in scan([source])),
        transform=partial(_Recoder, entries, layout),
    )
    return rewrite(work, out, shard_positions, overwrite, placement)


class _Entries(NamedTuple):
    """The number of entries of a position, in the settings of `logitcache.build`."""

    top_k: int
    top_p: float
    min_k: int


def _fewer_entries(stored: _Entries, top_k: int | None, top_p: float | None, min_k: int | None) -> _Entries:
    """Returns the settings of the new cache. Raises UserError if they ask for more than the cache holds."""
    ragged = stored.top_p < 1
    k = stored.top_k if top_k is None else top_k
    p = stored.top_p if top_p is None else top_p
    most = min(k, stored.min_k) if ragged else k  # the floor that every position is sure to have
    default = min(DEFAULT_MIN_K, most) if top_p is not None else min(stored.min_k, k)
    floor = default if min_k is None else min_k
    for holds, message in [
        (
            1 <= k <= stored.top_k,
            f"--top-k {k}: the cache holds {stored.top_k} entries of a position, choose 1…{stored.top_k}",
        ),
        (0 < p <= 1, f"--top-p {p}: choose a probability mass in (0, 1]"),
        (
            p <= stored.top_p,
            f"--top-p {p}: the cache's entries were taken up to a mass of {stored.top_p}, choose no more",
        ),
        (1 <= floor <= k, f"--min-k {floor}: choose 1…{k}, the value of --top-k"),
        (floor <= most or min_k is None, f"--min-k {floor}: the cache's own floor is {stored.min_k}, choose 1…{most}"),
    ]:
        if not holds:
            raise UserError(message)
    return _Entries(k, p, floor)


def _checked(drop: Sequence[str], layout: Layout) -> list[str]:
    known = [*(part.option for part, _ in layout.tail_parts.stored()), *layout.columns]
    for name in drop:
        if name not in known:
            raise UserError(f"--drop {name}: the cache holds {', '.join(known) or 'nothing that can be dropped'}")
    return sorted(set(drop))


def _smaller_rank(tail_parts: TailParts, rank: int | None) -> int:
    if rank is None:
        return tail_parts.rank
    if not 1 <= rank <= tail_parts.rank:
        choice = f"choose 1…{tail_parts.rank}" if tail_parts.rank else "none would be left"
        raise UserError(f"--tail-rank {rank}: of {tail_parts.rank} coefficients that are kept of a position, {choice}")
    return rank


def _with_precision(source: LogitCache, precision: str | None) -> Layout:
    layout = source.manifest.layout
    if precision is None or precision == layout.precision:
        return layout
    check_precision(precision)
    finest_first = list(PRESETS)
    if finest_first.index(precision) < finest_first.index(layout.precision):
        coarser = ", ".join(finest_first[finest_first.index(layout.precision) :])
        raise UserError(f"--precision {precision}: finer than what the cache holds, choose one of {coarser}")
    layout = replace(layout, precision=precision, quantization=None)
    return layout.with_coefficient_step(source.tail_basis.step) if source.tail_basis else layout


class _Recoder:
    """Makes of a row what is stored of it.

    Samples that replace others are drawn by the row's id and the source's manifest: a resumed recode draws the same, a recode
    of its result draws independently of it.
    """

    def __init__(self, entries: _Entries, layout: Layout, source: LogitCache) -> None:
        self._entries, self._layout = entries, layout
        self._tail_groups = source.tail_groups if layout.tail_parts.groups else None
        fewer = 0 < layout.tail_parts.rank < source.manifest.layout.tail_parts.rank
        self._tail_basis = source.tail_basis if fewer else None
        self._seed = int.from_bytes(hashlib.sha256(source.folder.read(MANIFEST_NAME)).digest())

    def __call__(self, sequence: CachedSequence) -> SparseTargets:
        entries, parts, targets = self._entries, self._layout.tail_parts, sequence.targets
        targets = parts.of(with_rank(targets, self._tail_basis, parts.rank) if self._tail_basis else targets)
        keep = nucleus(targets.logprobs, *entries).sum(axis=1)
        random = (
            np.random.default_rng([self._seed, int(sequence.row_id, 16)]) if targets.sample_ids is not None else None
        )
        return truncate(targets, keep, self._tail_groups, random)

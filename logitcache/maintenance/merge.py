"""logitcache merge: several caches of one teacher, made with one set of settings, become one, with every row once."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack, overload

from logitcache.assembly.placement import OutputOptions, Placement
from logitcache.assembly.plan import SHARD_POSITIONS
from logitcache.assembly.resume import compared, first_of
from logitcache.errors import UserError
from logitcache.format.manifest import BUILD_DIRECTORY
from logitcache.format.tail_parts import PARTS
from logitcache.maintenance.rewrite import Rewrite, open_source, rewrite
from logitcache.maintenance.row_scan import Rows, scan
from logitcache.ranges import one_or_more
from logitcache.reading.cache import LogitCache
from logitcache.reading.row_index import RowIndex
from logitcache.storage.atomic import space_needed
from logitcache.storage.folder import Folder


@overload
def merge(
    paths: Sequence[LogitCache | str | Path],
    out: str | Path,
    *,
    shard_range: None = None,
    **options: Unpack[OutputOptions],
) -> LogitCache: ...
@overload
def merge(
    paths: Sequence[LogitCache | str | Path],
    out: str | Path,
    *,
    shard_range: tuple[int, int],
    **options: Unpack[OutputOptions],
) -> None: ...
def merge(
    paths: Sequence[LogitCache | str | Path],
    out: str | Path,
    *,
    shard_positions: int = SHARD_POSITIONS,
    executor: str = "local",
    ray_address: str | None = None,
    workers: int | None = None,
    shard_range: tuple[int, int] | None = None,
    overwrite: bool = False,
) -> LogitCache | None:
    """Writes the rows of several caches to one, in their order. Of rows with the same id the first is kept.

    The same call continues an interrupted one.

    Args:
        paths: At least two caches, or their folders or URLs.
        out: The new cache: a folder, or a URL that fsspec writes.
        shard_positions: Stored positions of a shard.
        executor: "local", this process; "ray", several in a cluster.
        ray_address: HOST:PORT of a running Ray cluster. None: one is started on this machine.
        workers: Processes on Ray, with a core each. None: as many as the cluster has cores.
        shard_range: (i, n): this call writes the i-th of n parts of the shards, which n processes share; then call `finish`.
        overwrite: Replaces what `out` holds.

    Returns:
        The new cache; None with a `shard_range`.

    Raises:
        UserError: Teacher, tokenizer, capture settings or columns differ (the message names them), a cache is damaged, or `out`
            holds something else.
    """
    placement = Placement(executor, ray_address, workers, shard_range, overwrite=overwrite)
    if len(paths := one_or_more(paths)) < 2:
        raise UserError("merge needs at least two caches")
    sources = [open_source(path) for path in paths]
    for source in sources[1:]:
        _refuse_different(sources[0], source)
    work = Rewrite(
        command="merge",
        settings={},
        sources=sources,
        layout=sources[0].manifest.layout,
        fingerprint=_joined([source.manifest.fingerprint for source in sources]),
        skipped=sum((Counter(source.manifest.skipped) for source in sources), Counter()),
        select=lambda folder: _distinct(sources, folder),
        left_out="duplicates",
    )
    return rewrite(work, out, shard_positions, overwrite, placement)


def _refuse_different(one: LogitCache, other: LogitCache) -> None:
    found = list(compared(_comparable(one), _comparable(other)))
    if not found:
        return
    parts = {name.split(".")[0] for name, _, _ in found}
    what = first_of([f"{name} is {a} in {one.path}, {b} in {other.path}" for name, a, b in found])
    other_files = {Path(part.file).stem for part in PARTS if part.file and part.layout_key not in parts}
    if parts & {"teacher", "tokenizer", "vocab_size", *other_files}:
        hint = (
            "Only caches of one teacher, tokenizer, set of tail groups and tail basis can be merged; `logitcache build --reuse` "
            "takes groups and basis of another cache"
        )
    else:
        hint = "`logitcache recode` can bring both to what the smaller one holds"
    raise UserError(f"these caches cannot be merged: {what}. {hint}")


def _comparable(cache: LogitCache) -> dict[str, Any]:
    """Returns what must be the same in two caches, in the order in which differences are named."""
    manifest, fingerprint = cache.manifest, cache.manifest.fingerprint
    layout = {part.layout_key: part.absent for part in PARTS} | manifest.layout.to_json()
    del layout["format_version"]
    quantization = manifest.layout.quantization
    layout["rounding"] = manifest.layout.stored_format["rounding"]  # the step comes last, as it is by the basis
    # The layout says it too, or it is no matter of content.
    elsewhere = {"precision", *(part.option for part in PARTS), "shard_positions"}
    return {
        "teacher": fingerprint["teacher"],
        "tokenizer": fingerprint.get("tokenizer"),
        "vocab_size": layout.pop("vocab_size"),
        "precision": layout.pop("precision"),
        "capture": {name: value for name, value in fingerprint["capture"].items() if name not in elsewhere},
        **layout,
        **{Path(part.file).stem: manifest.files.get(part.file) for part in PARTS if part.file},
        "coefficient_step": quantization.coefficient_step if quantization else None,
    }


def _joined(fingerprints: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Joins fingerprints: the first one, with the sources of all, and the corpus and generation settings that all share."""
    sources: list[Any] = []
    for fingerprint in fingerprints:
        sources += [source for source in fingerprint["corpus"].get("sources", []) if source not in sources]
    first, *others = [fingerprint["corpus"] for fingerprint in fingerprints]
    shared = {name: value for name, value in first.items() if all(name in o and o[name] == value for o in others)}
    joined = {**fingerprints[0], "corpus": {**shared, "sources": sources}}
    if any(fingerprint.get("generation") != joined.get("generation") for fingerprint in fingerprints):
        joined.pop("generation", None)
    return joined


def _distinct(sources: Sequence[LogitCache], folder: Folder) -> Generator[Rows]:
    """Yields all rows except those whose id an earlier row has."""
    scratch = folder.local and folder.local / BUILD_DIRECTORY  # of a cache at a URL, this machine's folder for such
    with tempfile.TemporaryDirectory(prefix="ids-", dir=scratch) as directory, space_needed(directory):
        ids = (rows.ids for rows, _ in scan(sources))
        index = RowIndex(Path(directory), ids, sum(len(source) for source in sources))
        for rows, _ in scan(sources):
            yield rows[index.find(rows.ids) == rows.numbers]

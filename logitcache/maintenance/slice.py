"""logitcache slice: some rows of a cache become another cache."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Unpack, overload

import numpy as np
import pyarrow as pa

from logitcache.assembly.placement import OutputOptions, Placement
from logitcache.assembly.plan import SHARD_POSITIONS
from logitcache.errors import UserError, one_line
from logitcache.format.probes import splitmix64
from logitcache.maintenance.rewrite import Rewrite, open_source, rewrite
from logitcache.maintenance.row_scan import Rows, scan
from logitcache.ranges import parse_range
from logitcache.reading.cache import LogitCache

COUNTS = ("row_id", "num_tokens", "num_positions")
"""What an expression may speak of beside the kept columns."""


class SliceOptions(OutputOptions, total=False):
    """The options of `slice_cache`, but for its shard range."""

    rows: str | None
    row_ids: str | Path | None
    where: str | None
    sample: int | None
    seed: int
    against: str | None


@overload
def slice_cache(
    path: LogitCache | str | Path, out: str | Path, *, shard_range: None = None, **options: Unpack[SliceOptions]
) -> LogitCache: ...
@overload
def slice_cache(
    path: LogitCache | str | Path, out: str | Path, *, shard_range: tuple[int, int], **options: Unpack[SliceOptions]
) -> None: ...
def slice_cache(
    path: LogitCache | str | Path,
    out: str | Path,
    *,
    rows: str | None = None,
    row_ids: str | Path | None = None,
    where: str | None = None,
    sample: int | None = None,
    seed: int = 0,
    against: str | None = None,
    shard_positions: int = SHARD_POSITIONS,
    executor: str = "local",
    ray_address: str | None = None,
    workers: int | None = None,
    shard_range: tuple[int, int] | None = None,
    overwrite: bool = False,
) -> LogitCache | None:
    """Writes the rows of a cache that meet all of the given conditions to another cache.

    The same call continues an interrupted one.

    Args:
        path: A cache, or its folder or URL.
        out: The new cache: a folder, or a URL that fsspec writes.
        rows: "A:B", from row A, counted from 0, up to B, which is left out. Either may be missing.
        row_ids: Text file with a row id a line.
        where: Expression of DuckDB's SQL over the kept columns, `row_id`, `num_tokens` and `num_positions`.
        sample: Number of rows that are drawn of those that meet the other conditions, by their ids, whatever their order.
        seed: Random seed of `sample`.
        against: Identity that the cache must have, see `logitcache.open`.
        shard_positions: Stored positions of a shard.
        executor: "local", this process; "ray", several in a cluster.
        ray_address: HOST:PORT of a running Ray cluster. None: one is started on this machine.
        workers: Processes on Ray, with a core each. None: as many as the cluster has cores.
        shard_range: (i, n): this call writes the i-th of n parts of the shards, which n processes share; then call `finish`.
        overwrite: Replaces what `out` holds.

    Returns:
        The new cache; None with a `shard_range`.

    Raises:
        UserError: The conditions cannot be met, DuckDB refuses the expression, or it reaches for anything but these columns, no
            row meets the conditions, the cache is damaged, or `out` holds something else.
    """
    placement = Placement(executor, ray_address, workers, shard_range, overwrite=overwrite)
    if rows is None and row_ids is None and where is None and sample is None:
        raise UserError("nothing to slice by: give --rows, --row-ids, --where or --sample")
    if seed < 0:
        raise UserError(f"--seed {seed}: choose 0 or more")
    source = open_source(path, against)
    listed = None if row_ids is None else _ListedIds(Path(row_ids))
    settings = {
        "rows": rows,
        "row_ids": listed and listed.settings,
        "where": where,
        "sample": sample,
        "seed": None if sample is None else seed,
    }
    choice = _Choice(source, parse_range(rows, len(source), "row"), listed, where, sample, seed)
    work = Rewrite(
        command="slice",
        settings={name: value for name, value in settings.items() if value is not None},
        sources=[source],
        layout=source.manifest.layout,
        fingerprint=source.manifest.fingerprint,
        skipped=source.manifest.skipped,
        select=lambda folder: choice.rows(),
    )
    return rewrite(work, out, shard_positions, overwrite, placement)


@dataclass(frozen=True)
class _Choice:
    """The conditions that rows must meet.  numbers: of the rows that may."""

    source: LogitCache
    numbers: range
    listed: _ListedIds | None
    where: str | None
    sample: int | None
    seed: int

    def rows(self) -> Generator[Rows]:
        chosen = self._filtered()
        return chosen if self.sample is None else _sampled(chosen, self.sample, self.seed)

    def _filtered(self) -> Generator[Rows]:
        meets = _expression(self.where, list(self.source.manifest.layout.columns)) if self.where is not None else None
        kept_columns = list(self.source.manifest.layout.columns) if meets else []
        first, end = self.numbers.start, self.numbers.stop
        read = (0, None) if self.listed else (first, end)  # a listed id that is nowhere is refused
        for rows, table in scan([self.source], kept_columns, *read):
            kept = (rows.numbers >= first) & (rows.numbers < end)
            if self.listed:
                kept &= self.listed.found(rows.ids)
            if meets and kept.any():
                kept[kept] = meets(rows[kept], table.filter(pa.array(kept)))
            yield rows[kept]
        if self.listed:
            self.listed.refuse_unknown(self.source.path)


class _ListedIds:
    """Row ids in a text file, sorted, 16 bytes each."""

    def __init__(self, path: Path) -> None:
        self._path = path
        joined = bytearray()
        try:
            with path.open(encoding="ascii") as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        joined += self._parse(line.strip(), number)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--row-ids {path}: cannot be read ({one_line(error)})") from error
        self._ids = np.unique(np.frombuffer(bytes(joined), "S16"))
        self._seen = np.zeros(len(self._ids), dtype=bool)

    def _parse(self, text: str, number: int) -> bytes:
        if not re.fullmatch("[0-9a-fA-F]{32}", text):
            shown = text if len(text) < 40 else f"{text[:40]}…"
            raise UserError(
                f"--row-ids {self._path}, line {number}: {shown!r} is no row id, which has 32 hexadecimal digits"
            )
        return bytes.fromhex(text)

    @property
    def settings(self) -> dict[str, Any]:
        return {"count": len(self._ids), "sha256": hashlib.sha256(self._ids.tobytes()).hexdigest()}

    def found(self, ids: np.ndarray) -> np.ndarray:
        """Returns which ids [n] are listed, bool [n], and remembers them."""
        if not len(self._ids):
            return np.zeros(len(ids), dtype=bool)
        at = np.minimum(np.searchsorted(self._ids, ids), len(self._ids) - 1)
        listed: np.ndarray = self._ids[at] == ids
        self._seen[at[listed]] = True
        return listed

    def refuse_unknown(self, cache: str) -> None:
        unknown = self._ids[~self._seen]
        if len(unknown):
            first = [unknown[i : i + 1].tobytes().hex() for i in range(min(3, len(unknown)))]
            more = ", …" if len(unknown) > 3 else ""
            raise UserError(
                f"--row-ids {self._path}: {len(unknown)} of {len(self._ids)} ids are not in {cache}: {', '.join(first)}{more}"
            )


def _sampled(chosen: Iterator[Rows], count: int, seed: int) -> Generator[Rows]:
    """Yields the rows whose ids, mixed with the seed, are the `count` lowest numbers, in order; of equal ids the first."""
    if count < 1:
        raise UserError(f"--sample {count}: at least 1 row is needed")
    seen, num_drawn = 0, 0
    limit = np.uint64(2**64 - 1)
    parts: list[Rows] = []
    for rows in chosen:
        seen += len(rows)
        parts.append(rows[_mixed(rows.ids, seed) <= limit])
        num_drawn += len(parts[-1])
        if num_drawn >= 2 * count:
            best = _lowest(parts, count, seed)
            parts, num_drawn, limit = [best], count, _mixed(best.ids, seed).max()
    if seen < count:
        raise UserError(f"--sample {count}: only {seen} rows to draw from")
    yield _lowest(parts, count, seed)


def _lowest(parts: list[Rows], count: int, seed: int) -> Rows:
    rows = Rows.joined(parts)
    return rows[np.sort(np.argsort(_mixed(rows.ids, seed), kind="stable")[:count])]


def _mixed(ids: np.ndarray, seed: int) -> np.ndarray:
    """Returns a number for each id [n], uint64, unlike that of other seeds."""
    return splitmix64(
        ids.view("<u8").reshape(-1, 2)[:, 0] ^ np.random.default_rng(seed).integers(2**64, dtype=np.uint64)
    )


def _expression(where: str, columns: list[str]) -> Callable[[Rows, pa.Table], np.ndarray]:
    """Returns the function that tells which of some rows, given with their kept columns, meet the expression.

    DuckDB evaluates it in a database that holds these rows and nothing else, with its access to files, to other Python objects
    and to its own settings turned off.
    """
    try:
        import duckdb
    except ModuleNotFoundError as error:
        raise UserError("--where needs DuckDB: pip install 'logitcache[sql]'") from error
    confined: dict[str, str | bool | int | float | list[str]] = {
        "enable_external_access": "false",
        "python_enable_replacements": "false",
        "autoload_known_extensions": "false",
        "autoinstall_known_extensions": "false",
        "threads": "1",
        "lock_configuration": "true",
    }
    connection = duckdb.connect(":memory:", config=confined)
    names = list(dict.fromkeys([*COUNTS, *columns]))
    for name, other in combinations(names, 2):
        if name.lower() == other.lower():
            raise UserError(
                f"--where: SQL takes the columns {name} and {other} for one, and cannot tell which is meant"
            )
    number = "#"
    while number in columns:
        number += "#"

    def meets(rows: Rows, table: pa.Table) -> np.ndarray:
        lengths = table["loss_mask"].combine_chunks().value_lengths()
        values = {"num_tokens": lengths, "num_positions": pa.array(rows.num_positions)}
        values |= {name: table[name] for name in ("row_id", *columns)}
        values[number] = pa.array(np.arange(len(rows)))
        try:
            found = connection.from_arrow(pa.table(values)).filter(duckdb.SQLExpression(where))
            chosen = found.project(duckdb.ColumnExpression(number)).fetchnumpy()[number]
        except duckdb.Error as error:
            first = next(iter(str(error).splitlines()), "")
            raise UserError(f"--where {where!r}: {first} (columns: {', '.join(names)})") from error
        except RuntimeError as error:  # what DuckDB makes of Ctrl-C
            raise KeyboardInterrupt from error
        met = np.zeros(len(rows), dtype=bool)
        met[np.asarray(chosen, dtype=np.int64)] = True
        return met

    return meets

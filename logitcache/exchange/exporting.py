"""logitcache export: a cache → one file that another tool reads, a row group at a time."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from logitcache.errors import UserError, one_line
from logitcache.exchange import axolotl, topk
from logitcache.format.codec import DecodedRows
from logitcache.format.tail_basis import extended
from logitcache.progress import Progress
from logitcache.reading.cache import LogitCache, opened
from logitcache.storage.folder import Folder

logger = logging.getLogger("logitcache")


@dataclass(frozen=True)
class TargetFormat:
    """A format of files.  table: rows of a cache and the name of the field for log-probabilities → the columns that hold them.

    exact_entries: the same rows → the numbers of their entries, in lists as those of `table`.
    restored: kept lists of objects are written as such, not as the JSON text that the cache holds.  named: whether the field's
    name can be chosen.
    """

    table: Callable[[DecodedRows, str], pa.Table]
    exact_entries: Callable[[DecodedRows], pa.Array]
    restored: bool
    named: bool


FORMATS = {
    "topk": TargetFormat(lambda rows, _: topk.table(rows), topk.exact_entries, restored=False, named=False),
    "axolotl": TargetFormat(axolotl.table_v1, axolotl.exact_entries, restored=True, named=True),
    "axolotl-v2": TargetFormat(axolotl.table_v2, axolotl.exact_entries, restored=True, named=True),
}
"""By the name that --to takes."""
LOGPROBS_FIELD = "logprobs"
ROW_ID = "row_id"


@dataclass(frozen=True)
class Exported:
    """The file that was written.  num_left_out: rows in which nothing is trained."""

    path: str
    num_rows: int
    num_positions: int
    num_left_out: int
    num_bytes: int


def export(
    cache: LogitCache | str | Path,
    out: str | Path,
    *,
    to: str,
    top_k: int | None = None,
    logprobs_field: str | None = None,
    overwrite: bool = False,
) -> Exported:
    """Writes the rows of a cache to a file in another tool's format. The file appears when it is complete.

    In JSON, kept numbers that are not a number or infinite are null.

    Args:
        cache: A cache, or its folder or URL.
        out: A path or URL that ends with .parquet or .jsonl.
        to: "topk", "axolotl" or "axolotl-v2".
        top_k: Entries of a position, at least as many as the cache stores. Those beyond are rebuilt from its coefficients and
            approximate: the column "exact_entries" has, for each position, how many first ones are not. None: as stored.
        logprobs_field: Column of Axolotl's lists. None: "logprobs".
        overwrite: Replaces the file.

    Returns:
        Where the file is, its rows, positions and bytes.

    Raises:
        UserError: The cache does not open or is damaged, the file is there or cannot be written, or names contradict.
    """
    if to not in FORMATS:
        raise UserError(f"--to {to}: choose one of {', '.join(FORMATS)}")
    target = FORMATS[to]
    if logprobs_field is not None and not target.named:
        raise UserError(f"--logprobs-field {logprobs_field}: only Axolotl's rows have such a field")
    field = LOGPROBS_FIELD if logprobs_field is None else logprobs_field
    if field in ("", ROW_ID, axolotl.IDS, topk.EXACT):
        raise UserError(f"--logprobs-field {field!r}: choose a name that no other column has, such as {LOGPROBS_FIELD}")
    cache = opened(cache)
    folder, name = _split(str(out))
    folder.check_writable(name)
    if folder.lies_in(cache.folder):
        raise UserError(f"--out {out}: lies in the cache that is read; choose a file beside it")
    if folder.exists(name) and not overwrite:
        raise UserError(f"--out {out} exists: choose another name, or replace it with --overwrite")
    if folder.local and (folder.local / name).is_dir():
        raise UserError(f"--out {out}: this is a folder; name a file in it")
    _check_top_k(cache, top_k)
    if to != "topk" and not cache.manifest.layout.columns:
        logger.warning(
            "warning: %s keeps no column of its source: Axolotl needs the chat messages (build and import keep them with --keep)",
            cache.path,
        )
    try:
        with folder.writing(name) as path:
            with _writer(path, cache, target, name) as write:
                num_rows, num_positions = _write(cache, target, field, top_k, write)
            if not num_rows:
                raise UserError(f"{cache.path} holds no row with a trained token: nothing to export")
            num_bytes = path.stat().st_size
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror or one_line(error)})") from error
    return Exported(folder.where(name), num_rows, num_positions, len(cache) - num_rows, num_bytes)


Write = Callable[[pa.Table, dict[str, list[Any]]], None]
"""Takes the next rows: their targets, and the values of each kept column."""


def _check_top_k(cache: LogitCache, top_k: int | None) -> None:
    """Raises UserError for a number of entries that the cache cannot give, and says that others than its own are approximate."""
    if top_k is None:
        return
    if not cache.manifest.layout.tail_parts.rank:
        raise UserError(
            f"--top-k {top_k}: {cache.path} has no coefficients (--tail-rank) from which more could be rebuilt"
        )
    if not 0 < top_k <= cache.vocab_size:
        raise UserError(
            f"--top-k {top_k}: the teacher's vocabulary has {cache.vocab_size} tokens, choose 1…{cache.vocab_size}"
        )
    logger.info(
        "entries beyond those of the cache are rebuilt from its coefficients, approximately: column %s has the number of its own",
        topk.EXACT,
    )


def _extended(rows: DecodedRows, cache: LogitCache, top_k: int) -> DecodedRows:
    """Returns rows whose positions have `top_k` entries."""
    stored = int(rows.num_entries.max(initial=0))
    if top_k < stored:
        raise UserError(f"--top-k {top_k}: {cache.path} stores up to {stored}, `logitcache recode --top-k` keeps fewer")
    assert cache.tail_basis is not None
    result = copy(rows)
    result.targets = extended(rows.targets, cache.tail_basis, top_k)
    result.num_entries = result.targets.num_entries
    return result


def _write(cache: LogitCache, target: TargetFormat, field: str, top_k: int | None, write: Write) -> tuple[int, int]:
    num_rows = num_positions = 0
    approximate = "tail" in cache.manifest.fingerprint.get("capture", {})
    progress = Progress("exporting", cache.num_positions, 0, "positions")
    try:
        for rows in cache.iter_row_groups():
            trained = np.diff(rows.offsets) > 0
            if top_k is None:
                table = target.table(rows, field)
            else:
                table = target.table(_extended(rows, cache, top_k), field)
                table = table.append_column(topk.EXACT, target.exact_entries(rows))
            if approximate and topk.TAIL in table.column_names:
                table = table.drop_columns([topk.TAIL])  # whoever reads it would take it for the teacher's
            table = table.append_column(ROW_ID, pa.array(rows.row_ids, pa.string()))
            kept: dict[str, list[Any]] = {name: [] for name in cache.manifest.layout.columns}
            if clash := sorted(set(table.column_names) & kept.keys()):
                raise UserError(
                    f"{cache.path} keeps a column {clash[0]!r}, as the rows to write have one: leave it out with "
                    "`logitcache recode --drop`"
                )
            for row in (rows[index] for index in np.flatnonzero(trained).tolist()) if kept else ():
                for name, value in row.columns.items():
                    kept[name].append(axolotl.as_it_was(value) if target.restored else value)
            if trained.any():
                write(table.filter(pa.array(trained)), kept)
            num_rows += int(trained.sum())
            num_positions += len(rows.targets)
            progress.advance(len(rows.targets))
    finally:
        progress.close()
    return num_rows, num_positions


def _split(out: str) -> tuple[Folder, str]:
    parent, _, name = out.rpartition("/")
    if not name.endswith((".parquet", ".jsonl")):
        raise UserError(f"--out {out}: a name that ends with .parquet or .jsonl is wanted")
    return Folder(parent or ("/" if out.startswith("/") else ".")), name


@contextmanager
def _writer(path: Path, cache: LogitCache, target: TargetFormat, name: str) -> Iterator[Write]:
    """Yields the function that writes to a file of the kind that `name` says."""
    if name.endswith(".jsonl"):
        with path.open("w", encoding="utf-8") as lines:
            yield lambda table, kept: _write_lines(lines, table, kept)
        return
    opened: list[pq.ParquetWriter] = []
    with _parquet_takes(name):
        types = _column_types(cache, target)

    def write(table: pa.Table, kept: dict[str, list[Any]]) -> None:
        with _parquet_takes(name):
            for column, values in kept.items():
                table = table.append_column(column, pa.array(values, types[column]))
            opened.extend([] if opened else [pq.ParquetWriter(path, table.schema, compression="zstd")])
            opened[0].write_table(table)

    try:
        yield write
    finally:
        for writer in opened:
            writer.close()


@contextmanager
def _parquet_takes(name: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except (pa.ArrowException, ValueError, OverflowError) as error:
        raise UserError(
            f"--out {name}: a kept column has values of different kinds, which Parquet does not take "
            f"({one_line(error)}): write .jsonl"
        ) from error


def _column_types(cache: LogitCache, target: TargetFormat) -> Mapping[str, pa.DataType]:
    """Returns the Arrow type of each kept column as it is written; objects have the keys of those of all rows."""
    types = {name: pa.type_for_alias(alias) for name, alias in cache.manifest.layout.columns.items()}
    texts = [name for name, arrow_type in types.items() if target.restored and pa.types.is_string(arrow_type)]
    seen = pa.schema([(name, pa.null()) for name in texts])
    for table in cache.iter_columns(texts) if texts else ():
        values = {name: [axolotl.as_it_was(value) for value in table[name].to_pylist()] for name in texts}
        found = pa.schema([(name, pa.infer_type(values[name])) for name in texts])
        seen = pa.unify_schemas([seen, found], promote_options="permissive")
    return types | {column.name: column.type for column in seen if not pa.types.is_null(column.type)}


def _write_lines(lines: TextIO, table: pa.Table, kept: dict[str, list[Any]]) -> None:
    for index in range(len(table)):
        row = table.slice(index, 1).to_pylist()[0] | {name: _json(values[index]) for name, values in kept.items()}
        lines.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def _json(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value

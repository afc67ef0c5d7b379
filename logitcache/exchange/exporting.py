"""logitcache export: a cache → one file that another tool reads, a row group at a time."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from logitcache.cache import LogitCache, open_cache
from logitcache.errors import UserError, one_line
from logitcache.exchange import axolotl, topk
from logitcache.format.codec import DecodedRows
from logitcache.format.storage import Folder
from logitcache.progress import Progress

logger = logging.getLogger("logitcache")


@dataclass(frozen=True)
class TargetFormat:
    """table: rows of a cache and the name of the field for log-probabilities → the columns that hold them.
    restored: kept lists and objects are written as such, not as the JSON text that the cache holds.
    named: whether the field's name can be chosen.
    """

    table: Callable[[DecodedRows, str], pa.Table]
    restored: bool
    named: bool


FORMATS = {
    "topk": TargetFormat(lambda rows, _: topk.table(rows), restored=False, named=False),
    "axolotl": TargetFormat(axolotl.table_v1, restored=True, named=True),
    "axolotl-v2": TargetFormat(axolotl.table_v2, restored=True, named=True),
}
"""By the name that --to takes."""
LOGPROBS_FIELD = "logprobs"


@dataclass(frozen=True)
class Exported:
    """What was written. num_left_out: rows in which nothing is trained."""

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
    logprobs_field: str | None = None,
    overwrite: bool = False,
) -> Exported:
    """Writes the rows of a cache to a file in another tool's format; it appears when it is complete.

    out: a name that ends with .parquet or .jsonl, local or at any URL that fsspec writes.  to: a name in FORMATS.
    logprobs_field: of Axolotl's rows, default "logprobs".  overwrite: replace the file.

    Raises UserError for a cache that does not open or is damaged, for a file that is there, and for names that contradict.
    """
    if to not in FORMATS:
        raise UserError(f"--to {to}: choose one of {', '.join(FORMATS)}")
    target = FORMATS[to]
    if logprobs_field is not None and not target.named:
        raise UserError(f"--logprobs-field {logprobs_field}: only Axolotl's rows have such a field")
    field = logprobs_field or LOGPROBS_FIELD
    cache = cache if isinstance(cache, LogitCache) else open_cache(cache)
    folder, name = _split(str(out))
    if folder.lies_in(Folder(cache.path)):
        raise UserError(f"--out {out}: lies in the cache that is read; choose a file beside it")
    if folder.exists(name) and not overwrite:
        raise UserError(f"--out {out} exists: choose another name, or replace it with --overwrite")
    if folder.local and (folder.local / name).is_dir():
        raise UserError(f"--out {out}: this is a folder; name a file in it")
    if to != "topk" and not cache.manifest.layout.columns:
        logger.warning(
            "warning: %s keeps no column of its source: Axolotl needs the chat messages (build and import keep them with --keep)",
            cache.path,
        )
    with folder.writing(name) as path:
        with _writer(path, name) as write:
            num_rows, num_positions = _write(cache, target, field, write)
        if not num_rows:
            raise UserError(f"{cache.path} holds no row with a trained token: nothing to export")
        num_bytes = path.stat().st_size
    return Exported(str(out), num_rows, num_positions, len(cache) - num_rows, num_bytes)


Write = Callable[[pa.Table, dict[str, list[Any]]], None]
"""Takes the next rows: their targets, and the values of each kept column."""


def _write(cache: LogitCache, target: TargetFormat, field: str, write: Write) -> tuple[int, int]:
    """(rows, positions) written."""
    num_rows = num_positions = 0
    approximate = "tail" in cache.manifest.fingerprint.get("capture", {})
    progress = Progress("exporting", cache.num_positions, 0, "positions")
    try:
        for rows in cache.iter_row_groups():
            trained = np.diff(rows.offsets) > 0
            table = target.table(rows, field)
            if approximate and topk.TAIL in table.column_names:
                table = table.drop_columns([topk.TAIL])  # whoever reads it would take it for the teacher's
            table = table.append_column("row_id", pa.array(rows.row_ids, pa.string()))
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
    """Folder and name of the file. Raises UserError for a kind of file that is not written."""
    parent, _, name = out.rpartition("/")
    if not name.endswith((".parquet", ".jsonl")):
        raise UserError(f"--out {out}: a name that ends with .parquet or .jsonl is wanted")
    return Folder(parent or ("/" if out.startswith("/") else ".")), name


@contextmanager
def _writer(path: Path, name: str) -> Iterator[Write]:
    """What writes to a file of the kind that `name` says."""
    if name.endswith(".jsonl"):
        with path.open("w", encoding="utf-8") as lines:
            yield lambda table, kept: _write_lines(lines, table, kept)
        return
    opened: list[pq.ParquetWriter] = []

    def write(table: pa.Table, kept: dict[str, list[Any]]) -> None:
        try:
            for column, values in kept.items():
                table = table.append_column(
                    column, pa.array(values, opened[0].schema.field(column).type if opened else None)
                )
            opened.extend([] if opened else [pq.ParquetWriter(path, table.schema, compression="zstd")])
            opened[0].write_table(table)
        except (pa.ArrowException, ValueError) as error:
            raise UserError(
                f"--out {name}: a kept column has values of different kinds, which Parquet does not take "
                f"({one_line(error)}): write .jsonl"
            ) from error

    try:
        yield write
    finally:
        for writer in opened:
            writer.close()


def _write_lines(lines: TextIO, table: pa.Table, kept: dict[str, list[Any]]) -> None:
    for index in range(len(table)):
        row = table.slice(index, 1).to_pylist()[0] | {name: values[index] for name, values in kept.items()}
        lines.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")

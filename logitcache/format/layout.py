"""The layout of a cache: its columns and the rounding of their numbers, as JSON in every shard and in the manifest."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import pyarrow as pa

from logitcache.errors import UserError
from logitcache.format.quantization import (
    COEFFICIENT_BITS,
    DEFAULT_PRECISION,
    FINEST_COEFFICIENT_BITS,
    PRESETS,
    QuantizationSpec,
    check_precision,
)
from logitcache.format.tail_part import Column
from logitcache.format.tail_parts import PARTS, TEMPERED_PREFIX, TailParts

FORMAT_VERSION = 2
NEWEST_FORMAT = max([FORMAT_VERSION, *(part.since for part in PARTS)])
"""What is read. A cache says `FORMAT_VERSION`, or that of the newest part it stores: others stay readable for older readers."""
METADATA_KEY = b"logitcache"


@dataclass(frozen=True)
class Layout:
    """The columns of a cache.

    vocab_size: V of the teacher.  tail_parts: what is stored of the tail beside its mass.  columns: Arrow type name of each
    kept source column.  precision: a name in `quantization.PRESETS`.  quantization: what that name meant when the cache was
    written, None for exact.
    """

    vocab_size: int
    tail_parts: TailParts = field(default_factory=TailParts)
    columns: Mapping[str, str] = field(default_factory=dict)
    precision: str = DEFAULT_PRECISION
    quantization: QuantizationSpec | None = None

    def __post_init__(self) -> None:
        if self.quantization is None:
            check_precision(self.precision)
            object.__setattr__(self, "quantization", PRESETS[self.precision])

    @property
    def format_version(self) -> int:
        """The oldest format that has all that is stored."""
        return max([FORMAT_VERSION, *(part.since for part, _ in self.tail_parts.stored())])

    @property
    def stored_format(self) -> dict[str, Any]:
        """The record of the format in a fingerprint: its version, and how numbers are rounded, whatever the tail basis."""
        preset = replace(self.quantization, coefficient_step=None).to_json() if self.quantization else None
        return {"version": self.format_version, "rounding": preset}

    def with_coefficient_step(self, step: float) -> Layout:
        """Returns the layout with the step of a tail basis, or the multiple of its precision; an exact cache's stays as it is."""
        if self.quantization is None:
            return self
        step *= 2.0 ** (FINEST_COEFFICIENT_BITS - COEFFICIENT_BITS[self.precision])
        return replace(self, quantization=replace(self.quantization, coefficient_step=step))

    def to_json(self) -> dict[str, Any]:
        """Returns the layout as plain JSON types."""
        return {
            "format_version": self.format_version,
            "vocab_size": self.vocab_size,
            **self.tail_parts.to_json("layout_key"),
            "columns": dict(self.columns),
            "precision": self.precision,
            "rounding": self.quantization.to_json() if self.quantization else None,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Layout:
        """Returns the layout of `to_json`; what format 1 wrote reads as exact."""
        rounding = data.get("rounding")
        layout = cls(
            vocab_size=data["vocab_size"],
            tail_parts=TailParts.from_json(data, "layout_key"),
            columns=data["columns"],
            precision=data.get("precision", "exact"),
            quantization=QuantizationSpec.from_json(rounding) if rounding else None,
        )
        if layout.tail_parts.rank and layout.quantization and layout.quantization.coefficient_step is None:
            raise ValueError("its rounding has no step of the coefficients")
        return layout

    def values_per_position(self) -> dict[str, tuple[pa.DataType, int]]:
        """Returns the columns with a fixed number of values per stored position: name → (Arrow type, that number)."""
        columns = {"num_entries": (pa.int32(), 1), "tail_logprob": (pa.float32(), 1)}
        if self.quantization:
            columns["lowest_level"] = (pa.int32(), 1)
        for name, column in self.tail_columns.items():
            columns[name] = (column.arrow_type, column.width)
        return columns

    @cached_property
    def tail_columns(self) -> dict[str, Column]:
        """The columns of the tail's optional parts by name."""
        parts = self.tail_parts.stored()
        return {n: c for part, value in parts for n, c in part.columns(value, self.quantization).items()}

    def values_per_entry(self) -> dict[str, pa.DataType]:
        """Returns the columns with a value per entry: name → Arrow type."""
        if self.quantization:
            return {"id_gaps": pa.int32(), "levels_above_lowest": pa.int32()}
        return {"token_ids": pa.int32(), "logprobs": pa.float32()}

    def schema(self) -> pa.Schema:
        """Returns the Arrow schema of every shard, metadata included."""
        lists = {"input_ids": pa.int32(), "loss_mask": pa.bool_(), **self.values_per_entry()}
        lists |= {name: arrow_type for name, (arrow_type, _) in self.values_per_position().items()}
        fields = [pa.field("row_id", pa.string())]
        fields += [pa.field(name, pa.list_(arrow_type)) for name, arrow_type in lists.items()]
        fields += [pa.field(name, pa.type_for_alias(alias)) for name, alias in self.columns.items()]
        return pa.schema(fields, metadata={METADATA_KEY: json.dumps(self.to_json())})

    def parquet_options(self) -> dict[str, Any]:
        """Returns keyword arguments of `pyarrow.parquet.ParquetWriter`.

        BYTE_STREAM_SPLIT puts the low bytes of a column together and the high ones, mostly zero, elsewhere, which zstd's
        entropy coder then sees apart. `tools/bench_codec.py` compares it with the other encodings, and zstd's levels.
        """
        levels = {name: column.level for name, column in self.tail_columns.items()}
        level: int | dict[str, int] = 6
        if any(other != level for other in levels.values()):
            types = {field.name: field.type for field in self.schema()}
            path = {name: f"{name}.list.element" if pa.types.is_list(of) else name for name, of in types.items()}
            level = {path[name]: levels.get(name, 6) for name in types}
        split = [
            name
            for name, values in zip(self.schema().names, self.schema().types, strict=True)
            if pa.types.is_list(values) and not pa.types.is_boolean(values.value_type) and name != "num_entries"
        ]
        return {
            "compression": "zstd",
            "compression_level": level,
            "use_dictionary": ["num_entries.list.element"],
            "column_encoding": {f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in split},
            "write_statistics": ["row_id"],
            "write_page_checksum": True,
        }


def _reserved() -> frozenset[str]:
    once = TailParts(**{part.name: type(part.absent)(1) for part in PARTS if part.absent != ()})
    everything = [Layout(1, once, precision=precision).schema().names for precision in PRESETS]
    return frozenset().union(*everything)


RESERVED_COLUMNS = _reserved()
"""Names that kept source columns cannot have (nor any that begins with `TEMPERED_PREFIX`)."""


def refuse_reserved(kept: Iterable[str]) -> None:
    """Raises UserError for a kept column with a name that a cache's own column has."""
    for name in kept:
        if name in RESERVED_COLUMNS or name.startswith(TEMPERED_PREFIX):
            raise UserError(f"--keep {name}: the cache has a column of that name itself; rename the source's")


def read_layout(metadata: Mapping[bytes, bytes] | None, where: str) -> Layout:
    """Reads the layout in a shard's schema metadata. Raises UserError for foreign and altered files and for newer formats."""
    if not metadata or METADATA_KEY not in metadata:
        raise UserError(f"{where} is not a shard of a logitcache (no such schema metadata)")
    try:
        data = json.loads(metadata[METADATA_KEY])
        check_version(data["format_version"], where)
        return Layout.from_json(data)
    except UserError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise UserError(f"{where} was altered: its schema metadata is unreadable ({error!r})") from error


def check_version(found: int, where: str) -> None:
    """Raises UserError if a file was written in a newer format than this code reads."""
    if found > NEWEST_FORMAT:
        raise UserError(
            f"{where} is written in cache format {found}, this logitcache reads up to format {NEWEST_FORMAT}: "
            f"install a logitcache that reads format {found}"
        )

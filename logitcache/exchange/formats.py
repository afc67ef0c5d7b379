"""Formats that are imported: which columns hold the entries, and what reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from logitcache.errors import UserError
from logitcache.exchange import distillkit, topk
from logitcache.exchange.distillkit_config import CONFIG_NAME, CompressionConfig, parse_config
from logitcache.exchange.source_files import Source, read_beside
from logitcache.exchange.source_rows import SourceRow

Entries = tuple[np.ndarray, np.ndarray, np.ndarray | None]
"""Ids int [N, k], log-probabilities float32 [N, k], tail float32 [N] or None."""


@dataclass(frozen=True)
class SourceFormat:
    """A format of sources.  read: (row, positions int [N], number of tokens) → entries of these, out of the `columns`.

    loss_mask: its usual column.  vocab_size: if the format knows it.  settings: what else decides how bytes are read, plain
    JSON.  most_mass: what entries of a position may add up to by the format's own rounding.
    """

    name: str
    columns: Sequence[str]
    read: Callable[[SourceRow, np.ndarray, int], Entries]
    loss_mask: str | None
    vocab_size: int | None
    settings: dict[str, Any]
    most_mass: float


def _distillkit(sources: Sequence[Source], config: str | None) -> SourceFormat:
    settings = _find_config(sources, config)
    return SourceFormat(
        "distillkit",
        (distillkit.IDS, distillkit.LOGPROBS),
        lambda row, positions, count: (*distillkit.read_entries(row, positions, count, settings), None),
        loss_mask=None,
        vocab_size=settings.d,
        settings={"config": settings.to_json()},
        most_mass=2.0,  # a curve may miss its values by much
    )


def _topk(sources: Sequence[Source], config: str | None) -> SourceFormat:
    if config is not None:
        raise UserError("--config is of DistillKit's data only: --from distillkit")
    columns = (topk.IDS, topk.LOGPROBS, topk.TAIL, topk.EXACT)
    return SourceFormat("topk", columns, topk.read_entries, topk.MASK, None, {}, most_mass=1.05)


FORMATS: dict[str, Callable[[Sequence[Source], str | None], SourceFormat]] = {"distillkit": _distillkit, "topk": _topk}
"""By the name that --from takes."""


def _find_config(sources: Sequence[Source], config: str | None) -> CompressionConfig:
    """Reads the one configuration of all sources. Raises UserError if there is none, or if there are several that differ."""
    if config is not None:
        try:
            return parse_config(Path(config).expanduser().read_bytes(), config)
        except OSError as error:
            raise UserError(f"--config {config}: cannot be read ({error.strerror})") from error
    found: list[tuple[str, CompressionConfig]] = []
    for source in sources:
        beside = read_beside(source, CONFIG_NAME)
        if not beside:
            raise UserError(
                f"{source.argument}: no {CONFIG_NAME} beside it; name DistillKit's configuration with --config"
            )
        found += [(url, parse_config(content, url)) for url, content in beside.items()]
    first_url, first = found[0]
    for url, other in found[1:]:
        if other != first:
            raise UserError(f"{first_url} and {url} differ: import what each describes to a cache of its own")
    return first

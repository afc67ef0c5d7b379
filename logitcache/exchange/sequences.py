"""A source's row → tokens and loss mask, and what is kept beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from logitcache.errors import UserError
from logitcache.exchange.source_rows import SourceRow
from logitcache.exchange.values import BadRow, numbers, plain
from logitcache.format.layout import RESERVED_COLUMNS, TEMPERED_PREFIX
from logitcache.format.sequences import TokenSequence

TOKENS = "input_ids"


@dataclass(frozen=True)
class SequenceReader:
    """What of a row becomes a TokenSequence.

    mask: column of 0 and 1 for each token, None where there is none.  mask_needed: rows without it are refused, otherwise all
    their tokens are trained.  num_known: tokens of the tokenizer.  keep: columns that travel along.
    """

    mask: str | None
    mask_needed: bool
    num_known: int
    keep: Sequence[str]

    def __post_init__(self) -> None:
        for name in self.keep:
            if name in RESERVED_COLUMNS or name.startswith(TEMPERED_PREFIX):
                raise UserError(f"--keep {name}: the cache has a column of that name itself; rename the source's")

    @property
    def columns(self) -> list[str]:
        """The source's columns that are read."""
        return [TOKENS, *([self.mask] if self.mask else []), *self.keep]

    def read(self, row: SourceRow) -> TokenSequence:
        """The row's tokens. Raises BadRow for ids that the tokenizer does not know and a mask of another length."""
        ids = numbers(row.value(TOKENS), TOKENS, "iu")
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.num_known:
            wrong = next(int(one) for one in ids if not 0 <= one < self.num_known)
            raise BadRow(f"{TOKENS} holds {wrong}, the tokenizer has {self.num_known:,} tokens: is it the teacher's?")
        kept = {name: plain(row.value(name)) for name in self.keep}
        return TokenSequence(ids.astype(np.int32), self._loss_mask(row, len(ids)), kept)

    def _loss_mask(self, row: SourceRow, num_tokens: int) -> np.ndarray:
        mask = np.ones(num_tokens, dtype=bool)
        if self.mask and (self.mask_needed or row.has(self.mask)):
            values = numbers(row.value(self.mask), self.mask, "biuf")
            if len(values) != num_tokens:
                raise BadRow(f"{self.mask} has {len(values)} values for {num_tokens} tokens")
            mask = values != 0
            if not (mask == values).all():
                raise BadRow(f"{self.mask} holds values other than 0 and 1")
        mask[:1] = False
        return mask

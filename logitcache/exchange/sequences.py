"""A source's row → tokens and loss mask, and what is kept beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from logitcache.documents.document import BadDocument
from logitcache.documents.masks import LOSS_MASKS, PADDING, read_masks
from logitcache.exchange.source_rows import SourceRow
from logitcache.exchange.values import BadRow, numbers, plain
from logitcache.format.layout import refuse_reserved
from logitcache.format.sequences import TokenSequence

TOKENS = "input_ids"


@dataclass(frozen=True)
class SequenceReader:
    """The parts of a row that become a TokenSequence.

    mask: the format's usual column, or the user's with mask_needed: then rows without it are refused. Otherwise all masks that
    a row has are read as `read_masks` does.  num_known: tokens of the tokenizer.  keep: columns that travel along.
    """

    mask: str | None
    mask_needed: bool
    num_known: int
    keep: Sequence[str]

    def __post_init__(self) -> None:
        refuse_reserved(self.keep)

    @property
    def columns(self) -> list[str]:
        """The source's columns that are read."""
        return list(dict.fromkeys([TOKENS, *self._masks, PADDING, *self.keep]))

    @property
    def _masks(self) -> Sequence[str]:
        return [self.mask] if self.mask and self.mask_needed else LOSS_MASKS

    def read(self, row: SourceRow) -> TokenSequence:
        """Reads a row's tokens. Raises BadRow for ids that the tokenizer does not know and a mask of another length."""
        ids = numbers(row.value(TOKENS), TOKENS, "iu")
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.num_known:
            wrong = next(int(one) for one in ids if not 0 <= one < self.num_known)
            raise BadRow(f"{TOKENS} holds {wrong}, the tokenizer has {self.num_known:,} tokens: is it the teacher's?")
        kept = {name: plain(row.value(name)) for name in self.keep}
        return TokenSequence(ids.astype(np.int32), self._loss_mask(row, ids), kept)

    def _loss_mask(self, row: SourceRow, ids: np.ndarray) -> np.ndarray:
        if self.mask and self.mask_needed and not row.has(self.mask):
            raise BadRow(f"column {self.mask!r} is missing or null")
        masks = {name: plain(row.value(name)) for name in (*self._masks, PADDING) if row.has(name)}
        if self.mask and self.mask_needed:
            masks["loss_mask"] = masks.pop(self.mask)
        try:
            unpadded, mask = read_masks(ids, masks)
        except BadDocument as error:
            raise BadRow(str(error)) from error
        if unpadded.start:
            raise BadRow(f"{PADDING}: padding on the left, which moves what follows it; write the rows without it")
        mask[:1] = False
        return mask

"""How a document becomes tokens: ids and loss mask."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from logitcache.capture.corpus.offsets import Offsets
from logitcache.documents.text_tokens import TextTokens

Tokens = tuple[np.ndarray, np.ndarray]
"""Token ids int32 [T] and loss mask bool [T]."""


@dataclass
class Tokenization:
    """The means by which documents become tokens.

    tokenizer: transformers'.  turns: which answers of a chat are trained, see `chat.tokenize_messages`.  notes: facts that
    the user is told once, as words that follow a number, with that number.
    """

    tokenizer: Any
    turns: str = "all"
    notes: Counter[str] = field(default_factory=Counter)

    @cached_property
    def texts(self) -> TextTokens:
        """How text that is no chat is tokenised."""
        return TextTokens(self.tokenizer, self.notes)

    @cached_property
    def with_offsets(self) -> Offsets:
        """Text → tokens with their places in it."""
        return Offsets(self.tokenizer)


def tokens(ids: Any, mask: Any) -> Tokens:
    """Ids and mask as arrays. The first token is never trained: nothing predicts it."""
    loss_mask = np.array(mask, dtype=bool)
    loss_mask[:1] = False
    return np.array(ids, dtype=np.int32), loss_mask

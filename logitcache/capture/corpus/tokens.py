"""The means by which a document becomes tokens: ids, loss mask, and each token's place in the text."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from logitcache.documents.document import BadDocument
from logitcache.documents.text_tokens import TextTokens

Tokens = tuple[np.ndarray, np.ndarray]
"""Token ids int32 [T] and loss mask bool [T]."""


class Offsets:
    """Tokenises text and tells each token's place in it, white space included.

    A tokenizer's post-processor may cut white space off the offsets (`trim_offsets`, as in Llama 3's); a copy without it
    gives the same tokens, as special tokens are not asked for, with whole offsets.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._exact = getattr(tokenizer, "is_fast", False)
        if self._exact and tokenizer.backend_tokenizer.post_processor is not None:
            self._tokenizer = copy.deepcopy(tokenizer)
            self._tokenizer.backend_tokenizer.post_processor = None

    def __call__(self, text: str, edges: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns token ids, the first character of each token, and the character after its last one: int64 [T] each.

        edges: characters at which answers begin or end. A tokenizer without offsets is given the pieces between them; raises
        BadDocument if these have other tokens than the whole.
        """
        if not self._exact:
            return self._by_pieces(text, edges)
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        places = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        return np.array(encoded["input_ids"], dtype=np.int64), places[:, 0], places[:, 1]

    def _by_pieces(self, text: str, edges: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        cuts = sorted({0, len(text), *edges})
        pieces = [self._ids(text[start:end]) for start, end in pairwise(cuts)]
        ids = [number for piece in pieces for number in piece]
        if ids != self._ids(text):
            raise BadDocument(
                "this tokenizer tells no token's place in the text, and a token reaches across the edge of an answer; a "
                "tokenizer with a tokenizer.json does"
            )
        lengths = [len(piece) for piece in pieces]
        return np.array(ids, dtype=np.int64), np.repeat(cuts[:-1], lengths), np.repeat(cuts[1:], lengths)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids


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

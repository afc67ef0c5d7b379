"""The token sequences of a corpus, within the teacher's length; documents that are left out are counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import numpy as np

from logitcache.capture.corpus.chat import TURNS
from logitcache.capture.corpus.document_types import DOCUMENT_TYPES, DocumentTypes, find_document_type
from logitcache.capture.corpus.documents import Source
from logitcache.capture.corpus.tokens import Tokenization, Tokens
from logitcache.documents.document import BadDocument, Document
from logitcache.documents.masks import LOSS_MASKS, PADDING
from logitcache.errors import UserError
from logitcache.format.layout import refuse_reserved
from logitcache.format.sequences import TokenSequence

LONG_POLICIES = ("split", "truncate", "skip")


@dataclass(frozen=True)
class CorpusSettings:
    """The settings by which documents become sequences.

    max_length: tokens of the longest sequence.  layout: the type of the documents, None to find it from the first document's
    columns.  turns: which answers of a chat are trained, see `chat.tokenize_messages`.  columns: the type's column name →
    the source's.  long: what happens to longer documents; None splits `text` and refuses any other type.  keep: source
    columns to store.  skip_bad: leave bad documents out, and rows for which the teacher gives NaN, instead of stopping.
    """

    document_types: ClassVar[DocumentTypes] = DOCUMENT_TYPES
    long_policies: ClassVar[Sequence[str]] = LONG_POLICIES
    max_length: int
    layout: str | None = None
    turns: str = "all"
    columns: Mapping[str, str] = field(default_factory=dict)
    long: str | None = None
    keep: Sequence[str] = ()
    skip_bad: bool = False

    def __post_init__(self) -> None:
        if self.layout is not None and self.layout not in self.document_types:
            raise UserError(f"--layout {self.layout}: choose one of {', '.join(self.document_types)}")
        if self.turns not in TURNS:
            raise UserError(f"--turns {self.turns}: choose one of {', '.join(TURNS)}")
        if self.long is not None and self.long not in self.long_policies:
            raise UserError(f"--long {self.long}: choose one of {', '.join(self.long_policies)}")
        if self.max_length < 2:
            raise UserError(f"--max-length {self.max_length}: at least 2 tokens are needed, one to predict the other")
        known = {column for needed, _ in DOCUMENT_TYPES.values() for column in needed} | {*LOSS_MASKS, PADDING, "tools"}
        if unknown := set(self.columns) - known:
            raise UserError(
                f"--columns {sorted(unknown)[0]}=…: no layout has this column; they have {', '.join(sorted(known))}"
            )
        refuse_reserved(self.keep)

    def to_json(self) -> dict[str, Any]:
        """Returns the settings as plain JSON types, for the fingerprint."""
        return asdict(self) | {"columns": dict(self.columns), "keep": list(self.keep)}


class Corpus:
    """The sequences of all sources, which are iterated once, in order.

    skipped: documents left out so far, by reason.  document_type: found with the first document.  never_kept: columns of
    `keep` that no document has had.  notes: see `Tokenization`.
    """

    def __init__(self, sources: Sequence[Source], tokenizer: Any, vocab_size: int, settings: CorpusSettings) -> None:
        self._sources = sources
        self._by = Tokenization(tokenizer, settings.turns)
        self.notes = self._by.notes
        self._vocab_size = vocab_size
        self._settings = settings
        self.document_type = settings.layout
        self.num_documents = 0
        self.skipped: Counter[str] = Counter()
        self.first_bad: str | None = None
        self.never_kept = set(settings.keep)

    def __iter__(self) -> Iterator[TokenSequence]:
        for source in self._sources:
            for document in source.documents():
                self.num_documents += 1
                try:
                    yield from self._sequences(document)
                except BadDocument as error:
                    if not self._settings.skip_bad:
                        raise UserError(
                            f"{document.where}: {error}; mend it, or leave such documents out with --skip-bad"
                        ) from error
                    self.skipped["bad"] += 1
                    self.first_bad = self.first_bad or f"{document.where}: {error}"

    def _sequences(self, document: Document) -> Iterator[TokenSequence]:
        kept = self._kept(document)
        for ids, mask in self._tokens(document):
            if len(ids) < 2:
                self.skipped["empty"] += 1
                continue
            pieces = self._within_length(ids, mask)
            trainable = [piece for piece in pieces if piece[1].any()]
            if pieces and not trainable:
                self.skipped["untrainable"] += 1
            for piece_ids, piece_mask in trainable:
                yield TokenSequence(piece_ids, piece_mask, kept, document.where)

    def _tokens(self, document: Document) -> list[Tokens]:
        if document.error:
            raise BadDocument(document.error)
        values = self._named(document.values)
        types, renamed = self._settings.document_types, self._settings.columns
        self.document_type = self.document_type or find_document_type(values, document.where, renamed, types)
        needed, tokenize = types[self.document_type]
        if missing := [renamed.get(c, c) for c in needed if values.get(c) is None]:
            raise BadDocument(f"column {missing[0]!r} is missing or null (layout {self.document_type})")
        if self.document_type == "messages" and not self._by.tokenizer.chat_template:
            raise UserError(
                f"{document.where}: chat messages, but the teacher's tokenizer has no chat template; name a file with one by "
                "--chat-template"
            )
        found = tokenize(values, self._by)
        for ids, _ in found:
            if len(ids) and int(ids.max()) >= self._vocab_size:
                raise BadDocument(f"token id {ids.max()} is outside the teacher's vocabulary of {self._vocab_size}")
        return found

    def _kept(self, document: Document) -> dict[str, Any]:
        self.never_kept -= document.values.keys()
        return {name: document.values.get(name) for name in self._settings.keep}

    def _named(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the columns by the type's names. A mask that the user names is the only one."""
        columns = self._settings.columns
        others = {name: value for name, value in values.items() if name not in columns.values()}
        named = {ours: values[theirs] for ours, theirs in columns.items() if theirs in values}
        if "loss_mask" in named:
            others = {name: value for name, value in others.items() if name not in LOSS_MASKS}
        return others | named

    def _within_length(self, ids: np.ndarray, mask: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        longest = self._settings.max_length
        if len(ids) <= longest:
            return [(ids, mask)]
        long = self._settings.long or ("split" if self.document_type == "text" else None)
        if long == "skip":
            self.skipped["too long"] += 1
            return []
        if long == "truncate":
            return [(ids[:longest], mask[:longest])]
        if long == "split":
            # Pieces overlap by one token, so that every trained token is predicted in exactly one of them.
            pieces = [(ids[i : i + longest], mask[i : i + longest].copy()) for i in range(0, len(ids) - 1, longest - 1)]
            for _, piece_mask in pieces:
                piece_mask[0] = False
            return pieces
        raise BadDocument(
            f"{len(ids)} tokens, longer than --max-length {longest}; choose --long split, truncate or skip"
        )

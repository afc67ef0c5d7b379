"""A random sample of a corpus: all documents counted, some of them tokenised, totals with their standard errors."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from logitcache.capture.corpus.documents import Source
from logitcache.capture.corpus.tokenize import Corpus, CorpusSettings
from logitcache.documents.document import Document
from logitcache.errors import UserError
from logitcache.format.sequences import TokenSequence
from logitcache.progress import Progress

SAMPLED_DOCUMENTS = 2000

logger = logging.getLogger("logitcache")


@dataclass(frozen=True)
class Total:
    """A total over the corpus, estimated from the sample, with its standard error (0: everything was in the sample)."""

    value: float
    standard_error: float

    def __str__(self) -> str:
        return f"{self.value:,.0f}" + (f" ± {self.standard_error:,.0f}" if self.standard_error else "")


@dataclass(frozen=True)
class CorpusSample:
    """The documents of a corpus counted, some of them tokenised.

    num_documents: of the whole corpus.  num_sampled: of the sample.  sequences: the sample's, in the corpus's order.
    num_sequences, num_tokens, num_positions: of the whole corpus.  skipped: documents of the sample that are left out, by
    reason.  first_bad: the first of the bad ones.
    """

    document_type: str
    num_documents: int
    num_sampled: int
    sequences: list[TokenSequence] = field(repr=False)
    num_sequences: Total
    num_tokens: Total
    num_positions: Total
    skipped: Mapping[str, int]
    first_bad: str | None

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence of the sample."""
        return max(len(sequence.input_ids) for sequence in self.sequences)


def sample_corpus(
    sources: Sequence[Source],
    tokenizer: Any,
    vocab_size: int,
    settings: CorpusSettings,
    num_documents: int = SAMPLED_DOCUMENTS,
) -> CorpusSample:
    """Reads all documents and tokenises `num_documents` of them, drawn with a fixed seed.

    Raises UserError for documents of the sample that a build would refuse, and if nothing of it can be trained.
    """
    count, first, sampled = _reservoir(sources, num_documents)
    # The first readable document of the corpus decides about the type, as it does in a build.
    probe = Corpus([_source(first)], tokenizer, vocab_size, settings)
    next(iter(probe), None)
    corpus = Corpus([_source(sampled)], tokenizer, vocab_size, replace(settings, layout=probe.document_type))
    sequences: list[TokenSequence] = []
    per_document = np.zeros((len(sampled), 3))
    progress = Progress("tokenising the sample", None, 0, "sequences")
    for sequence in corpus:
        sequences.append(sequence)
        per_document[corpus.num_documents - 1] += 1, len(sequence.input_ids), len(sequence.positions)
        progress.advance(1)
    progress.close()
    if not sequences:
        left_out = ", ".join(f"{number} {reason}" for reason, number in corpus.skipped.items()) or "none at all"
        raise UserError(f"nothing to train on in a sample of {len(sampled)} of {count} documents ({left_out})")
    for note, times in corpus.notes.items():
        logger.warning("%s %s (of the sample)", f"{times:,}", note)
    if corpus.never_kept:
        logger.warning("--keep %s: no sampled document has this column", ", ".join(sorted(corpus.never_kept)))
    num_sequences, num_tokens, num_positions = (_total(values, count) for values in per_document.T)
    return CorpusSample(
        document_type=str(corpus.document_type),
        num_documents=count,
        num_sampled=len(sampled),
        sequences=sequences,
        num_sequences=num_sequences,
        num_tokens=num_tokens,
        num_positions=num_positions,
        skipped=dict(corpus.skipped),
        first_bad=corpus.first_bad,
    )


def _reservoir(sources: Sequence[Source], size: int) -> tuple[int, list[Document], list[Document]]:
    """Returns the number of documents, the first readable one (in a list, if there is one), and `size` drawn, in order."""
    generator = random.Random(0)
    count = 0
    first: list[Document] = []
    drawn: list[tuple[int, Document]] = []
    progress = Progress("counting", None, 0, "documents")
    for source in sources:
        for document in source.documents():
            if not first and not document.error:
                first = [document]
            if count < size:
                drawn.append((count, document))
            elif (place := generator.randrange(count + 1)) < size:
                drawn[place] = (count, document)
            count += 1
            progress.advance(1)
    progress.close()
    return count, first, [document for _, document in sorted(drawn, key=lambda pair: pair[0])]


def _source(documents: Sequence[Document]) -> Source:
    return Source("sample", dict, lambda: iter(documents))


def _total(per_document: np.ndarray, num_documents: int) -> Total:
    """Returns the total that a simple random sample without replacement estimates."""
    sampled = len(per_document)
    spread = float(per_document.std(ddof=1)) if sampled > 1 else 0.0
    unseen = 1 - sampled / num_documents
    return Total(num_documents * float(per_document.mean()), num_documents * spread * math.sqrt(unseen / sampled))

"""ROUGE-L, as the papers on distilled instruction models report it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from logitcache import UserError


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """Computes F of the longest common subsequence of stemmed words, ×100: the most over the references (Lin 2004).

    Words are runs of a–z and 0–9 in lower case, stemmed if they have more than three letters, as in the rouge-score
    package. The score is 0 if either text has no word.
    """
    return 100 * max(float(_scorer().score(reference, answer)["rougeL"].fmeasure) for reference in references)


def has_words(references: Sequence[str]) -> bool:
    """Says whether any answer could score above 0 against these references."""
    return any(re.search("[a-z0-9]", reference.lower()) for reference in references)


def check_rouge_installed() -> None:
    """Raises UserError if the rouge-score package is missing."""
    _scorer()


@cache
def _scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise UserError(
            "--generate scores answers with the rouge-score package, and it is not installed: pip install rouge-score"
        ) from error
    return RougeScorer(["rougeL"], use_stemmer=True)

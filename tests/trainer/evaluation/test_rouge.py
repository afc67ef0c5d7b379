"""ROUGE-L against the textbook's longest common subsequence."""

from __future__ import annotations

import re
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nltk.stem.porter import PorterStemmer

from logitcache import UserError
from trainer.evaluation import rouge
from trainer.evaluation.rouge import check_rouge_installed, has_words, rouge_l

WORDS = st.sampled_from(["run", "running", "runs", "cache", "caches", "The", "a", "3.14", "teacher's", "—", "é"])
TEXTS = st.lists(WORDS, max_size=12).map(" ".join)


def slow_words(text: str) -> list[str]:
    stem = PorterStemmer().stem
    words = re.findall("[a-z0-9]+", text.lower())
    return [stem(word) if len(word) > 3 else word for word in words]


def slow_lcs(a: list[str], b: list[str]) -> int:
    if not a or not b:
        return 0
    lengths = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            lengths[i + 1][j + 1] = lengths[i][j] + 1 if x == y else max(lengths[i][j + 1], lengths[i + 1][j])
    return lengths[-1][-1]


def slow_rouge_l(answer: str, references: list[str]) -> float:
    scores = [0.0]
    found = slow_words(answer)
    for reference in map(slow_words, references):
        if common := slow_lcs(found, reference):
            precision, recall = common / len(found), common / len(reference)
            scores.append(200 * precision * recall / (precision + recall))
    return max(scores)


@given(answer=TEXTS, references=st.lists(TEXTS, min_size=1, max_size=3))
def test_a_score_is_f_of_the_longest_common_subsequence_of_stems(answer: str, references: list[str]) -> None:
    assert rouge_l(answer, references) == pytest.approx(slow_rouge_l(answer, references))


def test_the_best_reference_counts_and_inflections_are_the_same_word() -> None:
    assert rouge_l("Caching the runs", ["nothing alike", "caches the running"]) == pytest.approx(100)
    assert rouge_l("b a", ["a b"]) == pytest.approx(50), "order counts"
    assert rouge_l("", ["a b"]) == 0


def test_references_of_other_scripts_have_no_words() -> None:
    assert not has_words(["ответ", "…"])
    assert has_words(["…", "Ответ 42"])


def test_without_rouge_score_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    rouge._scorer.cache_clear()
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(UserError, match="pip install rouge-score"):
        check_rouge_installed()
    rouge._scorer.cache_clear()

"""Columns beside `input_ids`: masks, labels and padding as transformers and TRL write them."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logitcache import UserError
from logitcache.capture.corpus.document_types import DOCUMENT_TYPES, tokenize_input_ids
from logitcache.capture.corpus.documents import Source, find_sources
from logitcache.capture.corpus.prompts import PROMPT_TYPES
from logitcache.capture.corpus.sample import sample_corpus
from logitcache.capture.corpus.tokenize import Corpus, CorpusSettings
from logitcache.capture.corpus.tokens import Tokenization
from logitcache.documents.document import BadDocument, Document
from tests.helpers.smallcaches import small

MASKS = ("loss_mask", "labels", "completion_mask", "assistant_masks")


def tokenize(document: dict[str, Any]) -> tuple[list[int], list[bool]]:
    [(ids, mask)] = tokenize_input_ids(document, Tokenization(None))
    return ids.tolist(), mask.tolist()


def corpus(documents: list[dict[str, Any]], **settings: Any) -> Corpus:
    rows = [Document(row, f"rows {number}") for number, row in enumerate(documents)]
    return Corpus([Source("rows", dict, lambda: iter(rows))], None, 512, CorpusSettings(64, **settings))


@given(data=st.data(), left=st.integers(0, 3), right=st.integers(0, 3), length=st.integers(1, 8))
@small
def test_every_way_to_say_what_is_trained_gives_the_same(data: Any, left: int, right: int, length: int) -> None:
    ids = data.draw(st.lists(st.integers(2, 99), min_size=length, max_size=length))
    mask = data.draw(st.lists(st.booleans(), min_size=length, max_size=length))
    padded = [0] * left + ids + [0] * right
    trained = [False] * left + mask + [False] * right
    every = {
        "loss_mask": trained,
        "labels": [token if train else -100 for token, train in zip(padded, trained, strict=True)],
        "completion_mask": [int(train) for train in trained],
        "assistant_masks": [float(train) for train in trained],
    }
    chosen = data.draw(st.sets(st.sampled_from(MASKS), min_size=1))
    document = {"input_ids": padded, "attention_mask": [0] * left + [1] * length + [0] * right}
    document |= {name: every[name] if name in chosen else None for name in MASKS}
    assert tokenize(document) == (ids, [False, *mask[1:]])
    if length > 1:
        at = data.draw(st.integers(1, length - 1)) + left
        wrong = data.draw(st.sampled_from(sorted(chosen)))
        changed = list(every["completion_mask"])
        changed[at] = 1 - changed[at]
        other = "completion_mask" if wrong != "completion_mask" else "assistant_masks"
        with pytest.raises(BadDocument, match=rf"contradict each other at token {at};"):
            tokenize(document | {other: changed})


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_transformers_is_cut_off(teacher_tokenizer: Any, side: str) -> None:
    texts = ["The quick brown fox", "The"]
    padding = copy.deepcopy(teacher_tokenizer)
    padding.pad_token = padding.eos_token
    padded = padding(texts, padding=True, padding_side=side)
    for row, text in enumerate(texts):
        alone = teacher_tokenizer(text)["input_ids"]
        assert tokenize({name: values[row] for name, values in padded.items()})[0] == alone
        prompt = {name: values[row] for name, values in padded.items()}
        assert PROMPT_TYPES["input_ids"][1](prompt, Tokenization(None))[0][0].tolist() == alone


def test_a_chat_that_transformers_has_tokenised_is_the_chat_itself(teacher_tokenizer: Any) -> None:
    chat = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]
    done = teacher_tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    [(ids, mask)] = DOCUMENT_TYPES["messages"][1]({"messages": chat}, Tokenization(teacher_tokenizer))
    assert tokenize(dict(done)) == (ids.tolist(), mask.tolist())
    assert mask.any() and not mask.all()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"labels": [8, 9, -100]},
            r"`labels` holds 8 at token 0, whose id is 7: labels are the ids themselves, or -100",
        ),
        ({"labels": [-100, 8]}, "`labels` must be a list of integers as long as `input_ids`, 3"),
        ({"labels": [-100, 8.0, None]}, "`labels` must be a list of integers"),
        ({"labels": "x"}, "`labels` must be a list of integers"),
        (
            {"completion_mask": [0, 2, 1]},
            "`completion_mask` must be a list of true and false as long as `input_ids`, 3",
        ),
        ({"loss_mask": [-100, 9, 9]}, "`loss_mask` holds 9 at token 1, whose id is 8"),
        ({"attention_mask": [1, 0, 1]}, "`attention_mask` has zeros between ones"),
        ({"attention_mask": [1, 2, 2]}, "`attention_mask` must be a list of true and false"),
        ({"attention_mask": [1, 1, 0], "labels": [-100, 8, 9]}, "`labels` trains token 2, which is padding by"),
        (
            {"loss_mask": [0, 1, 1], "labels": [-100, 8, -100]},
            "`loss_mask` and `labels` contradict each other at token 2",
        ),
    ],
)
def test_masks_that_cannot_be_shown_right_are_refused_by_name(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(BadDocument, match=message):
        tokenize({"input_ids": [7, 8, 9], **columns})


@pytest.mark.parametrize("mask", [[1, 0, 1], [True, False, True]])
def test_zeros_and_ones_are_a_mask_also_where_they_are_the_ids(mask: list[Any]) -> None:
    assert tokenize({"input_ids": [1, 0, 1], "loss_mask": mask}) == ([1, 0, 1], [False, False, True])


def test_padding_alone_is_an_empty_document() -> None:
    rows = corpus([{"input_ids": [0, 0], "attention_mask": [0, 0]}, {"input_ids": [1, 2]}])
    assert len(list(rows)) == 1
    assert rows.skipped == {"empty": 1}


@pytest.mark.parametrize("values", [[-100, -100, 9], [0, 0, 1]])
def test_the_mask_that_the_user_names_is_the_one_that_holds(values: list[int]) -> None:
    document = {"input_ids": [7, 8, 9], "mine": values, "labels": [-100, 8, 9], "completion_mask": [0, 1, 1]}
    [row] = corpus([document], columns={"loss_mask": "mine"})
    assert row.loss_mask.tolist() == [False, False, True]
    labels = {"input_ids": [7, 8, 9], "labels": [-100, -100, 9], "loss_mask": [0, 1, 1]}
    rows = corpus([labels], columns={"loss_mask": "labels"})
    assert [row.loss_mask.tolist() for row in rows] == [[False, False, True]]
    assert not rows.notes
    [row] = corpus([{"tokens": [7, 8], "target": [-100, 8]}], columns={"input_ids": "tokens", "labels": "target"})
    assert row.loss_mask.tolist() == [False, True]


def test_a_column_that_looks_like_a_mask_and_is_not_used_is_said_with_its_number_of_documents() -> None:
    document = {"input_ids": [7, 8, 9], "prompt_mask": [1, 1, 0], "answer": [0, 1, 1], "token_type_ids": [0, 0, 0]}
    rows = corpus([document, document | {"answer": None}, {"input_ids": [7, 8], "scores": [0.5, 1.0]}])
    assert len(list(rows)) == 3
    said = "documents have a column {!r} that looks like a mask and is not used"
    assert rows.notes == {said.format("prompt_mask"): 2, said.format("answer"): 1}


def test_a_plan_says_it_too(caplog: pytest.LogCaptureFixture) -> None:
    rows = [Document({"input_ids": [7, 8, 9], "my_labels": [0, 8, 9]}, "rows")]
    with caplog.at_level(logging.WARNING, "logitcache"):
        sample_corpus([Source("rows", dict, lambda: iter(rows))], None, 512, CorpusSettings(64))
    assert "1 documents have a column 'my_labels' that looks like a mask and is not used (of the sample)" in caplog.text


def test_a_prompt_to_be_answered_says_that_masks_are_not_used() -> None:
    by = Tokenization(None)
    document = {"input_ids": [7, 8, 9, 0], "attention_mask": [1, 1, 1, 0], "labels": [-100, 8, 9, -100]}
    [(ids, mask)] = PROMPT_TYPES["input_ids"][1](document, by)
    assert ids.tolist() == [7, 8, 9]
    assert not mask.any()
    assert by.notes == Counter(
        {"documents have a column 'labels', which is not used: all of `input_ids` is the prompt": 1}
    )


def test_labels_in_parquet_are_read_and_a_bad_one_is_named_by_file_and_row(tmp_path: Path) -> None:
    table = pa.table({"input_ids": [[7, 8, 9], [7, 8]], "labels": [[-100, 8, 9], [8, 8]]})
    pq.write_table(table, tmp_path / "rows.parquet")
    rows = iter(Corpus(find_sources(str(tmp_path / "rows.parquet")), None, 512, CorpusSettings(64)))
    assert np.array_equal(next(rows).loss_mask, [False, True, True])
    with pytest.raises(UserError, match=r"rows\.parquet, row 1: `labels` holds 8 at token 0, whose id is 7"):
        next(rows)

"""Documents → sequences: length policies, what is left out and counted, what is refused, and what is kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logitcache import UserError
from logitcache.capture.corpus.documents import Source
from logitcache.capture.corpus.tokenize import Corpus, CorpusSettings
from logitcache.documents.document import Document
from logitcache.format.sequences import TokenSequence
from tests.helpers.smallcaches import small

VOCAB = 512


def corpus(documents: list[Any], tokenizer: Any = None, max_length: int = 16, **settings: Any) -> Corpus:
    """A corpus of rows in memory; a string stands for a row that could not be read."""

    def rows() -> Iterator[Document]:
        for number, row in enumerate(documents):
            yield Document({}, f"rows {number}", row) if isinstance(row, str) else Document(row, f"rows {number}")

    source = Source("rows", dict, rows)
    return Corpus([source], tokenizer, VOCAB, CorpusSettings(max_length, **settings))


def ids(length: int, first: int = 0) -> dict[str, Any]:
    return {"input_ids": list(range(first, first + length))}


def trained(sequence: TokenSequence) -> list[int]:
    tokens: list[int] = sequence.input_ids[sequence.loss_mask].tolist()
    return tokens


@given(data=st.data(), length=st.integers(2, 120), longest=st.integers(2, 40))
@small
def test_splitting_predicts_every_trained_token_exactly_once(data: Any, length: int, longest: int) -> None:
    mask = data.draw(st.lists(st.booleans(), min_size=length, max_size=length))
    document = ids(length) | {"loss_mask": mask}
    pieces = list(corpus([document], max_length=longest, long="split"))
    for piece in pieces:
        assert 2 <= len(piece.input_ids) <= longest
        assert piece.loss_mask.any() and not piece.loss_mask[0]
        start = int(piece.input_ids[0])
        assert piece.input_ids.tolist() == list(range(start, start + len(piece.input_ids)))
    assert [token for piece in pieces for token in trained(piece)] == [i for i in range(1, length) if mask[i]]


def test_a_split_document_gives_each_trained_token_as_much_context_as_its_piece_holds() -> None:
    pieces = list(corpus([ids(10)], max_length=4, long="split"))
    assert [piece.input_ids.tolist() for piece in pieces] == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    assert [trained(piece) for piece in pieces] == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]


def test_truncating_keeps_the_beginning() -> None:
    assert [s.input_ids.tolist() for s in corpus([ids(10)], max_length=4, long="truncate")] == [[0, 1, 2, 3]]


def test_a_document_of_just_the_longest_length_is_left_whole() -> None:
    for long in ("split", "truncate", "skip", None):
        rows = corpus([ids(4)], max_length=4, long=long)
        assert [s.input_ids.tolist() for s in rows] == [[0, 1, 2, 3]]
        assert not rows.skipped


def test_a_truncated_document_of_which_only_the_prompt_remains_is_untrainable() -> None:
    rows = corpus([ids(10) | {"loss_mask": [0] * 8 + [1] * 2}], max_length=4, long="truncate")
    assert list(rows) == []
    assert rows.skipped == {"untrainable": 1}


def test_long_documents_are_skipped_and_counted() -> None:
    rows = corpus([ids(10), ids(3), ids(99)], max_length=4, long="skip")
    assert [len(s.input_ids) for s in rows] == [3]
    assert rows.skipped == {"too long": 2}


def test_a_long_document_is_refused_with_its_length_unless_a_policy_is_chosen() -> None:
    with pytest.raises(
        UserError, match=r"rows 1: 10 tokens, longer than --max-length 4; choose --long split, truncate or"
    ):
        list(corpus([ids(3), ids(10)], max_length=4))


def test_long_text_is_split_unless_another_policy_is_chosen(teacher_tokenizer: Any) -> None:
    text = "The quick brown fox jumps over the lazy dog. " * 5
    whole = [*teacher_tokenizer(text)["input_ids"], teacher_tokenizer.eos_token_id]
    pieces = list(corpus([{"text": text}], teacher_tokenizer))
    assert len(pieces) > 1
    assert [token for piece in pieces for token in trained(piece)] == whole[1:]
    assert len(list(corpus([{"text": text}], teacher_tokenizer, long="truncate"))) == 1


def test_empty_and_untrainable_documents_are_left_out_and_counted() -> None:
    rows = corpus([ids(0), ids(1), ids(3), ids(3) | {"loss_mask": [1, 0, 0]}, ids(4) | {"loss_mask": [0] * 4}])
    assert len(list(rows)) == 1
    assert rows.skipped == {"empty": 2, "untrainable": 2}
    assert rows.num_documents == 5


def test_empty_text_and_empty_chats_are_empty_documents(teacher_tokenizer: Any) -> None:
    empty: list[dict[str, Any]] = [{"text": ""}, {"prompt": "", "completion": ""}, {"messages": []}]
    for document in empty:
        rows = corpus([document], teacher_tokenizer)
        assert list(rows) == []
        assert rows.skipped == {"empty": 1}


def test_an_id_outside_the_vocabulary_is_refused() -> None:
    assert len(list(corpus([ids(2, first=VOCAB - 2)]))) == 1
    with pytest.raises(UserError, match=r"rows 0: token id 512 is outside the teacher's vocabulary of 512"):
        list(corpus([ids(2, first=VOCAB - 1)]))


def test_a_bad_document_stops_the_corpus_saying_where_and_what_to_do() -> None:
    rows = iter(corpus([ids(3), "not JSON (…)", ids(3)]))
    next(rows)
    with pytest.raises(
        UserError, match=r"rows 1: not JSON \(…\); mend it, or leave such documents out with --skip-bad"
    ):
        next(rows)


def test_skip_bad_leaves_bad_documents_out_counts_them_and_remembers_the_first() -> None:
    rows = corpus([ids(3), {"input_ids": None}, "not JSON", ids(2, first=VOCAB), ids(99), ids(4)], skip_bad=True)
    assert [len(s.input_ids) for s in rows] == [3, 4]
    assert rows.skipped == {"bad": 4}
    assert rows.first_bad == "rows 1: column 'input_ids' is missing or null (layout input_ids)"
    assert rows.num_documents == 6


def test_the_layout_of_the_first_document_holds_for_all(teacher_tokenizer: Any) -> None:
    rows = corpus([{"text": "One."}, {"prompt": "a", "completion": "b"}], teacher_tokenizer)
    with pytest.raises(UserError, match=r"rows 1: column 'text' is missing or null \(layout text\)"):
        list(rows)
    assert rows.document_type == "text"


def test_a_named_layout_wins_over_the_columns(teacher_tokenizer: Any) -> None:
    document = {"text": "One.", "prompt": "a", "completion": "b"}
    (found,) = corpus([document], teacher_tokenizer, layout="text")
    assert teacher_tokenizer.decode(found.input_ids) == "One.<|eos|>"


def test_chat_without_a_template_is_refused(teacher_tokenizer: Any) -> None:
    import copy

    plain = copy.deepcopy(teacher_tokenizer)
    plain.chat_template = None
    with pytest.raises(UserError, match="rows 0: chat messages, but the teacher's tokenizer has no chat template"):
        list(corpus([{"messages": [{"role": "user", "content": "Hi"}]}], plain))


def test_columns_of_other_names_are_renamed(teacher_tokenizer: Any) -> None:
    columns = {"prompt": "question", "completion": "answer"}
    named = list(corpus([{"question": "Why?", "answer": " So."}], teacher_tokenizer, columns=columns))
    plain = list(corpus([{"prompt": "Why?", "completion": " So."}], teacher_tokenizer))
    assert named[0].row_id == plain[0].row_id


def test_a_missing_column_is_reported_under_the_name_of_the_source(teacher_tokenizer: Any) -> None:
    columns = {"prompt": "question", "completion": "answer"}
    rows = corpus([{"question": "Why?", "answer": "So."}, {"question": "Why?"}], teacher_tokenizer, columns=columns)
    with pytest.raises(UserError, match="rows 1: column 'answer' is missing or null"):
        list(rows)


def test_kept_columns_go_with_every_piece_of_their_document() -> None:
    documents = [ids(7) | {"id": 5, "url": "u", "other": 1}, ids(3) | {"id": 6}]
    rows = list(corpus(documents, max_length=4, long="split", keep=("id", "url")))
    assert [dict(row.columns) for row in rows] == [{"id": 5, "url": "u"}] * 2 + [{"id": 6, "url": None}]


def test_a_renamed_column_is_kept_under_the_name_of_the_source(teacher_tokenizer: Any) -> None:
    document = {"body": "One.", "text": "Another column."}
    (row,) = corpus([document], teacher_tokenizer, columns={"text": "body"}, keep=("body", "text"))
    assert teacher_tokenizer.decode(row.input_ids) == "One.<|eos|>"
    assert row.columns == document


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layout": "chat"}, "--layout chat: choose one of input_ids, messages, prompt-completion, text"),
        ({"long": "wrap"}, "--long wrap: choose one of split, truncate, skip"),
        ({"max_length": 1}, "--max-length 1: at least 2 tokens"),
        ({"columns": {"question": "q"}}, "--columns question=…: no layout has this column; they have .*, prompt, text"),
        ({"keep": ("logprobs",)}, "--keep logprobs: the cache has a column of that name"),
        ({"keep": ("row_id",)}, "--keep row_id: the cache has a column of that name"),
        ({"keep": ("tail_log_norm_T9",)}, "--keep tail_log_norm_T9: the cache has a column of that name"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CorpusSettings(**{"max_length": 8, **settings})


def test_settings_become_plain_json() -> None:
    assert CorpusSettings(8, columns={"text": "body"}, keep=("id",)).to_json() == {
        "max_length": 8,
        "layout": None,
        "turns": "all",
        "columns": {"text": "body"},
        "long": None,
        "keep": ["id"],
        "skip_bad": False,
    }


def test_masks_are_of_their_own_piece() -> None:
    first, second = corpus([ids(5)], max_length=3, long="split")
    assert first.loss_mask.tolist() == [False, True, True] == second.loss_mask.tolist()
    assert not np.shares_memory(first.loss_mask, second.loss_mask)

"""Documents of each layout → token ids and the mask of what is trained."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from logitcache import UserError
from logitcache.capture.corpus.document_types import DOCUMENT_TYPES, find_document_type
from logitcache.capture.corpus.tokens import Tokenization, Tokens
from logitcache.documents.document import BadDocument

EOS = "<|eos|>"
CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is a cache?"},
    {"role": "assistant", "content": "A store."},
    {"role": "tool", "content": "42 hits"},
    {"role": "user", "content": "And a hit?"},
    {"role": "assistant", "content": "Something found."},
]


def tokenize(layout: str, document: dict[str, Any], tokenizer: Any) -> Tokens:
    [tokens] = DOCUMENT_TYPES[layout][1](document, Tokenization(tokenizer))
    return tokens


def with_template(tokenizer: Any, template: str) -> Any:
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


def without_marks(tokenizer: Any) -> Any:
    template = tokenizer.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    return with_template(tokenizer, template)


def trained_text(tokenizer: Any, ids: np.ndarray, mask: np.ndarray) -> str:
    text: str = tokenizer.decode(ids[mask])
    return text


def assert_wellformed(ids: np.ndarray, mask: np.ndarray) -> None:
    assert ids.dtype == np.int32
    assert mask.dtype == bool
    assert ids.shape == mask.shape
    assert not mask[:1].any()


def test_text_is_trained_from_the_second_token_to_the_end_of_text(teacher_tokenizer: Any) -> None:
    ids, mask = tokenize("text", {"text": "The fox jumps."}, teacher_tokenizer)
    assert_wellformed(ids, mask)
    assert teacher_tokenizer.decode(ids) == "The fox jumps." + EOS
    assert mask.tolist() == [False] + [True] * (len(ids) - 1)


def test_text_that_ends_in_the_end_of_text_token_gets_no_second_one(teacher_tokenizer: Any) -> None:
    once, _ = tokenize("text", {"text": "The fox jumps."}, teacher_tokenizer)
    again, _ = tokenize("text", {"text": "The fox jumps." + EOS}, teacher_tokenizer)
    assert once.tolist() == again.tolist()


def test_a_tokenizer_without_an_end_of_text_token_adds_none(teacher_tokenizer: Any) -> None:
    endless = copy.deepcopy(teacher_tokenizer)
    endless.eos_token = None
    ids, _ = tokenize("text", {"text": "The fox jumps."}, endless)
    assert teacher_tokenizer.decode(ids) == "The fox jumps."


def test_empty_text_has_no_tokens(teacher_tokenizer: Any) -> None:
    for ids, mask in (
        tokenize("text", {"text": ""}, teacher_tokenizer),
        tokenize("prompt-completion", {"prompt": "", "completion": ""}, teacher_tokenizer),
        tokenize("messages", {"messages": []}, teacher_tokenizer),
        tokenize("input_ids", {"input_ids": []}, teacher_tokenizer),
    ):
        assert_wellformed(ids, mask)
        assert len(ids) == 0


def test_the_completion_is_trained_and_the_prompt_is_not(teacher_tokenizer: Any) -> None:
    document = {"prompt": "Name a fruit:", "completion": " apple"}
    ids, mask = tokenize("prompt-completion", document, teacher_tokenizer)
    assert_wellformed(ids, mask)
    assert teacher_tokenizer.decode(ids) == "Name a fruit: apple" + EOS
    assert trained_text(teacher_tokenizer, ids, mask) == " apple" + EOS


def test_prompt_and_completion_are_tokenised_apart(teacher_tokenizer: Any) -> None:
    ids, mask = tokenize("prompt-completion", {"prompt": "The te", "completion": "acher"}, teacher_tokenizer)
    assert ids[~mask].tolist() == teacher_tokenizer("The te")["input_ids"]
    assert ids[mask].tolist() == [*teacher_tokenizer("acher")["input_ids"], teacher_tokenizer.eos_token_id]


def test_without_a_prompt_all_but_the_first_token_is_trained(teacher_tokenizer: Any) -> None:
    ids, mask = tokenize("prompt-completion", {"prompt": "", "completion": "apple pie"}, teacher_tokenizer)
    assert mask.tolist() == [False] + [True] * (len(ids) - 1)


def test_a_prompt_without_a_completion_trains_nothing(teacher_tokenizer: Any) -> None:
    ids, mask = tokenize("prompt-completion", {"prompt": "Name a fruit:", "completion": ""}, teacher_tokenizer)
    assert teacher_tokenizer.decode(ids) == "Name a fruit:"
    assert not mask.any()


def test_only_what_the_assistant_says_is_trained(teacher_tokenizer: Any) -> None:
    ids, mask = tokenize("messages", {"messages": CHAT}, teacher_tokenizer)
    assert_wellformed(ids, mask)
    assert ids.tolist() == teacher_tokenizer.apply_chat_template(CHAT, return_dict=False)
    assert trained_text(teacher_tokenizer, ids, mask) == "A store.<|end|>Something found.<|end|>"


@pytest.mark.parametrize("turns", [2, 3, 4, 5, 6])
def test_a_template_without_marks_gives_the_same_mask_by_prefix_difference(teacher_tokenizer: Any, turns: int) -> None:
    marked = tokenize("messages", {"messages": CHAT[:turns]}, teacher_tokenizer)
    unmarked = tokenize("messages", {"messages": CHAT[:turns]}, without_marks(teacher_tokenizer))
    assert unmarked[0].tolist() == marked[0].tolist()
    assert unmarked[1].tolist() == marked[1].tolist()


def test_chatml_trains_the_answers_with_their_end_marks(teacher_tokenizer: Any) -> None:
    ids, mask = tokenize("messages", {"messages": CHAT}, with_template(teacher_tokenizer, CHATML))
    assert trained_text(teacher_tokenizer, ids, mask) == "A store.<|end|>\nSomething found.<|end|>\n"


def test_an_empty_answer_trains_its_end_mark(teacher_tokenizer: Any) -> None:
    chat = [{"role": "user", "content": "Say nothing."}, {"role": "assistant", "content": ""}]
    ids, mask = tokenize("messages", {"messages": chat}, without_marks(teacher_tokenizer))
    assert trained_text(teacher_tokenizer, ids, mask) == "<|end|>"


@pytest.mark.parametrize("role", ["system", "user", "tool"])
@pytest.mark.parametrize("marks", [True, False])
def test_a_chat_without_an_answer_trains_nothing(teacher_tokenizer: Any, role: str, marks: bool) -> None:
    tokenizer = teacher_tokenizer if marks else without_marks(teacher_tokenizer)
    ids, mask = tokenize("messages", {"messages": [{"role": role, "content": "Hello there."}]}, tokenizer)
    assert len(ids) > 2
    assert not mask.any()


def test_tools_reach_the_template(teacher_tokenizer: Any) -> None:
    template = "{% if tools %}{{ tools[0]['function']['name'] }}{% endif %}" + CHATML
    tools = [{"type": "function", "function": {"name": "lookup", "parameters": {}}}]
    ids, mask = tokenize("messages", {"messages": CHAT, "tools": tools}, with_template(teacher_tokenizer, template))
    assert teacher_tokenizer.decode(ids).startswith("lookup<|system|>")
    assert trained_text(teacher_tokenizer, ids, mask) == "A store.<|end|>\nSomething found.<|end|>\n"


def test_a_template_that_rewrites_earlier_turns_is_reported(teacher_tokenizer: Any) -> None:
    forgets = (
        "{% for m in messages %}<|{{ m['role'] }}|>{% if loop.last or m['role'] != 'assistant' %}{{ m['content'] }}"
        "{% else %}…{% endif %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    with pytest.raises(BadDocument, match=r"message 2: this chat template renders earlier turns differently"):
        tokenize("messages", {"messages": CHAT}, with_template(teacher_tokenizer, forgets))


def test_what_a_template_refuses_is_reported_with_its_words(teacher_tokenizer: Any) -> None:
    strict = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('the user must begin') }}{% endif %}" + CHATML
    with pytest.raises(BadDocument, match=r"the chat template failed .*the user must begin"):
        tokenize("messages", {"messages": CHAT}, with_template(teacher_tokenizer, strict))


@pytest.mark.parametrize("messages", ["Hello", {"role": "user"}, ["Hello"], [{"content": "Hello"}], [None]])
def test_messages_of_another_shape_are_refused(teacher_tokenizer: Any, messages: Any) -> None:
    with pytest.raises(BadDocument, match="`messages` must be a list of objects with a `role`"):
        tokenize("messages", {"messages": messages}, teacher_tokenizer)


def test_input_ids_are_taken_as_they_are() -> None:
    ids, mask = tokenize("input_ids", {"input_ids": [7, 8, 9]}, None)
    assert_wellformed(ids, mask)
    assert (ids.tolist(), mask.tolist()) == ([7, 8, 9], [False, True, True])


@pytest.mark.parametrize("mask", [[True, False, True], [1, 0, 1], [0, 0, 1]])
def test_input_ids_are_trained_where_their_mask_says(mask: list[Any]) -> None:
    _, trained = tokenize("input_ids", {"input_ids": [7, 8, 9], "loss_mask": mask}, None)
    assert trained.tolist() == [False, False, True]


@pytest.mark.parametrize("ids", ["7 8", [7.0, 8.0], [True, False], ["7", "8"], [7, None], [[7], [8]], {"7": 8}, 7])
def test_input_ids_that_are_not_integers_are_refused(ids: Any) -> None:
    with pytest.raises(BadDocument, match="`input_ids` must be a list of integers"):
        tokenize("input_ids", {"input_ids": ids}, None)


@pytest.mark.parametrize("ids", [[-1, 3], [3, 2**31], [10**30, 1]])
def test_input_ids_that_no_token_can_have_are_refused(ids: list[int]) -> None:
    with pytest.raises(BadDocument, match=rf"`input_ids` must lie in 0…2147483647, found {min(ids)} and {max(ids)}"):
        tokenize("input_ids", {"input_ids": ids}, None)


@pytest.mark.parametrize(
    "mask", [[True], [True] * 4, "110", [0.5, 1, 1], [None, 1, 1], ["0", "1", "1"], [[1], [0], [1]]]
)
def test_a_mask_of_another_shape_is_refused(mask: Any) -> None:
    with pytest.raises(BadDocument, match="`loss_mask` must be a list of true and false as long as `input_ids`, 3"):
        tokenize("input_ids", {"input_ids": [7, 8, 9], "loss_mask": mask}, None)


@pytest.mark.parametrize("value", [3, None, ["text"], b"text"])
def test_text_of_another_type_is_refused(teacher_tokenizer: Any, value: Any) -> None:
    with pytest.raises(BadDocument, match=f"text is wanted, found {type(value).__name__}"):
        tokenize("text", {"text": value}, teacher_tokenizer)
    with pytest.raises(BadDocument, match=f"text is wanted, found {type(value).__name__}"):
        tokenize("prompt-completion", {"prompt": "Name:", "completion": value}, teacher_tokenizer)


@pytest.mark.parametrize(
    ("columns", "layout"),
    [
        (["id", "text"], "text"),
        (["prompt", "completion"], "prompt-completion"),
        (["messages", "tools"], "messages"),
        (["input_ids", "loss_mask"], "input_ids"),
        (["text", "messages"], "messages"),
    ],
)
def test_the_layout_is_found_by_the_columns(columns: list[str], layout: str) -> None:
    assert find_document_type(dict.fromkeys(columns), "x") == layout


def test_columns_that_fit_no_layout_are_refused_naming_them_and_the_layouts() -> None:
    with pytest.raises(UserError, match=r"a\.jsonl, line 1: the columns prompt, answer fit no layout; .*--columns"):
        find_document_type({"prompt": "", "answer": ""}, "a.jsonl, line 1")


def test_a_token_that_reaches_from_the_generation_prompt_into_the_answer_is_trained(teacher_tokenizer: Any) -> None:
    merging = with_template(
        teacher_tokenizer,
        "{% for m in messages %}{{ m['role'] }} teac{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant teac{% endif %}",
    )
    chat = [{"role": "user", "content": "k"}, {"role": "assistant", "content": "her writes"}]
    assert teacher_tokenizer.tokenize(" teacher") != teacher_tokenizer.tokenize(" teac") + teacher_tokenizer.tokenize(
        "her"
    )
    ids, mask = tokenize("messages", {"messages": chat}, merging)
    assert teacher_tokenizer.decode(ids) == merging.apply_chat_template(chat, tokenize=False)
    assert trained_text(teacher_tokenizer, ids, mask) == " teacher writes<|end|>"


def test_a_token_that_reaches_from_the_turn_before_into_the_answer_is_not_trained(teacher_tokenizer: Any) -> None:
    bare = with_template(teacher_tokenizer, "{% for m in messages %}{{ m['content'] }}{% endfor %}")
    chat = [{"role": "user", "content": "The teac"}, {"role": "assistant", "content": "her writes"}]
    by = Tokenization(bare)
    [(ids, mask)] = DOCUMENT_TYPES["messages"][1]({"messages": chat}, by)
    assert trained_text(teacher_tokenizer, ids, mask) == " writes"
    assert by.notes == {"answers share their first token with the turn before them; it is not trained": 1}


def test_columns_named_by_the_user_decide_between_layouts() -> None:
    columns = dict.fromkeys(["prompt", "completion", "text"])
    assert find_document_type(columns, "x") == "prompt-completion"
    assert find_document_type(columns, "x", renamed=["text"]) == "text"

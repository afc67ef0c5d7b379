"""Published chat templates' logic, and the text that is trained of chats under them: templates/pairs.json, between ⟦ and ⟧."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import logitcache
from logitcache import UserError
from logitcache.capture.corpus.chat import tokenize_messages
from logitcache.capture.corpus.tokens import Tokenization
from logitcache.documents.document import BadDocument

TEMPLATES = Path(__file__).parents[3] / "data/templates"
PAIRS = json.loads((TEMPLATES / "pairs.json").read_text(encoding="utf-8"))
MARKED = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def call(arguments: Any) -> list[dict[str, Any]]:
    return [{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": arguments}}]


RESULT = {"role": "tool", "content": "sunny"}
CHATS = {
    "two answers": [user("hi"), assistant("one"), user("go on"), assistant("  two ")],
    "system": [{"role": "system", "content": "Be brief."}, user("hi"), assistant("one")],
    "assistant first": [assistant("Welcome!"), user("hi"), assistant("Hello")],
    "tool call": [user("weather?"), assistant(None, tool_calls=call({"city": "Rome"})), RESULT, assistant("Sunny.")],
    "tool call as text": [
        user("weather?"),
        assistant(None, tool_calls=call('{"city": "Rome"}')),
        RESULT,
        assistant("Sunny."),
    ],
    "thought": [user("2+2"), assistant("<think>\nhm\n</think>\n\nfour")],
    "thoughts apart": [
        user("2+2"),
        assistant("four", reasoning_content="hm", thinking="hm"),
        user("1+2"),
        assistant("three", reasoning_content="um", thinking="um"),
    ],
}


def with_template(tokenizer: Any, template: str) -> Any:
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


def keeps_null(tokenizer: Any) -> bool:
    """Whether this transformers hands a turn's null on: 5.24 leaves the key out."""
    asks = with_template(tokenizer, "{{ messages[0]['content'] is none }}")
    return bool(asks.apply_chat_template([assistant(None)], tokenize=False) == "True")


def shown(tokenizer: Any, ids: np.ndarray, mask: np.ndarray) -> str:
    """The whole text, the trained part of it between ⟦ and ⟧."""
    edges = np.flatnonzero(np.diff(mask.astype(np.int8))) + 1
    pieces = [tokenizer.decode(piece) for piece in np.split(ids, edges)]
    return "".join(f"⟦{piece}⟧" if number % 2 else piece for number, piece in enumerate(pieces))


def trained(tokenizer: Any, messages: Any, turns: str = "all", **columns: Any) -> tuple[list[str], dict[str, int]]:
    by = Tokenization(tokenizer, turns)
    found = tokenize_messages({"messages": messages, **columns}, by)
    return [shown(tokenizer, ids, mask) for ids, mask in found], dict(by.notes)


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair['template']}-{pair['chat']}-{pair['turns']}")
def test_trained_is_what_the_template_renders_for_each_answer(teacher_tokenizer: Any, pair: dict[str, Any]) -> None:
    template = (TEMPLATES / f"{pair['template']}.jinja").read_text(encoding="utf-8")
    tokenizer = with_template(teacher_tokenizer, template)
    messages = CHATS[pair["chat"]]
    if pair.get("asks_for_null") and not keeps_null(tokenizer):
        pair = {**pair, "refused": "the chat template failed"}
    if "refused" in pair:
        with pytest.raises(BadDocument) as refused:
            trained(tokenizer, messages, pair["turns"])
        assert str(refused.value).startswith(pair["refused"])
        assert "chat template failed" in str(refused.value) or "--turns each" in str(refused.value)
        return
    texts, _ = trained(tokenizer, messages, pair["turns"])
    assert texts == pair["rendered"]
    if pair["turns"] == "all":
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        assert [text.replace("⟦", "").replace("⟧", "") for text in texts] == [whole]


def test_a_dropped_thought_and_an_unrendered_call_are_told(teacher_tokenizer: Any) -> None:
    r1 = with_template(teacher_tokenizer, (TEMPLATES / "r1-distill.jinja").read_text(encoding="utf-8"))
    _, notes = trained(r1, CHATS["thought"])
    [note] = notes
    assert "rendered without '<think>\\n'" in note
    assert "--turns each" in note
    smollm3 = with_template(teacher_tokenizer, (TEMPLATES / "smollm3.jinja").read_text(encoding="utf-8"))
    _, notes = trained(smollm3, CHATS["tool call"])
    assert any("call tools that the chat template does not render" in note for note in notes)


# Marks.


def trimming(tokenizer: Any) -> Any:
    """The tokenizer with a post-processor that cuts white space off offsets, as Llama 3's."""
    from tokenizers import processors

    other = copy.deepcopy(tokenizer)
    other.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return other


@pytest.mark.parametrize("trim", [False, True])
def test_marks_are_told_from_the_text_around_them_by_our_own_offsets(teacher_tokenizer: Any, trim: bool) -> None:
    tokenizer = trimming(teacher_tokenizer) if trim else teacher_tokenizer
    secret = [user("hi"), assistant("sure: "), user("my secret is 1234"), assistant("ok")]
    texts, notes = trained(with_template(tokenizer, MARKED), secret)
    assert texts == [
        "<|user|>hi<|end|><|assistant|>⟦sure: ⟧<|end|><|user|>my secret is 1234<|end|><|assistant|>⟦ok⟧<|end|>"
    ]
    spaced = [user("a"), assistant("one"), user("b"), assistant("  two"), user("c"), assistant("three")]
    texts, _ = trained(with_template(tokenizer, MARKED), spaced)
    assert [part.partition("⟧")[0] for part in texts[0].split("⟦")[1:]] == ["one", "  two", "three"]
    assert not notes


def test_a_mark_of_the_first_token_ends_with_it(teacher_tokenizer: Any) -> None:
    bare = MARKED.replace("<|{{ m.role }}|>", "").replace("<|assistant|>", "")
    texts, _ = trained(with_template(teacher_tokenizer, bare), [assistant("a"), user("secret"), assistant("b")])
    assert texts == ["a<|end|>secret<|end|>⟦b⟧<|end|>"]


@pytest.mark.parametrize(
    "template",
    [
        "{% macro turn(m) %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}<|end|>{% endmacro %}{% for m in messages %}{{ turn(m) }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        "{% for m in messages %}{% set words %}{% if m.role == 'assistant' %}{%- generation -%} {{ m.content }} "
        "{%- endgeneration -%}{% else %}{{ m.content }}{% endif %}{% endset %}<|{{ m.role }}|>{{ words }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        "{% for m in messages %}\n<|{{ m.role }}|>{% if m.role == 'assistant' %}\n  {% generation %}\n{{ m.content }}"
        "{% endgeneration %}\n  {% else %}\n{{ m.content }}\n  {%- endif %}\n<|end|>\n{%- endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    ],
    ids=["macro", "set", "lines"],
)
def test_marks_are_found_wherever_they_are_rendered(teacher_tokenizer: Any, template: str) -> None:
    texts, notes = trained(with_template(teacher_tokenizer, template), CHATS["two answers"])
    assert texts == ["<|user|>hi<|end|><|assistant|>⟦one⟧<|end|><|user|>go on<|end|><|assistant|>⟦  two ⟧<|end|>"]
    assert not notes


def test_marks_that_a_filter_changes_are_not_believed(teacher_tokenizer: Any) -> None:
    filtered = MARKED.replace("{% generation %}", "{% filter trim %}{% generation %}").replace(
        "{% endgeneration %}", "{% endgeneration %}{% endfilter %}"
    )
    texts, notes = trained(with_template(teacher_tokenizer, filtered), CHATS["two answers"])
    assert texts == ["<|user|>hi<|end|><|assistant|>⟦one<|end|>⟧<|user|>go on<|end|><|assistant|>⟦two<|end|>⟧"]
    assert notes == {"chats lose the template's {% generation %} marks; trained is the text that each turn adds": 1}


def test_a_mark_that_leaves_a_tool_call_out_gives_way_to_the_whole_turn(teacher_tokenizer: Any) -> None:
    partial = (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content or '' }}"
        "{% endgeneration %}{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}{% else %}{{ m.content }}"
        "{% endif %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    texts, notes = trained(with_template(teacher_tokenizer, partial), CHATS["tool call"])
    assert texts[0].endswith("<|assistant|>⟦weather<|end|>⟧<|tool|>sunny<|end|><|assistant|>⟦Sunny.⟧<|end|>")
    assert list(notes.values()) == [1]


def test_marks_of_a_template_that_drops_thoughts_are_taken_where_each_holds_its_answer(teacher_tokenizer: Any) -> None:
    drops = (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{% if loop.last %}<think>"
        "{% endif %}{{ m.content }}<|end|>{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    texts, _ = trained(with_template(teacher_tokenizer, drops), CHATS["two answers"])
    assert texts[0].endswith("⟦one<|end|>⟧<|user|>go on<|end|><|assistant|>⟦<think>  two <|end|>⟧")
    shifted = drops.replace("{{ m.content }}<|end|>{% endgeneration %}", "{% endgeneration %}{{ m.content }}<|end|>")
    with pytest.raises(BadDocument, match="--turns each"):
        trained(with_template(teacher_tokenizer, shifted), CHATS["two answers"])


CONTENTS = st.lists(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.sampled_from(["  ", " a ", "\n\n"])
)


@pytest.mark.slow
@given(contents=CONTENTS, trim=st.booleans())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_said_the_answers_are_trained_and_nothing_else(
    teacher_tokenizer: Any, contents: list[str], trim: bool
) -> None:
    tokenizer = trimming(teacher_tokenizer) if trim else teacher_tokenizer
    chat = [(assistant if number % 2 else user)(content) for number, content in enumerate(contents)]
    answers = contents[1::2]
    if not answers:
        return
    marked = with_template(tokenizer, MARKED)
    [(ids, mask)] = tokenize_messages({"messages": chat}, Tokenization(marked))
    assert ids.tolist() == marked.apply_chat_template(chat, return_dict=False)
    expected = "".join(answer or "<|end|>" for answer in answers)  # an empty answer's turn is trained whole
    assert tokenizer.decode(ids[mask]) == expected
    if not trim and all(
        answer and answer.isascii() for answer in answers
    ):  # theirs ends within a sign of several tokens
        theirs = marked.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
        assert mask.tolist() == [bool(one) for one in theirs["assistant_masks"]]
    plain = with_template(tokenizer, PLAIN)
    [(ids, mask)] = tokenize_messages({"messages": chat}, Tokenization(plain))
    assert ids.tolist() == plain.apply_chat_template(chat, return_dict=False)
    # A token may take the prompt's last space along, and the next turn's first characters.
    assert all(answer.strip() in tokenizer.decode(ids[mask]) for answer in answers)


# Messages.


def test_a_null_content_reaches_the_template_as_transformers_hands_it_on(teacher_tokenizer: Any) -> None:
    asks = (
        "{% for m in messages %}{% if m['content'] is string %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
        "{% else %}<|assistant|>{{ 'NULL' if m['content'] is none else 'ABSENT' }} {{ m['tool_calls'][0]['function']['name'] }}"
        "{% endif %}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer = with_template(teacher_tokenizer, asks)
    texts, _ = trained(tokenizer, CHATS["tool call"])
    word = "NULL" if keeps_null(tokenizer) else "ABSENT"
    assert texts == [
        f"<|user|>weather?<|end|><|assistant|>⟦{word} weather<|end|>⟧<|tool|>sunny<|end|><|assistant|>⟦Sunny.<|end|>⟧"
    ]
    assert texts[0].replace("⟦", "").replace("⟧", "") == tokenizer.apply_chat_template(
        CHATS["tool call"], tokenize=False
    )


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"weight": 0.0, "train": True}])
@pytest.mark.parametrize("turns", ["all", "each"])
def test_an_answer_of_weight_0_is_context(teacher_tokenizer: Any, mark: dict[str, Any], turns: str) -> None:
    chat = [user("ok?"), assistant("bad", **mark), user("2+2"), assistant("four", weight=1)]
    texts, _ = trained(with_template(teacher_tokenizer, MARKED), chat, turns)
    assert texts == ["<|user|>ok?<|end|><|assistant|>bad<|end|><|user|>2+2<|end|><|assistant|>⟦four⟧<|end|>"]


@pytest.mark.parametrize("weight", [0.5, -1, "0", [0]])
def test_another_weight_is_refused(teacher_tokenizer: Any, weight: Any) -> None:
    with pytest.raises(BadDocument, match=r"message 1: `weight` .* must be 0 or 1"):
        trained(teacher_tokenizer, [user("hi"), assistant("one", weight=weight)])


@pytest.mark.parametrize("theirs", ["Assistant", "ASSISTANT", "model", "gpt", "bot", "ai", "chatgpt"])
def test_other_names_of_the_assistant_are_understood_and_told(teacher_tokenizer: Any, theirs: str) -> None:
    tokenizer = with_template(teacher_tokenizer, MARKED)
    chat = [{"role": "Human", "content": "hi"}, {"role": theirs, "content": "one"}]
    texts, notes = trained(tokenizer, chat)
    assert texts == ["<|user|>hi<|end|><|assistant|>⟦one⟧<|end|>"]
    assert notes == {
        "turns have the role 'Human', read as 'user'": 1,
        f"turns have the role {theirs!r}, read as 'assistant'": 1,
    }


def test_sharegpts_keys_are_understood(teacher_tokenizer: Any) -> None:
    chat = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "one"}]
    texts, _ = trained(with_template(teacher_tokenizer, MARKED), chat)
    assert texts == ["<|user|>hi<|end|><|assistant|>⟦one⟧<|end|>"]


def test_a_role_that_may_be_the_assistants_is_refused_by_name(teacher_tokenizer: Any) -> None:
    with pytest.raises(BadDocument, match="no turn is the assistant's, and the role 'oracle' is not known"):
        trained(teacher_tokenizer, [user("hi"), {"role": "oracle", "content": "one"}])
    _, notes = trained(
        with_template(teacher_tokenizer, MARKED), [{"role": "critic", "content": "x"}, user("hi"), assistant("one")]
    )
    assert notes == {"chats have turns of the role 'critic', which is taken for context": 1}


def test_json_text_is_read_as_the_chat_that_it_is(teacher_tokenizer: Any) -> None:
    tokenizer = with_template(teacher_tokenizer, (TEMPLATES / "qwen2.5.jinja").read_text(encoding="utf-8"))
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
    chat = CHATS["tool call"]
    plain = trained(tokenizer, chat, tools=tools)
    assert trained(tokenizer, json.dumps(chat), tools=json.dumps(tools)) == plain
    assert trained(tokenizer, [json.dumps(turn) for turn in chat], tools=[json.dumps(tool) for tool in tools]) == plain
    with pytest.raises(BadDocument, match="text that is not JSON"):
        trained(tokenizer, "[{")


# Tokenizers.


def test_a_tokenizer_without_offsets_is_given_the_pieces(teacher_tokenizer: Any) -> None:
    from transformers import ByT5Tokenizer

    tokenizer = with_template(ByT5Tokenizer(), PLAIN)
    assert not tokenizer.is_fast
    texts, _ = trained(tokenizer, [user("hü"), assistant("ön e"), user("go"), assistant("x")])
    assert texts == ["user: hü\nassistant: ⟦ön e\n⟧user: go\nassistant: ⟦x\n⟧"]


def test_a_tokenizer_without_offsets_whose_tokens_reach_across_is_refused(teacher_tokenizer: Any) -> None:
    class Slow:
        """The tiny teacher's tokenizer, its offsets left out."""

        is_fast = False
        apply_chat_template = teacher_tokenizer.apply_chat_template

        def get_chat_template(self, tools: Any = None) -> str:
            return str(teacher_tokenizer.get_chat_template(tools=tools))

        def __call__(self, text: str, **options: Any) -> Any:
            return teacher_tokenizer(text, **options)

    assert len(tokenize_messages({"messages": CHATS["system"]}, Tokenization(Slow()))) == 1
    merging = with_template(
        teacher_tokenizer,
        "{% for m in messages %}{{ m['role'] }} teac{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant teac{% endif %}",
    )
    Slow.apply_chat_template = merging.apply_chat_template
    with pytest.raises(BadDocument, match="a token reaches across the edge of an answer"):
        tokenize_messages({"messages": [user("k"), assistant("her")]}, Tokenization(Slow()))


# Builds.


def test_a_build_trains_each_answer_by_the_template_of_a_file(teacher: Path, tmp_path: Path) -> None:
    data = tmp_path / "chats.jsonl"
    data.write_text(json.dumps({"messages": CHATS["two answers"]}) + "\n", encoding="utf-8")
    options: dict[str, Any] = {"top_k": 4, "backend": "transformers", "turns": "each"}
    template = TEMPLATES / "qwen3.jinja"
    cache = logitcache.build(str(teacher), str(data), tmp_path / "cache", chat_template=str(template), **options)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "cache" / "tokenizer")
    assert tokenizer.chat_template == template.read_text(encoding="utf-8")
    rows = [shown(tokenizer, row.input_ids, row.loss_mask) for row in cache]
    assert rows == next(
        pair["rendered"]
        for pair in PAIRS
        if (pair["template"], pair["chat"], pair["turns"]) == ("qwen3", "two answers", "each")
    )
    assert cache.manifest.fingerprint["corpus"]["turns"] == "each"
    with pytest.raises(UserError, match="--turns each"):
        logitcache.build(
            str(teacher), str(data), tmp_path / "all", chat_template=str(template), **options | {"turns": "all"}
        )
    assert not (tmp_path / "all" / "logitcache.json").exists()


def test_a_template_that_is_no_text_is_refused_before_anything_loads(tmp_path: Path) -> None:
    for content in (b"\xff\xfe", b"  \n", None):
        path = tmp_path / "template.jinja"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match=r"--chat-template .*template\.jinja: "):
            logitcache.build("no-such-teacher", "no-such-data", tmp_path / "out", chat_template=str(path))

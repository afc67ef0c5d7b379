"""Files of prompts and references: what is read of each kind, and what is said of rows that cannot be used."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from logitcache import UserError
from trainer.evaluation.generation_settings import GenerationSettings
from trainer.evaluation.prompts import check_columns, check_templates, data_stem, read_prompts

ROWS = [{"prompt": "The quick", "completion": " brown fox"}, {"prompt": "A student", "completion": " reads them"}]
ALPACA = ["Task: {instruction}\nInput: {context}\nAnswer:", "Task: {instruction}\nAnswer:"]


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(params=["jsonl", "jsonl.gz", "parquet"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    path = tmp_path / f"pairs.{request.param}"
    if request.param == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
        return str(path)
    text = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    path.write_bytes(gzip.compress(text) if request.param == "jsonl.gz" else text)
    return str(path)


def test_every_kind_of_file_gives_the_same_prompts(file: str, teacher_tokenizer: Any) -> None:
    prompts = read_prompts(file, teacher_tokenizer)
    assert [prompt.text for prompt in prompts] == ["The quick", "A student"]
    assert [prompt.references for prompt in prompts] == [[" brown fox"], [" reads them"]]
    assert [prompt.token_ids for prompt in prompts] == [teacher_tokenizer(row["prompt"])["input_ids"] for row in ROWS]
    assert data_stem(file) == "pairs"


def test_columns_are_renamed_and_a_list_is_several_references(tmp_path: Path, teacher_tokenizer: Any) -> None:
    path = write(tmp_path / "a.jsonl", [{"question": "Who?", "output": ["he", "she"], "prompt": "unused"}])
    (prompt,) = read_prompts(path, teacher_tokenizer, {"prompt": "question", "completion": "output"})
    assert (prompt.text, prompt.references) == ("Who?", ["he", "she"])


def test_a_chat_is_asked_up_to_the_assistants_last_turn(tmp_path: Path, teacher_tokenizer: Any) -> None:
    turns = [("user", "Hi"), ("assistant", "Hello"), ("user", "Who?"), ("assistant", "Me")]
    messages = [{"role": role, "content": content} for role, content in turns]
    (prompt,) = read_prompts(write(tmp_path / "a.jsonl", [{"messages": messages}]), teacher_tokenizer)
    assert prompt.references == ["Me"]
    assert prompt.text == "<|user|>Hi<|end|><|assistant|>Hello<|end|><|user|>Who?<|end|><|assistant|>"
    rendered = teacher_tokenizer.apply_chat_template(messages[:3], add_generation_prompt=True, return_dict=True)
    assert prompt.token_ids == rendered["input_ids"]


def test_a_chat_is_read_as_a_build_reads_it_by_the_template_that_is_given(
    tmp_path: Path, teacher_tokenizer: Any
) -> None:
    chat = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    template = (
        "{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    path = write(tmp_path / "a.jsonl", [{"messages": chat}, {"messages": json.dumps(chat)}])
    said: list[str] = []
    prompts = read_prompts(path, teacher_tokenizer, chat_template=template, say=said.append)
    assert [(prompt.text, prompt.references) for prompt in prompts] == [("user=Hi;>", ["Hello"])] * 2
    assert any("read as 'assistant'" in line for line in said)


def test_answers_depend_on_the_template_that_is_given(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ROWS)
    own = GenerationSettings([path]).decisive("transformers")
    template = tmp_path / "template.jinja"
    decisive = []
    for text in ("one", "another", "one"):
        template.write_text(text)
        decisive.append(GenerationSettings([path], chat_template=str(template)).decisive("transformers"))
    assert decisive[0] == decisive[2] != decisive[1]
    assert own == {name: value for name, value in decisive[0].items() if name != "chat_template_sha256"}
    with pytest.raises(UserError, match=r"--chat-template .*not readable"):
        GenerationSettings([path], chat_template=str(tmp_path / "none.jinja"))


def test_a_row_takes_the_first_template_whose_columns_have_text(tmp_path: Path, teacher_tokenizer: Any) -> None:
    rows = [
        {"instruction": "Add", "context": "1 {2}", "response": "3"},
        {"instruction": "Sing", "context": " ", "response": "la"},
        {"instruction": "Sing", "context": None, "response": "la"},
    ]
    prompts = read_prompts(write(tmp_path / "dolly.jsonl", rows), teacher_tokenizer, {"completion": "response"}, ALPACA)
    assert prompts[0].text == "Task: Add\nInput: 1 {2}\nAnswer:"
    assert prompts[1].text == prompts[2].text == "Task: Sing\nAnswer:"


BAD_ROWS: list[tuple[Any, str]] = [
    ({"prompt": "a", "completion": None}, "`completion` must be a text or a list of texts, found nothing"),
    ({"prompt": "a", "completion": []}, "found an empty list"),
    ({"prompt": "a", "completion": [1]}, "must be a text or a list of texts"),
    ({"prompt": 3, "completion": "b"}, "`prompt` must be a text, found a number"),
    ({"prompt": "", "completion": "b"}, "the prompt has no token"),
    ({"question": "a"}, "the columns question hold no prompt with a reference.*--columns"),
    ([1, 2], "a JSON object is wanted, this is list"),
    ({"messages": [{"role": "user", "content": "a"}]}, "must end with a text of the assistant"),
    ({"messages": [{"role": "assistant", "content": "a"}]}, "after a turn that it answers"),
    ({"messages": "a"}, "list of objects with a `role`"),
]


@pytest.mark.parametrize(("row", "said"), BAD_ROWS)
def test_a_row_that_cannot_be_used_is_named(row: Any, said: str, tmp_path: Path, teacher_tokenizer: Any) -> None:
    path = write(tmp_path / "a.jsonl", [ROWS[0], row])
    with pytest.raises(UserError, match=rf"a\.jsonl, line 2: .*{said}"):
        read_prompts(path, teacher_tokenizer)


def test_rows_of_parquet_are_named_by_their_number(tmp_path: Path, teacher_tokenizer: Any) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": ["a", ""], "completion": ["b", "c"]}), path)
    with pytest.raises(UserError, match=r"a\.parquet, row 1: the prompt has no token"):
        read_prompts(str(path), teacher_tokenizer)


def test_a_line_that_is_no_json_and_a_file_without_rows_are_refused(tmp_path: Path, teacher_tokenizer: Any) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": \n')
    with pytest.raises(UserError, match=r"line 1: not JSON"):
        read_prompts(str(path), teacher_tokenizer)
    path.write_text("\n")
    with pytest.raises(UserError, match="no rows"):
        read_prompts(str(path), teacher_tokenizer)


def test_damaged_files_are_named(tmp_path: Path, teacher_tokenizer: Any) -> None:
    for name in ("a.parquet", "a.jsonl.gz"):
        (tmp_path / name).write_bytes(b"no such thing")
        with pytest.raises(UserError, match=rf"{name}, after .*not readable"):
            read_prompts(str(tmp_path / name), teacher_tokenizer)


def test_a_template_that_names_a_missing_column_or_a_number_is_refused(tmp_path: Path, teacher_tokenizer: Any) -> None:
    path = write(tmp_path / "a.jsonl", [{"instruction": 3, "completion": "b"}])
    with pytest.raises(UserError, match=r"no column input, .* there are instruction, completion"):
        read_prompts(path, teacher_tokenizer, {}, ["{input}"])
    with pytest.raises(UserError, match=r"instruction, .* must be a text, found a number"):
        read_prompts(path, teacher_tokenizer, {}, ["{instruction}"])


def test_a_column_that_is_named_and_missing_is_a_bad_row_even_where_the_file_has_our_name(
    tmp_path: Path, teacher_tokenizer: Any
) -> None:
    path = write(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(UserError, match=r"line 1: no column nope, .*prompt=nope; there are prompt, completion"):
        read_prompts(path, teacher_tokenizer, {"prompt": "nope"})


@pytest.mark.parametrize("template", ["no column", "{}", "{0}", "{a.b}", "{a!r}", "{a:>3}", "{a"])
def test_templates_that_are_no_text_with_columns_are_refused(template: str) -> None:
    with pytest.raises(UserError, match="--prompt_template"):
        check_templates([template])


def test_unknown_columns_and_kinds_of_files_are_refused() -> None:
    with pytest.raises(UserError, match=r"question is none of prompt, completion"):
        check_columns({"question": "prompt"})
    with pytest.raises(UserError, match=r"unknown kind of file, accepted are \.jsonl"):
        data_stem("data.csv")

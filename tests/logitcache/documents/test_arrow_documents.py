"""Documents in Arrow's types: the same documents, and the same tokens, as from .jsonl."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logitcache import UserError
from logitcache.capture.corpus.documents import find_sources
from logitcache.capture.corpus.tokenize import Corpus, CorpusSettings
from logitcache.documents.arrow import read_arrow
from tests.helpers.smallcaches import small
from trainer.evaluation.prompts import read_prompts

SHOWS_ALL = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
    "{% for m in messages %}{{ m['role'] }}: {{ m | tojson }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
"""A template that prints every key, those that are null too."""


def tool(name: str, **properties: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}


ROWS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Weather?"},
            call("weather", city="Rome"),
            {"role": "tool", "content": "sunny", "name": "weather"},
            {"role": "assistant", "content": "Sunny.", "reasoning_content": "It said so."},
        ],
        "tools": [tool("weather", city={"type": "string", "enum": ["Rome", None]})],
    },
    {
        "messages": [
            {"role": "user", "content": "Sum?"},
            call("add", a=1, b=[2, 3], role={"content": "x"}),
            {"role": "assistant", "content": ""},
        ],
        "tools": [tool("add", a={"type": "number"}, role={"type": "object"}), tool("weather")],
    },
]


def as_json_lines(rows: list[dict[str, Any]], path: Path) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def by_pyarrow(rows: list[dict[str, Any]], folder: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    return folder / "rows.parquet"


def by_dataset_from_list(rows: list[dict[str, Any]], folder: Path) -> Path:
    import datasets

    datasets.Dataset.from_list(rows).to_parquet(folder / "rows.parquet")
    return folder / "rows.parquet"


def by_load_dataset(rows: list[dict[str, Any]], folder: Path) -> Path:
    """What `datasets` ≥ 4.8 writes of chat rows: `list<arrow.json>`."""
    import datasets

    lines = as_json_lines(rows, folder / "lines.json")
    loaded = datasets.load_dataset("json", data_files=str(lines), split="train", cache_dir=str(folder / "cache"))
    loaded.to_parquet(folder / "rows.parquet")
    assert "arrow.json" in str(pq.ParquetFile(folder / "rows.parquet").schema_arrow)
    return folder / "rows.parquet"


def json_text(rows: list[dict[str, Any]], folder: Path) -> Path:
    return by_pyarrow([{name: json.dumps(value) for name, value in row.items()} for row in rows], folder)


def json_texts(rows: list[dict[str, Any]], folder: Path) -> Path:
    return by_pyarrow([{name: [json.dumps(one) for one in row[name]] for name in row} for row in rows], folder)


def json_text_in_lines(rows: list[dict[str, Any]], folder: Path) -> Path:
    return as_json_lines(
        [{name: json.dumps(value) for name, value in row.items()} for row in rows], folder / "rows.jsonl"
    )


WRITERS = [by_pyarrow, by_dataset_from_list, by_load_dataset, json_text, json_texts, json_text_in_lines]


@pytest.fixture
def shows_all(teacher_tokenizer: Any) -> Any:
    tokenizer = copy.deepcopy(teacher_tokenizer)
    tokenizer.chat_template = SHOWS_ALL
    return tokenizer


def tokens(path: Path, tokenizer: Any, **columns: str) -> list[tuple[list[int], list[bool]]]:
    settings = CorpusSettings(4096, columns=columns)
    corpus = Corpus(find_sources(str(path)), tokenizer, 512, settings)
    return [(row.input_ids.tolist(), row.loss_mask.tolist()) for row in corpus]


@pytest.mark.parametrize("write", WRITERS)
def test_every_way_to_write_a_chat_gives_the_tokens_that_transformers_gives(
    tmp_path: Path, shows_all: Any, write: Callable[..., Path]
) -> None:
    found = tokens(write(ROWS, tmp_path), shows_all)
    for (ids, _), row in zip(found, ROWS, strict=True):
        assert shows_all.decode(ids) == shows_all.apply_chat_template(row["messages"], row["tools"], tokenize=False)
    assert found == tokens(as_json_lines(ROWS, tmp_path / "all.jsonl"), shows_all)


@pytest.mark.parametrize("write", WRITERS)
def test_the_trainers_prompts_are_the_same_of_every_way(
    tmp_path: Path, shows_all: Any, write: Callable[..., Path]
) -> None:
    prompts = read_prompts(str(write(ROWS, tmp_path)), shows_all)
    for prompt, row in zip(prompts, ROWS, strict=True):
        before = shows_all.apply_chat_template(
            row["messages"][:-1], row["tools"], tokenize=False, add_generation_prompt=True
        )
        assert prompt.text == before


def test_chats_in_a_column_of_another_name_are_the_same(tmp_path: Path, shows_all: Any) -> None:
    renamed = [{"chat": row["messages"], "functions": row["tools"]} for row in ROWS]
    names = {"messages": "chat", "tools": "functions"}
    (tmp_path / "made").mkdir()
    expected = tokens(as_json_lines(ROWS, tmp_path / "all.jsonl"), shows_all)
    for write in (by_pyarrow, by_load_dataset, json_text):
        assert tokens(write(renamed, tmp_path), shows_all, **names) == expected


def test_arguments_that_are_json_text_stay_text(tmp_path: Path, shows_all: Any) -> None:
    chat = [{"role": "user", "content": "Sum?"}, call("add", text='{"a": null}')]
    for write in WRITERS:
        [(ids, _)] = tokens(write([{"messages": chat}], tmp_path), shows_all)
        assert r'"{\"a\": null}"' in shows_all.decode(ids)


@pytest.mark.parametrize("through", [json_text, json_texts, by_load_dataset])
def test_json_text_says_exactly_which_nulls_there_are(
    tmp_path: Path, shows_all: Any, through: Callable[..., Path]
) -> None:
    chat = [{"role": "user", "content": "Sum?", "name": None}, call("add", a=None)]
    rows = [{"messages": chat}, {"messages": ROWS[1]["messages"]}]
    [(ids, _), _] = tokens(through(rows, tmp_path), shows_all)
    assert shows_all.decode(ids) == shows_all.apply_chat_template(chat, tokenize=False)


def test_text_that_is_no_json_is_named(tmp_path: Path, shows_all: Any) -> None:
    rows = [{"messages": json.dumps(ROWS[0]["messages"])}, {"messages": '[{"role": "user"'}]
    with pytest.raises(UserError, match=r"rows\.parquet, row 1: .*found text that is not JSON"):
        tokens(by_pyarrow(rows, tmp_path), shows_all)


def test_blank_tools_are_none(tmp_path: Path, shows_all: Any) -> None:
    plain = [{"messages": ROWS[0]["messages"]}]
    blank = [{"messages": ROWS[0]["messages"], "tools": " "}]
    (tmp_path / "blank").mkdir()
    assert tokens(by_pyarrow(blank, tmp_path / "blank"), shows_all) == tokens(by_pyarrow(plain, tmp_path), shows_all)


def documents(path: Path) -> list[dict[str, Any]]:
    return [dict(document.values) for source in find_sources(str(path)) for document in source.documents()]


@pytest.mark.parametrize("write", [by_pyarrow, by_dataset_from_list, by_load_dataset])
def test_every_way_to_write_a_chat_gives_the_same_documents(tmp_path: Path, write: Callable[..., Path]) -> None:
    assert documents(write(ROWS, tmp_path)) == ROWS


@pytest.mark.parametrize("write", [by_pyarrow, by_dataset_from_list, by_load_dataset])
def test_a_stream_of_load_dataset_gives_the_same_documents(
    tmp_path: Path, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    (tmp_path / "made").mkdir()
    file = write(ROWS, tmp_path / "made")
    (tmp_path / "hub").mkdir()
    file.rename(tmp_path / "hub" / "rows.parquet")
    monkeypatch.setattr("logitcache.capture.corpus.documents.find_reader", lambda path: None)
    assert documents(tmp_path / "hub") == ROWS


@pytest.mark.parametrize("text", ['{"a": ', '"\\ud83d"', "[" * 100_000])
def test_a_bad_value_of_the_json_type_spoils_its_row_only(text: str) -> None:
    values = pa.ExtensionArray.from_storage(pa.json_(), pa.array(['{"a": null}', text]))
    (good, no_error), (bad, error) = read_arrow(pa.table({"x": values}))
    assert (good, no_error) == ({"x": {"a": None}}, None)
    assert bad == {}
    assert error is not None and error.startswith("not JSON")


def test_maps_are_objects_and_what_lies_in_them_was_written() -> None:
    type_ = pa.map_(pa.string(), pa.struct({"a": pa.int64(), "b": pa.int64()}))
    table = pa.table({"m": pa.array([[("x", {"a": 1, "b": None}), ("y", None)], None], type_)})
    assert [values for values, _ in read_arrow(table)] == [{"m": {"x": {"a": 1}, "y": None}}, {"m": None}]


FULL = {"city": "Rome", "days": 3, "near": [{"name": "Ostia", "km": 25.5}], "units": {"of": "heat", "short": True}}
"""Every key that the arguments of the property below may have."""
ARGUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "city": st.text(st.characters(codec="utf-8"), max_size=3),
        "days": st.integers(-9, 9),
        "near": st.lists(
            st.none() | st.fixed_dictionaries({}, optional={"name": st.just("x"), "km": st.floats(0, 1)}), max_size=2
        ),
        "units": st.fixed_dictionaries({}, optional={"of": st.just("light"), "short": st.booleans()}),
    },
)
TURNS = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant"]), "content": st.none() | st.just("text")},
    optional={
        "name": st.just("n"),
        "tool_calls": st.lists(st.fixed_dictionaries({"arguments": ARGUMENTS}), max_size=2),
    },
)
FIRST = {"role": "user", "content": "x", "name": "n", "tool_calls": [{"arguments": FULL}]}


@given(chats=st.lists(st.lists(TURNS, max_size=3), max_size=4))
@small
def test_absent_keys_stay_absent_and_written_values_stay(chats: list[Any]) -> None:
    rows = [{"messages": [FIRST]}, *({"messages": chat} for chat in chats)]
    assert [values for values, _ in read_arrow(pa.Table.from_pylist(rows))] == rows


@given(chats=st.lists(st.lists(TURNS, max_size=3), max_size=4))
@small
def test_the_json_type_keeps_the_order_of_keys_too(chats: list[Any]) -> None:
    storage = pa.array([[json.dumps(turn) for turn in chat] for chat in chats], pa.list_(pa.string()))
    column = storage.cast(pa.list_(pa.json_()))
    found = [values["messages"] for values, _ in read_arrow(pa.table({"messages": column}))]
    assert json.dumps(found) == json.dumps(chats)

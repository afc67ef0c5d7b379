"""Files of prompts and reference answers → what a model is asked, and what its answers are compared with."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from logitcache import UserError
from logitcache.errors import one_line

if TYPE_CHECKING:  # options are checked before transformers is imported, which takes seconds
    from transformers import PreTrainedTokenizerBase

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
COLUMNS = ("prompt", "completion", "messages", "tools")
Row = tuple[int, str, dict[str, Any]]
"""Number of a row (of its line, from 1; of a Parquet row, from 0), file and row in words, columns."""


@dataclass(frozen=True)
class Prompt:
    """row: its number in the file.  where: file and row, for messages.  text, token_ids: what the model gets."""

    row: int
    where: str
    text: str
    token_ids: Sequence[int]
    references: Sequence[str]


class BadRow(Exception):
    """The row cannot be used; the message says why."""


def data_stem(path: str) -> str:
    """Name of a data file without its suffix. Raises UserError for a kind that is not read."""
    name = Path(path).name
    for suffix in SUFFIXES:
        if name.endswith(suffix) and name != suffix:
            return name.removesuffix(suffix)
    raise UserError(f"--data {path}: unknown kind of file, accepted are {', '.join(SUFFIXES)}")


def check_columns(columns: Mapping[str, str]) -> None:
    """Raises UserError for columns to rename that are not read."""
    for ours in columns:
        if ours not in COLUMNS:
            raise UserError(
                f"--columns {ours}={columns[ours]}: {ours} is none of {', '.join(COLUMNS)}; it is OURS=THEIRS, for example "
                "prompt=question,completion=answer"
            )


def check_templates(templates: Sequence[str]) -> None:
    """Raises UserError for a template that is no text with {column} fields."""
    for template in templates:
        if not _fields(template):
            raise UserError(
                f"--prompt_template {template!r}: it names no {{column}}, so every prompt would be the same"
            )


def read_prompts(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    columns: Mapping[str, str] | None = None,
    templates: Sequence[str] = (),
) -> list[Prompt]:
    """The prompts of a file, in its order.

    A row has `prompt` and `completion` (a text, or a list of texts: several references), or `messages`, which goes through
    the tokenizer's chat template and ends with the assistant's turn that is the reference.  columns: ours → the file's,
    which every row must have.
    templates: texts with {column} fields of the file that make the prompt; a row takes the first whose columns all have
    text in it, or else the last.

    Raises UserError for the first row that cannot be used, naming it, and for a file without rows.
    """
    prompts = []
    for row, where, values in _rows(Path(path)):
        try:
            renamed = _renamed(values, columns or {})
            text, references, is_chat = _texts(renamed, values, templates, tokenizer)
            # A chat template writes the special tokens itself.
            token_ids = tokenizer(text, add_special_tokens=not is_chat, verbose=False)["input_ids"]
            if not token_ids:
                raise BadRow("the prompt has no token")
        except BadRow as error:
            raise UserError(f"{where}: {error}") from error
        prompts.append(Prompt(row, where, text, token_ids, references))
    if not prompts:
        raise UserError(f"--data {path}: no rows")
    return prompts


def _renamed(values: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    for ours, theirs in columns.items():
        if theirs not in values:
            there = ", ".join(values) or "(none)"
            raise BadRow(f"no column {theirs}, which --columns names as {ours}={theirs}; there are {there}")
    return {**values, **{ours: values[theirs] for ours, theirs in columns.items()}}


def _texts(
    row: Mapping[str, Any], values: Mapping[str, Any], templates: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> tuple[str, list[str], bool]:
    """Prompt, references, and whether the chat template wrote the prompt."""
    if templates:
        return _filled(templates, values), _references(row), False
    if "prompt" in row and "completion" in row:
        if not isinstance(row["prompt"], str):
            raise BadRow(f"`prompt` must be a text, found {_kind(row['prompt'])}")
        return row["prompt"], _references(row), False
    if "messages" in row:
        *before, last = _turns(row["messages"])
        return _rendered(before, row.get("tools"), tokenizer), [last["content"]], True
    raise BadRow(
        f"the columns {', '.join(values) or '(none)'} hold no prompt with a reference: `prompt` and `completion`, or "
        "`messages`, are wanted. Name yours with --columns, for example --columns prompt=question,completion=answer"
    )


def _references(row: Mapping[str, Any]) -> list[str]:
    if "completion" not in row:
        raise BadRow(
            f"no reference: the columns are {', '.join(row) or '(none)'}. Name yours with --columns, for example "
            "--columns completion=response"
        )
    given = row["completion"]
    references = [given] if isinstance(given, str) else given
    if not isinstance(references, list) or not references or not all(isinstance(text, str) for text in references):
        raise BadRow(f"`completion` must be a text or a list of texts, found {_kind(given)}")
    return references


def _filled(templates: Sequence[str], values: Mapping[str, Any]) -> str:
    for template in templates:
        found = {name: values.get(name) for name in _fields(template)}
        if all(isinstance(value, str) and value.strip() for value in found.values()) or template == templates[-1]:
            break
    for name, value in found.items():
        if name not in values:
            raise BadRow(f"no column {name}, which --prompt_template names; there are {', '.join(values) or '(none)'}")
        if not isinstance(value, str | None):
            raise BadRow(f"the column {name}, which --prompt_template names, must be a text, found {_kind(value)}")
    return template.format_map({name: value or "" for name, value in found.items()})


def _fields(template: str) -> set[str]:
    try:
        parts = [part[1:] for part in Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise UserError(f"--prompt_template {template!r}: {error} (a brace itself is written twice, {{{{)") from error
    for name, format_spec, conversion in parts:
        if not name or any(sign in name for sign in ".[]") or name.isdigit() or format_spec or conversion:
            raise UserError(
                f"--prompt_template {template!r}: a field is a column's name in braces, for example {{instruction}}"
            )
    return {str(part[0]) for part in parts}


def _turns(messages: Any) -> list[dict[str, Any]]:
    """A chat's turns, of which the last is a text of the assistant."""
    if not isinstance(messages, list) or not all(isinstance(turn, dict) and "role" in turn for turn in messages):
        raise BadRow("`messages` must be a list of objects with a `role`")
    # Arrow fills keys that other messages have with None; templates ask whether a key is there.
    turns = [{key: value for key, value in turn.items() if value is not None} for turn in messages]
    if len(turns) < 2 or turns[-1]["role"] != "assistant" or not isinstance(turns[-1].get("content"), str):
        raise BadRow("`messages` must end with a text of the assistant, the reference, after a turn that it answers")
    return turns


def _rendered(turns: list[dict[str, Any]], tools: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        text = tokenizer.apply_chat_template(turns, tools=tools, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # a template is a program: it may raise anything
        raise BadRow(f"the chat template failed ({one_line(error)})") from error
    return str(text)


def _rows(path: Path) -> Iterator[Row]:
    return _parquet_rows(path) if path.suffix == ".parquet" else _json_rows(path)


def _json_rows(path: Path) -> Iterator[Row]:
    number = 0
    try:
        with io.BufferedReader(pa.input_stream(path, compression="detect")) as file:
            for number, line in enumerate(file, start=1):
                where = f"{path}, line {number}"
                if line.strip():
                    yield number, where, _parsed(line, where)
    except OSError as error:
        raise UserError(f"{path}, after line {number}: not readable ({one_line(error)})") from error


def _parsed(line: bytes, where: str) -> dict[str, Any]:
    try:
        values = json.loads(line.decode("utf-8-sig"))
        json.dumps(values, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise UserError(f"{where}: a JSON object is wanted, this is {_kind(values)}")
    return values


def _parquet_rows(path: Path) -> Iterator[Row]:
    row = 0
    try:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=256):
            for values in batch.to_pylist():
                yield row, f"{path}, row {row}", values
                row += 1
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}, after row {row}: not readable as Parquet ({one_line(error)})") from error


def _kind(value: Any) -> str:
    names = {
        type(None): "nothing",
        str: "a text",
        list: "a list",
        dict: "an object",
        int: "a number",
        float: "a number",
    }
    if value == []:
        return "an empty list"
    return names.get(type(value), type(value).__name__)

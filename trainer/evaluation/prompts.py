"""Files of prompts and reference answers → prompts for a model, and references for its answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Any

from logitcache import UserError
from logitcache.documents.chat_template import render
from logitcache.documents.document import BadDocument
from logitcache.documents.files import find_reader
from logitcache.documents.messages import ASSISTANT, read_chat
from logitcache.documents.text_tokens import TextTokens

if TYPE_CHECKING:  # options are checked before transformers is imported, which takes seconds
    from transformers import PreTrainedTokenizerBase

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
COLUMNS = ("prompt", "completion", "messages", "tools")


@dataclass(frozen=True)
class Prompt:
    """A prompt and its references.

    row: its number in the file (of a line, from 1; of a Parquet row, from 0).  where: file and row, for messages.
    text, token_ids: the input of the model.
    """

    row: int
    where: str
    text: str
    token_ids: Sequence[int]
    references: Sequence[str]


def data_stem(path: str) -> str:
    """Returns the name of a data file without its suffix. Raises UserError for a kind of file that is not read."""
    name = Path(path).name
    for suffix in SUFFIXES:
        if name.endswith(suffix) and name != suffix:
            return name.removesuffix(suffix)
    raise UserError(f"--data {path}: unknown kind of file, accepted are {', '.join(SUFFIXES)}")


def check_columns(columns: Mapping[str, str]) -> None:
    """Raises UserError if a column to rename is none that is read."""
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
    chat_template: str | None = None,
    say: Callable[[str], None] = print,
) -> list[Prompt]:
    """Reads the prompts of a file, in its order.

    A row has `prompt` and `completion` (a text, or a list of texts: several references), or `messages`, which goes through
    the tokenizer's chat template and ends with the assistant's turn that is the reference.  columns: ours → the file's,
    which every row must have.  templates: texts with {column} fields of the file that make the prompt; a row takes the
    first template whose columns all have text in it, or else the last.  chat_template: Jinja, in place of the tokenizer's
    own.  say: gets a line for each fact of the file that is to be known.

    Raises UserError for the first row that cannot be used, naming it, and for a file without rows.
    """
    prompts = []
    notes: Counter[str] = Counter()
    texts = TextTokens(tokenizer, notes)
    read = find_reader(Path(path))
    assert read is not None, path
    for document in read(Path(path)):
        try:
            if document.error:
                raise BadDocument(document.error)
            values = document.values
            renamed = _renamed(values, columns or {})
            text, references, is_chat = _texts(renamed, values, templates, tokenizer, chat_template, notes)
            # A chat template writes the special tokens itself.
            token_ids = texts.of_written(text) if is_chat else texts.of_prompt(text)
            if not token_ids:
                raise BadDocument("the prompt has no token")
        except BadDocument as error:
            raise UserError(f"{document.where}: {error}") from error
        prompts.append(Prompt(document.row, document.where, text, token_ids, references))
    if not prompts:
        raise UserError(f"--data {path}: no rows")
    for note, count in notes.items():
        say(f"{path}: {count:,} {note}")
    return prompts


def _renamed(values: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    for ours, theirs in columns.items():
        if theirs not in values:
            there = ", ".join(values) or "(none)"
            raise BadDocument(f"no column {theirs}, which --columns names as {ours}={theirs}; there are {there}")
    return {**values, **{ours: values[theirs] for ours, theirs in columns.items()}}


def _texts(
    row: Mapping[str, Any],
    values: Mapping[str, Any],
    templates: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None,
    notes: Counter[str],
) -> tuple[str, list[str], bool]:
    """Returns the prompt, its references, and whether the chat template wrote it."""
    if templates:
        return _filled(templates, values), _references(row), False
    if "prompt" in row and "completion" in row:
        if not isinstance(row["prompt"], str):
            raise BadDocument(f"`prompt` must be a text, found {_kind(row['prompt'])}")
        return row["prompt"], _references(row), False
    if "messages" in row:
        return _of_chat(row, tokenizer, chat_template, notes)
    raise BadDocument(
        f"the columns {', '.join(values) or '(none)'} hold no prompt with a reference: `prompt` and `completion`, or "
        "`messages`, are wanted. Name yours with --columns, for example --columns prompt=question,completion=answer"
    )


def _references(row: Mapping[str, Any]) -> list[str]:
    if "completion" not in row:
        raise BadDocument(
            f"no reference: the columns are {', '.join(row) or '(none)'}. Name yours with --columns, for example "
            "--columns completion=response"
        )
    given = row["completion"]
    references = [given] if isinstance(given, str) else given
    if not isinstance(references, list) or not references or not all(isinstance(text, str) for text in references):
        raise BadDocument(f"`completion` must be a text or a list of texts, found {_kind(given)}")
    return references


def _filled(templates: Sequence[str], values: Mapping[str, Any]) -> str:
    for template in templates:
        found = {name: values.get(name) for name in _fields(template)}
        if all(isinstance(value, str) and value.strip() for value in found.values()) or template == templates[-1]:
            break
    for name, value in found.items():
        if name not in values:
            raise BadDocument(
                f"no column {name}, which --prompt_template names; there are {', '.join(values) or '(none)'}"
            )
        if not isinstance(value, str | None):
            raise BadDocument(f"the column {name}, which --prompt_template names, must be a text, found {_kind(value)}")
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


def _of_chat(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, chat_template: str | None, notes: Counter[str]
) -> tuple[str, list[str], bool]:
    chat = read_chat(row)
    notes.update(chat.notes)
    if (
        len(chat.messages) < 2
        or chat.messages[-1]["role"] != ASSISTANT
        or not isinstance(chat.messages[-1].get("content"), str)
    ):
        raise BadDocument(
            "`messages` must end with a text of the assistant, the reference, after a turn that it answers"
        )
    if chat_template is None and not tokenizer.chat_template:
        raise BadDocument(
            "chat messages, but the model's tokenizer has no chat template; name a file by --chat_template"
        )
    *before, last = chat.messages
    text = render(tokenizer, before, chat.tools, add_generation_prompt=True, chat_template=chat_template)
    return text, [last["content"]], True


def _kind(value: Any) -> str:
    if value == []:
        return "an empty list"
    if value is None:
        return "nothing"
    names = {str: "a text", list: "a list", dict: "an object", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)

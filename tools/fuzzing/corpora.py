"""Documents of every layout and kind of file, and chats under many templates."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from damage import ODD_VALUES, damaged_bytes, damaged_tree
from trial import Command, Trial

TEMPLATES = sorted(Path(__file__).parents[2].glob("tests/data/templates/*.jinja"))
HOSTILE = [
    "{{ raise_exception('no') }}",
    "{{ 1 / 0 }}",
    "{{ messages[5].content }}",
    "{{ messages | tojson }}",
    "{% for m in [] %}{{ m }}{% endfor %}",
    "{% for m in messages %}{{ m.content + 1 }}{% endfor %}",
    "{% for m in messages %}{{ m.content.x.y }}{% endfor %}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "{% generation %}{% for m in messages %}{{ m.content }}{% endfor %}{% endgeneration %}",
    "{% for m in messages %}{% generation %}{% generation %}{{ m.role }}{% endgeneration %}{% endgeneration %}{% endfor %}",
    "{% for m in messages | reverse %}{{ m.role }}:{{ m.content }}{% endfor %}",
    "{{ messages | length }}{{ add_generation_prompt }}{{ tools }}",
    "{% if add_generation_prompt %}{{ messages[-1].content }}{% endif %}",
    "{% for m in messages %}{{ m.content | upper | trim }}\n{% endfor %}",
    "{% set x = namespace(n=0) %}{% for m in messages %}{% set x.n = x.n + 1 %}{{ x.n }}{{ m.content }}{% endfor %}",
    "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ strftime_now('%d %q') }}{{ messages[0]['content'] }}",
    "{% for m in messages %}{{ m.role }}{% endif %}",
    "{{",
    "constant",
    "{% for i in range(99999) %}{% endfor %}{{ messages[0].content[:3] }}",
    "{% for m in messages %}{{ '<|eos|>' }}{{ m.content }}{{ '<|eos|>' }}{% endfor %}",
    "{% include 'x' %}",
]
TEXTS = [
    "the hens",
    "",
    " ",
    "a  b ",
    "x" * 900,
    "é👩‍👧\u0301",
    "\n\n",
    "<|eos|>",
    "<|end|><|assistant|>",
    "\x00",
    "\u202e",
    "ﬁ\u2028",
]
ROLES = [
    "system",
    "user",
    "assistant",
    "tool",
    "Assistant",
    "gpt",
    "human",
    "bot",
    "model",
    "developer",
    "nobody",
    "",
    None,
]


def corpora(trial: Trial) -> list[Command]:
    """Documents of one layout, some of them odd, in a file of some kind, which may be damaged."""
    layout = trial.choose([_text, _pair, _ids, _chat])
    rows = [layout(trial) for _ in range(trial.choose([1, 2, 5, 20]))]
    if trial.maybe(0.5):
        rows = damaged_tree(trial.random, rows)
    return [_build(trial, _write(trial, rows))]


def messages(trial: Trial) -> list[Command]:
    """Chats, some of them odd, under a published template's logic or a hostile one; scored, or to be answered."""
    rows = [_chat(trial) for _ in range(trial.choose([1, 2, 5]))]
    if trial.maybe(0.3):
        rows = damaged_tree(trial.random, rows)
    data = _write(trial, rows, damage=0.03)
    template = trial.choose(TEMPLATES).read_text() if trial.maybe(0.7) else trial.choose(HOSTILE)
    if trial.maybe(0.1):
        template = damaged_bytes(trial.random, template.encode()).decode(errors="replace")
    options = ["--chat-template", trial.write(template, ".jinja")] * trial.maybe(0.9)
    if trial.maybe(0.1):
        limits = ["--max_new_tokens", "1", "--seeds", "1", "--backend", "transformers", "--answers", str(trial.path())]
        return [["trainer", "eval", str(trial.material / "student"), "--generate", "--data", data, *limits, *options]]
    options += ["--turns", trial.choose(["all", "last", "each"])] * trial.maybe(0.7)
    return [_build(trial, data, *options)]


def _build(trial: Trial, data: str, *options: str) -> Command:
    more = list(options)
    for share, option in [
        (0.5, ["--skip-bad"]),
        (0.3, ["--long", trial.choose(["split", "truncate", "skip"])]),
        (0.2, ["--max-length", trial.choose(["2", "50", "100"])]),
        (0.15, ["--keep", trial.choose(["id", "id,meta", "text", "nobody"])]),
        (0.1, ["--columns", trial.choose(["prompt=text", "text=id", "loss_mask=labels", "messages=conversations"])]),
        (0.1, ["--layout", trial.choose(["text", "messages", "input_ids", "prompt-completion"])]),
        (0.2, ["--shard-positions", trial.choose(["50", "500"])]),
        (0.1, ["--tail-groups", "2", "--temperatures", "2", "--tail-entropy", "--tail-samples", "1"]),
    ]:
        more += option * trial.maybe(share)
    command = ["logitcache", trial.choose(["build"] * 9 + ["plan"]), "--teacher", str(trial.material / "teacher")]
    out = ["--out", str(trial.path())] * (command[1] == "build")
    return [*command, "--backend", "transformers", "--data", data, *out, "--top-k", "4", *more]


def _text(trial: Trial) -> dict[str, Any]:
    return {"text": trial.choose(TEXTS), "id": trial.choose([1, 2**63 - 1, "x", 0.5, None, True]), "meta": {"a": 1}}


def _pair(trial: Trial) -> dict[str, Any]:
    return {"prompt": trial.choose(TEXTS), "completion": trial.choose(TEXTS), "id": trial.choose([1, None])}


def _ids(trial: Trial) -> dict[str, Any]:
    length = trial.choose([0, 1, 2, 5, 300])
    row: dict[str, Any] = {"input_ids": [trial.random.randrange(260) for _ in range(length)]}
    for name in ("loss_mask", "attention_mask", "completion_mask", "assistant_masks"):
        if trial.maybe(0.3):
            row[name] = [trial.choose([0, 1, 1, True, 0.5]) for _ in range(length + trial.choose([0, 0, 0, 1, -1]))]
    if trial.maybe(0.4):
        row["labels"] = [number if trial.maybe(0.7) else -100 for number in row["input_ids"]]
    return row


def _chat(trial: Trial) -> dict[str, Any]:
    turns = [_turn(trial, number) for number in range(trial.choose([0, 1, 2, 3, 4, 6]))]
    row: dict[str, Any] = {"messages": turns, "id": 1}
    if trial.maybe(0.2):
        parameters = {"type": "object", "properties": {"city": {"type": trial.choose(["string", None])}}}
        row["tools"] = [
            {"type": "function", "function": {"name": "weather", "description": "", "parameters": parameters}}
        ]
    if trial.maybe(0.15):
        row = {"conversations": [{"from": turn["role"], "value": turn["content"]} for turn in turns]}
    if trial.maybe(0.15):
        row = {name: json.dumps(value) for name, value in row.items()}
    return row


def _turn(trial: Trial, number: int) -> dict[str, Any]:
    role = trial.choose(ROLES) if trial.maybe(0.05) else ("user", "assistant")[number % 2]
    turn: dict[str, Any] = {"role": role, "content": trial.choose(TEXTS)}
    if trial.maybe(0.1):
        turn["content"] = trial.choose([None, [{"type": "text", "text": trial.choose(TEXTS)}]])
    if trial.maybe(0.08):
        arguments = trial.choose([{"city": "Rome"}, {"a": None, "b": [1, {"c": None}]}, '{"x": 1}', None])
        turn["tool_calls"] = [{"type": "function", "function": {"name": "weather", "arguments": arguments}}]
    if trial.maybe(0.08):
        turn[trial.choose(["weight", "train", "thinking", "reasoning_content", "name"])] = trial.choose(
            [0, 1, "x", *ODD_VALUES]
        )
    return turn


def _write(trial: Trial, rows: Any, damage: float = 0.15) -> str:
    """The rows in a file of some kind; as Parquet only where Arrow has a type for them."""
    lines = "\n".join(
        json.dumps(row, ensure_ascii=trial.maybe(0.5)) for row in (rows if isinstance(rows, list) else [rows])
    )
    content, suffix = lines.encode(errors="surrogatepass"), ".jsonl"
    kind = trial.choose(["jsonl", "jsonl", "gz", "zst", "parquet", "parquet", "json columns", "txt"])
    if kind in ("parquet", "json columns"):
        try:
            content, suffix = _parquet(rows, as_json=kind == "json columns"), ".parquet"
        except (pa.ArrowException, TypeError, ValueError, OverflowError, AttributeError):
            kind = "jsonl"
    if kind == "txt":
        suffix = ".txt"
    if kind == "gz":
        content, suffix = gzip.compress(content, mtime=0), ".jsonl.gz"
    if kind == "zst":
        content, suffix = zstandard.compress(content), ".jsonl.zst"
    return trial.write(damaged_bytes(trial.random, content) if trial.maybe(damage) else content, suffix)


def _parquet(rows: Any, *, as_json: bool) -> bytes:
    table = pa.Table.from_pylist(rows)
    if as_json:
        texts = {
            name: pa.array([json.dumps(row.get(name)) for row in rows], pa.string()) for name in table.schema.names
        }
        table = pa.table({name: pa.ExtensionArray.from_storage(pa.json_(), text) for name, text in texts.items()})
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, row_group_size=2)
    return bytes(buffer.getvalue())

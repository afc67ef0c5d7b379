"""The text of a dataset card: what a cache is, what it holds, how to read it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from logitcache.assembly.card_columns import column_table, decoding
from logitcache.format.manifest import Manifest, fingerprint_digest
from logitcache.report.description import amounts, history, origin
from logitcache.report.statistics import PERCENTILES, Statistics


def card_text(manifest: Manifest, identity: str, statistics: Statistics, licenses: Mapping[str, str]) -> str:
    """Returns YAML as the Hugging Face Hub and `datasets` read it, then Markdown. Words of the manifest are shown as text.

    licenses: "license" of the cache, an identifier of the Hub; "teacher_license" and "data_license", any words.
    """
    words, sql = decoding(manifest.layout)
    rows = [(label, value) for label, value in origin(manifest) if label != "fingerprint"]
    steps = "\n".join(f"{number}. {_plain(step)}" for number, step in enumerate(history(manifest), start=1))
    return _CARD.format(
        yaml=_yaml(manifest, licenses),
        title=_plain(_teacher(manifest)),
        origin=_table(rows),
        amounts=_table(amounts(manifest)),
        statistics=_statistics(statistics),
        precision=words,
        columns=column_table(manifest.layout),
        sql=sql,
        licenses=_table((_LICENSE_LABELS[name], licenses[name]) for name in _LICENSE_LABELS),
        identity=identity,
        fingerprint=fingerprint_digest(manifest.fingerprint),
        history=steps or "As the build left it.",
    )


_LICENSE_LABELS = {"license": "this cache", "teacher_license": "the teacher", "data_license": "the documents"}


def _yaml(manifest: Manifest, licenses: Mapping[str, str]) -> str:
    """Quotes a text for YAML: JSON strings are YAML strings, whatever is in them."""
    lines = [f"license: {licenses['license']}"]
    lines += [
        f"{name}: {json.dumps(licenses[name], ensure_ascii=False)}" for name in _LICENSE_LABELS if name != "license"
    ]
    teacher = json.dumps(f"Log-probabilities of {_teacher(manifest)}", ensure_ascii=False)
    lines += [f"pretty_name: {teacher}", "size_categories:", f"- {_size_category(manifest.num_sequences)}"]
    return "\n".join(lines)


def _teacher(manifest: Manifest) -> str:
    return str(manifest.fingerprint.get("teacher", {}).get("name", "an unknown teacher"))


def _size_category(count: int) -> str:
    """Returns the Hub's name for a number of rows."""
    names = ["1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T"]
    power = len(str(max(count, 1))) - 3  # 1 for 1,000 to 9,999
    if power < 1:
        return "n<1K"
    return f"{names[power - 1]}<n<{names[power]}" if power < len(names) else "n>1T"


def _statistics(statistics: Statistics) -> str:
    if not statistics.num_positions:
        return "No position."
    of = "positions of some row groups, evenly spread" if statistics.sampled else "positions"
    entropy = "entropy, nats, the tail as one outcome" if statistics.entropy_is_lower_bound else "entropy, nats"
    covered = ["mass covered", *(f"{mass:.4f}" for mass in statistics.mass_covered)]
    ks = _grid(["most probable entries", *map(str, statistics.ks)], [covered])
    spread = _grid(
        ["", "mean", *(f"{percentile} %" for percentile in PERCENTILES)],
        [
            [entropy, *(f"{value:.3f}" for value in statistics.entropy.values())],
            ["mass of the tail", *(f"{value:.2e}" for value in statistics.tail_mass.values())],
        ],
    )
    return f"Of {statistics.num_positions:,} {of}:\n\n{ks}\n\n{spread}"


def _grid(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


def _table(rows: Iterable[tuple[str, str]]) -> str:
    return _grid(["", ""], [[label, _plain(value)] for label, value in rows])


def _plain(text: str) -> str:
    """Escapes words of a manifest so that Markdown shows them: one line, no tag, no link, no cell of a table."""
    shown = "".join(sign for sign in " ".join(text.split()) if sign.isprintable())
    escaped = shown.replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{sign}" if sign in "\\`*_{}[]|~" else sign for sign in escaped)


_CARD = """\
---
{yaml}
task_categories:
- text-generation
tags:
- logitcache
- knowledge-distillation
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*.parquet
---

# Log-probabilities of {title}

A cache of a teacher's next-token distributions, to distil students from without the teacher. Row i of a sequence's targets is the
teacher's distribution of token i + 1 given tokens 0…i; a position is stored where `loss_mask` is true for token i + 1.
Log-probabilities are natural logarithms at temperature 1, normalised over the teacher's full vocabulary.

## What it is

{origin}

## What it holds

{amounts}

{statistics}

## Licences

{licenses}

## Load it

Wherever it lies, as this folder or at a URL such as `hf://datasets/ORG/NAME` or `s3://bucket/name`:

```python
import logitcache

cache = logitcache.open(".")
sequence = cache[0]  # row_id, input_ids [T], loss_mask [T], positions [M], targets
targets = sequence.targets  # token_ids [M, k], logprobs [M, k], tail_logprob [M]
```

```
trainer fit --cache . --student NAME --loss todi --output_dir runs/todi
```

The columns as they are stored, without this project:

```python
from datasets import load_dataset

rows = load_dataset("parquet", data_files="data/*.parquet", split="train", streaming=True)
```

Token ids and log-probabilities of every entry in SQL (DuckDB); `position` counts a row's stored positions from 1:

```sql
{sql}```

## Columns

{columns}

{precision}

## Where it comes from

{history}

| | |
|---|---|
| identity | `{identity}` |
| fingerprint | `{fingerprint}` |

The identity is the SHA-256 of `logitcache.json`, which names that of every other file but this one. Compare it with what
the cache's maker tells you some other way: `logitcache verify CACHE --against IDENTITY`. The fingerprint is that of
teacher, tokenizer, corpus and settings.
"""

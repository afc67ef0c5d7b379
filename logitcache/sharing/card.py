"""README.md of a cache: the dataset card that makes its folder a Hugging Face dataset repository."""

from __future__ import annotations

from logitcache.format.codec import TEMPERED_PREFIX
from logitcache.format.manifest import Manifest


def dataset_card(manifest: Manifest) -> str:
    """Text of the card: YAML that `datasets` reads, what the cache is, how to load it."""
    teacher, corpus, capture = (manifest.fingerprint[part] for part in ("teacher", "corpus", "capture"))
    positions = manifest.num_positions
    rows = [
        ("teacher", f"{teacher['name']} ({teacher['architecture']}, {teacher['dtype']})"),
        ("engine", f"{teacher['engine']} {teacher['engine_version']}"),
        ("sequences", f"{manifest.num_sequences:,}"),
        ("positions", f"{positions:,}"),
        ("entries per position", f"{manifest.num_entries / positions:.1f} (at most {capture['top_k']})"),
        ("mass covered by the entries", f"{1 - manifest.mean_tail_mass:.4f}"),
        ("bytes per position", f"{manifest.num_bytes / positions:.1f}"),
        ("vocabulary", f"{manifest.layout.vocab_size:,}"),
        ("documents from", ", ".join(source["name"] for source in corpus["sources"])),
    ]
    rows += [(f"documents left out: {reason}", f"{count:,}") for reason, count in manifest.skipped.items()]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    columns = "\n".join(f"| `{c.name}` | `{c.type}` | {_meaning(c.name)} |" for c in manifest.layout.schema())
    steps = {name: manifest.layout.to_json()[name] for name in ("logprob_step", "group_step")}
    return _CARD.format(table=table, columns=columns, **steps)


def _meaning(column: str) -> str:
    if column.startswith(TEMPERED_PREFIX):
        return f"log Σ p^(1/T) over the tail, T = {column.removeprefix(TEMPERED_PREFIX)}"
    return _MEANINGS.get(column, "kept from the source")


_MEANINGS = {
    "row_id": "hash of token ids and loss mask",
    "input_ids": "the sequence",
    "loss_mask": "true where a token is trained",
    "num_entries": "entries of each stored position",
    "token_ids": "entries of all stored positions, one after the other",
    "logprobs": "their log-probabilities, descending within a position",
    "tail_logprob": "log of the probability outside a position's entries",
    "group_logprobs": "log of the probability outside the entries, by tail group; groups in `tail_groups.parquet`",
    "tail_entropy": "Σ p log p over the tail, divided by its mass",
    "sample_ids": "ids drawn from the tail",
    "sample_logprobs": "their log-probabilities",
}

_CARD = """\
---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*.parquet
tags:
- logitcache
- knowledge-distillation
---

# Teacher log-probabilities

Made by `logitcache build`. Row i of a sequence's targets is the teacher's distribution of token i + 1 given tokens 0…i;
a position is stored where `loss_mask` is true for token i + 1. Log-probabilities are natural logarithms at temperature 1,
normalised over the full vocabulary, rounded to multiples of {logprob_step:g} (of tail groups: {group_step:g}); the tail is not
rounded.

|  |  |
|---|---|
{table}

## Columns

| column | type | meaning |
|---|---|---|
{columns}

## Load it

```python
import logitcache

cache = logitcache.open(".")  # this folder
sequence = cache[0]  # row_id, input_ids [T], loss_mask [T], positions [M], targets
targets = sequence.targets  # token_ids [M, k], logprobs [M, k], tail_logprob [M]
```

```sql
-- DuckDB: the first position's entries of every row
SELECT row_id, token_ids[1:num_entries[1]] AS ids, logprobs[1:num_entries[1]] AS logprobs
FROM 'data/*.parquet';
```

Train a student from it: `trainer fit --cache . --student NAME --loss todi`.
"""

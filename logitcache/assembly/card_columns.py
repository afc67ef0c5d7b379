"""The card explains the columns: their meanings, and the SQL that turns them into token ids and log-probabilities."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np

from logitcache.format.layout import Layout


def column_table(layout: Layout) -> str:
    """Returns a Markdown table of the columns."""
    meanings = _MEANINGS | {name: column.meaning for name, column in layout.tail_columns.items()}
    rows = [f"| `{c.name}` | `{c.type}` | {meanings.get(c.name, 'kept from the source')} |" for c in layout.schema()]
    return "\n".join(["| column | type | meaning |", "|---|---|---|", *rows])


def decoding(layout: Layout) -> tuple[str, str]:
    """Explains how the columns are read: in words, and as SQL for DuckDB."""
    quantization = layout.quantization
    if quantization is None:
        return _EXACT + _low_rank(layout), _EXACT_SQL
    names = asdict(quantization) | {
        "u": quantization.uniform_from,
        "n": quantization.square_root_steps,
        "D": quantization.uniform_step,
    }
    names["half"] = f"{quantization.bound(np.log([1e-3]))[0]:.3f}"
    groups = _GROUPS if layout.tail_parts.groups else ""
    return (_ROUNDED + groups).format(**names) + _low_rank(layout), _ROUNDED_SQL.format(**names)


def _low_rank(layout: Layout) -> str:
    """Explains how the tail is rebuilt from its coefficients; empty without these."""
    rank, quantization = layout.tail_parts.rank, layout.quantization
    if not rank:
        return ""
    number = "v" if quantization is None else f"xor(v::INT >> 1, -(v::INT & 1)) * {quantization.coefficient_step!r}"
    return _LOW_RANK.format(rank=rank, number=number)


_MEANINGS = {
    "row_id": "hash of token ids and loss mask",
    "input_ids": "the sequence",
    "loss_mask": "true where a token is trained",
    "num_entries": "entries of each stored position",
    "token_ids": "entries of all stored positions, one after the other",
    "logprobs": "their log-probabilities, descending within a position",
    "id_gaps": "ranks between an entry and the one before it in its position, ascending",
    "levels_above_lowest": "levels from the position's least probable entry up to this one",
    "lowest_level": "level of each position's least probable entry",
    "tail_logprob": "log of the probability outside a position's entries",
}

_EXACT = "Log-probabilities are what the teacher gave in float32."

_EXACT_SQL = """\
SELECT row_id, unnest(flatten([[p for _ in range(num_entries[p])] for p in range(1, len(num_entries) + 1)])) AS position,
  unnest(token_ids) AS token_id, unnest(logprobs) AS logprob
FROM 'data/*.parquet';
"""

_ROUNDED = """\
Log-probabilities are rounded to levels: level c stands for p = (1 − c/{n})² up to level {u}, and beyond it for steps of
{D:g} nats (an error of at most {half} nats where p ≥ 0.001). An entry's level is `lowest_level` of its position minus
`levels_above_lowest`. A position's entries are in ascending order of rank; a rank is the sum of the gaps so far plus the
number of entries before. The token of rank r is
`frequent_ids[r]` where there are so many, otherwise r − len(frequent_ids). That list is in the file metadata of each shard,
under the key `logitcache.codebook`. The tail, its normalisers and its entropy are rounded to multiples of {tail_step:g},
sampled log-probabilities to {sample_step:g}."""

_GROUPS = """

`group_levels` is 0 for an empty group; from level v > 0, the log of the group's share of the tail is
(profile + z)·{group_step:g}, z = (v − 1)/2 for odd v and −v/2 for even v. The groups' profile is beside `frequent_ids`."""

_LOW_RANK = """

A position has {rank} `tail_coefficients`. With `tail_basis.parquet`, a row per token in the order of their ids, they give the
logits of the whole vocabulary, about and up to a shift: offset + directions · coefficients. Outside the entries a token's
probability is then the tail's times the softmax, over the tail, of these. The logits of all tokens in SQL, here for the first
position of the first row (position p has the coefficients {rank}·(p − 1) + 1 to {rank}·p):

```sql
WITH position AS (
  SELECT [{number} FOR v IN tail_coefficients[1:{rank}]] AS z FROM 'data/*.parquet' LIMIT 1
)
SELECT file_row_number AS token_id, "offset" + list_dot_product(directions[1:{rank}], z) AS logit
FROM read_parquet('tail_basis.parquet', file_row_number = true), position;
```"""

_ROUNDED_SQL = """\
WITH books AS (
  SELECT file_name AS filename, CAST(json_extract(decode(value), '$.frequent_ids') AS INTEGER[]) AS frequent_ids
  FROM parquet_kv_metadata('data/*.parquet') WHERE decode(key) = 'logitcache.codebook'
), entries AS (
  SELECT filename, file_row_number, row_id, lowest_level,
    unnest(flatten([[p for _ in range(num_entries[p])] for p in range(1, len(num_entries) + 1)])) AS position,
    unnest(id_gaps) AS gap, unnest(levels_above_lowest) AS above, generate_subscripts(id_gaps, 1) AS place
  FROM read_parquet('data/*.parquet', filename = true, file_row_number = true)
), ranks AS (
  SELECT *, lowest_level[position] - above AS level,
    CAST(sum(gap + 1) OVER (PARTITION BY filename, file_row_number, position ORDER BY place) AS BIGINT) - 1 AS rank
  FROM entries
)
SELECT row_id, position,
  CASE WHEN rank < len(frequent_ids) THEN frequent_ids[rank + 1] ELSE rank - len(frequent_ids) END AS token_id,
  CASE WHEN level < {u} THEN 2 * ln(1 - level / {n}) ELSE 2 * ln(1 - {u} / {n}) - (level - {u}) * {D:g} END AS logprob
FROM ranks JOIN books USING (filename);
"""

"""A reader hands out no rows that no teacher can have given, whatever checksums they have."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import logitcache
from logitcache import UserError
from logitcache.format.codebook import CODEBOOK_KEY
from logitcache.format.layout import Layout
from logitcache.format.manifest import MANIFEST_NAME
from logitcache.format.quantization import PRESETS
from logitcache.format.shards import shard_name
from logitcache.format.tail_parts import TailParts
from logitcache.maintenance.slice import slice_cache
from tests.helpers.smallcaches import EVERYTHING, VOCAB, layouts, random_rows, scored_rows, small, write_cache

ROWS = random_rows(
    60, Layout(VOCAB, TailParts(groups=3, temperatures=(2.0,), entropy=True, samples=2)), seed=3, longest=20
)
LAYOUTS = {
    precision: Layout(VOCAB, TailParts(groups=3, temperatures=(2.0,), entropy=True, samples=2), precision=precision)
    for precision in PRESETS
}
Change = Callable[[list[Any]], object]


def at(place: int, value: object) -> Change:
    """The change of one value of a column, counted through all rows."""
    return lambda values: values.__setitem__(place, value(values[place]) if callable(value) else value)


def alter(root: Path, column: str, change: Change) -> None:
    """A shard with another column, or codebook, whose checksums are right."""
    path, data = root / shard_name(0, 1), json.loads((root / MANIFEST_NAME).read_text())
    shard = data["shards"][0]
    with pq.ParquetFile(path) as file:
        table, codebook = file.read(), json.loads(file.metadata.metadata.get(CODEBOOK_KEY, b"{}"))
    if column in codebook:
        change(codebook[column])
    else:
        lists = table[column].combine_chunks()
        values = lists.values.to_pylist()
        change(values)
        changed = pa.ListArray.from_arrays(lists.offsets, pa.array(values, lists.type.value_type))
        table = table.set_column(table.schema.get_field_index(column), table.schema.field(column), changed)
    with pq.ParquetWriter(path, table.schema, compression="zstd", write_page_checksum=True) as writer:
        writer.add_key_value_metadata({CODEBOOK_KEY: json.dumps(codebook).encode()})
        first = 0
        for size in shard["row_group_sizes"]:
            writer.write_table(table.slice(first, size), row_group_size=size)
            first += size
    shard |= {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "num_bytes": path.stat().st_size}
    (root / MANIFEST_NAME).write_text(json.dumps(data | {"num_bytes": shard["num_bytes"]}))


OUTSIDE, TWICE = "outside the vocabulary of 50", "its codebook has an id twice"
OF_ALL: dict[str, tuple[str, Change, str]] = {
    "input id": ("input_ids", at(7, 2**30), f"row . has an input id {OUTSIDE}"),
    "negative input id": ("input_ids", at(0, -1), f"row 0 has an input id {OUTSIDE}"),
    "mask": (
        "loss_mask",
        lambda mask: mask.__setitem__(slice(None), [True] * len(mask)),
        "the loss mask of row . trains",
    ),
    "first token": ("loss_mask", at(0, True), "the loss mask of row 0 trains"),
    "tail": ("tail_logprob", at(3, 5.0), "(not sum to 1|above 0) at stored position . of row ."),
    "tail that is none": ("tail_logprob", at(3, float("nan")), "not a number|not sum to 1"),
    "tempered": ("tail_log_norm_T2", at(0, float("inf")), "a tempered tail that is not a number at stored position 0"),
    "entropy": ("tail_entropy", at(1, 1.0), "a tail entropy that is not ≤ 0"),
    "sample": ("sample_ids", at(2, VOCAB), "a sampled id outside the vocabulary"),
    "sample logprob": ("sample_logprobs", at(2, 0.5), "a sampled log-probability above 0"),
}
OF_EXACT: dict[str, tuple[str, Change, str]] = {
    "id": ("token_ids", at(5, VOCAB), "a token id outside the vocabulary"),
    "negative id": ("token_ids", at(5, -7), "a token id outside the vocabulary"),
    "padding": ("token_ids", at(5, -1), "padding that has a log-probability"),
    "twice": ("token_ids", lambda ids: ids.__setitem__(1, ids[0]), "the same token id twice at stored position 0"),
    "above zero": ("logprobs", at(0, 0.5), "not sum to 1|above 0"),
    "groups": ("group_logprobs", at(4, -0.01), "tail groups that do not add up"),
}
OF_ROUNDED: dict[str, tuple[str, Change, str]] = {
    "codebook": ("frequent_ids", at(0, 10**9), OUTSIDE),
    "negative codebook": ("frequent_ids", at(0, -7), OUTSIDE),
    "codebook, twice": ("frequent_ids", lambda ids: ids.__setitem__(0, ids[1]), TWICE),
    "gap": ("id_gaps", at(4, 2**31 - 1), "no vocabulary"),
    "negative gap": ("id_gaps", at(4, -1), "entries that do not ascend"),
    "groups": ("group_levels", at(4, 61), "tail groups that do not add up"),
    "profile": ("group_profile", lambda profile: profile.pop(), "its codebook is of 2 tail groups"),
}
CASES = [
    pytest.param(precision, *case, id=f"{name}, {precision}")
    for precision, cases in (("exact", OF_ALL | OF_EXACT), ("balanced", OF_ALL | OF_ROUNDED))
    for name, case in cases.items()
]


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "column", "change", "what"), CASES)
def test_a_row_that_cannot_be_is_refused(
    tmp_path: Path, precision: str, column: str, change: Change, what: str
) -> None:
    write_cache(tmp_path, ROWS, LAYOUTS[precision])
    alter(tmp_path, column, change)
    cache = logitcache.open(tmp_path)
    with pytest.raises(UserError, match=rf"train-00000-of-00001\.parquet was altered: .*({what}).*\(row group 0\)"):
        list(cache)
    with pytest.raises(UserError, match="was altered"):
        _ = cache[0]


def test_every_row_group_is_looked_at(tmp_path: Path) -> None:
    cache = write_cache(tmp_path, ROWS, LAYOUTS["exact"], row_group_bytes=4000)
    groups = len(cache.manifest.shards[0].row_group_sizes)
    assert groups > 3
    alter(tmp_path, "tail_logprob", at(-1, -1e-3))
    cache = logitcache.open(tmp_path)
    assert cache[0].row_id
    with pytest.raises(UserError, match=rf"not sum to 1 at stored position \d+ of row \d+ \(row group {groups - 1}\)"):
        list(cache)


def test_a_frequent_id_has_one_rank(tmp_path: Path) -> None:
    """By its place among the others it would come out twice."""
    write_cache(tmp_path, ROWS, LAYOUTS["balanced"])
    with pq.ParquetFile(tmp_path / shard_name(0, 1)) as file:
        frequent = json.loads(file.metadata.metadata[CODEBOOK_KEY])["frequent_ids"]
    alter(tmp_path, "id_gaps", at(0, len(frequent) + min(frequent)))
    with pytest.raises(UserError, match="no vocabulary"):
        list(logitcache.open(tmp_path))


def test_a_slice_of_such_rows_takes_no_memory_for_ids_that_are_none(tmp_path: Path) -> None:
    write_cache(tmp_path / "cache", ROWS, LAYOUTS["exact"])
    alter(tmp_path / "cache", "token_ids", at(5, 2**31 - 1))
    with pytest.raises(UserError, match="a token id outside the vocabulary"):
        slice_cache(tmp_path / "cache", tmp_path / "out", rows="0:5")


@pytest.mark.slow
@given(layouts(), st.data())
@small
def test_what_the_writer_wrote_is_read(
    tmp_path_factory: pytest.TempPathFactory, layout: Layout, data: st.DataObject
) -> None:
    rows = data.draw(scored_rows(layout))
    assert len(list(write_cache(tmp_path_factory.mktemp("cache"), rows, layout))) == len(rows)


def test_wide_and_ragged_rows_are_read(tmp_path: Path) -> None:
    for precision in PRESETS:
        layout = Layout(VOCAB, TailParts(groups=3, temperatures=(0.5,), entropy=True, samples=2), precision=precision)
        rows = random_rows(30, layout, seed=9, max_entries=VOCAB)
        assert len(list(write_cache(tmp_path / precision, rows, layout))) == 30
    assert EVERYTHING.vocab_size == VOCAB

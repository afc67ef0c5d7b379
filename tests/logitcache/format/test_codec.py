"""SparseTargets → Arrow columns → SparseTargets: what is kept exactly, and what is rounded by how much."""

from __future__ import annotations

import hashlib
import json
import math
import struct
import tracemalloc
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logitcache import UserError
from logitcache.format.codebook import CODEBOOK_KEY, Codebook
from logitcache.format.codec import DecodedRows, encode
from logitcache.format.layout import METADATA_KEY, NEWEST_FORMAT, RESERVED_COLUMNS, Layout, read_layout
from logitcache.format.quantization import PRESETS
from logitcache.format.sequences import TokenSequence
from logitcache.format.targets import SparseTargets, concatenate
from tests.helpers.smallcaches import (
    COLUMNS,
    EVERYTHING,
    VOCAB,
    Row,
    assert_holds,
    assert_same_entries,
    at_precision,
    layouts,
    random_rows,
    scored_rows,
    small,
)


def encoded(rows: list[Row], layout: Layout, codebook: Codebook | None = None) -> pa.Table:
    """As it comes from a shard, whose file metadata holds the codebook."""
    targets = [targets for _, targets in rows]
    codebook = codebook or Codebook.of(concatenate(targets), layout.quantization)
    table = encode([sequence for sequence, _ in rows], targets, layout, codebook)
    return table.replace_schema_metadata(table.schema.metadata | codebook.to_metadata())


@st.composite
def codebooks(draw: st.DrawFn, layout: Layout) -> Codebook:
    """Any ids may be called frequent, and any profile typical."""
    ids = draw(st.lists(st.integers(0, layout.vocab_size - 1), unique=True, max_size=layout.vocab_size))
    profile = draw(
        st.lists(st.integers(-300, 20), min_size=layout.tail_parts.groups, max_size=layout.tail_parts.groups)
    )
    return Codebook(np.array(ids, np.int32), np.array(profile, np.int32))


@pytest.mark.slow
@small
@given(data=st.data(), layout=layouts())
def test_rows_come_back_as_they_were_written(data: Any, layout: Layout) -> None:
    rows = data.draw(scored_rows(layout))
    decoded = DecodedRows(encoded(rows, layout, data.draw(st.none() | codebooks(layout))), layout)
    assert len(decoded) == len(rows)
    for cached, row in zip(decoded, rows, strict=True):
        assert_holds(cached, row, layout)


@pytest.mark.slow
@small
@given(data=st.data(), layout=layouts())
def test_rows_that_are_read_and_written_again_do_not_change(data: Any, layout: Layout) -> None:
    rows = data.draw(scored_rows(layout))
    once = DecodedRows(encoded(rows, layout), layout)
    again = [(TokenSequence(s.input_ids, s.loss_mask, s.columns), s.targets) for s in once]
    other_codebook = data.draw(codebooks(layout))
    twice = DecodedRows(encoded(again, layout, other_codebook), layout)
    for first, second in zip(once, twice, strict=True):
        for name in ("token_ids", "logprobs", "tail_logprob", "group_logprobs", "tail_entropy", "sample_logprobs"):
            assert np.array_equal(getattr(first.targets, name), getattr(second.targets, name)), name
        for temperature, values in first.targets.tempered_tail.items():
            assert np.array_equal(values, second.targets.tempered_tail[temperature])


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRESETS)
@small
@given(data=st.data(), vocab_size=st.sampled_from([2, 1000, 1_000_000]), k=st.integers(1, 80))
def test_any_ids_and_log_probabilities_come_back(data: Any, precision: str, vocab_size: int, k: int) -> None:
    """k = 1, a million tokens, ties, log-probabilities from 0 down to −inf."""
    k = min(k, vocab_size)
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    layout = Layout(vocab_size, precision=precision)
    levels = st.sampled_from([0.0, -1e-7, -0.3, -1.0, -6.9, -10.4, -30.0, -103.0, -4000.0, -np.inf])
    values = data.draw(st.lists(levels | st.floats(-120, 0, width=32), min_size=3 * k, max_size=3 * k))
    logprobs = -np.sort(-np.array(values, np.float32).reshape(3, k), axis=1)
    ids = np.stack([random.choice(vocab_size, k, replace=False) for _ in range(3)]).astype(np.int32)
    written = SparseTargets(ids, logprobs, np.array([-np.inf, -2.5, 0.0], np.float32))
    sequence = TokenSequence(np.arange(4, dtype=np.int32), np.arange(4) > 0)
    read = DecodedRows(encoded([(sequence, written)], layout), layout)[0].targets
    assert_same_entries(read, written, layout.quantization)
    assert read.tail_logprob.tolist() == written.tail_logprob.tolist()


def test_a_sequence_without_a_stored_position_comes_back_empty() -> None:
    nothing = SparseTargets(np.zeros((0, 0), np.int32), np.zeros((0, 0), np.float32), np.zeros(0, np.float32))
    sequence = TokenSequence(np.array([3, 4], dtype=np.int32), np.array([False, False]))
    read = DecodedRows(encoded([(sequence, nothing)], Layout(VOCAB)), Layout(VOCAB))[0]
    assert (len(read.targets), read.input_ids.tolist()) == (0, [3, 4])


@pytest.mark.parametrize("precision", ["balanced", "compact"])
def test_the_columns_mean_what_the_formula_says(precision: str) -> None:
    """Decoded once more with plain Python from the columns and the file's metadata alone."""
    layout = at_precision(EVERYTHING, precision)
    rows = random_rows(12, layout)
    frequent = np.array([7, 3, 40], np.int32)
    table = encoded(rows, layout, Codebook(frequent, np.array([-8, 2, 0], np.int32)))
    described = json.loads(table.schema.metadata[METADATA_KEY])["rounding"]
    book = json.loads(table.schema.metadata[CODEBOOK_KEY])
    n, step = described["square_root_steps"], described["uniform_step"]
    knot = n - 2 / step
    for row, read in zip(table.to_pylist(), DecodedRows(table, layout), strict=True):
        group_logprobs = read.targets.group_logprobs
        assert group_logprobs is not None
        entry = 0
        for position, count in enumerate(row["num_entries"]):
            rank, found = -1, {}
            for _ in range(count):
                rank += row["id_gaps"][entry] + 1
                level = row["lowest_level"][position] - row["levels_above_lowest"][entry]
                token = book["frequent_ids"][rank] if rank < len(frequent) else rank - len(frequent)
                if level < knot:
                    found[token] = 2 * math.log(1 - level / n)
                else:
                    found[token] = 2 * math.log(2 / (step * n)) - (level - knot) * step
                entry += 1
            ids = read.targets.token_ids[position, :count].tolist()
            assert found == pytest.approx(
                dict(zip(ids, read.targets.logprobs[position, :count], strict=True)), rel=1e-6
            )
            assert sorted(found) == sorted(ids)
            for group in range(3):
                code = row["group_levels"][3 * position + group]
                read_logprob = group_logprobs[position, group]
                if code == 0:
                    assert read_logprob == -math.inf
                else:
                    difference = (code - 1) // 2 if code % 2 else -(code // 2)
                    share = (book["group_profile"][group] + difference) * described["group_step"]
                    assert row["tail_logprob"][position] + share == pytest.approx(read_logprob, rel=1e-6)


@pytest.mark.parametrize("precision", ["balanced", "compact"])
def test_frequent_ids_come_first_and_rare_ones_are_not_listed(precision: str) -> None:
    layout = Layout(VOCAB, precision=precision)
    ids = np.array([[9, 30 + i] if i < 10 else [9, 4] for i in range(40)], np.int32)
    targets = SparseTargets(ids, np.full((40, 2), -1.0, np.float32), np.full(40, -2.0, np.float32))
    assert Codebook.of(targets, layout.quantization).frequent_ids.tolist() == [9, 4]


@pytest.mark.parametrize(
    ("column", "value", "what"),
    [
        ("id_gaps", 10_000, "an id that is in no vocabulary"),
        ("levels_above_lowest", 5000, "a level that does not exist"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(column: str, value: int, what: str) -> None:
    table = encoded(random_rows(3, EVERYTHING), EVERYTHING)
    values = [[value, *row[1:]] for row in table[column].to_pylist()]
    altered = table.set_column(
        table.schema.get_field_index(column), table.schema.field(column), pa.array(values, pa.list_(pa.int32()))
    )
    with pytest.raises(ValueError, match=what):
        DecodedRows(altered, EVERYTHING)


def with_column(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    index = table.schema.get_field_index(name)
    return table.set_column(index, pa.field(name, values.type), values)


@pytest.mark.parametrize("precision", PRESETS)
@pytest.mark.parametrize("count", [10**9, VOCAB + 1, -1, -(2**31)])
def test_numbers_of_entries_that_cannot_be_are_refused_before_there_is_memory_for_them(
    precision: str, count: int
) -> None:
    layout = at_precision(EVERYTHING, precision)
    table = encoded(random_rows(3, layout), layout)
    values = table["num_entries"].to_pylist()
    values[1][0] = count
    altered = with_column(table, "num_entries", pa.array(values, pa.list_(pa.int32())))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="a number of entries that no position has"):
            DecodedRows(altered, layout)
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()


LISTS = [
    name for name, kind in zip(EVERYTHING.schema().names, EVERYTHING.schema().types, strict=True) if kind != "string"
]


@pytest.mark.parametrize("name", [name for name in LISTS if name not in COLUMNS])
@pytest.mark.parametrize("change", ["longer", "shorter", "moved to the next row"])
def test_a_list_of_another_length_than_its_row_needs_is_refused(name: str, change: str) -> None:
    table = encoded(random_rows(3, EVERYTHING), EVERYTHING)
    values = table[name].to_pylist()
    last = values[0].pop() if change != "longer" else values[0][-1]
    if change != "shorter":
        values[0 if change == "longer" else 1].append(last)
    altered = with_column(table, name, pa.array(values, table.schema.field(name).type))
    with pytest.raises(ValueError, match="has not as many values as the rows need"):
        DecodedRows(altered, EVERYTHING)


def test_a_position_with_more_entries_than_are_stored_is_refused() -> None:
    table = encoded(random_rows(3, EVERYTHING), EVERYTHING)
    values = table["num_entries"].to_pylist()
    values[0][0] += 1
    altered = with_column(table, "num_entries", pa.array(values, pa.list_(pa.int32())))
    with pytest.raises(ValueError, match="has not as many values as the rows need"):
        DecodedRows(altered, EVERYTHING)


@pytest.mark.parametrize("name", ["num_entries", "tail_logprob", "input_ids", "loss_mask"])
@pytest.mark.parametrize("missing", ["value", "list"])
def test_values_that_are_missing_are_refused(name: str, missing: str) -> None:
    table = encoded(random_rows(3, EVERYTHING), EVERYTHING)
    values = table[name].to_pylist()
    if missing == "value":
        values[0][0] = None
    else:
        values[0] = None
    altered = with_column(table, name, pa.array(values, table.schema.field(name).type))
    with pytest.raises(ValueError, match=f"values of column {name} are missing"):
        DecodedRows(altered, EVERYTHING)


@pytest.mark.parametrize("kind", [pa.list_(pa.float64()), pa.int32()], ids=str)
def test_a_column_of_another_type_is_refused(kind: pa.DataType) -> None:
    table = encoded(random_rows(3, EVERYTHING), EVERYTHING)
    altered = with_column(table, "num_entries", pa.array([None] * 3, kind))
    with pytest.raises(ValueError, match="column num_entries is of another type than the layout says"):
        DecodedRows(altered, EVERYTHING)


def test_a_shard_without_its_codebook_is_refused() -> None:
    table = encoded(random_rows(3, EVERYTHING), EVERYTHING)
    with pytest.raises(ValueError, match="its codebook is unreadable"):
        DecodedRows(table.replace_schema_metadata({}), EVERYTHING)


@pytest.mark.parametrize("cut", [0, 4], ids=["one chunk", "two chunks"])
def test_part_of_a_table_decodes_like_the_whole(cut: int) -> None:
    rows = random_rows(9, EVERYTHING)
    codebook = Codebook.of(concatenate([targets for _, targets in rows]), EVERYTHING.quantization)
    table = pa.concat_tables(encoded(part, EVERYTHING, codebook) for part in (rows[:cut], rows[cut:]) if part)
    for cached, row in zip(DecodedRows(table.slice(2, 5), EVERYTHING), rows[2:7], strict=True):
        assert_holds(cached, row)


def test_rows_beyond_the_end_are_refused() -> None:
    decoded = DecodedRows(encoded(random_rows(3, EVERYTHING), EVERYTHING), EVERYTHING)
    with pytest.raises(IndexError):
        decoded[3]


def test_a_group_without_tail_mass_keeps_minus_infinity() -> None:
    rows = random_rows(30, EVERYTHING)
    decoded = DecodedRows(encoded(rows, EVERYTHING), EVERYTHING)
    written = np.concatenate([t.group_logprobs for _, t in rows])
    read = np.concatenate([s.targets.group_logprobs for s in decoded])
    assert (written == -np.inf).any()
    assert np.array_equal(read == -np.inf, written == -np.inf)


@small
@given(ids=st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=20), data=st.data())
def test_the_row_id_is_the_hash_of_ids_and_mask(ids: list[int], data: Any) -> None:
    mask = data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
    bits = "".join("01"[trained] for trained in mask).ljust(-(-len(mask) // 8) * 8, "0")
    content = struct.pack(f"<{len(ids)}i", *ids) + bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))
    sequence = TokenSequence(np.array(ids, dtype=np.int32), np.array(mask))
    assert sequence.row_id == hashlib.blake2b(content, digest_size=16).hexdigest()


def test_the_row_id_changes_with_every_id_and_every_mask_bit() -> None:
    ids, mask = np.arange(10, dtype=np.int32), np.ones(10, dtype=bool)
    seen = {TokenSequence(ids, mask).row_id}
    for i in range(10):
        other_ids, other_mask = ids.copy(), mask.copy()
        other_ids[i] += 100
        other_mask[i] = False
        seen |= {TokenSequence(other_ids, mask).row_id, TokenSequence(ids, other_mask).row_id}
    assert len(seen) == 21


@small
@given(layout=layouts())
def test_the_schema_carries_the_layout(layout: Layout) -> None:
    metadata = encoded(random_rows(2, layout), layout).schema.metadata
    assert read_layout(metadata, "x.parquet") == layout
    described = json.loads(metadata[METADATA_KEY])
    assert described["format_version"] == layout.format_version
    assert described["precision"] == layout.precision


def test_every_column_of_the_format_is_reserved() -> None:
    layouts = [at_precision(EVERYTHING, precision) for precision in PRESETS]
    names = {name for layout in layouts for name in layout.schema().names if name not in EVERYTHING.columns}
    assert {name for name in names if not name.startswith("tail_log_norm_T")} == RESERVED_COLUMNS
    assert {"tail_log_norm_T0.5", "tail_log_norm_T2"} <= names


@pytest.mark.parametrize("metadata", [None, {}, {b"pandas": b"{}"}])
def test_a_foreign_file_is_refused(metadata: Any) -> None:
    with pytest.raises(UserError, match=r"data/x\.parquet is not a shard of a logitcache"):
        read_layout(metadata, "data/x.parquet")


def test_a_newer_file_is_refused_naming_the_format_it_needs() -> None:
    newer = {METADATA_KEY: json.dumps({"format_version": NEWEST_FORMAT + 1, "bits": 3}).encode()}
    with pytest.raises(UserError, match=rf"x\.parquet is written in cache format {NEWEST_FORMAT + 1}"):
        read_layout(newer, "x.parquet")

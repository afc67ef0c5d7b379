"""SparseTargets → Arrow columns → SparseTargets: what is kept exactly, and what is rounded by how much."""

from __future__ import annotations

import hashlib
import json
import struct
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from smallcaches import EVERYTHING, VOCAB, Row, assert_holds, layouts, random_rows, scored_rows, small

from logitcache import UserError
from logitcache.format.codec import (
    FORMAT_VERSION,
    LOGPROB_STEP,
    METADATA_KEY,
    RESERVED_COLUMNS,
    DecodedRows,
    Layout,
    encode,
    read_layout,
)
from logitcache.format.sequences import TokenSequence
from logitcache.format.targets import SparseTargets


def encoded(rows: list[Row], layout: Layout) -> pa.Table:
    return encode([sequence for sequence, _ in rows], [targets for _, targets in rows], layout)


@small
@given(data=st.data(), layout=layouts())
def test_rows_come_back_as_they_were_written(data: Any, layout: Layout) -> None:
    rows = data.draw(scored_rows(layout))
    decoded = DecodedRows(encoded(rows, layout), layout)
    assert len(decoded) == len(rows)
    for cached, row in zip(decoded, rows, strict=True):
        assert_holds(cached, row)


@small
@given(rows=scored_rows(EVERYTHING))
def test_rounded_log_probabilities_still_descend_and_stay_below_one(rows: list[Row]) -> None:
    for cached in DecodedRows(encoded(rows, EVERYTHING), EVERYTHING):
        logprobs = cached.targets.logprobs
        assert (logprobs[:, 1:] <= logprobs[:, :-1]).all()
        assert (logprobs <= 0).all()


def test_rounded_log_probabilities_are_multiples_of_the_step() -> None:
    written = np.array([[-1e-7, -1.00001, -3.3, -17.123456, -900.7]], dtype=np.float32)
    targets = SparseTargets(np.arange(5, dtype=np.int32)[None], written, np.array([-2.5], dtype=np.float32))
    sequence = TokenSequence(np.array([1, 2], dtype=np.int32), np.array([False, True]))
    read = DecodedRows(encode([sequence], [targets], Layout(VOCAB)), Layout(VOCAB))[0].targets.logprobs
    assert read[0].tolist() == [round(float(x) / LOGPROB_STEP) * LOGPROB_STEP for x in written[0]]


@pytest.mark.parametrize("cut", [0, 4], ids=["one chunk", "two chunks"])
def test_part_of_a_table_decodes_like_the_whole(cut: int) -> None:
    rows = random_rows(9, EVERYTHING)
    table = pa.concat_tables(encoded(part, EVERYTHING) for part in (rows[:cut], rows[cut:]) if part)
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


def test_the_groups_of_a_position_add_up_to_its_tail() -> None:
    decoded = DecodedRows(encoded(random_rows(30, EVERYTHING), EVERYTHING), EVERYTHING)
    for sequence in decoded:
        targets = sequence.targets
        assert targets.group_logprobs is not None
        total = np.exp(targets.group_logprobs, dtype=np.float64).sum(axis=1)
        assert np.allclose(total, np.exp(targets.tail_logprob, dtype=np.float64), rtol=1e-6, atol=0)


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
    assert described["format_version"] == FORMAT_VERSION
    assert described["logprob_step"] == LOGPROB_STEP


def test_every_column_of_the_format_is_reserved() -> None:
    names = {name for name in EVERYTHING.schema().names if name not in EVERYTHING.columns}
    assert {name for name in names if not name.startswith("tail_log_norm_T")} == RESERVED_COLUMNS
    assert {"tail_log_norm_T0.5", "tail_log_norm_T2"} <= names


@pytest.mark.parametrize("metadata", [None, {}, {b"pandas": b"{}"}])
def test_a_foreign_file_is_refused(metadata: Any) -> None:
    with pytest.raises(UserError, match=r"data/x\.parquet is not a shard of a logitcache"):
        read_layout(metadata, "data/x.parquet")


def test_a_newer_file_is_refused_naming_the_format_it_needs() -> None:
    newer = {METADATA_KEY: json.dumps({"format_version": FORMAT_VERSION + 1, "bits": 3}).encode()}
    with pytest.raises(UserError, match=rf"x\.parquet is written in cache format {FORMAT_VERSION + 1}"):
        read_layout(newer, "x.parquet")

"""Every entry of the table of tail parts goes the whole way, alone and with the others, and the table is complete."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import logitcache
from logitcache import SparseTargets
from logitcache.capture.settings import CaptureSettings
from logitcache.capture.wire_format import fields as places
from logitcache.capture.wire_format import position_width, unpack
from logitcache.format.codebook import Codebook
from logitcache.format.codec import DecodedRows, encode
from logitcache.format.layout import Layout
from logitcache.format.quantization import PRESETS
from logitcache.format.sequences import TokenSequence
from logitcache.format.shards import ShardWriter
from logitcache.format.soundness import find_wrong
from logitcache.format.tail_part import TailPart
from logitcache.format.tail_parts import PARTS, TailParts, parts_of, rescaled, shared_parts
from logitcache.format.targets import concatenate
from logitcache.report.description import origin
from logitcache.storage.folder import Folder
from tests.helpers.exchanging import findings
from tests.helpers.maintained import arrays_of, assert_same_row, assert_same_targets, make_cache
from tests.helpers.smallcaches import (
    COEFFICIENT_STEP,
    COLUMNS,
    EVERY_PART,
    EVERYTHING,
    VOCAB,
    at_precision,
    random_rows,
)
from trainer.data.collator import Collator

ALONE = {part.name: TailParts(**{part.name: getattr(EVERY_PART, part.name)}) for part in PARTS}
ALONE["probes"] = replace(ALONE["probes"], rank=EVERY_PART.rank)  # they need it
CHOICES = {**ALONE, "all": EVERY_PART, "none": TailParts()}
ROWS = random_rows(20, EVERYTHING, seed=5)

each_part = pytest.mark.parametrize("part", PARTS, ids=[part.name for part in PARTS])
each_choice = pytest.mark.parametrize("parts", CHOICES.values(), ids=list(CHOICES))


def test_the_table_has_every_part_and_every_optional_field_of_the_targets() -> None:
    assert [part.name for part in PARTS] == [field.name for field in fields(TailParts)]
    assert all(value for value in vars(EVERY_PART).values()), "a part that no test of this file sees"
    optional = [field.name for field in fields(SparseTargets)][3:]
    assert [name for part in PARTS for name in part.dtypes] == optional[:-1]
    assert optional[-1] == "probe_ids"
    assert TailParts() == TailParts(**{part.name: part.absent for part in PARTS})
    assert [part.name for part in PARTS if part.since == 1] == ["groups", "temperatures", "entropy", "samples"]


@each_part
def test_a_part_is_in_the_json_of_settings_and_layout(part: TailPart) -> None:
    parts = ALONE[part.name]
    for names in ("option", "layout_key"):
        assert TailParts.from_json(parts.to_json(names), names) == parts
    settings = CaptureSettings(8, tail_parts=parts)
    assert CaptureSettings.from_json(settings.to_json()) == settings
    assert settings.beyond_top_k[-1] == part.flag
    layout = Layout(VOCAB, parts).with_coefficient_step(COEFFICIENT_STEP)
    assert Layout.from_json(layout.to_json()) == layout
    assert layout.to_json()[part.layout_key] == settings.to_json()[part.option]
    with pytest.raises(KeyError):
        TailParts.from_json({}, "option")


@each_part
def test_a_part_of_a_later_format_is_named_only_where_it_is_stored(
    part: TailPart, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(part, "since", 3)
    without, alone = Layout(VOCAB), Layout(VOCAB, ALONE[part.name]).with_coefficient_step(COEFFICIENT_STEP)
    assert part.layout_key not in without.to_json() and part.option not in CaptureSettings(8).to_json()
    assert Layout.from_json(without.to_json()) == without and Layout.from_json(alone.to_json()) == alone
    assert CaptureSettings.from_json(CaptureSettings(8).to_json()) == CaptureSettings(8)
    for layout, version in ((without, 2), (alone, 3)):
        assert layout.to_json()["format_version"] == layout.stored_format["version"] == version


@each_choice
def test_the_wire_format_carries_the_parts_bit_for_bit(parts: TailParts) -> None:
    targets = parts.of(concatenate([targets for _, targets in ROWS]))
    settings = CaptureSettings(targets.token_ids.shape[1], tail_parts=parts)
    lines = np.zeros((len(targets), position_width(settings)), np.int32)
    for name, at in places(settings).items():
        values = getattr(targets, name)
        values = np.stack(list(values.values()), axis=1) if isinstance(values, Mapping) else values
        lines[:, at] = values.reshape(len(targets), -1).view(np.int32)
    assert_same_targets(unpack(lines, settings), replace(targets, probe_ids=None))


@each_choice
@pytest.mark.parametrize("precision", PRESETS)
def test_the_codec_gives_back_the_parts_and_again_the_same_numbers(parts: TailParts, precision: str) -> None:
    layout = at_precision(Layout(VOCAB, parts, COLUMNS), precision)

    def through(targets: list[SparseTargets]) -> SparseTargets:
        codebook = Codebook.of(concatenate(targets), layout.quantization)
        table = encode([sequence for sequence, _ in ROWS], targets, layout, codebook)
        read = DecodedRows(table.replace_schema_metadata({**table.schema.metadata, **codebook.to_metadata()}), layout)
        return concatenate([row.targets for row in read])

    given = [parts.of(targets) for _, targets in ROWS]
    once = through(given)
    assert [part.name for part in parts_of(once)] == [part.name for part, _ in parts.stored()]
    assert find_wrong(once, layout) is None
    if precision == "exact":
        assert_same_targets(once, concatenate(given))
    edges = np.cumsum([len(targets) for targets in given])[:-1]
    assert_same_targets(through([once[rows] for rows in np.split(np.arange(len(once)), edges)]), once)


@pytest.mark.slow
@each_choice
def test_the_commands_keep_the_parts(parts: TailParts, tmp_path: Path) -> None:
    whole = make_cache(
        tmp_path / "whole", ROWS, EVERYTHING, capture=CaptureSettings(8, tail_parts=EVERY_PART).to_json()
    )
    others = [part.option for part in PARTS if part not in dict(parts.stored())]
    cache = logitcache.recode(whole.path, tmp_path / "some", drop=[*others, "flag"])
    assert cache.manifest.layout.tail_parts == parts
    capture = cache.manifest.fingerprint["capture"]
    assert {part.option: capture[part.option] for part in PARTS if part.option in capture} == parts.to_json("option")
    for read, source in zip(cache, whole, strict=True):
        assert_same_targets(read.targets, parts.of(source.targets))
    described = dict(origin(cache.manifest))["of the tail"]
    assert described == ", ".join(["mass", *(part.describe(value) for part, value in parts.stored())])

    first, second = (
        logitcache.slice(cache.path, tmp_path / name, rows=rows) for name, rows in (("a", "0:9"), ("b", "9:"))
    )
    merged = logitcache.merge([first.path, second.path], tmp_path / "merged")
    for read, expected in zip(merged, cache, strict=True):
        assert_same_row(read, expected)
    fewer = logitcache.recode(merged.path, tmp_path / "fewer", top_k=4, precision="compact")
    assert fewer.manifest.layout.tail_parts == parts
    for found in (cache, merged, fewer):
        assert not findings(found)


@pytest.mark.slow
@each_choice
def test_a_batch_has_the_parts_by_the_names_of_the_targets(parts: TailParts, tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache", ROWS, EVERYTHING)
    batch = Collator(parts)([*cache])
    expected = rescaled(parts.of(concatenate([row.targets for row in cache])))
    found: dict[Any, np.ndarray] = {
        name: tensor.numpy() for name, tensor in vars(batch.targets).items() if tensor is not None
    }
    found |= {T: tensor.numpy() for T, tensor in batch.tempered_tail.items()}
    assert found.keys() == arrays_of(expected).keys()
    for name, values in arrays_of(expected).items():
        np.testing.assert_array_equal(found[name], values, err_msg=str(name))


@each_part
def test_a_part_in_some_caches_only_is_not_shared(part: TailPart) -> None:
    assert shared_parts([EVERY_PART, EVERY_PART]) == EVERY_PART
    without = replace(EVERY_PART, **{part.name: part.absent})
    assert shared_parts([EVERY_PART, without]) == without
    assert shared_parts([EVERY_PART, ALONE[part.name]]) == ALONE[part.name]


def test_of_the_temperatures_those_are_shared_that_all_caches_have() -> None:
    some, others = TailParts(temperatures=(0.5, 2.0)), TailParts(temperatures=(2.0, 4.0))
    assert shared_parts([some, others]).temperatures == (2.0,)


@each_part
def test_other_settings_are_refused_by_the_options_name(part: TailPart) -> None:
    if part.shape is not bool:
        value: Any = (-1.0,) if part.shape == [float] else -1
        impossible = replace(TailParts(), **{part.name: value})
        with pytest.raises(logitcache.UserError, match=f"{part.flag} -1"):
            CaptureSettings(8, tail_parts=impossible).check(VOCAB)


@pytest.mark.slow
def test_coefficients_take_little_more_than_their_entropy(tmp_path: Path) -> None:
    layout = Layout(VOCAB, TailParts(rank=32)).with_coefficient_step(COEFFICIENT_STEP)
    random = np.random.default_rng(0)
    deviations = COEFFICIENT_STEP * np.array([9, 6, 4, *[2] * 29])
    coefficients = (random.normal(size=(4000, 32)) * deviations).astype(np.float32)
    ids = np.zeros((4000, 1), np.int32)
    targets = SparseTargets(ids, np.zeros((4000, 1), np.float32), np.full(4000, -np.inf, np.float32))
    with ShardWriter(Folder(tmp_path), "shard.parquet", layout) as writer:
        sequence = TokenSequence(np.zeros(4001, np.int32), np.arange(4001) > 0)
        writer.write(sequence, replace(targets, tail_coefficients=coefficients))
    metadata = pq.read_metadata(tmp_path / "shard.parquet")
    chunks = [metadata.row_group(0).column(i) for i in range(metadata.num_columns)]
    taken = {chunk.path_in_schema.split(".")[0]: 8 * chunk.total_compressed_size for chunk in chunks}
    counts = np.unique(np.rint(coefficients / COEFFICIENT_STEP), return_counts=True)[1]
    entropy = -(counts * np.log2(counts / counts.sum())).sum()
    assert entropy <= taken["tail_coefficients"] <= 1.1 * entropy


def test_a_layout_of_rounded_coefficients_has_their_step() -> None:
    described = Layout(VOCAB, TailParts(rank=2)).with_coefficient_step(COEFFICIENT_STEP).to_json()
    assert described["rounding"]["coefficient_step"] == COEFFICIENT_STEP
    del described["rounding"]["coefficient_step"]
    with pytest.raises(ValueError, match="no step of the coefficients"):
        Layout.from_json(described)
    exact = Layout(VOCAB, TailParts(rank=2), precision="exact")
    assert exact.with_coefficient_step(COEFFICIENT_STEP) == exact == Layout.from_json(exact.to_json())
    assert Layout(VOCAB).parquet_options()["compression_level"] == 6

"""logitcache verify: every kind of damage is found, named with its place, and does not hide any other."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logitcache import SparseTargets, UserError
from logitcache.cli import main
from logitcache.format.codebook import CODEBOOK_KEY
from logitcache.format.layout import Layout
from logitcache.format.manifest import MANIFEST_NAME
from logitcache.format.quantization import PRESETS
from logitcache.format.sequences import TokenSequence
from logitcache.format.shards import shard_name
from logitcache.format.tail_basis import TailBasis, write_tail_basis
from logitcache.format.tail_parts import TAIL_BASIS_NAME, TAIL_GROUPS_NAME, TailParts
from logitcache.maintenance.verify import verification
from logitcache.maintenance.verify.findings import KINDS, SHOWN_PER_KIND, Finding, Report
from logitcache.maintenance.verify.verification import Verification
from logitcache.reading.cache import open_cache
from logitcache.storage.atomic import file_sha256
from logitcache.storage.folder import Folder
from tests.helpers.smallcaches import EVERYTHING, VOCAB, Row, at_precision, random_rows, small, tail_basis, write_cache

EXACT = at_precision(EVERYTHING, "exact")
ROWS = random_rows(30, EXACT)
FIRST, SECOND, THIRD = (shard_name(index, 3) for index in range(3))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 rows in 3 shards of several row groups, stored exactly, with two tokenizer files."""
    root = tmp_path_factory.mktemp("sound")
    write_cache(root, ROWS, EXACT, rows_per_shard=10, row_group_bytes=1500)
    (root / "tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (root / "tokenizer" / name).write_text(f"{{}} of {name}")
    names = [f"tokenizer/{path.name}" for path in (root / "tokenizer").iterdir()]
    edit(root, lambda data: data["files"].update({name: sha256(root, name) for name in names}))
    return root


@pytest.fixture
def root(sound: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(sound, tmp_path / "cache"))


def sha256(root: Path, name: str) -> str:
    return file_sha256(root / name)


def content(root: Path) -> dict[str, Any]:
    """The manifest, without the checksum that tells any change of it."""
    data: dict[str, Any] = json.loads((root / MANIFEST_NAME).read_text())
    data.pop("checksum", None)
    return data


def edit(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = content(root)
    change(data)
    (root / MANIFEST_NAME).write_text(json.dumps(data))


def declare(root: Path, shard: int) -> None:
    """The manifest takes a shard's file for what it should be."""
    name = shard_name(shard, 3)

    def change(data: dict[str, Any]) -> None:
        data["shards"][shard] |= {"sha256": sha256(root, name), "num_bytes": (root / name).stat().st_size}
        data["num_bytes"] = sum(entry["num_bytes"] for entry in data["shards"])

    edit(root, change)


def rewrite(root: Path, shard: int, change: Callable[[pa.Table], pa.Table]) -> None:
    """A shard with other content whose checksums are right; `change` gets all of its rows."""
    path = root / shard_name(shard, 3)
    sizes = content(root)["shards"][shard]["row_group_sizes"]
    with pq.ParquetFile(path) as file:  # whose metadata are in the table's, unlike those of a dataset
        table = change(file.read())
    with pq.ParquetWriter(path, table.schema, compression="zstd", write_page_checksum=True) as writer:
        first = 0
        for size in sizes:
            writer.write_table(table.slice(first, size), row_group_size=size)
            first += size
    declare(root, shard)


def with_row(table: pa.Table, column: str, row: int, value: object) -> pa.Table:
    """The table with one row of one column replaced."""
    values = table[column].to_pylist()
    values[row] = value(values[row]) if callable(value) else value
    index = table.schema.get_field_index(column)
    return table.set_column(index, table.schema.field(index), pa.array(values, table.schema.field(index).type))


def flip(path: Path, at: int, bit: int = 4) -> None:
    damaged = bytearray(path.read_bytes())
    damaged[at] ^= 1 << bit
    path.write_bytes(damaged)


def flip_page(root: Path, shard: int, row_group: int, column: str) -> None:
    """Damages the last byte of a column's pages in a row group."""
    path = root / shard_name(shard, 3)
    group = pq.read_metadata(path).row_group(row_group)
    chunks = [group.column(i) for i in range(group.num_columns)]
    chunk = next(chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] == column)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    flip(path, start + chunk.total_compressed_size - 1)


def found(root: Path | str) -> list[Finding]:
    return list(Verification(root))


def kinds(findings: list[Finding]) -> set[tuple[str, str]]:
    return {(finding.kind, finding.file) for finding in findings}


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRESETS)
def test_nothing_is_wrong_with_a_sound_cache(tmp_path: Path, precision: str) -> None:
    layout = at_precision(EVERYTHING, precision)
    cache = write_cache(tmp_path, random_rows(40, layout), layout, rows_per_shard=15, row_group_bytes=1500)
    verification = Verification(tmp_path)
    assert list(verification) == []
    assert (verification.num_rows, verification.num_positions) == (40, cache.num_positions)
    assert (verification.num_bytes, verification.num_shards) == (cache.manifest.num_bytes, 3)


@pytest.mark.slow
@given(seed=st.integers(0, 10_000), precision=st.sampled_from(sorted(PRESETS)), most=st.integers(1, VOCAB))
@small
def test_no_cache_that_was_written_as_it_should_be_has_findings(
    tmp_path_factory: pytest.TempPathFactory, seed: int, precision: str, most: int
) -> None:
    layout = at_precision(EVERYTHING, precision)
    root = tmp_path_factory.mktemp("any")
    write_cache(root, random_rows(5, layout, seed=seed, max_entries=most), layout)
    assert found(root) == []


def test_nothing_is_wrong_with_a_cache_of_format_1() -> None:
    assert found(Path(__file__).parents[2] / "data/format1" / "cache") == []


@pytest.mark.slow
@given(data=st.data())
@small
def test_a_flipped_bit_anywhere_in_a_shard_is_found(sound: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([FIRST, SECOND, THIRD]))
    whole = (sound / name).read_bytes()
    try:
        flip(sound / name, data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 7)))
        findings = found(sound)
    finally:
        (sound / name).write_bytes(whole)
    assert ("altered", name) in kinds(findings)
    assert {finding.file for finding in findings} == {name}


@pytest.mark.slow
@small
@given(st.data())
def test_a_byte_of_the_manifest_that_is_another_is_found(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    root = tmp_path_factory.mktemp("cache")
    write_cache(root, ROWS[:3], EXACT)
    assert not found(root)
    content = bytearray((root / MANIFEST_NAME).read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    (root / MANIFEST_NAME).write_bytes(content)
    assert {"manifest", "newer"} & {finding.kind for finding in found(root)}


@pytest.mark.parametrize(("old", "new"), [("tests", "tesls"), ("{\n", "{\r"), ('"random"', '"rando\u00fc"')])
def test_an_edit_of_a_manifests_free_text_is_found(root: Path, old: str, new: str) -> None:
    write_cache(root, ROWS[:3], EXACT)
    text = (root / MANIFEST_NAME).read_text()
    assert old in text
    (root / MANIFEST_NAME).write_text(text.replace(old, new, 1), newline="")
    assert [finding.what for finding in found(root) if finding.kind == "manifest"] == [
        "its checksum is not that of its content"
    ]


def test_a_manifest_without_a_checksum_of_its_own_is_one_of_before(root: Path) -> None:
    edit(root, lambda data: None)
    assert "checksum" not in content(root)
    assert not found(root)


def test_a_flipped_bit_in_a_page_is_named_by_row_group_and_column(root: Path) -> None:
    flip_page(root, 1, 2, "logprobs")
    altered, damaged = found(root)
    assert (altered.kind, altered.file) == ("altered", SECOND)
    assert (damaged.kind, damaged.file, damaged.row_group) == ("damaged", SECOND, 2)
    assert "column logprobs" in damaged.what


def test_damage_in_a_kept_column_leaves_the_rows_checked(root: Path) -> None:
    rewrite(root, 0, lambda table: with_row(table, "row_id", 0, "0" * 32))
    flip_page(root, 0, 0, "url")
    declare(root, 0)
    damaged, wrong_id = found(root)
    assert (damaged.kind, damaged.row_group) == ("damaged", 0)
    assert "column url" in damaged.what
    assert (wrong_id.kind, wrong_id.row) == ("rows", 0)


def test_damage_of_one_row_group_does_not_hide_what_is_in_the_others(root: Path) -> None:
    sizes = content(root)["shards"][0]["row_group_sizes"]
    last = sum(sizes) - 1
    rewrite(root, 0, lambda table: with_row(table, "tail_logprob", last, lambda tail: [0.0] * len(tail)))
    flip_page(root, 0, 0, "token_ids")
    flip_page(root, 0, 1, "row_id")
    findings = found(root)
    damaged = [finding.row_group for finding in findings if finding.kind == "damaged"]
    targets = [(finding.row_group, finding.row) for finding in findings if finding.kind == "targets"]
    assert damaged == [0, 1]
    assert set(targets) == {(len(sizes) - 1, last)}


@pytest.mark.parametrize("left", [0, 3, 100, -9, -1])
def test_a_truncated_shard_is_found_by_its_size(root: Path, left: int) -> None:
    whole = (root / SECOND).read_bytes()
    (root / SECOND).write_bytes(whole[:left])
    findings = found(root)
    assert {finding.file for finding in findings} == {SECOND}
    assert findings[0].kind == "altered"
    assert f"the manifest says {len(whole):,}" in findings[0].what
    assert any(finding.kind == "damaged" and "footer" in finding.what for finding in findings)


def test_a_missing_shard_and_an_extra_file_are_found(root: Path) -> None:
    (root / SECOND).unlink()
    (root / "data/train-00007-of-00009.parquet").write_bytes(b"something")
    assert kinds(found(root)) == {("missing", SECOND), ("foreign", "data/train-00007-of-00009.parquet")}


def test_swapped_shards_are_named_as_what_they_are(root: Path) -> None:
    (root / FIRST).rename(root / "x")
    (root / SECOND).rename(root / FIRST)
    (root / "x").rename(root / SECOND)
    findings = found(root)
    assert kinds(findings) == {("swapped", FIRST), ("swapped", SECOND)}
    assert [SECOND in findings[0].what, FIRST in findings[1].what] == [True, True]


def test_a_renamed_shard_is_found_under_its_new_name(root: Path) -> None:
    (root / SECOND).rename(root / "data/copy.parquet")
    findings = {finding.file: finding for finding in found(root)}
    assert findings[SECOND].kind == "missing"
    assert findings["data/copy.parquet"].kind == "swapped"
    assert SECOND in findings["data/copy.parquet"].what


def test_a_shard_in_place_of_another_repeats_its_rows(root: Path) -> None:
    shutil.copy(root / FIRST, root / SECOND)
    findings = found(root)
    assert ("swapped", SECOND) in kinds(findings)
    repeated = [finding for finding in findings if finding.kind == "repeated"]
    assert sorted((finding.file, finding.row) for finding in repeated) == [(SECOND, row) for row in range(10)]


def set_total(data: dict[str, Any]) -> None:
    data["num_positions"] += 1


EDITS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "total": (set_total, "num_positions is"),
    "rows": (lambda data: data["shards"][1].update(num_sequences=11), "row groups of 10 rows together"),
    "negative": (lambda data: data["shards"][1].update(num_tokens=-1), "num_tokens is -1, a whole number"),
    "boolean": (lambda data: data["shards"][1].update(longest=True), "longest is true"),
    "text": (lambda data: data["shards"][1].update(num_entries="many"), 'num_entries is "many"'),
    "digest": (lambda data: data["shards"][1].update(sha256="abc"), "64 hexadecimal digits"),
    "share": (lambda data: data["shards"][1].update(mean_tail_mass=float("nan")), "mean_tail_mass is NaN"),
    "part": (lambda data: data["shards"][1].pop("longest"), "longest is missing"),
    "unknown part": (lambda data: data["shards"][1].update(pickle="x"), "unknown part pickle"),
    "outside": (
        lambda data: data["shards"][1].update(name="data/../../secret.parquet"),
        "no cache has a file of this name",
    ),
    "absolute": (lambda data: data["shards"][1].update(name="/etc/passwd"), "no cache has a file of this name"),
    "url": (lambda data: data["shards"][1].update(name="https://example.org/x"), "no cache has a file of this name"),
    "file outside": (lambda data: data["files"].update({"../x": "0" * 64}), 'a file that no cache has: "../x"'),
    "file digest": (
        lambda data: data["files"].update({"tokenizer/tokenizer.json": 5}),
        "SHA-256 of tokenizer/tokenizer.json",
    ),
    "twice": (lambda data: data["shards"].append(data["shards"][0]), f"names {FIRST} 2 times"),
    "an entry": (lambda data: data["shards"].append(7), "shards[3] is 7"),
    "no shards": (lambda data: data.pop("shards"), "shards is missing"),
    "shards": (lambda data: data.update(shards={}), "shards is {}"),
    "fingerprint": (lambda data: data.update(fingerprint=[]), "fingerprint is []"),
    "layout": (lambda data: data.update(layout=3), "layout is 3"),
    "layout part": (lambda data: data["layout"].pop("vocab_size"), "layout is unreadable"),
    "precision": (lambda data: data["layout"].update(precision="fine"), "layout is unreadable"),
    "vocabulary": (lambda data: data["layout"].update(vocab_size="50"), "layout is unreadable"),
    "column type": (lambda data: data["layout"]["columns"].update(id="int3"), "layout is unreadable"),
    "teacher": (lambda data: data["fingerprint"]["teacher"].update(vocab_size=51), "51 tokens, its layout 50"),
    "created_by": (lambda data: data.pop("created_by"), "created_by is missing"),
    "version": (lambda data: data.update(format_version="two"), 'format_version is "two"'),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EDITS)
def test_an_edited_manifest_is_found_by_what_was_edited(root: Path, name: str) -> None:
    change, what = EDITS[name]
    edit(root, change)
    findings = found(root)
    assert [what in finding.what for finding in findings if finding.kind == "manifest"].count(True) == 1, findings


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"text"', "\ufeff{}", "[" * 100_000])
def test_a_manifest_that_is_none_is_a_finding_and_shards_are_still_checked(root: Path, text: str) -> None:
    (root / MANIFEST_NAME).write_text(text)
    rewrite_first = pq.read_table(root / FIRST, partitioning=None)
    pq.write_table(with_row(rewrite_first, "row_id", 4, "f" * 32), root / FIRST)
    findings = found(root)
    assert findings[0].kind == "manifest"
    assert [(finding.file, finding.row) for finding in findings if finding.kind == "rows"] == [(FIRST, 4)]


def test_a_manifest_that_is_gone_is_a_finding_and_shards_are_still_checked(root: Path) -> None:
    (root / MANIFEST_NAME).unlink()
    verification = Verification(root)
    assert kinds(list(verification)) == {("missing", MANIFEST_NAME)}
    assert verification.num_rows == 30


def test_every_edit_of_a_manifest_is_listed(root: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        data["num_sequences"] += 1
        data["num_bytes"] -= 1
        data["shards"][0]["num_tokens"] += 5
        data["shards"][2]["mean_tail_mass"] /= 2
        data["files"]["../../etc/shadow"] = "0" * 64

    edit(root, change)
    texts = "\n".join(str(finding) for finding in found(root))
    for part in ("num_sequences", "num_bytes", "num_tokens", "mean_tail_mass", "../../etc/shadow"):
        assert part in texts


@pytest.mark.parametrize("part", ["num_tokens", "num_positions", "num_entries", "longest", "mean_tail_mass"])
def test_counts_that_are_not_the_shards_are_found(root: Path, part: str) -> None:
    def change(data: dict[str, Any]) -> None:
        data["shards"][1][part] += 0.01 if part == "mean_tail_mass" else 1
        data["num_positions"] = sum(entry["num_positions"] for entry in data["shards"])

    edit(root, change)
    (finding,) = found(root)
    assert (finding.kind, finding.file) == ("counts", SECOND)
    assert finding.what.startswith(part)


def test_other_row_groups_than_the_manifest_says_are_found(root: Path) -> None:
    edit(root, lambda data: data["shards"][0].update(row_group_sizes=[10]))
    (finding,) = found(root)
    assert (finding.kind, finding.file) == ("counts", FIRST)
    assert "row groups" in finding.what


def test_a_newer_format_is_said_to_be_one_and_no_damage(root: Path) -> None:
    edit(root, lambda data: data.update(format_version=9, something_else={}))
    (finding,) = found(root)
    assert (finding.kind, finding.file) == ("newer", MANIFEST_NAME)
    assert "format 9" in finding.what

    def newer(table: pa.Table) -> pa.Table:
        metadata = json.loads(table.schema.metadata[b"logitcache"]) | {"format_version": 9}
        return table.replace_schema_metadata(table.schema.metadata | {b"logitcache": json.dumps(metadata)})

    rewrite(root, 0, newer)
    assert kinds(found(root)) == {("newer", MANIFEST_NAME), ("newer", FIRST)}


def test_a_shard_of_a_cache_with_another_layout_is_found(root: Path, tmp_path: Path) -> None:
    other = Layout(VOCAB + 10, precision="exact")
    write_cache(tmp_path / "other", random_rows(10, other), other)
    shutil.copy(tmp_path / "other" / shard_name(0, 1), root / SECOND)
    declare(root, 1)
    layouts = [finding for finding in found(root) if finding.kind == "layout"]
    assert {finding.file for finding in layouts} == {SECOND}
    texts = " ".join(finding.what for finding in layouts)
    assert "vocab_size is 60, the manifest says 50" in texts
    assert "num_tail_groups is 0, the manifest says 3" in texts


def test_a_file_of_another_kind_is_found(root: Path) -> None:
    pq.write_table(pa.table({"text": ["a"]}), root / SECOND)
    declare(root, 1)
    assert any("is not a shard of a logitcache" in str(finding) or "no such" in str(finding) for finding in found(root))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda table: table.drop_columns(["num_entries"]), "column num_entries is missing"),
        (lambda table: table.append_column("code", pa.array(["x"] * 10)), "column code is none of its layout's"),
        (
            lambda table: table.set_column(
                table.schema.get_field_index("logprobs"), "logprobs", table["logprobs"].cast(pa.list_(pa.float64()))
            ),
            "column logprobs is of type list<element: double>",
        ),
    ],
    ids=["missing", "extra", "type"],
)
def test_columns_that_are_not_the_layouts_are_found(
    root: Path, change: Callable[[pa.Table], pa.Table], what: str
) -> None:
    rewrite(root, 2, change)
    findings = found(root)
    assert kinds(findings) == {("layout", THIRD)}
    assert what.split(" of type")[0] in findings[0].what


def test_wrong_row_ids_are_found_and_the_right_one_is_told(root: Path) -> None:
    rewrite(root, 1, lambda table: with_row(with_row(table, "row_id", 3, "0" * 32), "row_id", 8, "not an id"))
    first, second = found(root)
    assert (first.kind, first.file, first.row, first.row_id) == ("rows", SECOND, 3, "0" * 32)
    assert ROWS[13][0].row_id in first.what
    assert (second.row, second.row_id) == (8, "not an id")


Change = Callable[[list[Any]], None]


def with_position(table: pa.Table, row: int, changes: dict[str, Change]) -> pa.Table:
    """Changes lists of a row in place."""
    for column, change in changes.items():
        values = table[column].to_pylist()[row]
        change(values)
        table = with_row(table, column, row, values)
    return table


def entries_before(row: int, position: int) -> int:
    return int(ROWS[row][1].num_entries[:position].sum())


def a_position_with_entries(shard: int, least: int) -> tuple[int, int]:
    """(row in the shard, position among its stored ones) with at least so many entries, not the first of its row."""
    for row in range(10):
        for position, count in enumerate(ROWS[10 * shard + row][1].num_entries):
            if count >= least and position > 0:
                return row, position
    raise AssertionError


def assign(at: int, value: float) -> Change:
    return lambda values: values.__setitem__(at, value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "what"),
    [
        ("id", "a token id outside the vocabulary"),
        ("negative id", "a token id outside the vocabulary"),
        ("twice", "the same token id twice"),
        ("ascending", "log-probabilities that do not descend"),
        ("infinite", "a log-probability that is not finite"),
        ("above zero", "a log-probability above 0"),
        ("mass", "entries and tail that do not sum to 1"),
        ("tail", "a tail log-probability that is not a number"),
        ("groups", "tail groups that do not add up to the tail"),
        ("group nan", "tail groups that do not add up to the tail"),
        ("tempered", "a tempered tail that is not a number"),
        ("entropy", "a tail entropy that is not ≤ 0"),
        ("sample", "a sampled id outside the vocabulary"),
        ("sampled entry", "a sampled id that is an entry"),
        ("sample logprob", "a sampled log-probability above 0"),
    ],
)
def test_targets_that_no_teacher_can_give_are_found_by_row_and_position(root: Path, damage: str, what: str) -> None:
    row, position = a_position_with_entries(1, 3)
    sequence, targets = ROWS[10 + row]
    at = entries_before(10 + row, position)
    ids = targets.token_ids[position]
    changes: dict[str, dict[str, Change]] = {
        "id": {"token_ids": assign(at, VOCAB)},
        "negative id": {"token_ids": assign(at, -7)},
        "twice": {"token_ids": assign(at + 1, int(ids[0]))},
        "ascending": {"logprobs": lambda values: values.insert(at, values.pop(at + 2))},
        "infinite": {"logprobs": assign(at + 2, float("-inf"))},
        "above zero": {"logprobs": assign(at, 0.5)},
        "mass": {"tail_logprob": assign(position, -1e-3)},
        "tail": {"tail_logprob": assign(position, float("nan"))},
        "groups": {"group_logprobs": assign(3 * position + 2, -0.1)},
        "group nan": {"group_logprobs": assign(3 * position + 1, float("nan"))},
        "tempered": {"tail_log_norm_T2": assign(position, float("nan"))},
        "entropy": {"tail_entropy": assign(position, 1.0)},
        "sample": {"sample_ids": assign(2 * position, VOCAB)},
        "sampled entry": {"sample_ids": assign(2 * position, int(ids[0]))},
        "sample logprob": {"sample_logprobs": assign(2 * position, 3.0)},
    }
    rewrite(root, 1, lambda table: with_position(table, row, changes[damage]))
    findings = [finding for finding in found(root) if finding.kind == "targets"]
    assert len(findings) == 1
    (finding,) = findings
    assert (finding.file, finding.row, finding.row_id) == (SECOND, row, sequence.row_id)
    assert finding.position == sequence.positions[position]
    assert finding.what == what


@pytest.mark.slow
@pytest.mark.parametrize(
    ("column", "change", "what"),
    [
        ("loss_mask", lambda values: values.append(True), "input ids, a loss mask of"),
        ("loss_mask", lambda values: values.__setitem__(-1, False), "num_entries has"),
        ("num_entries", lambda values: values.append(0), "num_entries has"),
        ("num_entries", lambda values: values.__setitem__(0, -1), "a negative number of entries"),
        ("token_ids", lambda values: values.pop(), "token_ids has"),
        ("logprobs", lambda values: values.append(-9.0), "logprobs has"),
        ("tail_logprob", lambda values: values.pop(), "tail_logprob has"),
        ("group_logprobs", lambda values: values.pop(), "group_logprobs has"),
        ("sample_ids", lambda values: values.append(1), "sample_ids has"),
        ("input_ids", lambda values: values.__setitem__(0, VOCAB), "an input id outside the vocabulary of 50"),
    ],
)
def test_a_row_that_contradicts_itself_is_found_and_its_neighbours_are_not(
    root: Path, column: str, change: Callable[[list[Any]], None], what: str
) -> None:
    rewrite(root, 0, lambda table: with_position(table, 5, {column: change}))
    findings = [finding for finding in found(root) if finding.kind != "counts"]
    assert {(finding.kind, finding.file, finding.row) for finding in findings} == {("rows", FIRST, 5)}
    assert any(what in finding.what for finding in findings)


def test_lengths_that_make_up_for_each_other_are_found_in_both_rows(root: Path) -> None:
    """Each list is of the right length over the row group, so that decoding it as a whole would succeed."""
    sizes = content(root)["shards"][0]["row_group_sizes"]
    row = next(sum(sizes[:i]) for i, size in enumerate(sizes) if size >= 2)

    def change(table: pa.Table) -> pa.Table:
        for column in ("token_ids", "logprobs"):
            values = table[column].to_pylist()
            table = with_row(table, column, row, values[row] + values[row + 1][:1])
            table = with_row(table, column, row + 1, values[row + 1][1:])
        return table

    rewrite(root, 0, change)
    assert {(finding.kind, finding.row) for finding in found(root)} == {("rows", row), ("rows", row + 1)}


def test_missing_numbers_are_found(root: Path) -> None:
    rewrite(root, 0, lambda table: with_position(table, 0, {"logprobs": lambda values: values.__setitem__(0, None)}))
    (finding,) = found(root)
    assert (finding.kind, finding.row_group) == ("damaged", 0)
    assert "column logprobs: values that are missing" in finding.what


@pytest.mark.slow
@pytest.mark.parametrize(
    ("column", "value"),
    [("id_gaps", 10_000), ("id_gaps", -50), ("levels_above_lowest", 100_000), ("lowest_level", 1 << 20)],
)
def test_integers_that_stand_for_nothing_are_found_by_row(tmp_path: Path, column: str, value: int) -> None:
    layout = at_precision(EVERYTHING, "balanced")
    write_cache(tmp_path, ROWS, layout, rows_per_shard=10, row_group_bytes=1500)
    rewrite(tmp_path, 1, lambda table: with_position(table, 6, {column: assign(0, value)}))
    findings = found(tmp_path)
    assert {(finding.file, finding.row, finding.row_id) for finding in findings} == {(SECOND, 6, ROWS[16][0].row_id)}


def test_a_codebook_that_is_gone_or_another_vocabularys_is_one_finding(tmp_path: Path) -> None:
    layout = at_precision(EVERYTHING, "balanced")
    write_cache(tmp_path, ROWS, layout, rows_per_shard=10, row_group_bytes=1500)

    def with_book(book: object) -> Callable[[pa.Table], pa.Table]:
        added = {} if book is None else {CODEBOOK_KEY: json.dumps(book).encode()}
        return lambda table: table.replace_schema_metadata(
            {key: value for key, value in table.schema.metadata.items() if key != CODEBOOK_KEY} | added
        )

    for shard, book in enumerate(
        [None, {"frequent_ids": [VOCAB], "group_profile": [0, 0, 0]}, {"frequent_ids": [1], "group_profile": [0]}]
    ):
        rewrite(tmp_path, shard, with_book(book))
    findings = found(tmp_path)
    assert [(finding.kind, finding.file) for finding in findings] == [
        ("layout", name) for name in (FIRST, SECOND, THIRD)
    ]
    assert all("codebook" in finding.what for finding in findings)


def test_every_wrong_position_is_listed(root: Path) -> None:
    rewrite(root, 1, lambda table: with_row(table, "tail_logprob", 2, lambda tail: [0.5] * len(tail)))
    targets = [finding.position for finding in found(root) if finding.kind == "targets"]
    assert targets == ROWS[12][0].positions.tolist()


def repeat(rows: list[Row], digest_of: list[Row] | None, root: Path) -> None:
    write_cache(root, rows, EXACT, rows_per_shard=4)
    if digest_of is not None:
        digest = hashlib.sha256("".join(sequence.row_id for sequence, _ in digest_of).encode()).hexdigest()
        edit(root, lambda data: data["fingerprint"]["corpus"].update(sequences_sha256=digest))


@pytest.mark.parametrize("waiting", [1, 3, 1 << 16])
def test_rows_that_are_there_twice_are_found_with_both_places(tmp_path: Path, waiting: int) -> None:
    repeat([*ROWS[:5], ROWS[1], ROWS[4], ROWS[1]], None, tmp_path)
    with patch.object(verification, "WAITING_ROWS", waiting):
        findings = found(tmp_path)
    first, second = shard_name(0, 2), shard_name(1, 2)
    assert {(finding.file, finding.row, finding.row_id, finding.what) for finding in findings} == {
        (second, 1, ROWS[1][0].row_id, f"the same tokens and loss mask as row 1 of {first}"),
        (second, 2, ROWS[4][0].row_id, "the same tokens and loss mask as row 0 of it"),
        (second, 3, ROWS[1][0].row_id, "the same tokens and loss mask as row 1 of it"),
    }


def test_documents_that_the_corpus_held_twice_are_no_finding(tmp_path: Path) -> None:
    rows = [*ROWS[:5], ROWS[1]]
    repeat(rows, rows, tmp_path)
    assert found(tmp_path) == []


def test_rows_that_are_not_the_corpus_are_found(tmp_path: Path) -> None:
    repeat(ROWS[:6], [*ROWS[:5], ROWS[6]], tmp_path)
    (finding,) = found(tmp_path)
    assert (finding.kind, finding.file) == ("manifest", MANIFEST_NAME)
    assert "sequences_sha256" in finding.what


def test_files_beside_the_shards_are_compared_with_the_manifest(root: Path) -> None:
    (root / "tokenizer/tokenizer.json").write_text("another")
    (root / "tokenizer/tokenizer_config.json").unlink()
    (root / "tokenizer/chat_template.jinja").write_text("{{ messages }}")
    (root / TAIL_GROUPS_NAME).unlink()
    assert kinds(found(root)) == {
        ("altered", "tokenizer/tokenizer.json"),
        ("missing", "tokenizer/tokenizer_config.json"),
        ("foreign", "tokenizer/chat_template.jinja"),
        ("missing", TAIL_GROUPS_NAME),
    }


@pytest.mark.parametrize("groups", [[0] * 49, [0] * 49 + [3], [-1] + [0] * 49])
def test_tail_groups_that_cannot_be_the_vocabularys_are_found(root: Path, groups: list[int]) -> None:
    ids = np.arange(len(groups), dtype=np.int32)
    pq.write_table(pa.table({"id": ids, "group": np.array(groups, np.int32)}), root / TAIL_GROUPS_NAME)
    edit(root, lambda data: data["files"].update({TAIL_GROUPS_NAME: sha256(root, TAIL_GROUPS_NAME)}))
    assert kinds(found(root)) == {("layout", TAIL_GROUPS_NAME)}


@pytest.mark.parametrize(
    ("change", "kind", "what"),
    [
        (lambda basis: basis.first(2), "layout", "it has 2 directions of 50 ids, the cache 3 of 50"),
        (lambda basis: tail_basis(replace(EVERYTHING, vocab_size=51)), "layout", "it has 3 directions of 51 ids"),
        (lambda basis: replace(basis, weights=basis.weights * 2), "damaged", "not positive numbers of sum 1"),
    ],
)
def test_a_basis_that_cannot_be_the_caches_is_found(
    root: Path, change: Callable[[TailBasis], TailBasis], kind: str, what: str
) -> None:
    write_tail_basis(Folder(root), change(tail_basis(EVERYTHING)))
    edit(root, lambda data: data["files"].update({TAIL_BASIS_NAME: sha256(root, TAIL_BASIS_NAME)}))
    (finding,) = found(root)
    assert (finding.kind, finding.file) == (kind, TAIL_BASIS_NAME) and what in finding.what


def test_a_basis_that_the_layout_needs_is_missing(root: Path) -> None:
    edit(root, lambda data: data["files"].pop(TAIL_BASIS_NAME))
    (root / TAIL_BASIS_NAME).unlink()
    (finding,) = found(root)
    assert (finding.kind, finding.file) == ("missing", TAIL_BASIS_NAME)


@pytest.mark.parametrize(
    ("precision", "number", "residual", "what"),
    [("exact", np.nan, np.inf, "that are not finite"), ("balanced", 2**16 - 1, 2**8 - 1, "below what is stored")],
)
def test_coefficients_and_residuals_outside_their_range_are_found(
    tmp_path: Path, precision: str, number: float, residual: float, what: str
) -> None:
    write_cache(tmp_path, ROWS, at_precision(EVERYTHING, precision), rows_per_shard=10)
    rewrite(tmp_path, 0, lambda table: with_row(table, "tail_coefficients", 3, lambda z: [number] * len(z)))
    rewrite(tmp_path, 1, lambda table: with_row(table, "probe_residuals", 3, lambda e: [residual] * len(e)))
    assert kinds(found(tmp_path)) == {("targets", FIRST), ("targets", SECOND)}
    with pytest.raises(UserError, match=f"altered: tail_coefficients {what} at stored position 0 of row 3"):
        _ = open_cache(tmp_path)[3]


def test_everything_that_is_wrong_at_once_is_listed(root: Path) -> None:
    rewrite(root, 2, lambda table: with_row(table, "row_id", 7, "1" * 32))
    rewrite(root, 2, lambda table: with_row(table, "tail_logprob", 2, lambda tail: [0.5] * len(tail)))
    flip_page(root, 0, 1, "input_ids")
    (root / SECOND).unlink()
    (root / "data/.hidden").write_text("left alone")
    (root / "data/train-00001-of-00003.parquet.tmp").write_text("left by a killed writer")
    (root / "tokenizer/tokenizer.json").write_text("x")
    edit(root, lambda data: data.update(num_sequences=31))
    assert kinds(found(root)) == {
        ("rows", THIRD),
        ("targets", THIRD),
        ("counts", THIRD),
        ("altered", FIRST),
        ("damaged", FIRST),
        ("missing", SECOND),
        ("foreign", "data/train-00001-of-00003.parquet.tmp"),
        ("altered", "tokenizer/tokenizer.json"),
        ("manifest", MANIFEST_NAME),
    }


def test_a_url_is_checked_as_a_folder_is(root: Path) -> None:
    flip_page(root, 0, 1, "loss_mask")
    (root / THIRD).unlink()
    rewrite(root, 1, lambda table: with_row(table, "row_id", 7, "1" * 32))
    memory = fsspec.filesystem("memory")
    memory.put(str(root), "/verified", recursive=True)
    try:
        assert found("memory://verified") == found(root)
    finally:
        memory.rm("/verified", recursive=True)
    assert len(found(root)) == 4


@pytest.mark.parametrize("precision", PRESETS)
def test_a_flat_distribution_with_all_its_tokens_as_entries_is_no_finding(tmp_path: Path, precision: str) -> None:
    """Where all entries are as improbable and rounded alike, their sum misses 1 by a fifth."""
    vocab_size, layout = 3400, Layout(3400, precision=precision)
    ids = np.tile(np.arange(vocab_size, dtype=np.int32), (2, 1))
    logprobs = np.full(ids.shape, -np.log(vocab_size), np.float32)
    targets = SparseTargets(ids, logprobs, np.full(2, -np.inf, np.float32))
    sequence = TokenSequence(np.zeros(3, np.int32), np.arange(3) > 0)
    write_cache(tmp_path, [(sequence, targets)], layout)
    assert found(tmp_path) == []
    write_cache(tmp_path, [(sequence, replace(targets, tail_logprob=np.full(2, -0.5, np.float32)))], layout)
    assert kinds(found(tmp_path)) == {("targets", shard_name(0, 1))}


def test_a_tail_of_more_than_everything_is_found_though_rounding_might_explain_the_sum(tmp_path: Path) -> None:
    layout = Layout(VOCAB, precision="compact")
    targets = SparseTargets(np.array([[7]], np.int32), np.log([[0.01]], dtype="f4"), np.array([0.01], np.float32))
    write_cache(tmp_path, [(TokenSequence(np.zeros(2, np.int32), np.arange(2) > 0), targets)], layout)
    assert "a tail log-probability above 0" in [finding.what for finding in found(tmp_path)]


@pytest.mark.parametrize("precision", ["balanced", "compact"])
@pytest.mark.parametrize(("steps", "findings"), [(-2, 1), (-1, 0), (1, 0), (2, 1)])
def test_groups_may_miss_the_tail_by_as_much_as_two_roundings_do(
    tmp_path: Path, precision: str, steps: int, findings: int
) -> None:
    """That of the capture, and that of a recode which added entries to what was rounded."""
    layout = Layout(VOCAB, TailParts(groups=1), precision=precision)
    half = np.log([0.5], dtype=np.float32)
    groups = half + steps * layout.quantization.group_step  # type: ignore[union-attr]
    targets = SparseTargets(np.array([[7]], np.int32), half[:, None], half, groups[:, None].astype(np.float32))
    write_cache(tmp_path, [(TokenSequence(np.zeros(2, np.int32), np.arange(2) > 0), targets)], layout)
    assert len(found(tmp_path)) == findings


def test_a_file_that_cannot_be_read_is_a_finding(root: Path) -> None:
    (root / SECOND).unlink()
    (root / SECOND).mkdir()
    assert ("damaged", SECOND) in kinds(found(root))


def test_the_command_says_what_it_checked(sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(sound)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("0 findings: 30 rows, ") and " in 3 shards checked in " in lines[0]


def test_the_command_lists_findings_and_fails(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(root, 1, lambda table: with_row(table, "row_id", 3, "0" * 32))
    (root / THIRD).unlink()
    assert main(["verify", str(root), "--rescore", "1"]) == 1
    printed = capsys.readouterr()
    assert "--rescore was skipped: fix the problems listed above first" in printed.err
    lines = printed.out.splitlines()
    assert f"missing files (1): {KINDS['missing'][1]}" in lines
    (row,) = [line for line in lines if "row 3" in line]
    assert row.startswith(f"  {SECOND}  row group ")
    assert lines[-1].startswith("2 findings: 20 rows")


@pytest.mark.parametrize("name", ["nowhere", "empty", "unfinished"])
def test_what_is_no_cache_at_all_is_bad_input(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "unfinished/.build").mkdir(parents=True)
    assert main(["verify", str(tmp_path / name)]) == 2
    assert capsys.readouterr().err.count("logitcache: error: ") == 1
    with pytest.raises(UserError, match=name):
        Verification(tmp_path / name)


def test_options_of_rescoring_without_it_are_refused(sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(sound), "--teacher", "x"]) == 2
    assert "--teacher needs --rescore" in capsys.readouterr().err


def test_a_report_shows_some_of_each_kind_and_counts_the_others() -> None:
    report = Report()
    for row in range(SHOWN_PER_KIND + 1234):
        report.add(Finding("rows", "data/x.parquet", "wrong", row=row))
    report.add(Finding("missing", "a\x1b[31m.parquet", "gone"))
    text = report.text()
    assert len(report) == SHOWN_PER_KIND + 1235
    assert text.count("data/x.parquet") == SHOWN_PER_KIND
    assert "  and 1,234 more" in text.splitlines()
    assert "\x1b" not in text
    wheres = {line.index("wrong") for line in text.splitlines() if line.endswith("wrong")}
    assert len(wheres) == 1, "the columns line up"

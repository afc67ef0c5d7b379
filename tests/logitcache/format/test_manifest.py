"""logitcache.json: read back as written, and refused with the reason when it is not ours to read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import logitcache
from logitcache import UserError
from logitcache.format.manifest import MANIFEST_NAME, Manifest
from tests.helpers.smallcaches import EVERYTHING, random_rows, write_cache


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_cache(tmp_path, random_rows(7, EVERYTHING), EVERYTHING, rows_per_shard=3)
    return tmp_path


def content(root: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((root / MANIFEST_NAME).read_text())
    return data


def rewrite(root: Path, **changes: Any) -> None:
    (root / MANIFEST_NAME).write_text(json.dumps(content(root) | changes))


def test_a_manifest_comes_back_as_it_was_written(root: Path) -> None:
    manifest = logitcache.open(root).manifest
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json())), "x") == manifest
    assert manifest.layout == EVERYTHING
    assert manifest.skipped == {"empty": 2}
    assert manifest.created_by == "tests"


def test_totals_are_those_of_the_shards(root: Path) -> None:
    manifest, data = logitcache.open(root).manifest, content(root)
    assert data["num_sequences"] == manifest.num_sequences == 7
    assert data["num_positions"] == manifest.num_positions == sum(s["num_positions"] for s in data["shards"])
    assert data["num_bytes"] == sum(path.stat().st_size for path in (root / "data").iterdir())
    assert manifest.num_entries == sum(s["num_entries"] for s in data["shards"])
    masses = [s["mean_tail_mass"] * s["num_positions"] for s in data["shards"]]
    assert manifest.mean_tail_mass == pytest.approx(sum(masses) / manifest.num_positions)


@pytest.mark.parametrize("total", ["num_sequences", "num_positions", "num_bytes"])
def test_a_total_that_is_not_its_shards_is_refused(root: Path, total: str) -> None:
    rewrite(root, **{total: content(root)[total] + 1})
    with pytest.raises(UserError, match=rf"logitcache\.json was altered: {total}"):
        logitcache.open(root)


def test_row_groups_that_do_not_hold_the_rows_of_their_shard_are_refused(root: Path) -> None:
    shards = content(root)["shards"]
    shards[1]["row_group_sizes"].append(1)
    rewrite(root, shards=shards)
    with pytest.raises(UserError, match=r"the row groups of data/train-00001-of-00003\.parquet have not 3 rows"):
        logitcache.open(root)


def test_a_newer_format_is_refused_naming_the_version_it_needs(root: Path) -> None:
    rewrite(root, format_version=7, shards="unheard of")
    with pytest.raises(UserError, match=r"format 7, .* up to format 3: install a logitcache that reads format 7"):
        logitcache.open(root)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "../other/x.parquet",
        "data/../../x.parquet",
        "data/" + "x" * 5000,
        "x/" * 2000,
        "data/\n",
        "data/\ud800",
        "/etc/x.parquet",
        r"C:\x.parquet",
        r"data\..\..\x",
        "C:x",
    ],
)
def test_a_shard_that_no_cache_can_have_is_refused(root: Path, name: str) -> None:
    shards = content(root)["shards"]
    shards[1]["name"] = name
    rewrite(root, shards=shards)
    with pytest.raises(UserError, match=rf"names a file that no cache has: {re.escape(repr(name[:80]))}"):
        logitcache.open(root)


def test_what_is_not_json_is_refused_with_file_and_line(root: Path) -> None:
    text = (root / MANIFEST_NAME).read_text().splitlines()
    text[4] = text[4].replace(":", "=")
    (root / MANIFEST_NAME).write_text("\n".join(text))
    with pytest.raises(UserError, match=rf"{root}/logitcache\.json, line 5: not JSON"):
        logitcache.open(root)


def test_what_is_not_utf8_is_refused(root: Path) -> None:
    (root / MANIFEST_NAME).write_bytes(b'{"created_by": "caf\xe9"}')
    with pytest.raises(UserError, match=r"logitcache\.json: not UTF-8"):
        logitcache.open(root)


@pytest.mark.parametrize("missing", ["format_version", "layout", "shards", "fingerprint", "skipped", "num_bytes"])
def test_a_manifest_without_one_of_its_parts_is_refused_by_its_name(root: Path, missing: str) -> None:
    data = content(root)
    del data[missing]
    (root / MANIFEST_NAME).write_text(json.dumps(data))
    with pytest.raises(UserError, match=rf"not a cache manifest of format 2: KeyError\('{missing}'\)"):
        logitcache.open(root)


@pytest.mark.parametrize("data", [[], "text", 3, None])
def test_json_of_another_kind_is_refused(root: Path, data: Any) -> None:
    (root / MANIFEST_NAME).write_text(json.dumps(data))
    with pytest.raises(UserError, match="not a cache manifest"):
        logitcache.open(root)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("skipped", 5),
        ("skipped", {"empty": None}),
        ("history", ["slice"]),
        ("fingerprint", []),
        ("fingerprint.capture.top_k", {}),
        ("layout.columns", {"input_ids": "int64"}),
        (
            "layout.rounding",
            {"square_root_steps": 0, "uniform_step": 0, "tail_step": 1, "group_step": 1, "sample_step": 1},
        ),
        ("files", {"tail_groups.parquet": 1}),
        ("layout.precision", "perfect"),
        ("layout.columns", {"id": "no type"}),
        ("layout.temperatures", 2),
        ("layout.tail_entropy", 1),
        ("shards.0.name", 5),
        ("shards.0.row_group_sizes", "12"),
        ("shards.0.row_group_sizes", [-1, 4]),
        ("shards.0.num_entries", 10**30),
        ("shards.0.num_positions", True),
        ("shards.0.mean_tail_mass", float("nan")),
    ],
)
def test_a_value_of_another_kind_is_refused(root: Path, part: str, value: Any) -> None:
    data = content(root)
    *path, name = part.split(".")
    place: Any = data
    for step in path:
        place = place[int(step)] if step.isdigit() else place[step]
    place[name] = value
    (root / MANIFEST_NAME).write_text(json.dumps(data))
    with pytest.raises(UserError, match=r"logitcache\.json is not a cache manifest of format 2: "):
        logitcache.open(root)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("teacher", 3),
        ("teacher", {"name": 5}),
        ("teacher", {"name": "x", "architecture": 5}),
        ("tokenizer", {"vocab_size": "many"}),
        ("corpus", []),
        ("corpus", {"sources": ["x"]}),
        ("corpus", {"sources": [{"name": 5}]}),
        ("capture", "x"),
        ("teacher", {"name": "\ud83d"}),
    ],
)
def test_a_fingerprint_of_another_kind_is_refused(root: Path, part: str, value: Any) -> None:
    rewrite(root, fingerprint=content(root)["fingerprint"] | {part: value})
    with pytest.raises(UserError, match=rf"manifest\.fingerprint\.{part}|'vocabulary_sha256'|surrogates not allowed"):
        logitcache.open(root)


@pytest.mark.parametrize("digest", ["", "0" * 63, "A" * 64, "../../x"])
@pytest.mark.parametrize("part", ["shards", "files"])
def test_a_digest_that_is_none_is_refused(root: Path, part: str, digest: str) -> None:
    """An empty one would let any content pass."""
    data = content(root)
    if part == "shards":
        data["shards"][1]["sha256"] = digest
    else:
        data["files"] = {"tokenizer/x": digest}
    rewrite(root, **data)
    with pytest.raises(UserError, match=r"logitcache\.json was altered: .* is no SHA-256"):
        logitcache.open(root)


def test_a_shard_that_stands_there_twice_is_refused(root: Path) -> None:
    data = content(root)
    data["shards"].append(data["shards"][0])
    for total in ("num_sequences", "num_positions", "num_bytes"):
        data[total] += data["shards"][0][total]
    rewrite(root, **data)
    with pytest.raises(UserError, match="names a shard twice"):
        logitcache.open(root)


def test_a_vocabulary_that_no_model_has_is_refused_before_anything_of_its_size_is_made(root: Path) -> None:
    rewrite(root, layout=content(root)["layout"] | {"vocab_size": 2_000_000_000})
    with pytest.raises(UserError, match="no vocabulary has 2000000000 tokens"):
        logitcache.open(root)


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 10_000])
def test_json_that_no_parser_takes_is_refused(root: Path, text: str) -> None:
    (root / MANIFEST_NAME).write_text(text)
    with pytest.raises(UserError, match="not JSON that can be read"):
        logitcache.open(root)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere does not exist"):
        logitcache.open(tmp_path / "nowhere")


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a cache: it has no logitcache\.json"):
        logitcache.open(tmp_path)


def test_an_unfinished_build_is_refused_saying_how_to_finish_it(tmp_path: Path) -> None:
    (tmp_path / ".build").mkdir()
    with pytest.raises(UserError, match=r"unfinished build: run the same `logitcache` command again"):
        logitcache.open(tmp_path)

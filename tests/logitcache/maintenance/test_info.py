"""logitcache info: one screen, with the numbers of the manifest and of the files."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest

import logitcache
from logitcache.cli import main
from logitcache.format.codec import flat
from logitcache.format.layout import Layout
from logitcache.format.manifest import fingerprint_digest
from logitcache.maintenance.info import SHOWN_BARS, info
from logitcache.report import footers
from logitcache.report.footers import READ_SHARDS
from logitcache.storage.folder import Folder
from tests.helpers.smallcaches import EVERYTHING, FINGERPRINT, VOCAB, random_rows, write_cache


def lines_of(text: str, label: str) -> list[str]:
    return [line for line in text.splitlines() if line.split("  ")[0].strip() == label]


def value(text: str, label: str) -> str:
    (line,) = lines_of(text, label)
    return line.removeprefix(label).strip()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 ragged rows in 4 shards, with everything that a cache can hold."""
    path = tmp_path_factory.mktemp("cache")
    write_cache(path, random_rows(40, EVERYTHING), EVERYTHING, rows_per_shard=10, row_group_bytes=1500)
    return path


def test_the_screen_says_what_the_manifest_says(root: Path) -> None:
    manifest, text = logitcache.open(root).manifest, info(root)
    assert value(text, "cache") == str(root)
    assert value(text, "fingerprint") == fingerprint_digest(FINGERPRINT)[:16]
    assert value(text, "teacher") == "tiny (Tiny, float32)"
    assert value(text, "rows") == f"40, the longest of {manifest.longest} tokens"
    assert value(text, "positions").startswith(f"{manifest.num_positions:,} of ")
    per_position = f"{manifest.num_bytes / manifest.num_positions:.1f} per position"
    basis = (root / "tail_basis.parquet").stat().st_size
    assert value(text, "bytes") == f"{manifest.num_bytes:,}, {per_position}; the basis {basis:,} once"
    assert f"{1 - manifest.mean_tail_mass:.3%} by {manifest.num_entries / manifest.num_positions:.1f} entries" in text
    assert (
        value(text, "of the tail") == "mass, 3 groups, normalisers at T = 0.5, 2, entropy, 2 samples, rank 3, 2 probes"
    )
    assert value(text, "left out") == "2 empty"
    assert value(text, "kept columns").startswith("id (int64), url (string)")
    assert value(text, "shards").startswith("4 of ")
    assert len(text.splitlines()) <= 46


def test_bytes_by_column_add_up_to_the_files(root: Path) -> None:
    text = info(root)
    table = text[text.index("\ncolumn") :].splitlines()[2:]
    sizes = {re.split(r" {2,}", line)[0]: int(re.split(r" {2,}", line)[1].replace(",", "")) for line in table}
    assert sum(sizes.values()) == sum(path.stat().st_size for path in (root / "data").iterdir())
    expected = 0
    for path in (root / "data").iterdir():
        metadata = pq.read_metadata(path)
        for group in range(metadata.num_row_groups):
            for column in range(metadata.num_columns):
                chunk = metadata.row_group(group).column(column)
                expected += chunk.total_compressed_size * (chunk.path_in_schema == "id_gaps.list.element")
    assert sizes["id_gaps"] == expected


def test_a_column_with_a_dot_in_its_name_is_called_by_all_of_it(tmp_path: Path) -> None:
    layout = Layout(VOCAB, columns={"meta.url": "string"})
    rows = [
        (replace(sequence, columns={"meta.url": "x"}), targets) for sequence, targets in random_rows(3, Layout(VOCAB))
    ]
    write_cache(tmp_path, rows, layout)
    assert len(lines_of(info(tmp_path), "meta.url")) == 1


def test_ragged_entries_are_drawn_as_bars_that_count_all_positions(root: Path) -> None:
    cache, text = logitcache.open(root), info(root)
    counts = np.concatenate([row.targets.num_entries for row in cache])
    bars = text[text.index("\nentries") : text.index("\ncolumn")].split("\n")[2:-1]
    assert [int(bar.split()[0]) for bar in bars] == list(range(1, 9))
    assert [int(bar.split()[1].replace(",", "")) for bar in bars] == np.bincount(counts, minlength=9)[1:].tolist()


def test_many_numbers_of_entries_share_bars(tmp_path: Path) -> None:
    layout = Layout(VOCAB)
    write_cache(tmp_path, random_rows(60, layout, max_entries=VOCAB), layout)
    bars = [line for line in info(tmp_path).splitlines() if "…" in line.split(" ")[0]]
    assert 4 < len(bars) <= SHOWN_BARS
    assert bars[0].startswith("1…7 ")


def test_a_fixed_number_of_entries_is_one_line_and_no_column_is_read(tmp_path: Path) -> None:
    layout = Layout(VOCAB)
    rows = [(sequence, targets.cut_to_width(1)) for sequence, targets in random_rows(10, layout)]
    for count, reads in [(8, False), (1, True)]:
        with patch.dict(FINGERPRINT["capture"], {"top_k": 1 if count == 8 else 8}):
            write_cache(tmp_path, rows, layout)
        with patch.object(footers, "flat", side_effect=AssertionError if not reads else flat):
            assert "\nentries  1 at every position\n" in info(tmp_path)


@pytest.mark.slow
def test_few_footers_of_many_are_read_and_the_screen_says_so(tmp_path: Path) -> None:
    cache = write_cache(tmp_path, random_rows(40, EVERYTHING), EVERYTHING, rows_per_shard=1)
    opened = []
    plain = Folder.open

    def counting(folder: Folder, name: str, num_bytes: int | None = None) -> object:
        opened.append(name)
        return plain(folder, name, num_bytes)

    with patch.object(Folder, "open", counting):
        text = info(cache)
    assert len(set(opened)) == READ_SHARDS
    assert {cache.manifest.shards[0].name, cache.manifest.shards[-1].name} <= set(opened)
    assert text.count("(of 32 of 40 shards)") == 2


def test_the_history_is_told_step_by_step(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "c")
    manifest = logitcache.open(root).manifest
    steps: list[dict[str, Any]] = [
        {"command": "merge", "created_by": "x", "from": [{"path": "a", "sequences": 3}, {"path": "b"}]},
        {"command": "slice", "created_by": "x", "rows": "0:40", "where": None, "from": [{"path": "ab"}]},
    ]
    replace(manifest, history=tuple(steps)).write(Folder(tmp_path / "c"))
    text = info(tmp_path / "c")
    at = next(i for i, line in enumerate(text.splitlines()) if line.startswith("history"))
    first, second = text.splitlines()[at : at + 2]
    assert first.endswith("merge: from a, b")
    assert second.endswith("slice: rows 0:40, from ab")
    assert first.index("merge") == second.index("slice")
    replace(manifest, history=tuple(steps * 50)).write(Folder(tmp_path / "c"))
    assert len(info(tmp_path / "c").splitlines()) <= 46


def test_a_built_cache_names_teacher_tokenizer_engine_and_settings(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"backend": "transformers", "top_k": 16, "tail_rank": 0, "temperatures": (1, 2)}
    logitcache.build(str(teacher), str(corpus), tmp_path / "c", **settings)
    cache = logitcache.open(tmp_path / "c")
    text = info(cache)
    fingerprint = cache.manifest.fingerprint
    content = fingerprint["teacher"]["content_sha256"][:12]
    assert value(text, "teacher") == f"{teacher.name} (LlamaForCausalLM, float32, content {content})"
    assert value(text, "engine").startswith("transformers ")
    assert fingerprint["tokenizer"]["vocabulary_sha256"][:12] in value(text, "tokenizer")
    assert "top_k 16" in value(text, "captured with")
    assert "format 2, precision balanced" in value(text, "created by")
    assert value(text, "corpus") == "train.jsonl"
    assert "\nentries  16 at every position\n" in text


def test_a_cache_of_format_1_is_described() -> None:
    text = info(Path(__file__).parents[2] / "data/format1" / "cache")
    assert "precision exact" in value(text, "created by")
    assert "token_ids" in text


def test_a_url_is_described_as_a_folder_is(root: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(root), "/described", recursive=True)
    try:
        assert info("memory://described") == info(root).replace(str(root), "memory://described")
    finally:
        memory.rm("/described", recursive=True)


def test_the_command_prints_the_screen(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(root)]) == 0
    assert capsys.readouterr().out == info(root) + "\n"


def test_what_is_no_cache_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(tmp_path)]) == 2
    assert "is not a cache" in capsys.readouterr().err


def test_a_damaged_footer_is_named(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(root, tmp_path / "c")
    path = sorted((tmp_path / "c/data").iterdir())[1]
    path.write_bytes(path.read_bytes()[:-4] + b"XXXX")
    assert main(["info", str(tmp_path / "c")]) == 2
    assert re.search(rf"{path.name} cannot be read .*logitcache verify", capsys.readouterr().err)


def test_the_digest_of_a_fingerprint_ignores_the_order_of_its_keys() -> None:
    one, other = {"a": 1, "b": {"c": "ü", "d": [1, 2]}}, {"b": {"d": [1, 2], "c": "ü"}, "a": 1}
    assert fingerprint_digest(one) == fingerprint_digest(other)
    assert fingerprint_digest(one) != fingerprint_digest({**one, "a": 2})
    assert re.fullmatch("[0-9a-f]{64}", fingerprint_digest(one))


@pytest.mark.parametrize("name", ["tail_basis.parquet", "tail_groups.parquet"])
def test_a_file_that_all_positions_need_is_missed(tmp_path: Path, name: str) -> None:
    root = tmp_path / "cache"
    write_cache(root, random_rows(3, EVERYTHING), EVERYTHING)
    assert "damaged" not in info(root)
    content = bytearray((root / name).read_bytes())
    content[len(content) // 2] ^= 1
    (root / name).write_bytes(content)
    (line,) = (line for line in info(root).splitlines() if line.startswith("damaged"))
    assert name in line and "SHA-256" in line
    (root / name).unlink()
    (line,) = (line for line in info(root).splitlines() if line.startswith("damaged"))
    assert name in line


def test_the_basis_of_a_cache_at_a_url_is_not_fetched(root: Path) -> None:
    url = "memory://info-basis"
    fsspec.filesystem("memory").put(str(root), url, recursive=True)
    with patch("logitcache.reading.cache.read_tail_basis", side_effect=AssertionError("it was read")) as read:
        assert not lines_of(info(url), "damaged")
    assert not read.called

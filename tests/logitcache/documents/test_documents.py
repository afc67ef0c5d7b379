"""Sources of documents: every kind of file, folders, globs and dataset folders, and where the bad ones are."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from logitcache import UserError
from logitcache.capture.corpus.documents import find_sources
from logitcache.documents import files
from logitcache.documents.document import Document

ROWS: list[dict[str, Any]] = [{"text": f"Número {i} …", "id": i} for i in range(300)]


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def read(*data: str | Path, **options: Any) -> list[Document]:
    return [document for source in find_sources([str(d) for d in data], **options) for document in source.documents()]


def values(*data: str | Path, **options: Any) -> list[dict[str, Any]]:
    found = read(*data, **options)
    assert all(document.error is None for document in found)
    return [dict(document.values) for document in found]


WRITERS: dict[str, Callable[[Path], object]] = {
    "rows.jsonl": lambda path: path.write_bytes(lines(ROWS)),
    "rows.jsonl.gz": lambda path: path.write_bytes(gzip.compress(lines(ROWS))),
    "rows.jsonl.zst": lambda path: path.write_bytes(zstandard.compress(lines(ROWS))),
    "rows.parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=70),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_its_rows_in_order(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    assert values(tmp_path / name) == ROWS


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "story.txt").write_text("Once upon a time.\n\nThe end.\n", encoding="utf-8")
    assert values(tmp_path / "story.txt") == [{"text": "Once upon a time.\n\nThe end.\n"}]


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
def test_compressed_files_that_were_joined_are_read_to_the_end(tmp_path: Path, compress: Any) -> None:
    path = tmp_path / ("rows.jsonl.gz" if compress is gzip.compress else "rows.jsonl.zst")
    path.write_bytes(compress(lines(ROWS[:200])) + compress(lines(ROWS[200:])))
    assert values(path) == ROWS


def test_blank_lines_and_a_byte_order_mark_are_not_documents(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\n  \n".join(lines(ROWS[:3]).splitlines()))
    assert values(tmp_path / "rows.jsonl") == ROWS[:3]
    assert [d.where for d in read(tmp_path / "rows.jsonl")] == [f"{tmp_path}/rows.jsonl, line {i}" for i in (1, 3, 5)]


def test_a_folder_gives_its_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a/z.jsonl", "a/y.txt", "c.csv", "notes.md"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"text": name}) if name.endswith("jsonl") else name)
    assert [row["text"] for row in values(tmp_path)] == ["a/y.txt", "a/z.jsonl", "b.jsonl"]
    assert [s.identity()["name"] for s in find_sources(str(tmp_path))] == ["a/y.txt", "a/z.jsonl", "b.jsonl"]


def test_a_glob_gives_what_it_matches_in_order(tmp_path: Path) -> None:
    for name in ("x2.txt", "x1.txt", "y.txt", "sub/x3.txt", "x.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [row["text"] for row in values(tmp_path / "x*")] == ["x1.txt", "x2.txt"]
    assert [row["text"] for row in values(tmp_path / "**/x*.txt")] == ["sub/x3.txt", "x1.txt", "x2.txt"]


def test_a_file_whose_name_looks_like_a_glob_is_read(tmp_path: Path) -> None:
    (tmp_path / "part[1].jsonl").write_bytes(lines(ROWS[:2]))
    assert values(tmp_path / "part[1].jsonl") == ROWS[:2]


def test_several_sources_keep_their_order(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("first")
    (tmp_path / "a.txt").write_text("second")
    assert [row["text"] for row in values(tmp_path / "b.txt", tmp_path / "a.txt")] == ["first", "second"]


def test_the_identity_of_a_file_is_its_name_and_content_not_its_place(tmp_path: Path) -> None:
    identities = []
    for folder, content in (("here", "text"), ("there", "text"), ("elsewhere", "tex!")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text(content)
        identities.append(find_sources(str(tmp_path / folder / "a.txt"))[0].identity())
    assert identities[0] == identities[1] != identities[2]
    assert identities[0]["num_bytes"] == 4


@pytest.fixture
def csv_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that only `datasets` can read."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "train.csv").write_text("text,id\nOne.,1\nTwo.,2\n")
    (folder / "test.csv").write_text("text,id\nHeld out.,3\n")
    return folder


def test_a_folder_of_other_files_goes_through_datasets(csv_folder: Path) -> None:
    assert values(csv_folder) == [{"text": "One.", "id": 1}, {"text": "Two.", "id": 2}]
    assert values(csv_folder, split="test") == [{"text": "Held out.", "id": 3}]
    assert [d.where for d in read(csv_folder)] == [f"{csv_folder} (train), row {i}" for i in (0, 1)]


def test_a_split_that_the_dataset_has_not_is_refused(csv_folder: Path) -> None:
    with pytest.raises(UserError, match=rf"--data {csv_folder}: neither a file nor a dataset that loads \(Bad split"):
        values(csv_folder, split="validation")


def test_a_dataset_that_breaks_off_says_after_which_row(csv_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def broken(self: Any) -> Any:
        yield pa.table({"text": ["One."]})
        raise RuntimeError("connection lost\nand more")

    monkeypatch.setattr(datasets.IterableDataset, "__iter__", broken)
    with pytest.raises(UserError, match=r"reading stops after row 1 \(connection lost\)$"):
        read(csv_folder)


@pytest.mark.parametrize("folder", ["", "nothing in it"])
def test_a_folder_without_documents_is_refused(tmp_path: Path, folder: str) -> None:
    (tmp_path / "nothing in it").mkdir()
    with pytest.raises(UserError, match=r"--data .*: neither a file nor a dataset"):
        read(tmp_path / folder)


@pytest.mark.parametrize("name", ["rows.jsonl", "deep/er/rows.parquet", "rows.txt", "a b"])
def test_a_missing_path_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=rf"--data {tmp_path}/{name}: no such file or folder"):
        find_sources(str(tmp_path / name))


def test_a_relative_path_that_is_missing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"--data rows\.jsonl: no such file or folder"):
        find_sources("rows.jsonl")


def test_an_unknown_kind_of_file_is_refused_naming_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text\nOne.\n")
    with pytest.raises(UserError, match=r"rows\.csv: unknown kind of file, accepted are \.jsonl, .*\.txt"):
        find_sources(str(tmp_path / "rows.csv"))


def test_a_glob_without_a_match_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text\nOne.\n")
    with pytest.raises(UserError, match=r"\*\.csv: no file matches"):
        find_sources(f"{tmp_path}/*.csv")


@pytest.mark.parametrize("suffix", ["gz", "zst"])
@pytest.mark.parametrize("at", [0, 20, 100, -1])
def test_a_damaged_compressed_file_is_refused(tmp_path: Path, suffix: str, at: int) -> None:
    content = bytearray((gzip.compress if suffix == "gz" else with_checksum)(lines(ROWS)))
    content[at] ^= 0x10
    path = tmp_path / f"rows.jsonl.{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"rows\.jsonl\.{suffix}, after line \d+: .*damaged"):
        read(path)


def with_checksum(content: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(content)


@pytest.mark.parametrize("suffix", ["gz", "zst"])
@pytest.mark.parametrize("kept", [0.05, 0.5, 0.99])
def test_a_truncated_compressed_file_is_refused(tmp_path: Path, suffix: str, kept: float) -> None:
    whole = (gzip.compress if suffix == "gz" else zstandard.compress)(lines(ROWS))
    path = tmp_path / f"rows.jsonl.{suffix}"
    path.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(UserError, match=rf"rows\.jsonl\.{suffix}, after line \d+: .*damaged"):
        read(path)


def test_a_truncated_file_gives_the_rows_before_its_end_and_says_where_it_stopped(tmp_path: Path) -> None:
    random = Random(0)
    rows = [{"text": random.randbytes(100).hex()} for _ in range(4000)]
    content = gzip.compress(lines(rows))
    (tmp_path / "rows.jsonl.gz").write_bytes(content[: len(content) // 2])
    good = 0
    with pytest.raises(UserError, match=r"rows\.jsonl\.gz, after line") as raised:
        for good, document in enumerate(find_sources(str(tmp_path / "rows.jsonl.gz"))[0].documents(), start=1):
            assert document.values == rows[good - 1]
    assert 1000 < good < 2500
    assert f"after line {good}:" in str(raised.value)


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (b'{"text": "half', "not JSON"),
        (b'{"text": 1' + b"0" * 5000 + b"}", "not JSON"),
        (b'{"text": "caf\xe9"}', "not JSON .*utf-8"),
        (b'{"text": "\\ud83d"}', "not JSON .*surrogates"),
        (b'{"text": "\xed\xa0\xbd"}', "not JSON .*utf-8"),
        (b"[" * 100_000, "not JSON"),
        (b'["text"]', "a JSON object is wanted, this is list"),
        (b'"text"', "a JSON object is wanted, this is str"),
        (b"null", "a JSON object is wanted, this is NoneType"),
    ],
    ids=["half", "endless number", "Latin-1", "half a pair", "encoded half", "nesting", "list", "string", "null"],
)
def test_a_bad_line_is_reported_with_its_number_and_the_rest_is_read(tmp_path: Path, line: bytes, error: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines(ROWS[:2]) + line + b"\n" + lines(ROWS[2:4]))
    found = read(path)
    assert [d.values for d in found if d.error is None] == ROWS[:4]
    bad = found[2]
    assert bad.where == f"{path}, line 3"
    assert bad.error is not None
    assert re.search(error, bad.error)


def test_a_whole_surrogate_pair_is_text(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "\\ud83d\\ude00 \\\\ud83d"}\n')
    assert values(tmp_path / "rows.jsonl") == [{"text": "😀 \\ud83d"}]


def test_a_text_file_that_is_not_utf8_is_reported(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.txt").write_text("fine")
    bad, good = read(tmp_path)
    assert bad.where == f"{tmp_path}/a.txt"
    assert bad.error is not None and bad.error.startswith("not UTF-8")
    assert good.values == {"text": "fine"}


def test_a_text_file_too_large_to_be_one_document_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_TEXT_FILE_BYTES", 1 << 20)
    (tmp_path / "a.txt").write_bytes(b"a" * ((1 << 20) + 1))
    with pytest.raises(UserError, match=r"a\.txt: a \.txt file is one document, .* 1 MiB; write its documents"):
        read(tmp_path / "a.txt")


@pytest.mark.parametrize("damage", ["not Parquet", "truncated", "flipped page"])
def test_a_damaged_parquet_file_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path, compression="zstd")
    content = bytearray(path.read_bytes())
    if damage == "not Parquet":
        content[:] = b"text,id\n1,2\n"
    elif damage == "truncated":
        del content[-20:]
    else:
        content[200:260] = bytes(60)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"rows\.parquet, after row 0: not readable as Parquet"):
        read(path)


@pytest.mark.parametrize("through", ["file", "load_dataset"])
def test_text_that_is_not_utf8_spoils_its_own_row_of_parquet_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, through: str
) -> None:
    texts = [b"fine", b"caf\xe9", "José".encode()]
    bad = {"text": pa.array(texts).view(pa.string()), "tags": pa.array([["a"], ["b"], None])}
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table(bad), path)
    if through == "load_dataset":
        read_by_datasets_only(monkeypatch, tmp_path)
    first, second, third = read(path if through == "file" else tmp_path)
    assert first.values == {"text": "fine", "tags": ["a"]}
    assert third.values == {"text": "José", "tags": None}
    assert second.where == (f"{path}, row 1" if through == "file" else f"{tmp_path} (train), row 1")
    assert second.error is not None
    assert re.match(r"column 'text' is not UTF-8 \(.*0xe9", second.error)


def test_a_date_that_python_has_not_spoils_its_row_only(tmp_path: Path) -> None:
    dates = pa.array([0, 2**40], pa.timestamp("s"))
    pq.write_table(pa.table({"text": ["a", "b"], "written": dates}), tmp_path / "rows.parquet")
    good, bad = read(tmp_path / "rows.parquet")
    assert good.values["text"] == "a"
    assert bad.error is not None and bad.error.startswith("column 'written' is not readable")


def read_by_datasets_only(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Makes a folder of Parquet files look like a dataset of the hub."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "hf")
    monkeypatch.setattr("logitcache.capture.corpus.documents.find_reader", lambda path: None)

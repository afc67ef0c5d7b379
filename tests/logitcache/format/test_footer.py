"""What a file claims is compared with the manifest, and bounded, before a page of it is decompressed."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import logitcache
from logitcache import SparseTargets, UserError
from logitcache.cli import main
from logitcache.format import codec, footer, shards
from logitcache.format.codec import DecodedRows
from logitcache.format.footer import check_footer, check_pages, read_footer
from logitcache.format.layout import Layout
from logitcache.format.manifest import MANIFEST_NAME
from logitcache.format.quantization import PRESETS
from logitcache.format.sequences import TokenSequence
from logitcache.format.shards import shard_name
from logitcache.format.tail_parts import TAIL_GROUPS_NAME
from logitcache.format.thrift import parse_struct
from logitcache.maintenance.info import info
from logitcache.maintenance.row_scan import scan
from logitcache.maintenance.verify.verification import Verification
from logitcache.report.page import view
from logitcache.sharing import bundle
from logitcache.sharing.bundle import opened_bundle, write_bundle
from logitcache.sharing.transfer import TravellingFile
from logitcache.storage.folder import Folder
from tests.helpers.smallcaches import (
    EVERYTHING,
    VOCAB,
    at_precision,
    full_distributions,
    random_rows,
    small,
    sparse_targets,
    write_cache,
)

ROWS = random_rows(12, EVERYTHING, seed=4)
SHARD = shard_name(0, 1)
MIB = 1 << 20


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_cache(tmp_path / "cache", ROWS, EVERYTHING)
    return tmp_path / "cache"


def declare(root: Path, **counts: Any) -> None:
    """The manifest's entry of the shard, as its maker would have it: with its SHA-256 and size, and these counts."""
    data = json.loads((root / MANIFEST_NAME).read_text())
    content = (root / SHARD).read_bytes()
    data["shards"][0] |= {"sha256": hashlib.sha256(content).hexdigest(), "num_bytes": len(content), **counts}
    data |= {name: data["shards"][0][name] for name in ("num_sequences", "num_positions", "num_bytes")}
    (root / MANIFEST_NAME).write_text(json.dumps(data))


def with_column(root: Path, name: str, values: Any, **options: Any) -> None:
    """The shard with another column, in one row group."""
    with pq.ParquetFile(root / SHARD) as file:
        table, metadata = file.read(), file.metadata.metadata
    table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), values)
    with pq.ParquetWriter(
        root / SHARD, table.schema, compression="zstd", write_page_checksum=True, **options
    ) as writer:
        writer.add_key_value_metadata({b"logitcache.codebook": metadata[b"logitcache.codebook"]})
        writer.write_table(table, row_group_size=len(table))


READERS: dict[str, Callable[[Path], object]] = {
    "rows": lambda root: list(logitcache.open(root)),
    "columns": lambda root: list(logitcache.open(root).iter_columns(["row_id"])),
    "info": lambda root: info(root),
    "view": lambda root: view(root, root.parent / "page.html"),
}


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("counted", [False, True], ids=["more than the manifest says", "as the manifest says"])
def test_a_list_without_end_is_refused_before_it_is_decompressed(
    root: Path, reader: str, counted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 8 KB; a run of equal ids takes no room in a file."""
    ids = pa.array([[7] * (4 * MIB), *[[7, 8]] * (len(ROWS) - 1)], pa.list_(pa.int32()))
    with_column(root, "id_gaps", ids)
    assert (root / SHARD).stat().st_size < 20_000
    declare(root, **({"num_entries": 5 * MIB} if counted else {}))
    monkeypatch.setattr(footer, "FREE_BYTES", 16 * MIB if counted else 1 << 40)
    refusal = "takes .* bytes uncompressed" if counted else "column id_gaps has 4,194,.* values, the manifest allows"
    with (
        patch.object(pq.ParquetFile, "read_row_group", side_effect=AssertionError),
        pytest.raises(UserError, match=refusal),
    ):
        READERS[reader](root)
    if counted:
        assert any("bytes uncompressed" in finding.what for finding in Verification(root))


def test_what_the_writer_wrote_is_within_the_manifests_counts(root: Path) -> None:
    cache = logitcache.open(root)
    info, layout = cache.manifest.shards[0], cache.manifest.layout
    with (root / SHARD).open("rb") as file:
        read = read_footer(file, (root / SHARD).stat().st_size)
    check_footer(read, info, layout)
    for part in ("num_tokens", "num_positions", "num_entries"):
        with pytest.raises(ValueError, match="the manifest allows"):
            check_footer(read, replace(info, **{part: getattr(info, part) // 2}), layout)
    with pytest.raises(ValueError, match=r"1 row groups of 12 rows, not those of the manifest"):
        check_footer(read, replace(info, row_group_sizes=(5, 7)), layout)


def test_a_footer_says_what_arrow_reads_in_it(tmp_path: Path) -> None:
    for precision in PRESETS:
        layout = at_precision(EVERYTHING, precision)
        write_cache(tmp_path / precision, random_rows(40, layout), layout, row_group_bytes=2000)
        path = tmp_path / precision / SHARD
        with path.open("rb") as file:
            read = read_footer(file, path.stat().st_size)
        theirs = pq.read_metadata(path)
        assert len(read.row_groups) == theirs.num_row_groups > 3
        for index, group in enumerate(read.row_groups):
            with path.open("rb") as file:
                check_pages(file, group)
            assert group.num_rows == theirs.row_group(index).num_rows
            for chunk, column in zip(
                group.chunks, map(theirs.row_group(index).column, range(theirs.num_columns)), strict=True
            ):
                assert chunk.name == column.path_in_schema.removesuffix(".list.element")
                assert (chunk.num_values, chunk.num_bytes) == (column.num_values, column.total_uncompressed_size)
                assert chunk.compressed_bytes == column.total_compressed_size


@pytest.mark.slow
@small
@given(st.data())
def test_a_footer_that_is_damaged_ends_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Arrow's own description of a column ends the process where its levels are not those of the schema."""
    root = tmp_path_factory.mktemp("damaged") / "cache"
    write_cache(root, ROWS, EVERYTHING)
    content = bytearray((root / SHARD).read_bytes())
    begin = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(begin, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (root / SHARD).write_bytes(content)
    declare(root)
    for reader in READERS.values():
        with contextlib.suppress(UserError):
            reader(root)
    list(Verification(root))


@given(st.binary(max_size=200))
def test_any_bytes_are_a_structure_or_none(content: bytes) -> None:
    with contextlib.suppress(ValueError):
        parse_struct(content)


def test_rows_beyond_the_bytes_are_refused(root: Path) -> None:
    declare(root, num_sequences=10**12, row_group_sizes=[10**12])
    with pytest.raises(UserError, match=r"was altered: 1000000000000 rows in \d+ bytes of data/train"):
        logitcache.open(root)


def test_a_position_of_many_entries_widens_no_others_without_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = Layout(VOCAB, precision="exact")
    targets = sparse_targets(full_distributions(np.random.default_rng(0), 40), [1] * 39 + [VOCAB], layout)
    row = TokenSequence(np.zeros(41, np.int32), np.arange(41) > 0), targets
    cache = write_cache(tmp_path, [row], layout)
    assert np.array_equal(cache[0].targets.token_ids, targets.token_ids)
    monkeypatch.setattr(codec, "MOST_PADDED", 1000)
    with pytest.raises(UserError, match="40 positions of up to 50 entries hold only 89"):
        list(logitcache.open(tmp_path))


def test_the_writer_makes_no_row_group_that_it_would_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout(VOCAB, precision="exact")

    def rows(count: int) -> list[tuple[TokenSequence, SparseTargets]]:
        random = np.random.default_rng(count)
        made = []
        for number in range(8):
            full = full_distributions(random, 20)
            wide = [VOCAB if number == 7 else 1] * 20
            sequence = TokenSequence(random.integers(0, VOCAB, 21, dtype=np.int32), np.arange(21) > 0)
            made.append((sequence, sparse_targets(full, wide, layout)))
        return made

    for module in (codec, shards):
        monkeypatch.setattr(module, "MOST_PADDED", 4000)
    cache = write_cache(tmp_path, rows(1), layout)
    assert len(list(cache)) == 8
    assert cache.manifest.shards[0].row_group_sizes == (7, 1)


def test_tail_groups_are_those_of_the_vocabulary(root: Path) -> None:
    def refused(match: str, **columns: Any) -> None:
        pq.write_table(pa.table(columns), root / TAIL_GROUPS_NAME)
        manifest = logitcache.open(root).manifest
        digest = hashlib.sha256((root / TAIL_GROUPS_NAME).read_bytes()).hexdigest()
        replace(manifest, files={TAIL_GROUPS_NAME: digest}).write(Folder(root))
        with pytest.raises(UserError, match=match):
            _ = logitcache.open(root).tail_groups

    refused("was altered .it is not of 50 ids in 3 groups", group=pa.array([0] * 49, pa.int32()))
    refused("was altered .it is not of 50 ids in 3 groups", group=pa.array([3] * 50, pa.int32()))
    refused("was altered .its groups are int64", group=[0] * 50)
    refused("was altered .its groups are int32, int32 is wanted, none missing", group=pa.array([None] * 50, pa.int32()))
    refused("was altered", id=[0])
    with patch.object(footer, "FREE_BYTES", 1000):
        refused("bytes uncompressed", group=pa.array([0] * 50_000, pa.int32()))


def test_a_bundle_unpacks_to_no_more_than_a_cache_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "FREE_BYTES", MIB)
    (tmp_path / MANIFEST_NAME).write_bytes(b"{}")
    (tmp_path / "zeros").write_bytes(bytes(64 * MIB))
    files = [TravellingFile(name, "") for name in (MANIFEST_NAME, "zeros")]
    write_bundle(tmp_path, files, tmp_path / "x.tar.zst", lambda count: None)
    assert (tmp_path / "x.tar.zst").stat().st_size < 16_000
    taken = 0
    with opened_bundle(str(tmp_path / "x.tar.zst")) as members, pytest.raises(UserError, match="which no cache does"):
        for member in members:
            for chunk in member.chunks:
                taken += len(chunk)
    assert taken < 4 * MIB


@pytest.mark.parametrize(
    ("column", "values", "what"),
    [
        ("loss_mask", pa.array([[None]] * len(ROWS), pa.list_(pa.bool_())), "values of column loss_mask are missing"),
        ("loss_mask", pa.array([None] * len(ROWS), pa.list_(pa.bool_())), "values of column loss_mask are missing"),
        ("row_id", pa.array([None] * len(ROWS), pa.string()), "values of column row_id are missing"),
        ("row_id", pa.array([1] * len(ROWS)), "column row_id is of another type than the layout says"),
        ("loss_mask", None, "column loss_mask is missing"),
    ],
)
def test_columns_that_are_not_the_layouts_are_refused_whoever_reads_them(
    root: Path, column: str, values: pa.Array | None, what: str
) -> None:
    with pq.ParquetFile(root / SHARD) as file:
        table, metadata = file.read(), file.metadata.metadata
    index = table.schema.get_field_index(column)
    table = table.remove_column(index)
    if values is not None:
        table = table.add_column(index, column, values)
    with pq.ParquetWriter(root / SHARD, table.schema) as writer:
        writer.add_key_value_metadata({b"logitcache.codebook": metadata[b"logitcache.codebook"]})
        writer.write_table(table, row_group_size=len(table))
    declare(root)
    cache = logitcache.open(root)
    for read in (lambda: list(cache), lambda: list(cache.iter_columns([column])), lambda: list(scan([cache]))):
        with pytest.raises(UserError, match=rf"was altered: {what} \(row group 0\)"):
            read()


def test_a_name_that_is_not_utf8_is_one_line(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = (root / SHARD).read_bytes()
    (root / SHARD).write_bytes(content.replace(b"\x03url", b"\x03\xff\xfe\xfd"))
    assert (root / SHARD).read_bytes() != content
    declare(root)
    for reader in READERS.values():
        with pytest.raises(UserError):
            reader(root)
    assert main(["verify", str(root)]) == 1
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("at", ["file", "rows"])
def test_a_machine_without_memory_is_no_damaged_shard(
    root: Path, at: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise pa.ArrowMemoryError("malloc of size 34359738368 failed")

    owner, name = {"file": (pq.ParquetFile, "read_row_group"), "rows": (DecodedRows, "__init__")}[at]
    monkeypatch.setattr(owner, name, fail)
    assert main(["verify", str(root)]) == 2
    written = capsys.readouterr()
    assert "logitcache: error: out of memory (malloc of size 34359738368 failed)" in written.err
    assert "damaged" not in written.out + written.err


@pytest.mark.slow
@pytest.mark.parametrize("part", ["bytes", "values"])
def test_a_page_that_claims_more_than_its_footer_is_not_decompressed(root: Path, part: str) -> None:
    """A footer in which four million values, or their bytes, are called a thousand."""
    values = [[7] * (4 * MIB), *[[7, 8]] * (len(ROWS) - 1)]
    with_column(root, "id_gaps", pa.array(values, pa.list_(pa.int32())), use_dictionary=part != "bytes")
    with (root / SHARD).open("rb") as file:
        group = read_footer(file, (root / SHARD).stat().st_size).row_groups[0]
        chunk = next(chunk for chunk in group.chunks if chunk.name == "id_gaps")
        lies = {"bytes": replace(chunk, num_bytes=1000), "values": replace(chunk, num_values=1000)}
        with pytest.raises(ValueError, match=r"column id_gaps: pages of [\d,]+ values in [\d,]+ bytes uncompressed"):
            check_pages(file, replace(group, chunks=(lies[part],)))
        check_pages(file, group)

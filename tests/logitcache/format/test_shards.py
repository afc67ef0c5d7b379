"""Shard files: whole or absent, cut into row groups, and every kind of damage found."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import s3fs

from logitcache import UserError
from logitcache.format import shards
from logitcache.format.layout import Layout, read_layout
from logitcache.format.sequences import TokenSequence
from logitcache.format.shards import ShardWriter
from logitcache.format.tail_parts import TailParts
from logitcache.format.targets import SparseTargets
from logitcache.reading import shard_reader
from logitcache.reading.cache import LogitCache
from logitcache.storage.atomic import file_sha256
from logitcache.storage.folder import Folder
from tests.helpers.objectstore import bucket, s3_endpoint  # noqa: F401
from tests.helpers.smallcaches import EVERYTHING, VOCAB, Row, assert_holds, random_rows, write_cache

NAME = shards.shard_name(0, 1)


def files(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def read_everything(root: Path | str) -> None:
    for _ in LogitCache(str(root)):
        pass


def test_a_shard_appears_when_it_is_complete(tmp_path: Path) -> None:
    with ShardWriter(Folder(tmp_path), NAME, EVERYTHING) as writer:
        for sequence, targets in random_rows(3, EVERYTHING):
            writer.write(sequence, targets)
        assert files(tmp_path) == [f"{NAME}.tmp"]
    assert files(tmp_path) == [NAME]


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, OSError])
def test_an_interrupted_shard_leaves_nothing(tmp_path: Path, kind: type[BaseException]) -> None:
    with pytest.raises(kind, match="stop"), ShardWriter(Folder(tmp_path), NAME, EVERYTHING) as writer:
        writer.write(*random_rows(1, EVERYTHING)[0])
        raise kind("stop")
    assert files(tmp_path) == []


def test_an_interrupted_shard_leaves_the_former_one(tmp_path: Path) -> None:
    rows = random_rows(3, EVERYTHING)
    write_cache(tmp_path, rows, EVERYTHING)
    with pytest.raises(KeyboardInterrupt), ShardWriter(Folder(tmp_path), NAME, EVERYTHING):
        raise KeyboardInterrupt
    assert_holds(LogitCache(str(tmp_path))[2], rows[2])


def test_the_info_counts_what_was_written(tmp_path: Path) -> None:
    rows = random_rows(7, EVERYTHING)
    info = write_cache(tmp_path, rows, EVERYTHING).manifest.shards[0]
    tail_masses = [float(np.exp(float(x))) for _, targets in rows for x in targets.tail_logprob]
    assert info.name == "data/train-00000-of-00001.parquet"
    assert info.num_sequences == 7
    assert info.num_tokens == sum(len(sequence.input_ids) for sequence, _ in rows)
    assert info.num_positions == sum(int(sequence.loss_mask.sum()) for sequence, _ in rows) == len(tail_masses)
    assert info.num_entries == sum(int((targets.token_ids >= 0).sum()) for _, targets in rows)
    assert info.mean_tail_mass == pytest.approx(sum(tail_masses) / len(tail_masses))
    assert info.num_bytes == (tmp_path / NAME).stat().st_size
    sha256 = subprocess.run(["sha256sum", tmp_path / NAME], capture_output=True, text=True, check=True).stdout
    assert info.sha256 == sha256.split()[0]


def test_the_file_says_itself_what_its_columns_are(tmp_path: Path) -> None:
    write_cache(tmp_path, random_rows(2, EVERYTHING), EVERYTHING)
    assert read_layout(pq.read_schema(tmp_path / NAME).metadata, NAME) == EVERYTHING


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "limit"),
    [(Layout(VOCAB), 20_000), (Layout(VOCAB, TailParts(groups=20, samples=30)), 100_000)],
    ids=["entries", "more tail than entries"],
)
def test_row_groups_are_as_large_as_asked_for(tmp_path: Path, layout: Layout, limit: int) -> None:
    rows = random_rows(120, layout, longest=40)
    cache = write_cache(tmp_path, rows, layout, row_group_bytes=limit)
    metadata = pq.read_metadata(tmp_path / NAME)
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    assert [group.num_rows for group in groups] == list(cache.manifest.shards[0].row_group_sizes)
    assert sum(group.num_rows for group in groups) == 120
    assert len(groups) > 2
    table = pq.read_table(tmp_path / NAME, columns=[name for name in layout.schema().names if name != "row_id"])
    first = 0
    for group in groups[:-1]:
        held = table.slice(first, group.num_rows)
        numbers = sum(
            len(column.combine_chunks().flatten()) * (1 if name == "loss_mask" else 4)
            for name, column in zip(held.column_names, held.columns, strict=True)
        )
        assert 0.5 * limit <= numbers <= 1.2 * limit
        first += group.num_rows


def damage(root: Path, at: int) -> None:
    path = root / NAME
    content = bytearray(path.read_bytes())
    content[at] ^= 0x10
    path.write_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize("place", [0.0, 0.01, 0.2, 0.4, 0.6, 0.8, 0.95, 0.999, 1.0])
def test_one_flipped_bit_anywhere_is_found(tmp_path: Path, place: float) -> None:
    write_cache(tmp_path, random_rows(20, EVERYTHING), EVERYTHING, row_group_bytes=1000)
    damage(tmp_path, round(place * ((tmp_path / NAME).stat().st_size - 1)))
    with pytest.raises(UserError, match=r"train-00000-of-00001\.parquet was altered.*SHA-256.*again"):
        read_everything(tmp_path)


def test_a_flipped_bit_in_any_column_of_a_remote_shard_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGITCACHE_LOCAL_GB", "0")
    write_cache(tmp_path, random_rows(5, EVERYTHING), EVERYTHING)
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path), "/remote", recursive=True)
    group = pq.read_metadata(tmp_path / NAME).row_group(0)
    whole = memory.cat_file(f"/remote/{NAME}")
    for index in range(group.num_columns):
        column = group.column(index)
        start = column.dictionary_page_offset or column.data_page_offset
        damaged = bytearray(whole)
        damaged[start + column.total_compressed_size - 1] ^= 0x10
        memory.pipe_file(f"/remote/{NAME}", bytes(damaged))
        with pytest.raises(UserError, match=r"train-00000-of-00001\.parquet was altered: .*row group 0"):
            read_everything("memory://remote")
    memory.rm("/remote", recursive=True)


@pytest.mark.parametrize("at", [-1, -6])
def test_a_remote_shard_without_its_end_mark_is_refused(tmp_path: Path, at: int) -> None:
    write_cache(tmp_path, random_rows(2, EVERYTHING), EVERYTHING)
    damage(tmp_path, at)
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path), "/remote", recursive=True)
    with pytest.raises(UserError, match=r"train-00000-of-00001\.parquet was altered"):
        read_everything("memory://remote")
    memory.rm("/remote", recursive=True)


def test_a_truncated_shard_is_refused_when_the_cache_is_opened(tmp_path: Path) -> None:
    size = write_cache(tmp_path, random_rows(3, EVERYTHING), EVERYTHING).manifest.num_bytes
    os.truncate(tmp_path / NAME, size - 100)
    with pytest.raises(UserError, match=rf"{NAME} was truncated or altered: {size - 100} bytes, .* {size}\."):
        LogitCache(str(tmp_path))


def test_a_missing_shard_is_refused_when_the_cache_is_opened(tmp_path: Path) -> None:
    write_cache(tmp_path, random_rows(6, EVERYTHING), EVERYTHING, rows_per_shard=2)
    (tmp_path / shards.shard_name(1, 3)).unlink()
    with pytest.raises(UserError, match=r"train-00001-of-00003\.parquet is missing"):
        LogitCache(str(tmp_path))


def test_a_shard_with_other_row_groups_than_the_manifest_says_is_refused(tmp_path: Path) -> None:
    write_cache(tmp_path, random_rows(6, EVERYTHING), EVERYTHING)
    manifest = tmp_path / "logitcache.json"
    data = json.loads(manifest.read_text())
    assert data["shards"][0]["row_group_sizes"] == [6]
    data["shards"][0]["row_group_sizes"] = [2, 4]
    manifest.write_text(json.dumps(data))
    with pytest.raises(
        UserError, match=r"train-00000-of-00001\.parquet was altered: it has 1 row groups of 6 rows, not those"
    ):
        read_everything(tmp_path)


def three_shards(root: Path) -> LogitCache:
    """Nine rows, each in a row group of its own, three in each of three shards."""
    cache = write_cache(root, random_rows(9, EVERYTHING), EVERYTHING, rows_per_shard=3, row_group_bytes=1)
    assert [len(info.row_group_sizes) for info in cache.manifest.shards] == [3, 3, 3]
    return cache


READINGS: dict[str, Callable[[LogitCache], Iterable[Any]]] = {
    "in order": lambda cache: cache.iter_sequences(),
    "shuffled": lambda cache: cache.iter_sequences(shuffle=True, seed=1),
    "row groups": lambda cache: cache.iter_row_groups(),
    "by number": lambda cache: (cache[row] for row in range(9)),
}
reading = pytest.mark.parametrize("read", READINGS.values(), ids=READINGS.keys())


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped": (flip, "was altered: its SHA-256 is not the manifest's"),
    "truncated": (lambda path: os.truncate(path, path.stat().st_size // 2), "was truncated or altered: [0-9]+ bytes"),
    "missing": (lambda path: path.unlink(), "is missing, though the manifest names it"),
    "swapped": (lambda path: swap(path, path.with_name(Path(shards.shard_name(2, 3)).name)), "altered"),
}


def swap(first: Path, second: Path) -> None:
    first.rename(first.with_suffix(".was"))
    second.rename(first)
    first.with_suffix(".was").rename(second)


@pytest.mark.slow
@reading
@pytest.mark.parametrize(("damage", "said"), DAMAGES.values(), ids=DAMAGES.keys())
def test_damage_done_after_opening_is_named_when_the_shard_is_read(
    tmp_path: Path, read: Callable[[LogitCache], Iterable[Any]], damage: Callable[[Path], None], said: str
) -> None:
    cache = three_shards(tmp_path)
    damage(tmp_path / shards.shard_name(1, 3))
    with pytest.raises(UserError, match=rf"train-0000[12]-of-00003\.parquet .*{said}.* again"):
        list(read(cache))


@pytest.mark.parametrize("damage", [flip, Path.unlink], ids=["flipped", "missing"])
def test_rows_before_the_damage_are_handed_out_though_what_follows_was_read_already(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    cache = three_shards(tmp_path)
    damage(tmp_path / shards.shard_name(1, 3))
    stream = iter(cache)
    assert len([next(stream) for _ in range(3)]) == 3
    with pytest.raises(UserError, match=r"train-00001-of-00003\.parquet"):
        next(stream)


def test_swapped_shards_whose_sizes_the_manifest_was_made_to_fit_are_refused(tmp_path: Path) -> None:
    three_shards(tmp_path)
    swap(tmp_path / shards.shard_name(0, 3), tmp_path / shards.shard_name(1, 3))
    manifest = tmp_path / "logitcache.json"
    data = json.loads(manifest.read_text())
    first, second = data["shards"][:2]
    first["num_bytes"], second["num_bytes"] = second["num_bytes"], first["num_bytes"]
    manifest.write_text(json.dumps(data))
    with pytest.raises(UserError, match=r"train-00000-of-00003\.parquet was altered: its SHA-256"):
        read_everything(tmp_path)


def test_a_verified_shard_that_is_removed_later_is_missing(tmp_path: Path) -> None:
    cache = three_shards(tmp_path)
    assert len(list(cache)) == 9
    (tmp_path / shards.shard_name(1, 3)).unlink()
    with pytest.raises(UserError, match=r"train-00001-of-00003\.parquet is missing"):
        list(cache)


def test_each_shard_is_hashed_once_however_many_threads_read_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []

    def watched(path: Path) -> str:
        hashed.append(path.name)
        return file_sha256(path)

    monkeypatch.setattr(shard_reader, "file_sha256", watched)
    cache = three_shards(tmp_path)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda row: cache[row], [0, 1, 2, 3, 4, 5, 6, 7, 8] * 3))
    list(cache)
    assert sorted(hashed) == sorted(Path(info.name).name for info in cache.manifest.shards)


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(operation, byte range) of every request to the object store."""
    made: list[tuple[str, str]] = []
    call = s3fs.S3FileSystem._call_s3

    def watched(self: s3fs.S3FileSystem, operation: str, *given: Any, **more: Any) -> Any:
        made.append((operation, more.get("Range", "")))
        return call(self, operation, *given, **more)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", watched)
    return made


@pytest.mark.slow
def test_a_remote_row_group_is_one_request_for_its_own_bytes(
    tmp_path: Path,
    bucket: str,  # noqa: F811
    requests: list[tuple[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOGITCACHE_LOCAL_GB", "0")
    cache = three_shards(tmp_path)
    fsspec.filesystem("s3").put(str(tmp_path), f"{bucket}/cache", recursive=True)
    remote = LogitCache(f"{bucket}/cache")
    first = [row.row_id for row in remote]
    assert first == [row.row_id for row in cache]

    requests.clear()  # from here on the footers are known
    assert [row.row_id for row in remote] == first
    assert [operation for operation, _ in requests] == ["get_object"] * 9
    expected = []
    for info in cache.manifest.shards:
        metadata = pq.read_metadata(tmp_path / info.name)
        expected += [sum(group_bytes(metadata.row_group(i))) for i in range(3)]
    ranges = [range_.removeprefix("bytes=").split("-") for _, range_ in requests]
    assert sorted(int(last) - int(first) + 1 for first, last in ranges) == sorted(expected)


def group_bytes(row_group: pq.RowGroupMetaData) -> list[int]:
    """Bytes on disk of each column."""
    return [row_group.column(i).total_compressed_size for i in range(row_group.num_columns)]


@pytest.mark.slow
def test_sizes_of_remote_shards_are_asked_for_all_at_once(
    tmp_path: Path,
    bucket: str,  # noqa: F811
    requests: list[tuple[str, str]],
) -> None:
    three_shards(tmp_path)
    fsspec.filesystem("s3").put(str(tmp_path), f"{bucket}/cache", recursive=True)
    few = len(requests_of_opening(f"{bucket}/cache", requests))
    write_cache(tmp_path / "more", random_rows(9, EVERYTHING), EVERYTHING, rows_per_shard=1)
    fsspec.filesystem("s3").put(str(tmp_path / "more"), f"{bucket}/more", recursive=True)
    assert len(requests_of_opening(f"{bucket}/more", requests)) == few


def requests_of_opening(url: str, requests: list[tuple[str, str]]) -> list[tuple[str, str]]:
    requests.clear()
    LogitCache(url)
    return requests.copy()


def test_a_remote_shard_that_is_missing_or_truncated_is_refused_on_opening(tmp_path: Path, bucket: str) -> None:  # noqa: F811
    three_shards(tmp_path)
    store = fsspec.filesystem("s3")
    store.put(str(tmp_path), f"{bucket}/cache", recursive=True)
    second = f"{bucket}/cache/{shards.shard_name(1, 3)}"
    store.pipe_file(second, b"PAR1 and no more")
    with pytest.raises(UserError, match=r"train-00001-of-00003\.parquet was truncated or altered: 16 bytes"):
        LogitCache(f"{bucket}/cache")
    store.rm(second)
    with pytest.raises(UserError, match=r"train-00001-of-00003\.parquet is missing"):
        LogitCache(f"{bucket}/cache")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    root = tmp_path / "disk"
    root.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", root], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"a full disk needs a small file system, and this user may mount none ({mount.stderr.strip()})")
    yield root
    subprocess.run(["umount", "--lazy", root], check=True)


def large_rows() -> list[Row]:
    """About 3 MiB, and no less than 1 MiB in any compression."""
    random = np.random.default_rng(0)
    rows = []
    for _ in range(40):
        ids = random.integers(0, 30_000, (149, 64)).astype(np.int32)
        logprobs = -np.sort(random.random((149, 64)).astype(np.float32), axis=1)
        sequence = TokenSequence(random.integers(0, 30_000, 150).astype(np.int32), np.arange(150) > 0)
        rows.append((sequence, SparseTargets(ids, logprobs, -random.random(149).astype(np.float32))))
    return rows


@pytest.mark.parametrize("row_group_bytes", [100_000, 4 << 20], ids=["while writing", "at the end"])
def test_a_full_disk_ends_in_one_line_and_leaves_its_space_free(
    small_disk: Path, row_group_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "ROW_GROUP_BYTES", row_group_bytes)
    rows = large_rows()
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(3 << 20))
    free = os.statvfs(small_disk).f_bfree

    def write(writer: ShardWriter) -> None:
        with writer:
            for sequence, targets in rows:
                writer.write(sequence, targets)

    failed = ShardWriter(Folder(small_disk), NAME, Layout(30_000, precision="exact"))
    with pytest.raises(UserError, match=rf"no space left for .*{NAME}: free some and run the same command again"):
        write(failed)
    assert files(small_disk) == ["ballast"]
    assert os.statvfs(small_disk).f_bfree == free

    ballast.unlink()
    write(ShardWriter(Folder(small_disk), NAME, Layout(30_000, precision="exact")))
    assert files(small_disk) == [NAME]

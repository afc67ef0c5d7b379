"""Remote caches used in place: streamed through local copies, looked into by ranges, and every way in which a store fails."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

import logitcache
from logitcache import LogitCache, UserError
from logitcache.cli import main
from logitcache.format import shards
from logitcache.format.codebook import CODEBOOK_KEY
from logitcache.format.manifest import MANIFEST_NAME
from logitcache.maintenance.recode import recode
from logitcache.maintenance.slice import slice_cache
from logitcache.maintenance.verify.findings import Finding
from logitcache.maintenance.verify.shard import shard_files
from logitcache.maintenance.verify.verification import Verification
from logitcache.storage import retries
from logitcache.storage.folder import Folder
from tests.helpers.objectstore import bucket, s3_endpoint  # noqa: F401
from tests.helpers.smallcaches import EVERYTHING, random_rows, write_cache

NUM_SHARDS = 4
ROWS_PER_SHARD = 6


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> LogitCache:
    """24 rows in four shards of 200 KiB, each row in a row group of its own: a footer is read with 64 KiB before it."""
    layout = replace(EVERYTHING, tail_parts=replace(EVERYTHING.tail_parts, samples=200))
    rows = random_rows(NUM_SHARDS * ROWS_PER_SHARD, layout, longest=200)
    root = tmp_path_factory.mktemp("local")
    return write_cache(root, rows, layout, rows_per_shard=ROWS_PER_SHARD, row_group_bytes=1)


@pytest.fixture
def url(local: LogitCache, bucket: str) -> str:  # noqa: F811
    """The same cache in an object store."""
    fsspec.filesystem("s3").put(local.path, f"{bucket}/cache", recursive=True)
    return f"{bucket}/cache"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOGITCACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


class Requests:
    """What an object store was asked for."""

    def __init__(self) -> None:
        self.made: list[tuple[str, str, int]] = []  # operation, key, bytes

    def clear(self) -> None:
        self.made.clear()

    def of(self, part: str) -> list[tuple[str, str, int]]:
        """Content of files with `part` in their names."""
        return [request for request in self.made if request[0] == "get_object" and part in request[1]]

    def num_bytes(self, part: str) -> int:
        return sum(request[2] for request in self.of(part))


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Requests:
    requests = Requests()
    call = s3fs.S3FileSystem._call_s3

    async def watched(self: s3fs.S3FileSystem, operation: str, *given: Any, **more: Any) -> Any:
        answer = await call(self, operation, *given, **more)
        requests.made.append((operation, more.get("Key", ""), answer.get("ContentLength", 0)))
        return answer

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", watched)
    return requests


def held(home: Path) -> set[str]:
    return {path.name for path in (home / "shards").iterdir()}


def ids(rows: Any) -> list[str]:
    return [row.row_id for row in rows]


STREAMS: dict[str, Callable[[LogitCache], list[str]]] = {
    "in order": lambda cache: ids(cache),
    "shuffled": lambda cache: ids(cache.iter_sequences(shuffle=True, seed=3)),
    "second of two ranks": lambda cache: ids(cache.iter_sequences(shuffle=True, seed=3, shard=(1, 2))),
    "continued": lambda cache: ids(cache.iter_sequences(shuffle=True, seed=3, start=10)),
    "row groups": lambda cache: [row_id for group in cache.iter_row_groups(shuffle=True) for row_id in group.row_ids],
}
streams = pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS.keys())
# Every stream reads shards in the same way, which a row and a row group at a time show.
two_streams = pytest.mark.parametrize(
    "stream",
    [
        pytest.param(stream, id=name, marks=[] if name in ("shuffled", "row groups") else pytest.mark.matrix)
        for name, stream in STREAMS.items()
    ],
)


@pytest.mark.slow
@streams
def test_a_stream_fetches_each_shard_once_and_later_ones_none(
    local: LogitCache, url: str, home: Path, requests: Requests, stream: Callable[[LogitCache], list[str]]
) -> None:
    remote = LogitCache(url)
    assert stream(remote) == stream(local)
    fetched = {key for _, key, _ in requests.of("parquet")}
    assert requests.num_bytes("/data/") == sum(
        info.num_bytes for info in local.manifest.shards if any(info.name in key for key in fetched)
    )
    assert held(home) == {info.sha256 for info in local.manifest.shards if any(info.name in key for key in fetched)}
    requests.clear()
    assert stream(remote) == stream(local)
    assert stream(LogitCache(url)) == stream(local)  # as the next run does
    assert requests.of("/data/") == []


@pytest.mark.slow
@streams
def test_what_has_no_room_is_read_by_ranges(
    local: LogitCache,
    url: str,
    home: Path,
    requests: Requests,
    stream: Callable[[LogitCache], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = [info.num_bytes for info in local.manifest.shards]
    monkeypatch.setenv("LOGITCACHE_LOCAL_GB", str(2.1 * max(sizes) / 1e9))
    remote = LogitCache(url)
    for _ in range(2):
        assert stream(remote) == stream(local)
    assert len(held(home)) == 2
    assert sum(path.stat().st_size for path in (home / "shards").iterdir()) <= 2.1 * max(sizes)
    whole = {key for _, key, num_bytes in requests.of("/data/") if num_bytes in sizes}
    assert len(whole) == 2


@pytest.mark.slow
def test_without_copies_a_stream_touches_no_disk(
    local: LogitCache, url: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGITCACHE_LOCAL_GB", "0")
    assert ids(LogitCache(url)) == ids(local)
    assert not home.exists()


@pytest.mark.slow
def test_single_rows_and_columns_are_read_by_ranges(
    local: LogitCache, url: str, home: Path, requests: Requests
) -> None:
    remote = LogitCache(url)
    assert remote[9].row_id == local[9].row_id
    assert requests.num_bytes("/data/") < local.manifest.shards[1].num_bytes
    assert len(list(remote.iter_columns(["row_id"]))) == len(local)
    assert not home.exists()


def test_a_stream_that_was_copied_serves_single_rows_too(local: LogitCache, url: str, requests: Requests) -> None:
    remote = LogitCache(url)
    ids(remote)
    requests.clear()
    assert remote[9].row_id == local[9].row_id
    assert requests.of("/data/") == []


@pytest.mark.slow
@pytest.mark.parametrize(("first", "end"), [(0, 24), (0, 1), (7, 9), (6, 12), (23, 24), (5, 20)])
def test_columns_of_some_rows_are_those_rows(local: LogitCache, first: int, end: int) -> None:
    tables = list(local.iter_columns(["row_id"], first, end))
    assert [row_id for table in tables for row_id in table["row_id"].to_pylist()] == ids(local)[first:end]


# What fails


def alter(url: str, name: str) -> None:
    """Another content of the same size."""
    store = fsspec.filesystem("s3")
    content = bytearray(store.cat_file(f"{url}/{name}"))
    content[len(content) // 2] ^= 1
    store.pipe_file(f"{url}/{name}", bytes(content))


@pytest.mark.slow
@two_streams
def test_an_altered_shard_of_the_same_size_is_refused_by_name(
    local: LogitCache, url: str, home: Path, stream: Callable[[LogitCache], list[str]]
) -> None:
    for info in local.manifest.shards:
        alter(url, info.name)
    message = (
        rf"^{url}/data/train-0000\d-of-00004\.parquet was altered: its SHA-256 is not the manifest's\. Fetch or push"
    )
    with pytest.raises(UserError, match=message):
        stream(LogitCache(url))
    time.sleep(0.2)  # what was begun ahead
    assert not [name for name in held(home) if not name.endswith(".tmp")]


@pytest.mark.slow
def test_rows_before_an_altered_shard_are_handed_out(local: LogitCache, url: str) -> None:
    alter(url, shards.shard_name(1, NUM_SHARDS))
    stream = iter(LogitCache(url))
    assert [next(stream).row_id for _ in range(ROWS_PER_SHARD)] == ids(local)[:ROWS_PER_SHARD]
    with pytest.raises(UserError, match=r"train-00001-of-00004\.parquet was altered"):
        next(stream)


@pytest.mark.slow
def test_an_altered_copy_on_this_machine_is_fetched_again(local: LogitCache, url: str, home: Path) -> None:
    assert ids(LogitCache(url)) == ids(local)
    for path in (home / "shards").iterdir():
        path.write_bytes(bytes(path.stat().st_size))
    assert ids(LogitCache(url)) == ids(local)


@pytest.mark.slow
@two_streams
def test_a_shard_that_is_removed_after_opening_is_missing(url: str, stream: Callable[[LogitCache], list[str]]) -> None:
    remote = LogitCache(url)
    fsspec.filesystem("s3").rm(f"{url}/data", recursive=True)
    with pytest.raises(UserError, match=r"\.parquet is missing, though the manifest names it: fetch or push it again$"):
        stream(remote)


class Proxy:
    """Passes TCP connections on to a server; the next `cuts` answers with the content of shards break off in the middle."""

    def __init__(self, endpoint: str) -> None:
        host, port = endpoint.removeprefix("http://").split(":")
        self._server = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.cuts = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._server)
                threading.Thread(target=self._pass, args=(client, server, False), daemon=True).start()
                threading.Thread(target=self._pass, args=(server, client, True), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, answers: bool) -> None:
        with suppress(OSError):
            while content := source.recv(1 << 16):
                if answers and self.cuts and b" 206 " in content[:20]:
                    self.cuts -= 1
                    target.sendall(content[: len(content) // 2])
                    break
                target.sendall(content)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def proxy(s3_endpoint: str, url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:  # noqa: F811
    proxy = Proxy(s3_endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    s3fs.S3FileSystem.clear_instance_cache()
    yield proxy
    proxy.close()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["0", "1"], ids=["ranges", "copies"])
def test_a_connection_that_breaks_in_the_middle_is_made_again(
    local: LogitCache, url: str, proxy: Proxy, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGITCACHE_LOCAL_GB", limit)
    remote = LogitCache(url)
    proxy.cuts = 3
    assert ids(remote) == ids(local)
    assert proxy.cuts == 0


class BreakingStore(MemoryFileSystem):  # type: ignore[misc]  # fsspec has no types
    """Reads of shards break off as long as `breaks` says."""

    protocol = "breaking"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    breaks = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.replace("breaking://", "memory://")))

    def _open(self, path: str, mode: str = "rb", *given: Any, **more: Any) -> Any:
        file = super()._open(path, mode, *given, **more)
        return BreakingFile(file.getvalue()) if mode == "rb" and "parquet" in path else file


class BreakingFile(MemoryFile):  # type: ignore[misc]
    def __init__(self, content: bytes) -> None:
        super().__init__(None, None, content)

    def read(self, size: int | None = -1) -> Any:
        if BreakingStore.breaks:
            BreakingStore.breaks -= 1
            super().read(10)  # so much of it had come
            raise ConnectionResetError("connection reset by peer")
        return super().read(size)


@pytest.fixture
def breaking(local: LogitCache, monkeypatch: pytest.MonkeyPatch) -> LogitCache:
    fsspec.register_implementation("breaking", BreakingStore, clobber=True)
    store = fsspec.filesystem("breaking")
    store.put(local.path, "/cache", recursive=True)
    monkeypatch.setattr(retries, "RETRIES_AFTER_S", (0.0, 0.0))
    monkeypatch.setattr(BreakingStore, "breaks", 0)
    return LogitCache("breaking://cache")


READINGS = STREAMS | {"single rows": lambda cache: [cache[row].row_id for row in range(len(cache))]}


@pytest.mark.slow
@pytest.mark.parametrize("read", READINGS.values(), ids=READINGS.keys())
@pytest.mark.parametrize("limit", ["0", "1"], ids=["ranges", "copies"])
def test_what_breaks_twice_is_read_a_third_time(
    local: LogitCache,
    breaking: LogitCache,
    read: Callable[[LogitCache], list[str]],
    limit: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOGITCACHE_LOCAL_GB", limit)
    cache = LogitCache(breaking.path)
    BreakingStore.breaks = 2
    assert read(cache) == read(local)
    assert BreakingStore.breaks == 0


@pytest.mark.parametrize("read", READINGS.values(), ids=READINGS.keys())
@pytest.mark.parametrize("limit", ["0", "1"], ids=["ranges", "copies"])
def test_a_connection_that_is_cut_for_good_is_one_line(
    breaking: LogitCache, read: Callable[[LogitCache], list[str]], limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGITCACHE_LOCAL_GB", limit)
    cache = LogitCache(breaking.path)
    BreakingStore.breaks = 10**9
    message = r"^breaking://cache: this URL does not answer \(connection reset by peer\), tried 3 times: run the same .* again$"
    with pytest.raises(UserError, match=message):
        read(cache)


def test_verifying_over_a_connection_that_is_cut_calls_nothing_damaged(breaking: LogitCache) -> None:
    BreakingStore.breaks = 2
    assert list(Verification(breaking.path)) == []
    BreakingStore.breaks = 10**9
    with pytest.raises(UserError, match=r"does not answer .*, tried 3 times"):
        list(Verification(breaking.path))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("s4://somewhere/cache", "s4://somewhere/cache: no file system for such a URL (Protocol not known: s4)"),
        ("s3://no-such-bucket-anywhere/cache", "s3://no-such-bucket-anywhere/cache does not exist"),
        ("{bucket}/nothing", "{bucket}/nothing does not exist"),
        ("{bucket}", "{bucket} is not a cache: it has no logitcache.json"),
    ],
)
def test_a_wrong_url_is_one_line(url: str, wrong: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    name = url.removesuffix("/cache")
    assert main(["info", wrong.format(bucket=name)]) == 2
    assert capsys.readouterr().err == f"logitcache: error: {said.format(bucket=name)}\n"


def test_missing_credentials_are_one_line_that_says_what_to_set(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        assert main(["info", url]) == 2
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search("Unable to locate credentials.*set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY", line)


# Commands


@pytest.mark.slow
def test_info_of_a_url_is_that_of_the_folder(
    local: LogitCache, url: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info", local.path]) == 0
    of_the_folder = capsys.readouterr().out
    assert main(["info", url]) == 0
    assert capsys.readouterr().out == of_the_folder.replace(local.path, url)
    assert not home.exists()


@pytest.mark.slow
def test_a_range_of_rows_of_a_url_fetches_its_row_groups_only(
    local: LogitCache, url: str, tmp_path: Path, requests: Requests
) -> None:
    part = slice_cache(url, tmp_path / "part", rows="14:17")
    assert ids(part) == ids(local)[14:17]
    assert {key.split("/", 1)[1] for _, key, _ in requests.of("/data/")} == {shards.shard_name(2, NUM_SHARDS)}
    # Loss masks and ids of three row groups, then the three whole; the footer once.
    assert len([1 for _, _, num_bytes in requests.of("/data/") if num_bytes]) <= 2 * 3 + 2
    groups = sum(size for row in range(2, 5) for size in row_group_bytes(local, 2, row))
    footer = local.manifest.shards[2].num_bytes - sum(
        size for row in range(ROWS_PER_SHARD) for size in row_group_bytes(local, 2, row)
    )
    assert requests.num_bytes("/data/") <= 2 * groups + max(footer, 1 << 16)


def row_group_bytes(cache: LogitCache, shard: int, row_group: int) -> list[int]:
    import pyarrow.parquet as pq

    group = pq.read_metadata(Path(cache.path) / cache.manifest.shards[shard].name).row_group(row_group)
    return [group.column(i).total_compressed_size for i in range(group.num_columns)]


@pytest.mark.slow
def test_commands_make_the_same_of_a_url_as_of_the_folder(local: LogitCache, url: str, tmp_path: Path) -> None:
    commands: dict[str, Callable[[str, str], list[str]]] = {
        "slice": lambda source, out: ["slice", source, "--sample", "9", "--out", out],
        "recode": lambda source, out: ["recode", source, "--top-k", "3", "--out", out],
        "merge": lambda source, out: ["merge", source, str(tmp_path / "other"), "--out", out],
    }
    slice_cache(local.path, tmp_path / "other", rows="3:8")
    for name, command in commands.items():
        made = []
        for source in (local.path, url):
            out = str(tmp_path / f"{name}-{source == url}")
            assert main(command(source, out)) == 0
            made.append([info.sha256 for info in logitcache.open(out).manifest.shards])
        assert made[0] == made[1], name


def forge(local: LogitCache, url: str, index: int) -> None:
    """Other numbers, such as a teacher may give, in a shard of the same size whose pages have the checksums of these numbers."""
    name = local.manifest.shards[index].name
    original = (Path(local.path) / name).read_bytes()
    with pq.ParquetFile(Path(local.path) / name) as file:
        table, metadata = file.read(), file.metadata.metadata
    for column in ("tail_entropy", "sample_logprobs"):
        lists = table[column].combine_chunks()
        values = pa.ListArray.from_arrays(lists.offsets, pa.array(np.full(len(lists.values), -0.5, np.float32)))
        table = table.set_column(table.schema.get_field_index(column), table.schema.field(column), values)
    written = BytesIO()
    with pq.ParquetWriter(written, table.schema, **local.manifest.layout.parquet_options()) as parquet:
        parquet.add_key_value_metadata({CODEBOOK_KEY: metadata[CODEBOOK_KEY]})
        parquet.write_table(table, row_group_size=1)
    content = written.getvalue()
    footer = int.from_bytes(content[-8:-4], "little") + 8
    padding = bytes(len(original) - len(content))
    fsspec.filesystem("s3").pipe_file(f"{url}/{name}", content[:-footer] + padding + content[-footer:])


@pytest.mark.slow
@pytest.mark.parametrize("room", ["64", "0"], ids=["room for copies", "no copies"])
def test_a_forged_shard_is_refused_against_an_identity_and_by_ranges_it_is_not(
    local: LogitCache, url: str, home: Path, tmp_path: Path, room: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGITCACHE_LOCAL_GB", room)
    forge(local, url, 2)
    entropy = LogitCache(url)[14].targets.tail_entropy
    assert entropy is not None
    assert entropy[0] == -0.5
    trusted = logitcache.open(url, against=local.identity)
    message = rf"^{url}/data/train-00002-of-00004\.parquet was altered: its SHA-256 is not the manifest's"
    for read in (lambda: trusted[14], lambda: list(trusted.iter_columns(["row_id"], 14, 15)), lambda: list(trusted)):
        with pytest.raises(UserError, match=message):
            read()
    assert trusted[0].row_id == local[0].row_id
    with pytest.raises(UserError, match=message):
        logitcache.pull(url, tmp_path / "part", rows="11:17", against=local.identity)
    part = logitcache.pull(url, tmp_path / "part", rows="0:3", against=local.identity)
    assert ids(part) == ids(local)[:3]


@pytest.mark.slow
def test_against_an_identity_shards_without_room_are_read_from_temporary_files(
    local: LogitCache, url: str, home: Path, tmp_path: Path, requests: Requests, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGITCACHE_LOCAL_GB", "0")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    trusted = LogitCache(url, local.identity)
    assert ids(trusted) == ids(local)
    assert [trusted[row].row_id for row in range(len(local))] == ids(local)
    fetched = sorted((key.split("/", 1)[1], num_bytes) for _, key, num_bytes in requests.of("/data/"))
    assert fetched == sorted((info.name, info.num_bytes) for info in local.manifest.shards)
    for path in (tmp_path / "temporary").glob("*/*"):
        path.unlink()
    assert trusted[0].row_id == local[0].row_id  # fetched again, whole
    assert requests.of("/data/")[-1][2] == local.manifest.shards[0].num_bytes
    assert ids(pickle.loads(pickle.dumps(trusted))) == ids(local)
    del trusted
    assert list((tmp_path / "temporary").iterdir()) == []


def test_against_an_identity_a_copy_that_somebody_removed_is_fetched_whole(
    local: LogitCache, url: str, home: Path, requests: Requests
) -> None:
    trusted = LogitCache(url, local.identity)
    for row in (7, 8):
        requests.clear()
        assert trusted[row].row_id == local[row].row_id
        assert [num_bytes for _, _, num_bytes in requests.of("/data/")] == [local.manifest.shards[1].num_bytes]
        for path in (home / "shards").iterdir():
            path.unlink()


def test_a_manifest_that_changes_after_it_was_checked_changes_nothing(
    local: LogitCache, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true, seen = (Path(local.path) / MANIFEST_NAME).read_bytes(), []
    forged = json.dumps(json.loads(true) | {"created_by": "somebody else"}).encode()
    read = Folder.read

    def changing(folder: Folder, name: str, *bound: int) -> bytes:
        if (folder.path, name) != (url, MANIFEST_NAME):
            return read(folder, name, *bound)
        seen.append(name)
        return true if len(seen) == 1 else forged

    monkeypatch.setattr(Folder, "read", changing)
    part = logitcache.pull(url, tmp_path / "part", rows="0:3", against=local.identity)
    assert part.manifest.history[-1]["from"][0]["manifest_sha256"] == local.identity
    assert seen == [MANIFEST_NAME]


def test_rows_of_a_cache_with_another_identity_are_not_pulled(local: LogitCache, url: str, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=rf"^{url} is not the cache that --against names: its identity is {local.identity}"
    ):
        logitcache.pull(url, tmp_path / "part", rows="0:3", against="0" * 64)
    assert not (tmp_path / "part").exists()


@pytest.mark.slow
def test_verifying_a_url_asks_for_each_shard_once(local: LogitCache, url: str, requests: Requests) -> None:
    assert list(Verification(url)) == []
    about_shards = [(operation, key.split("/", 1)[1]) for operation, key, _ in requests.made if "/data/" in key]
    assert sorted(about_shards) == [("get_object", info.name) for info in local.manifest.shards]


def test_while_a_shard_is_verified_the_next_ones_are_fetched_and_none_are_left(
    local: LogitCache, url: str, tmp_path: Path, requests: Requests, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    names = [info.name for info in local.manifest.shards] * 3
    files = shard_files(Folder(url), names, {})
    first = next(files)
    assert isinstance(first, Path)
    assert first.read_bytes() == (Path(local.path) / names[0]).read_bytes()
    eventually(lambda: len(requests.of("/data/")) == 4)
    assert len(list(tmp_path.iterdir())) <= 4
    second = next(files)
    assert not first.exists()
    assert isinstance(second, Path)
    assert second.read_bytes() == (Path(local.path) / names[1]).read_bytes()
    files.close()
    eventually(lambda: not list(tmp_path.iterdir()))
    assert len(requests.of("/data/")) <= 5


def eventually(holds: Callable[[], bool]) -> None:
    for _ in range(1000):
        if holds():
            return
        time.sleep(0.01)
    raise AssertionError("it never held")


@pytest.mark.slow
def test_verifying_a_url_reads_what_is_there_and_keeps_no_copy(local: LogitCache, url: str, home: Path) -> None:
    assert list(Verification(url)) == []
    assert not home.exists()
    ids(LogitCache(url))
    name = shards.shard_name(1, NUM_SHARDS)
    alter(url, name)
    findings = list(Verification(url))  # though a right copy lies here
    assert (findings[0].kind, findings[0].file) == ("altered", name)


@pytest.mark.slow
def test_a_cache_with_the_identity_that_is_wanted_is_checked(
    local: LogitCache, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    identity = hashlib.sha256((Path(local.path) / "logitcache.json").read_bytes()).hexdigest()
    assert main(["verify", url, "--against", identity.upper()]) == 0
    assert "0 findings: 24 rows" in capsys.readouterr().out


def test_a_cache_with_another_identity_is_one_finding_and_nothing_of_it_is_read(
    local: LogitCache, url: str, requests: Requests, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = "0" * 64
    findings = list(Verification(url, wanted))
    found = f"its SHA-256 is {local.identity}, {wanted} is wanted"
    assert findings == [Finding("another", "logitcache.json", found)]
    assert {key.rsplit("/")[-1] for operation, key, _ in requests.made if operation == "get_object"} == {
        "logitcache.json"
    }
    assert main(["verify", url, "--against", wanted]) == 1
    printed = capsys.readouterr().out
    assert found in printed
    assert "1 finding: 0 rows" in printed


def test_another_identity_stops_a_rescoring_before_it_is_settled(
    local: LogitCache, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--against", "0" * 64, "--rescore", "1", "--teacher", "no/such/teacher"]
    assert main(["verify", local.path, *options]) == 1
    printed = capsys.readouterr()
    assert "1 finding" in printed.out
    assert "--rescore was skipped: fix the problems listed above first" in printed.err


@pytest.mark.parametrize("wrong", ["", "0" * 63, "0" * 65, "g" * 64, "sha256:" + "0" * 64])
def test_an_identity_that_is_none_is_refused(local: LogitCache, wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", local.path, "--against", wrong]) == 2
    assert "the 64 hexadecimal digits of a cache's identity are wanted" in capsys.readouterr().err


def test_a_cache_without_a_manifest_has_no_identity(local: LogitCache, tmp_path: Path) -> None:
    shutil.copytree(local.path, tmp_path / "cache")
    (tmp_path / "cache" / "logitcache.json").unlink()
    findings = list(Verification(tmp_path / "cache", "0" * 64))
    assert [finding.kind for finding in findings] == ["missing"]


@pytest.mark.slow
def test_a_recoded_cache_at_a_url_is_read_back(local: LogitCache, bucket: str) -> None:  # noqa: F811
    made = recode(local.path, f"{bucket}/recoded", top_k=2)
    assert ids(made) == ids(local)

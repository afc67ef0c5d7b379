"""A cache as one file: the same bytes for the same cache, and nothing but a cache's files comes out of it."""

# ruff: noqa: F401, F811  (fixtures are imported)
from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

import logitcache
from logitcache import UserError
from logitcache.cli import main
from logitcache.format.manifest import MANIFEST_NAME
from logitcache.sharing import bundle, fetch, transfer
from logitcache.sharing.bundle import bundled_manifest, opened_bundle, write_bundle
from logitcache.sharing.pull import pull as pull_cache
from logitcache.sharing.push import push
from logitcache.sharing.transfer import TravellingFile
from logitcache.storage.folder import Folder, Unreachable
from tests.helpers.maintained import contents, make_cache
from tests.helpers.objectstore import bucket, s3_endpoint
from tests.helpers.smallcaches import EVERYTHING, random_rows, small

ROWS = random_rows(60, EVERYTHING)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    make_cache(tmp_path / "cache", ROWS, EVERYTHING)
    return tmp_path / "cache"


def members(path: Path) -> list[tarfile.TarInfo]:
    """As Python's own reader has them."""
    with tarfile.open(fileobj=io.BytesIO(decompressed(path))) as archive:
        return archive.getmembers()


def decompressed(path: Path) -> bytes:
    with zstandard.ZstdDecompressor().stream_reader(path.open("rb")) as stream:
        return stream.read()


@small
@given(st.lists(st.binary(max_size=3000), min_size=1, max_size=6), st.sampled_from([1, 511, 512, 513, 1 << 20]))
def test_what_is_written_is_read_back(files: list[bytes], chunk_bytes: int) -> None:
    with TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patched:
        patched.setattr(bundle, "CHUNK_BYTES", chunk_bytes)
        root = Path(directory)
        names = [MANIFEST_NAME, *(f"file-{index}" for index in range(1, len(files)))]
        for name, content in zip(names, files, strict=True):
            (root / name).write_bytes(content)
        travelling = [TravellingFile(name, "") for name in names]
        write_bundle(root, travelling, root / "x.tar.zst", lambda count: None)
        with opened_bundle(str(root / "x.tar.zst")) as found:
            read = [(member.name, b"".join(member.chunks)) for member in found]
        assert read == list(zip(names, files, strict=True))
        assert bundled_manifest(str(root / "x.tar.zst")) == files[0]


def test_a_bundle_is_a_tar_archive_as_any_tool_reads_it_the_manifest_first(cache: Path, tmp_path: Path) -> None:
    push(cache, tmp_path / "b.tar.zst")
    found = members(tmp_path / "b.tar.zst")
    assert found[0].name == MANIFEST_NAME
    assert sorted(member.name for member in found) == sorted(contents(cache))
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode, m.type) for m in found} == {
        (0, 0, 0, "", "", 0o644, tarfile.REGTYPE)
    }
    with tarfile.open(fileobj=io.BytesIO(decompressed(tmp_path / "b.tar.zst"))) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    assert contents(tmp_path / "unpacked") == contents(cache)


def test_the_same_cache_gives_the_same_bytes_wherever_and_whenever(cache: Path, tmp_path: Path) -> None:
    push(cache, tmp_path / "one.tar.zst")
    pull_cache(tmp_path / "one.tar.zst", tmp_path / "copy")
    for path in (tmp_path / "copy").rglob("*"):
        os.utime(path, (1, 1))
        path.chmod(0o700)
    push(tmp_path / "copy", tmp_path / "two.tar.zst")
    assert (tmp_path / "one.tar.zst").read_bytes() == (tmp_path / "two.tar.zst").read_bytes()


@pytest.fixture(params=["disk", "memory", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return f"{request.getfixturevalue('bucket')}/team/cache.tar.zst"
    return str(tmp_path / "there.tar.zst") if request.param == "disk" else f"memory://{tmp_path}/there.tar.zst"


@pytest.mark.slow
def test_a_cache_travels_in_one_file(cache: Path, tmp_path: Path, url: str) -> None:
    pushed = push(cache, url)
    assert (pushed.num_sent, pushed.identity) == (1, logitcache.open(cache).identity)
    pulled = pull_cache(url, tmp_path / "out", against=pushed.identity)
    assert contents(tmp_path / "out") == contents(cache)
    assert pulled.identity == pushed.identity


@pytest.mark.slow
def test_a_bundle_in_an_object_store_is_not_sent_twice(cache: Path, bucket: str) -> None:
    assert push(cache, f"{bucket}/c.tar.zst").num_sent == 1
    assert push(cache, f"{bucket}/c.tar.zst").num_kept == 1


@pytest.mark.slow
def test_the_bundle_of_another_cache_is_kept_unless_it_is_to_be_replaced(cache: Path, tmp_path: Path, url: str) -> None:
    push(cache, url)
    make_cache(tmp_path / "other", ROWS[:9], EVERYTHING, corpus={"sources": [{"name": "other"}]})
    with pytest.raises(
        UserError, match=r"holds another cache: fingerprint\.corpus\.sources\[0\]\.name was random, now other"
    ):
        push(tmp_path / "other", url)
    assert bundled_manifest(url) == (cache / MANIFEST_NAME).read_bytes()
    push(tmp_path / "other", url, overwrite=True)
    assert bundled_manifest(url) == (tmp_path / "other" / MANIFEST_NAME).read_bytes()


def test_a_file_that_is_no_bundle_is_not_replaced(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "b.tar.zst").write_text("precious")
    with pytest.raises(UserError, match="is not a bundle"):
        push(cache, tmp_path / "b.tar.zst")
    assert (tmp_path / "b.tar.zst").read_text() == "precious"


def test_a_damaged_shard_is_not_bundled(cache: Path, tmp_path: Path) -> None:
    shard = cache / "data/train-00003-of-00009.parquet"
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(UserError, match=r"train-00003-of-00009\.parquet was altered"):
        push(cache, tmp_path / "b.tar.zst")
    assert not list(tmp_path.glob("b.tar.zst*"))


def test_shards_are_taken_out_of_a_bundle(cache: Path, tmp_path: Path) -> None:
    push(cache, tmp_path / "b.tar.zst")
    part = pull_cache(tmp_path / "b.tar.zst", tmp_path / "part", shards="2:4")
    assert [shard.name[-17:] for shard in part.manifest.shards] == [
        "2-of-00009.parquet"[-17:],
        "3-of-00009.parquet"[-17:],
    ]
    for shard in part.manifest.shards:
        assert (tmp_path / "part" / shard.name).read_bytes() == (cache / shard.name).read_bytes()


Files = list[tuple[tarfile.TarInfo, bytes]]


def regular(name: str, content: bytes) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    return member, content


def special(name: str, kind: bytes, target: str = "") -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member, b""


def packed(files: Files, path: Path, **options: Any) -> str:
    """A bundle of any members, made by Python's own writer."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", **options) as archive:
        for member, content in files:
            archive.addfile(member, io.BytesIO(content))
    path.write_bytes(zstandard.ZstdCompressor().compress(raw.getvalue()))
    return str(path)


def with_more(*more: tuple[tarfile.TarInfo, bytes]) -> Callable[[Files], Files]:
    """After the manifest."""
    return lambda files: [files[0], *more, *files[1:]]


SHARD = "data/train-00000-of-00009.parquet"


def altered(files: Files, name: str, content: bytes) -> Files:
    return [regular(name, content) if member.name == name else (member, old) for member, old in files]


ATTACKS: dict[str, tuple[Callable[[Files], Files], str]] = {
    "absolute path": (
        with_more(regular("/etc/cron.d/x", b"x")),
        r"holds '/etc/cron\.d/x', which its manifest does not name",
    ),
    "path upwards": (with_more(regular("../../x", b"x")), r"holds '\.\./\.\./x', which its manifest does not name"),
    "path upwards below": (with_more(regular("data/../../x", b"x")), "which its manifest does not name"),
    "backslash": (with_more(regular("..\\x", b"x")), "which its manifest does not name"),
    "unknown file": (
        with_more(regular("data/evil.py", b"x")),
        r"holds 'data/evil\.py', which its manifest does not name",
    ),
    "build directory": (with_more(regular(".build/plan.json", b"{}")), "which its manifest does not name"),
    "symbolic link": (
        with_more(special("data/link", tarfile.SYMTYPE, "/etc")),
        "'data/link', which is no regular file",
    ),
    "link under a shard's name": (
        lambda files: [files[0], special(SHARD, tarfile.SYMTYPE, "/etc/passwd")],
        "which is no regular file",
    ),
    "hard link": (with_more(special(SHARD, tarfile.LNKTYPE, "/etc/passwd")), "which is no regular file"),
    "device": (with_more(special("data/null", tarfile.CHRTYPE)), "which is no regular file"),
    "pipe": (with_more(special("data/pipe", tarfile.FIFOTYPE)), "which is no regular file"),
    "directory": (with_more(special("data", tarfile.DIRTYPE)), "which is no regular file"),
    "twice": (lambda files: [*files, files[1]], "is in it twice"),
    "second manifest": (lambda files: [*files, files[0]], r"logitcache\.json is in it twice"),
    "manifest not first": (lambda files: files[::-1], r"it begins with '.*', not with logitcache\.json"),
    "shard too long": (
        lambda files: altered(files, SHARD, bytes(50_000)),
        r"train-00000-of-00009\.parquet was altered: 50000 bytes, the manifest says",
    ),
    "other content": (
        lambda files: [(m, bytes(m.size) if m.name == SHARD else c) for m, c in files],
        "was altered: its SHA-256 is not the manifest's",
    ),
    "shard missing": (
        lambda files: [file for file in files if file[0].name != SHARD],
        r"is not whole: data/train-00000-of-00009\.parquet is not in it",
    ),
    "card that is no text": (with_more(regular("README.md", b"\xff\xfe")), r"README\.md is not text in UTF-8"),
    "long name": (with_more(regular("data/" + 200 * "x", b"x")), "which is no regular file"),
    "empty": (lambda files: [], "is empty"),
}


@pytest.mark.slow
@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_are_refused_and_nothing_of_them_is_left(cache: Path, tmp_path: Path, attack: str) -> None:
    change, message = ATTACKS[attack]
    names = [MANIFEST_NAME, *sorted(contents(cache).keys() - {MANIFEST_NAME})]
    files = change([regular(name, contents(cache)[name]) for name in names])
    format = tarfile.GNU_FORMAT if attack == "long name" else tarfile.USTAR_FORMAT
    url = packed(files, tmp_path / "b.tar.zst", format=format)
    with pytest.raises(UserError, match=message):
        pull_cache(url, tmp_path / "out")
    left = contents(tmp_path / "out").keys() if (tmp_path / "out").exists() else set()
    assert MANIFEST_NAME not in left
    assert all(
        (tmp_path / "out" / name).read_bytes() == contents(cache).get(name) for name in left if ".build" not in name
    )
    assert {path.name for path in tmp_path.iterdir()} <= {"cache", "out", "b.tar.zst"}


def test_headers_of_extensions_are_not_followed(cache: Path, tmp_path: Path) -> None:
    member, content = regular("data/x", b"x")
    member.pax_headers = {"path": "/etc/cron.d/x"}
    files = [regular(MANIFEST_NAME, contents(cache)[MANIFEST_NAME]), (member, content)]
    url = packed(files, tmp_path / "b.tar.zst", format=tarfile.PAX_FORMAT)
    with pytest.raises(UserError, match="which is no regular file"):
        pull_cache(url, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.98])
def test_a_bundle_that_was_cut_is_refused_and_continued_from_a_whole_one(
    cache: Path, tmp_path: Path, kept: float, capsys: pytest.CaptureFixture[str]
) -> None:
    push(cache, tmp_path / "b.tar.zst")
    whole = (tmp_path / "b.tar.zst").read_bytes()
    (tmp_path / "b.tar.zst").write_bytes(whole[: int(kept * len(whole))])
    assert main(["pull", str(tmp_path / "b.tar.zst"), "--out", str(tmp_path / "out")]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert "ends too early" in line
    assert not (tmp_path / "out" / MANIFEST_NAME).exists()
    (tmp_path / "b.tar.zst").write_bytes(whole)
    pull_cache(tmp_path / "b.tar.zst", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(cache)


@pytest.mark.parametrize(
    "content", [b"garbage", bytes(5000), zstandard.ZstdCompressor().compress(b"no archive" * 200), b"PK\3\4" * 200]
)
def test_what_is_no_bundle_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "b.tar.zst").write_bytes(content)
    with pytest.raises(UserError, match=r"b\.tar\.zst (is not a bundle, or was damaged \(|ends too early)"):
        pull_cache(tmp_path / "b.tar.zst", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@small
@given(st.integers(0, 10**6), st.integers(1, 255))
def test_one_altered_byte_is_found_or_changes_nothing(place: int, change: int) -> None:
    with TemporaryDirectory() as directory:
        root = Path(directory)
        make_cache(root / "cache", ROWS[:6], EVERYTHING)
        push(root / "cache", root / "b.tar.zst")
        content = bytearray((root / "b.tar.zst").read_bytes())
        content[place % len(content)] ^= change
        (root / "b.tar.zst").write_bytes(content)
        try:
            pull_cache(root / "b.tar.zst", root / "out")
        except UserError:
            assert not (root / "out" / MANIFEST_NAME).exists()
        else:
            read = contents(root / "out")
            assert {**read, "README.md": b""} == {**contents(root / "cache"), "README.md": b""}


@pytest.mark.parametrize(
    ("old", "new"), [(b'"tests"', b'"tesls"'), (b'"checksum": "', b'"checksum": "x'), (b'"checksum"', b'"checksun"')]
)
def test_a_manifest_that_was_damaged_on_its_way_is_refused(cache: Path, tmp_path: Path, old: bytes, new: bytes) -> None:
    content = (cache / MANIFEST_NAME).read_bytes()
    assert old in content
    content = content.replace(old, new, 1)
    with pytest.raises(UserError, match="the checksum of its manifest is not that of its content"):
        pull_cache(packed([regular(MANIFEST_NAME, content)], tmp_path / "b.tar.zst"), tmp_path / "out")


class TestBombs:
    def test_a_manifest_without_bounds_is_not_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(bundle, "MAX_MANIFEST_BYTES", 10_000)
        url = packed([regular(MANIFEST_NAME, bytes(10_001))], tmp_path / "b.tar.zst")
        with pytest.raises(UserError, match="a manifest of 10001 bytes is refused, at most 10000 are read"):
            pull_cache(url, tmp_path / "out")

    def test_nor_a_tokenizer_without_bounds(self, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        push(cache, tmp_path / "b.tar.zst")
        monkeypatch.setattr(fetch, "MAX_FILE_BYTES", 5)
        with pytest.raises(UserError, match=r"bytes are refused, a file of its kind has at most 5"):
            pull_cache(tmp_path / "b.tar.zst", tmp_path / "out")

    def test_nor_a_card_without_bounds(self, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        push(cache, tmp_path / "b.tar.zst")
        monkeypatch.setattr(fetch, "MAX_TEXT_BYTES", 100)
        with pytest.raises(UserError, match=r"README\.md: \d+ bytes are refused, it has at most 100"):
            pull_cache(tmp_path / "b.tar.zst", tmp_path / "out")

    def test_nor_a_window_that_takes_gigabytes(self, tmp_path: Path) -> None:
        parameters = zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=True)
        content = zstandard.ZstdCompressor(compression_params=parameters).compressobj(size=-1)
        (tmp_path / "b.tar.zst").write_bytes(content.compress(bytes(1 << 20)) + content.flush())
        with pytest.raises(UserError, match="is not a bundle, or was damaged"):
            pull_cache(tmp_path / "b.tar.zst", tmp_path / "out")


def test_places_that_are_not_there_are_one_line(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.tar\.zst does not exist"):
        pull_cache(tmp_path / "nowhere.tar.zst", tmp_path / "out")
    (tmp_path / "folder.tar.zst").mkdir()
    with pytest.raises(UserError, match=r"folder\.tar\.zst"):
        pull_cache(tmp_path / "folder.tar.zst", tmp_path / "out")
    with pytest.raises(UserError, match=r"folder\.tar\.zst"):
        push(cache, tmp_path / "folder.tar.zst")


def test_a_name_that_an_archive_cannot_hold_is_refused(tmp_path: Path) -> None:
    name = "tokenizer/" + 120 * "x"
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / name).write_text("")
    with pytest.raises(UserError, match="cannot be put into a bundle"):
        write_bundle(tmp_path, [TravellingFile(name, "")], tmp_path / "b.tar.zst", lambda count: None)


def test_a_connection_that_is_cut_goes_on_with_what_is_missing(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"memory://{tmp_path}/b.tar.zst"
    push(cache, url)
    monkeypatch.setattr(transfer, "FIRST_PAUSE_S", 0)
    stored: list[str] = []
    original = fetch._store

    def store(member: Any, file: TravellingFile, folder: Folder, where: str) -> None:
        stored.append(file.name)
        if len(stored) == 5:
            raise Unreachable("cut")
        original(member, file, folder, where)

    monkeypatch.setattr(fetch, "_store", store)
    pull_cache(url, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(cache)
    assert len(stored) == len(set(stored)) + 1

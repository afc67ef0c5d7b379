"""A cache consists of regular files: nothing else is read, published, fetched or waited for."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import pytest

import logitcache
from logitcache import LogitCache, UserError
from logitcache.cli import main
from logitcache.maintenance.verify.verification import Verification
from logitcache.storage.folder import Folder
from logitcache.storage.regular_files import regular_file
from tests.helpers.maintained import contents, make_cache
from tests.helpers.smallcaches import EVERYTHING, random_rows

FILES = (
    "logitcache.json",
    "logitcache.json.sig",
    "README.md",
    "tokenizer/tokenizer.json",
    "tail_groups.parquet",
    "data/train-00001-of-00002.parquet",
)
SECRET = "what only the reader has"


def link(place: Path, tmp_path: Path) -> None:
    """To a file with the same content, so that no checksum tells."""
    kept = tmp_path / "elsewhere" / place.name
    kept.parent.mkdir(exist_ok=True)
    shutil.move(place, kept)
    place.symlink_to(kept)


def pipe(place: Path, _: Path) -> None:
    place.unlink()
    os.mkfifo(place)


def listening(place: Path, _: Path) -> None:
    place.unlink()
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(place.parent)  # an address has 107 bytes at most
        server.bind(place.name)


def endless(place: Path, _: Path) -> None:
    place.unlink()
    place.symlink_to("/dev/zero")


KINDS: dict[str, Callable[[Path, Path], None]] = {
    "a symbolic link": link,
    "a named pipe": pipe,
    "a socket": listening,
    "a device": endless,
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LogitCache]:
    """With a signature and a card."""
    monkeypatch.chdir(tmp_path)
    made = make_cache(tmp_path / "cache", random_rows(12, EVERYTHING), EVERYTHING)
    assert main(["push", "cache", "published"]) == 0  # writes the card
    (tmp_path / "cache/logitcache.json.sig").write_text("a signature")
    yield made


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *((kind, name) for kind in ("a symbolic link", "a named pipe") for name in FILES),
        *((kind, name) for kind in ("a socket", "a device") for name in (FILES[1], FILES[-1])),
    ],
)
def test_a_file_of_another_kind_is_refused_by_every_command(
    cache: LogitCache, tmp_path: Path, name: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    KINDS[kind](tmp_path / "cache" / name, tmp_path)
    os.chdir(tmp_path)
    capsys.readouterr()
    read_by_all = name not in ("README.md", "logitcache.json.sig", "tokenizer/tokenizer.json", "tail_groups.parquet")
    commands = {
        "push": ["push", "cache", "pushed", "--overwrite"],
        "bundle": ["push", "cache", "pushed.tar.zst", "--overwrite"],
        "pull": ["pull", "cache", "--out", "pulled"],
        "slice": ["slice", "cache", "--rows", "0:9", "--out", "part"],
        "info": ["info", "cache"],
        "view": ["view", "cache"],
        "export": ["export", "cache", "--to", "topk", "--out", "rows.jsonl"],
    }
    untouched = {"README.md": ("export",), "logitcache.json.sig": ("slice", "info", "view", "export")}
    untouched |= {"tokenizer/tokenizer.json": ("info", "export"), "tail_groups.parquet": ("info", "view", "export")}
    for command, arguments in commands.items():
        status = main(arguments)
        told = capsys.readouterr()
        assert "Traceback" not in told.err
        if read_by_all or command not in untouched[name]:
            assert status == 2, command
            assert "a cache consists of regular files" in told.err, command
    for place in ("pushed", "pulled"):
        assert not (tmp_path / place / "logitcache.json").exists()
    assert not (tmp_path / "pushed.tar.zst").exists()
    assert not (tmp_path / "part/logitcache.json").exists() or name == "logitcache.json.sig"
    if name not in ("README.md", "logitcache.json.sig"):
        assert any("a cache consists of regular files" in str(finding.what) for finding in Verification("cache"))


@pytest.mark.parametrize("directory", ["data", "tokenizer"])
def test_a_folder_of_a_cache_is_no_link(
    cache: LogitCache, tmp_path: Path, directory: str, capsys: pytest.CaptureFixture[str]
) -> None:
    link(tmp_path / "cache" / directory, tmp_path)
    for command in (["push", "cache", "pushed"], ["pull", "cache", "--out", "pulled"], ["view", "cache"]):
        assert main(command) == 2
        assert f"cache/{directory} is a symbolic link: a cache consists of regular files" in capsys.readouterr().err
    assert any("a cache consists of regular files" in finding.what for finding in Verification("cache"))


@pytest.mark.parametrize("name", ["README.md", "logitcache.json.sig"])
def test_what_no_manifest_lists_publishes_no_file_of_its_reader(
    cache: LogitCache, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "secret").write_text(SECRET)
    (tmp_path / "cache" / name).unlink()
    (tmp_path / "cache" / name).symlink_to(tmp_path / "secret")
    before = contents(tmp_path / "published")
    for command in (
        ["push", "cache", "published"],
        ["push", "cache", "published.tar.zst"],
        ["pull", "cache", "--out", "pulled"],
    ):
        assert main(command) == 2
        assert f"cache/{name} is a symbolic link" in capsys.readouterr().err
    assert contents(tmp_path / "published") == before
    assert not (tmp_path / "published.tar.zst").exists()
    assert SECRET not in "".join(map(str, contents(tmp_path / "pulled").values()))


def test_links_that_lead_round_in_circles_end(cache: LogitCache, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "cache/data" / name).symlink_to(tmp_path / "cache")
    assert main(["pull", "cache", "--out", "pulled"]) == 0
    assert {finding.kind for finding in Verification("cache")} == {"foreign"}
    assert contents(tmp_path / "pulled").keys() == contents(tmp_path / "published").keys() | {"logitcache.json.sig"}


def test_a_link_in_the_place_that_is_pulled_or_pushed_to_gives_way_to_the_file(
    cache: LogitCache, tmp_path: Path
) -> None:
    assert main(["pull", "published", "--out", "pulled"]) == 0
    for place in ("published", "pulled"):
        for name in ("data/train-00000-of-00002.parquet", "README.md"):
            kept = tmp_path / f"{place}-{Path(name).name}"
            shutil.move(tmp_path / place / name, kept)
            (tmp_path / place / name).symlink_to(kept)
    assert main(["push", "cache", "published"]) == 0
    assert main(["pull", "published", "--out", "pulled"]) == 0
    for place in ("published", "pulled"):
        assert not [path for path in (tmp_path / place).rglob("*") if path.is_symlink()]
        assert contents(tmp_path / place) == contents(tmp_path / "cache")


def test_the_cache_and_a_bundle_may_themselves_be_reached_by_a_link(cache: LogitCache, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "cache")
    assert len(logitcache.open("link")) == len(cache)
    assert not list(Verification("link"))
    assert main(["push", "link", "it.tar.zst"]) == 0
    (tmp_path / "elsewhere.tar.zst").symlink_to(tmp_path / "it.tar.zst")
    assert main(["pull", "elsewhere.tar.zst", "--out", "pulled"]) == 0


class TestSnapshotOfTheHub:
    """Files as huggingface_hub lays them: snapshots/REVISION/NAME → ../../blobs/DIGEST."""

    @pytest.fixture
    def snapshot(self, cache: LogitCache, tmp_path: Path) -> Path:
        from huggingface_hub.file_download import _create_symlink

        repository = tmp_path / "hub/datasets--team--cache"
        root = repository / "snapshots" / ("0" * 40)
        (repository / "blobs").mkdir(parents=True)
        for name, content in contents(tmp_path / "cache").items():
            blob = repository / "blobs" / sha256(content).hexdigest()
            blob.write_bytes(content)
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            _create_symlink(str(blob), str(root / name), new_blob=False)
            assert (root / name).is_symlink()
        return root

    @pytest.mark.slow
    def test_is_read_verified_sliced_pulled_and_pushed(self, snapshot: Path, cache: LogitCache, tmp_path: Path) -> None:
        assert [row.row_id for row in logitcache.open(snapshot)] == [row.row_id for row in cache]
        assert not list(Verification(snapshot))
        for command in (
            ["slice", str(snapshot), "--rows", "0:3", "--out", "part"],
            ["pull", str(snapshot), "--out", "pulled"],
            ["push", str(snapshot), "pushed"],
            ["view", str(snapshot)],
        ):
            assert main(command) == 0
        for copy in ("pulled", "pushed"):
            assert contents(tmp_path / copy) == contents(tmp_path / "cache")
            assert not [path for path in (tmp_path / copy).rglob("*") if path.is_symlink()]

    def test_is_read_through_a_link_to_it(self, snapshot: Path, cache: LogitCache, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to(snapshot)
        assert len(logitcache.open(tmp_path / "link")) == len(cache)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", FILES)
    def test_links_of_which_lead_nowhere_else(self, snapshot: Path, tmp_path: Path, name: str) -> None:
        blobs, place = snapshot.parent.parent / "blobs", snapshot / name
        (tmp_path / "secret").write_text(SECRET)
        (blobs / "name").write_text(SECRET)
        (blobs / ("a" * 40)).symlink_to(tmp_path / "secret")
        os.mkfifo(blobs / ("b" * 40))
        (blobs / ("c" * 40)).mkdir()
        targets = [tmp_path / "secret", blobs / "name", blobs / ("a" * 40), blobs / ("b" * 40), blobs / ("c" * 40)]
        for target in [*targets, blobs / ("d" * 40), tmp_path / "blobs" / ("a" * 40), Path("/dev/zero")]:
            place.unlink()
            place.symlink_to(os.path.relpath(target, place.parent))
            with pytest.raises(UserError, match="is a symbolic link: a cache consists of regular files"):
                regular_file(snapshot, name)
            with pytest.raises(UserError, match="is a symbolic link"):
                Folder(snapshot).read(name)

    def test_blobs_elsewhere_are_refused(self, snapshot: Path, tmp_path: Path) -> None:
        shutil.move(snapshot.parent.parent / "blobs", tmp_path / "blobs")
        (snapshot.parent.parent / "blobs").symlink_to(tmp_path / "blobs")
        with pytest.raises(UserError, match="is a symbolic link"):
            logitcache.open(snapshot)

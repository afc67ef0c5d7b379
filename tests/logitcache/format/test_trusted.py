"""Files beside the shards are handed out as the manifest vouches for them, or not at all."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

import logitcache
from logitcache import LogitCache, UserError
from logitcache.storage.folder import Folder
from tests.helpers.smallcaches import EVERYTHING, random_rows, write_cache

ROWS = random_rows(6, EVERYTHING, seed=1)
FILES = {
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b'{"a": 1}',
    "additional_chat_templates/tool use.jinja": b"x",
}


def with_tokenizer(root: Path, files: Mapping[str, bytes]) -> Path:
    """A cache with these files in tokenizer/, which its manifest names."""
    manifest = write_cache(root, ROWS, EVERYTHING).manifest
    digests = {f"tokenizer/{name}": hashlib.sha256(content).hexdigest() for name, content in files.items()}
    for name, content in files.items():
        path = root / "tokenizer" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    replace(manifest, files={**manifest.files, **digests}).write(Folder(root))
    return root


@pytest.fixture(params=["here", "at a URL"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Path | str:
    """A cache with a tokenizer, here or in a store."""
    folder = with_tokenizer(tmp_path / "cache", FILES)
    if request.param == "here":
        return folder
    MemoryFileSystem.store.clear()
    fsspec.filesystem("memory").put(f"{folder}/", "/cache/", recursive=True)
    return "memory://cache"


def opened(root: Path | str) -> LogitCache:
    return logitcache.open(root)


def test_a_tokenizers_files_are_those_that_the_manifest_names(root: Path | str) -> None:
    Folder(root).write("tokenizer/tokenization_evil.py", "raise SystemExit")
    assert opened(root).tokenizer_files() == FILES


def test_a_cache_without_a_tokenizer_has_no_files(tmp_path: Path) -> None:
    cache = write_cache(tmp_path, ROWS, EVERYTHING)
    Folder(tmp_path).write("tokenizer/tokenizer.json", "{}")
    assert cache.tokenizer_files() is None


def test_a_file_that_was_altered_or_is_missing_is_refused(root: Path | str) -> None:
    cache = opened(root)
    Folder(root).write("tokenizer/tokenizer.json", "{} ")
    with pytest.raises(
        UserError, match=r"cache/tokenizer/tokenizer\.json was altered: its SHA-256 is not the manifest"
    ):
        cache.tokenizer_files()
    Folder(root).remove("tokenizer/tokenizer.json")
    with pytest.raises(UserError, match=r"cache/tokenizer/tokenizer\.json is missing, though the manifest names it"):
        cache.tokenizer_files()


def test_all_files_together_have_no_more_bytes_than_a_tokenizer_has(
    root: Path | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, num_bytes = opened(root), sum(map(len, FILES.values()))
    monkeypatch.setattr("logitcache.format.tokenizer.MAX_TOKENIZER_BYTES", num_bytes)
    assert cache.tokenizer_files() == FILES
    monkeypatch.setattr("logitcache.format.tokenizer.MAX_TOKENIZER_BYTES", num_bytes - 1)
    with pytest.raises(UserError, match=r"tokenizer_config\.json is refused: it has more than the 7 bytes"):
        cache.tokenizer_files()


def test_a_file_that_is_a_folder_too_is_refused(tmp_path: Path) -> None:
    manifest = write_cache(tmp_path, ROWS, EVERYTHING).manifest
    both = {"tokenizer/a": "0" * 64, "tokenizer/a/b": "0" * 64}
    replace(manifest, files={**manifest.files, **both}).write(Folder(tmp_path))
    Folder(tmp_path).write("tokenizer/a/b", "")
    with pytest.raises(UserError, match=r"tokenizer/a"):
        logitcache.open(tmp_path).tokenizer_files()

"""The folder of a build: nobody else's, and only one build at a time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from logitcache import UserError
from logitcache.capture.workspace import OWN_NAMES, workspace


def test_a_new_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    with workspace(tmp_path / "a/b", overwrite=False):
        (tmp_path / "a/b/data").mkdir()
    assert (tmp_path / "a/b/data").is_dir()


def test_a_build_that_wrote_nothing_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="bad corpus"), workspace(tmp_path / "a", overwrite=False):
        raise UserError("bad corpus")
    assert not (tmp_path / "a").exists()


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious")
    with pytest.raises(UserError, match=r"--out .*out: is a file, a folder is wanted"):
        workspace(tmp_path / "out", overwrite=True).__enter__()
    assert (tmp_path / "out").read_text() == "precious"


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["thesis.tex", "data", "README.md", "tokenizer"])
def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path, overwrite: bool, name: str) -> None:
    (tmp_path / name).write_text("precious")
    with pytest.raises(UserError, match="the folder is not empty and holds no cache; choose another"):
        workspace(tmp_path, overwrite).__enter__()
    assert (tmp_path / name).read_text() == "precious"


@pytest.mark.parametrize("mark", [".build", "logitcache.json"])
def test_an_unfinished_and_a_finished_cache_are_entered_as_they_are(tmp_path: Path, mark: str) -> None:
    (tmp_path / mark).mkdir()
    (tmp_path / "data").mkdir()
    with workspace(tmp_path, overwrite=False):
        assert {path.name for path in tmp_path.iterdir()} == {mark, "data"}


def test_overwriting_removes_what_a_build_writes_and_nothing_else(tmp_path: Path) -> None:
    for name in OWN_NAMES:
        if "." in name[1:]:
            (tmp_path / name).write_text("{}")
        else:
            (tmp_path / name).mkdir()
            (tmp_path / name / "part").write_text("…")
    (tmp_path / "notes.txt").write_text("precious")
    with workspace(tmp_path, overwrite=True):
        assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_second_build_is_refused_while_the_first_runs(tmp_path: Path) -> None:
    root = tmp_path / "out"
    with workspace(root, overwrite=False):
        for overwrite in (False, True):
            with pytest.raises(UserError, match="another build is writing there"):
                workspace(root, overwrite).__enter__()
        (root / "logitcache.json").write_text("{}")
        with pytest.raises(UserError, match="another build is writing there"):
            workspace(root, overwrite=True).__enter__()
        assert (root / "logitcache.json").exists()
    with workspace(root, overwrite=False):
        pass


def test_a_build_of_another_process_is_noticed_and_its_death_frees_the_folder(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from logitcache.capture.workspace import workspace\n"
        "with workspace(Path(sys.argv[1]), False):\n"
        "    (Path(sys.argv[1]) / '.build').mkdir(); print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another build is writing there"):
            workspace(tmp_path, overwrite=False).__enter__()
    finally:
        holder.kill()
        holder.wait()
    with workspace(tmp_path, overwrite=False):
        pass

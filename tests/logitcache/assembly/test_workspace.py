"""The folder of a build: nobody else's, and only one build at a time."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from logitcache import UserError
from logitcache.assembly.workspace import abandon, begin, is_ours, remove_former, workspace
from logitcache.storage.folder import Folder


def test_a_new_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    with workspace(Folder(tmp_path / "a/b")):
        (tmp_path / "a/b/data").mkdir()
    assert (tmp_path / "a/b/data").is_dir()


def test_a_build_that_wrote_nothing_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="bad corpus"), workspace(Folder(tmp_path / "a")):
        raise UserError("bad corpus")
    assert not (tmp_path / "a").exists()


def test_a_link_to_an_empty_folder_is_left(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    with workspace(Folder(tmp_path / "link")):
        pass
    assert (tmp_path / "link").is_dir()


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious")
    with pytest.raises(UserError, match="a folder that can be written is wanted"):
        workspace(Folder(tmp_path / "out")).__enter__()
    assert (tmp_path / "out").read_text() == "precious"


@pytest.mark.parametrize("name", ["thesis.tex", "data", "README.md", "tokenizer"])
def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("precious")
    with pytest.raises(UserError, match="the folder is not empty and holds no cache; choose another"):
        workspace(Folder(tmp_path)).__enter__()
    assert (tmp_path / name).read_text() == "precious"


def test_a_folder_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UserError, match="a folder that can be written is wanted"):
        workspace(Folder(tmp_path / "file/out")).__enter__()


def test_the_build_directory_of_another_program_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / ".build/debug").mkdir(parents=True)
    (tmp_path / "README.md").write_text("precious")
    with pytest.raises(UserError, match="holds no cache"):
        workspace(Folder(tmp_path)).__enter__()


@pytest.mark.parametrize("mark", [".build/logitcache", "logitcache.json"])
def test_an_unfinished_and_a_finished_cache_are_entered_as_they_are(tmp_path: Path, mark: str) -> None:
    (tmp_path / mark).parent.mkdir(exist_ok=True)
    (tmp_path / mark).touch()
    (tmp_path / "data").mkdir()
    before = set(tmp_path.rglob("*"))
    with workspace(Folder(tmp_path)):
        assert set(tmp_path.rglob("*")) == before


def test_a_build_that_was_killed_before_its_mark_was_written_can_begin_again(tmp_path: Path) -> None:
    (tmp_path / ".build").mkdir()
    with workspace(Folder(tmp_path)):
        begin(Folder(tmp_path))
    assert is_ours(Folder(tmp_path))


def test_removing_a_former_cache_leaves_everything_else(tmp_path: Path) -> None:
    begin(Folder(tmp_path))
    for name in ("logitcache.json", "README.md", "tail_groups.parquet", "notes.txt"):
        (tmp_path / name).write_text("{}")
    for name in ("data", "tokenizer"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").write_text("…")
    remove_former(Folder(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", ".build"}


def test_abandoned_shards_stay_ours(tmp_path: Path) -> None:
    begin(Folder(tmp_path))
    (tmp_path / "data").mkdir()
    abandon(Folder(tmp_path))
    assert is_ours(Folder(tmp_path))
    (tmp_path / "data").rmdir()
    abandon(Folder(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_second_build_is_refused_while_the_first_runs(tmp_path: Path) -> None:
    root = tmp_path / "out"
    with workspace(Folder(root)):
        with pytest.raises(UserError, match="another command is writing there"):
            workspace(Folder(root)).__enter__()
        (root / "logitcache.json").write_text("{}")
        with pytest.raises(UserError, match="another command is writing there"):
            workspace(Folder(root)).__enter__()
        assert (root / "logitcache.json").exists()
    with workspace(Folder(root)):
        pass


def test_a_file_system_without_locks_is_used_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("logitcache.assembly.workspace.fcntl.flock", flock)
    with workspace(Folder(tmp_path)):
        begin(Folder(tmp_path))
    assert "cannot be held against other commands (Function not implemented)" in caplog.text


def test_a_web_server_takes_no_files() -> None:
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9/c: a web server takes no files; choose hf://"):
        workspace(Folder("http://127.0.0.1:9/c")).__enter__()


def test_a_folder_that_is_killed_while_it_is_abandoned_stays_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(Folder(tmp_path))
    Folder(tmp_path).write(".build/tokens/00000.parquet", "…")

    remove = Folder.remove

    def cut_off(folder: Folder, name: str) -> None:
        if name == ".build":
            folder.remove(".build/logitcache")
            raise KeyboardInterrupt
        remove(folder, name)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Folder, "remove", cut_off)
        abandon(Folder(tmp_path))
    assert is_ours(Folder(tmp_path))


@pytest.mark.slow
def test_a_build_of_another_process_is_noticed_and_its_death_frees_the_folder(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from logitcache.assembly.workspace import workspace\n"
        "from logitcache.storage.folder import Folder\n"
        "with workspace(Folder(sys.argv[1])):\n"
        "    (Path(sys.argv[1]) / '.build').mkdir(); print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another command is writing there"):
            workspace(Folder(tmp_path)).__enter__()
    finally:
        holder.kill()
        holder.wait()
    with workspace(Folder(tmp_path)):
        pass

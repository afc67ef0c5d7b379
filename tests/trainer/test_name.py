"""The name `trainer` belongs to others too: what has it in place of ours is told in one line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = "import sys; from logitcache.trainer_script import main; sys.exit(main())"


def started(folder: Path, *before: Path) -> subprocess.CompletedProcess[str]:
    """`trainer --help` as its console script runs it, with these folders before all others."""
    path = os.pathsep.join(map(str, (*before, os.environ.get("PYTHONPATH", ROOT))))
    return subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT, "--help"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_a_file_of_that_name_in_the_working_folder_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "trainer.py").write_text("raise SystemExit('it ran')")
    done = started(tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and "trainer fit --cache" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["trainer.py", "trainer/__init__.py"])
def test_a_package_before_ours_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "trainer").mkdir()
    other = tmp_path / name
    other.write_text("raise SystemExit('it ran')")
    done = started(tmp_path, tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"trainer: error: `import trainer` finds {other} in place of ")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("init", ["from trainer.trainer import Trainer", "Trainer = object"])
def test_a_package_that_overwrote_ours_is_told(init: str, tmp_path: Path) -> None:
    """As when coqui-tts-trainer is installed after ours: its files beside those of ours that it has no name for."""
    for package in ("logitcache", "trainer"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "trainer" / "__init__.py").write_text(init)
    done = started(tmp_path, tmp_path)
    assert done.returncode == 2
    assert f"has overwritten {tmp_path}/trainer/__init__.py: uninstall it" in done.stderr
    assert done.stderr.count("\n") == 1

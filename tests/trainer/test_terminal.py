"""What a stranger's file says reaches the terminal without control characters."""

from __future__ import annotations

import ast
import json
import logging
import warnings
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from logitcache import LogitCache
from logitcache.storage.folder import Folder
from tests.helpers.cachemaking import random_sequences, write_cache
from trainer.cli import main
from trainer.terminal import printable_logs, say

ESCAPES = "\x1b[2J\x1b]0;title\x07\r\x9b31m\u202e"
SPELT = "\\x1b[2J\\x1b]0;title\\x07\\r\\x9b31m\\u202e"
STEPS = ["--use_cpu", "--max_steps", "1", "--disable_tqdm", "true"]


def clean(capfd: pytest.CaptureFixture[str]) -> str:
    shown = "".join(capfd.readouterr())
    assert all(sign.isprintable() or sign == "\n" for sign in shown.replace("\r", "")), ascii(shown)
    return shown


@pytest.fixture
def hostile(tmp_path: Path) -> LogitCache:
    """A cache whose manifest says how its tail was made, and which special tokens its tokenizer has."""
    cache = write_cache(tmp_path / "hostile", random_sequences(8, seed=1))
    fingerprint = json.loads(json.dumps(cache.manifest.fingerprint))
    fingerprint["capture"] = {"tail": ESCAPES}
    fingerprint["tokenizer"]["special_tokens"] = {ESCAPES: ESCAPES}
    replace(cache.manifest, fingerprint=fingerprint).write(Folder(tmp_path / "hostile"))
    return cache


def test_warnings_about_a_manifest_are_printable(
    hostile: LogitCache, student_folder: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = ["--output_dir", str(tmp_path / "run")]
    assert main(["fit", "--cache", hostile.path, "--student", student_folder, *out, *STEPS]) == 0
    shown = clean(capfd)
    assert f"the mass of its tail is {SPELT}; losses" in shown
    assert "the student's special tokens are" in shown


def test_refusals_that_quote_a_manifest_a_student_or_a_run_are_printable(
    hostile: LogitCache, student_folder: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    common = ["fit", "--cache", hostile.path, "--output_dir", str(tmp_path / "run"), *STEPS]
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "config.json").write_text(json.dumps({"model_type": ESCAPES}))
    assert main([*common, "--student", str(tmp_path / "student")]) == 2
    assert "no model can be loaded" in clean(capfd)
    assert main([*common, "--student", student_folder, "--save_steps", "1"]) == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    record["settings"]["loss"] = ESCAPES
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    assert main([*common, "--student", student_folder, "--resume_from_checkpoint", "true"]) == 2
    assert f"--loss was {SPELT.replace(chr(92) + 'r', ' ')}, is todi" in clean(capfd)


@pytest.mark.slow
def test_tables_of_strangers_runs_are_printable(
    cache: LogitCache, student_folder: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["--cache", cache.path, "--eval_cache", cache.path, "--student", student_folder, *STEPS]
    runs = [tmp_path / "a", tmp_path / "b"]
    for run, loss in zip(runs, ("fkl", "rkl"), strict=True):
        assert main(["fit", *options, "--output_dir", str(run), "--loss", loss]) == 0
    record = json.loads((runs[1] / "run.json").read_text())
    record["settings"] |= {"loss": ESCAPES, "attn_implementation": ESCAPES}
    (runs[1] / "run.json").write_text(json.dumps(record))
    capfd.readouterr()
    assert main(["compare", *map(str, runs), "--out", str(tmp_path / "compare.png")]) == 0
    assert SPELT.upper()[:8] in clean(capfd).upper()


def test_logs_and_warnings_of_any_library_are_printable(capfd: pytest.CaptureFixture[str]) -> None:
    before, shown = logging.getLogRecordFactory(), StringIO()
    handler = logging.StreamHandler(shown)
    with printable_logs():
        for name in ("transformers", "trainer.run.distill_trainer", "peft"):
            logger = logging.getLogger(name)
            logger.addHandler(handler)
            logger.warning("of %s: %s", name, ESCAPES)
            logger.removeHandler(handler)
        assert SPELT in warnings.formatwarning(ESCAPES, UserWarning, "file.py", 1)
    assert shown.getvalue().splitlines() == [
        f"of {name}: {SPELT}" for name in ("transformers", "trainer.run.distill_trainer", "peft")
    ]
    say(ESCAPES, error=True)
    assert clean(capfd).endswith(f"{SPELT}\n")
    assert logging.getLogRecordFactory() is before  # vLLM and Ray have their own, once they are imported
    assert ESCAPES in warnings.formatwarning(ESCAPES, UserWarning, "file.py", 1)


def test_nothing_else_prints() -> None:
    """But the marks that move the line of what is running, beside text that is printable already; and numbers of a step."""
    printing = set()
    for path in sorted((Path(__file__).parents[2] / "trainer").rglob("*.py")):
        calls: list[Any] = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        printing |= {path.name for call in calls if ast.unparse(call.func) in ("print", "sys.stdout.write")}
    assert printing <= {"terminal.py", "status_line.py", "cli.py", "callbacks.py"}

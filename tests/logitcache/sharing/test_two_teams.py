"""Two teams with a bucket between them: one builds and pushes a cache, the other has nothing but its URL and identity."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import logitcache
from tests.helpers.exchanging import write_tokenizer
from tests.helpers.objectstore import bucket, s3_endpoint  # noqa: F401  (fixtures)
from tests.helpers.processes import run_command

pytestmark = pytest.mark.programs

DISTILLKIT = Path(__file__).parents[2] / "data/exchange" / "residual_bins"


def run(team: Path, *command: str, status: int = 0) -> str:
    """What a command of ours prints to a team, which has a home of its own and works in its own folder."""
    environment = {**os.environ, "HOME": str(team), "LOGITCACHE_HOME": str(team / "copies"), "OMP_NUM_THREADS": "1"}
    if command[:2] == ("logitcache", "push"):
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=team, env=environment, capture_output=True, text=True, timeout=300
        )
    else:
        done = run_command(*command, cwd=team, env=environment)
    assert done.returncode == status, done.stderr
    return done.stdout


@pytest.fixture
def teams(tmp_path: Path) -> tuple[Path, Path]:
    for name in "ab":
        (tmp_path / name).mkdir()
    return tmp_path / "a", tmp_path / "b"


def test_what_one_team_builds_and_pushes_another_uses_by_its_url(
    teams: tuple[Path, Path],
    bucket: str,  # noqa: F811
    teacher: Path,
    corpus: Path,
) -> None:
    a, b = teams
    url = f"{bucket}/team-a/cache"

    options = ["--backend", "transformers", "--top-k", "16", "--keep", "id", "--shard-positions", "700"]
    run(a, "logitcache", "build", "--teacher", str(teacher), "--data", str(corpus), "--out", "cache", *options)
    licenses = ["--license", "cc-by-4.0", "--teacher-license", "apache-2.0", "--data-license", "CC0"]
    pushed = run(a, "logitcache", "push", "cache", url, *licenses)
    identity = re.search(r"identity +([0-9a-f]{64})", pushed)
    assert identity and identity[1] == logitcache.open(a / "cache").identity
    assert "sent" in run(a, "logitcache", "push", "cache", url)

    shown = run(b, "logitcache", "info", url)
    assert identity[1] in shown and "license cc-by-4.0" in shown
    assert run(b, "logitcache", "verify", url, "--against", identity[1]).startswith("0 findings")
    assert run(b, "logitcache", "verify", url, "--against", "0" * 64, status=1).count(identity[1]) == 1

    run(b, "logitcache", "view", url, "--out", "page.html")
    page = (b / "page.html").read_text()
    assert identity[1] in page and "http://" not in page.replace("http://www.w3.org", "")

    training = [
        "--max_steps",
        "4",
        "--learning_rate",
        "1e-3",
        "--report_to",
        "none",
        "--use_cpu",
        "--logging_steps",
        "1",
    ]
    trained = ["--student", str(teacher), "--from_scratch", "--loss", "todi", *training]
    run(b, "trainer", "fit", "--cache", url, "--eval_cache", url, *trained, "--output_dir", "remote")
    run(b, "trainer", "fit", "--cache", str(a / "cache"), "--eval_cache", url, *trained, "--output_dir", "local")
    assert losses(b / "remote") == losses(b / "local")

    run(b, "logitcache", "slice", url, "--sample", "4", "--out", "tenth")
    part = logitcache.open(b / "tenth")
    assert len(part) == 4 and part.manifest.history[-1]["from"][0]["manifest_sha256"] == identity[1]
    assert run(b, "logitcache", "verify", "tenth").startswith("0 findings")

    run(b, "logitcache", "export", "tenth", "--to", "axolotl", "--out", "axolotl.jsonl")
    rows = [json.loads(line) for line in (b / "axolotl.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [sequence.columns["id"] for sequence in part]

    foreign = ["--teacher", "somebody/teacher", "--tokenizer", str(write_tokenizer(b / "tokenizer", 32_000))]
    run(b, "logitcache", "import", str(DISTILLKIT), "--from", "distillkit", "--out", "imported", *foreign)
    assert "approximate" in run(b, "logitcache", "info", "imported")
    assert run(b, "logitcache", "verify", "imported").startswith("0 findings")

    run(b, "logitcache", "pull", url, "--out", "whole", "--against", identity[1])
    assert logitcache.open(b / "whole").identity == identity[1]


def losses(run_folder: Path) -> list[float]:
    """Of every step that a run logged."""
    state = max(run_folder.glob("checkpoint-*/trainer_state.json"))
    return [entry["loss"] for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]

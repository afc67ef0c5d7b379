"""A run from a URL with a password: neither its files nor its lines have it, and another password continues it."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.helpers.remote_training import make_cache
from tests.helpers.webserver import SECRET, USER, Website, website
from tests.helpers.written import written_to
from trainer.cli import main
from trainer.config.config import DistillConfig
from trainer.data.training_data import open_training_data

pytestmark = pytest.mark.programs


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, teacher_tokenizer: Any) -> Iterator[Website]:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("site")
    for seed, name in enumerate(("train", "heldout")):
        make_cache(root / name, teacher_tokenizer, seed)
    with website(root) as site:
        yield site


@pytest.fixture
def site(served: Website, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Website:
    monkeypatch.chdir(tmp_path)
    served.password = SECRET
    return served


def options(site: Website, teacher: Path, steps: int) -> list[str]:
    caches = ["--cache", f"{site.url('train')}:0.5", "--eval_cache", site.url("heldout"), "--student", str(teacher)]
    fixed = ["--logging_steps", "1", "--per_device_train_batch_size", "4", "--use_cpu", "--disable_tqdm", "true"]
    return [*caches, "--max_steps", str(steps), "--save_steps", "1", "--report_to", "none", *fixed]


def test_a_run_and_what_is_made_of_it(
    site: Website, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *options(site, teacher, 2), "--output_dir", "run"]) == 0
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["settings"]["cache"] == [f"http://{site.host}/train:0.5"]
    assert record["cache"]["caches"][0]["path"] == f"http://{site.host}/train"
    assert json.loads((tmp_path / "run/eval.json").read_text())["cache"] == f"http://{site.host}/heldout"
    site.password = "another"
    again = [*options(site, teacher, 2), "--output_dir", "run", "--resume_from_checkpoint", "run/checkpoint-1"]
    assert main(["fit", *again]) == 0
    assert main(["eval", "run", "--cache", site.url("heldout"), "--out", "eval.json"]) == 0
    said = "".join(capsys.readouterr())
    for held in (said.encode(), written_to(tmp_path)):
        assert SECRET.encode() not in held
        assert f"{USER}:".encode() not in held
    assert site.host in said


def test_a_comparison(site: Website, teacher: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    common: dict[str, Any] = {
        **{"cache": site.url("train"), "eval_cache": site.url("heldout"), "student": str(teacher), "max_steps": 1},
        **{"per_device_train_batch_size": 4, "use_cpu": True, "report_to": "none"},
    }
    recipe: dict[str, Any] = {
        "output_dir": "students",
        "common": common,
        "runs": {"all": {"loss": "fkl"}},
        "seeds": [1],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["compare", "recipe.yaml"]) == 0
    left = written_to(tmp_path / "students")
    assert site.host.encode() in left
    assert SECRET.encode() not in left
    site.password = "another"
    recipe["common"] = {**common, "cache": site.url("train"), "eval_cache": site.url("heldout")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for name in ("run.json", "eval.json"):  # as a former version wrote them
        path = next((tmp_path / "students").glob(f"*/{name}"))
        path.write_text(path.read_text().replace(f"http://{site.host}/", f"http://{USER}:{SECRET}@{site.host}/"))
    assert main(["compare", "recipe.yaml"]) == 0
    said = "".join(capfd.readouterr())
    assert "1 of 1 runs in students are finished" in said
    held = (tmp_path / "students/compare.html").read_bytes() + said.encode()
    assert site.host.encode() in held
    assert SECRET.encode() not in held
    assert f"{USER}:".encode() not in held


def test_settings_are_reported_and_pickled_without_it(site: Website) -> None:
    urls: dict[str, Any] = {
        "cache": [f"{site.url('train')}:0.7"],
        "eval_cache": site.url("heldout"),
        "average_with": [site.url("train")],
    }
    config = DistillConfig(output_dir="run", use_cpu=True, report_to="none", **urls)
    for shown in (
        json.dumps(config.recorded()),
        str(config.to_sanitized_dict()),
        pickle.dumps(config).decode("latin-1"),
    ):
        assert SECRET not in shown
        assert site.host in shown
    assert config.cache == urls["cache"]  # which this process opens


def test_a_worker_process_opens_them_with_it(site: Website) -> None:
    data = open_training_data([site.url("train")])
    assert SECRET not in f"{data!r} {data.path}"
    assert len(pickle.loads(pickle.dumps(data))) == len(data)

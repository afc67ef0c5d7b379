"""`trainer fit` and `trainer eval` on caches in an object store: the same numbers as from the local folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from logitcache.format import shards
from tests.helpers.objectstore import bucket, s3_endpoint  # noqa: F401
from tests.helpers.remote_training import NUM_SHARDS, make_cache
from trainer.cli import main

pytestmark = pytest.mark.programs

NAMES = ("train", "heldout")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, teacher_tokenizer: Any) -> Path:
    """Training and held-out cache in a folder."""
    root = tmp_path_factory.mktemp("caches")
    for seed, name in enumerate(NAMES):
        make_cache(root / name, teacher_tokenizer, seed)
    return root


@pytest.fixture
def pairs(folder: Path, bucket: str) -> dict[str, tuple[str, str]]:  # noqa: F811
    """Training and held-out cache: in a folder, and in a store."""
    for name in NAMES:
        fsspec.filesystem("s3").put(str(folder / name), f"{bucket}/{name}", recursive=True)
    return {
        "local": (str(folder / "train"), str(folder / "heldout")),
        "remote": (f"{bucket}/train", f"{bucket}/heldout"),
    }


def trained(out: Path, train: str, heldout: str, teacher: Path, *options: str) -> tuple[list[float], dict[str, float]]:
    """Losses of eight steps, and the evaluation."""
    caches = ["--cache", train, "--eval_cache", heldout, "--student", str(teacher)]
    steps = ["--max_steps", "8", "--logging_steps", "1", "--per_device_train_batch_size", "4", "--use_cpu"]
    assert main(["fit", *caches, *steps, "--output_dir", str(out), "--disable_tqdm", "true", *options]) == 0
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry], metrics(out / "eval.json")


@pytest.fixture(scope="module")
def from_folder(
    folder: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[float], dict[str, float]]:
    return trained(tmp_path_factory.mktemp("run"), str(folder / "train"), str(folder / "heldout"), teacher)


def metrics(path: Path) -> dict[str, float]:
    """Of an evaluation, but for how long it took."""
    found = json.loads(path.read_text())["metrics"]
    return {name: value for name, value in found.items() if "second" not in name and name != "runtime"}


@pytest.mark.parametrize("options", [[], ["--dataloader_num_workers", "2"]], ids=["no workers", "forked workers"])
@pytest.mark.parametrize("limit_gb", ["1", "0"], ids=["copies", "ranges"])
def test_a_run_from_a_store_has_the_losses_of_one_from_a_folder(
    tmp_path: Path,
    pairs: dict[str, tuple[str, str]],
    from_folder: tuple[list[float], dict[str, float]],
    teacher: Path,
    options: list[str],
    limit_gb: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("LOGITCACHE_LOCAL_GB", limit_gb)
    found = trained(tmp_path / "run", *pairs["remote"], teacher, *options)
    assert "could not be checked" not in "".join(capsys.readouterr())
    assert len(found[0]) == 8
    assert found == from_folder


def test_a_student_is_evaluated_on_a_cache_in_a_store(
    tmp_path: Path, pairs: dict[str, tuple[str, str]], teacher: Path
) -> None:
    found = {}
    for place, (_, heldout) in pairs.items():
        out = tmp_path / f"{place}.json"
        assert main(["eval", str(teacher), "--cache", heldout, "--out", str(out)]) == 0
        found[place] = metrics(out)
    assert found["remote"] == found["local"]


def test_a_student_with_another_tokenizer_is_refused_by_what_the_store_holds(
    tmp_path: Path, pairs: dict[str, tuple[str, str]], teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = tmp_path / "student"
    student.mkdir()
    for path in teacher.iterdir():
        (student / path.name).write_bytes(path.read_bytes())
    tokenizer = json.loads((student / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, other = list(vocabulary)[300:302]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (student / "tokenizer.json").write_text(json.dumps(tokenizer))
    options = ["--student", str(student), "--output_dir", str(tmp_path / "run"), "--max_steps", "1", "--use_cpu"]
    assert main(["fit", "--cache", pairs["remote"][0], *options]) == 2
    assert repr(one) in capsys.readouterr().err


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_shard_that_was_altered_in_the_store_ends_a_run_in_one_line(
    tmp_path: Path, pairs: dict[str, tuple[str, str]], teacher: Path, workers: str, capsys: pytest.CaptureFixture[str]
) -> None:
    url = pairs["remote"][0]
    store = fsspec.filesystem("s3")
    for index in range(NUM_SHARDS):
        name = f"{url}/{shards.shard_name(index, NUM_SHARDS)}"
        content = bytearray(store.cat_file(name))
        content[len(content) // 2] ^= 1
        store.pipe_file(name, bytes(content))
    options = ["--student", str(teacher), "--output_dir", str(tmp_path / "run"), "--max_steps", "1", "--use_cpu"]
    assert main(["fit", "--cache", url, *options, "--dataloader_num_workers", workers]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"trainer: error: {url}/data/train-0000")
    assert last.endswith("was altered: its SHA-256 is not the manifest's. Fetch or push it again")

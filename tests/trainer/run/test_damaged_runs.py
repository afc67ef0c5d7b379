"""A run that continues from files of any kind, a full disk, too little memory: one line, nothing run, nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import trainer.run.fit
import trainer.run.prepare
from logitcache import LogitCache, UserError
from trainer.cli import main
from trainer.run.distill_trainer import DistillTrainer
from trainer.run.fit import _Trainer
from trainer.run.output_folder import folder_held, whole_or_removed
from trainer.run.resume import last_checkpoint

STEPS = ("--use_cpu", "--disable_tqdm", "true", "--max_steps", "4", "--save_steps", "2")


class Code:
    """Leaves a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._path),)


@pytest.fixture(scope="module")
def options(cache: LogitCache, student_folder: str) -> list[str]:
    return ["fit", "--cache", cache.path, "--student", student_folder, *STEPS]


@pytest.fixture(scope="module")
def finished(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert main([*options, "--output_dir", str(out)]) == 0
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("trainer: error: ")]
    assert len(lines) == 1
    return lines[0]


STATE: dict[str, Any] = {"global_step": 2, "log_history": []}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("run.json", text) for text in ("[]", "{}", "7", "\udcff", "[" * 100_000, '{"settings": {}, "tail": 7}')),
        ("run.json", '{"settings": {}, "tail": "bucket", "cache": {"path": 7}}'),
        ("run.json", '{"settings": {}, "tail": "bucket", "cache": {"path": "", "num_positions": 1, "caches": [7]}}'),
        *(("trainer_state.json", text) for text in ("[]", "7", "\udcff", "[" * 100_000, "{}", '{"global_step": "x"}')),
        ("trainer_state.json", json.dumps(STATE | {"unknown": 7})),
        ("trainer_state.json", json.dumps(STATE | {"log_history": [7]})),
        ("trainer_state.json", json.dumps(STATE | {"best_metric": "x"})),
        ("trainer_state.json", json.dumps(STATE | {"stateful_callbacks": {"RunMark": 7}})),
        ("trainer_state.json", json.dumps(STATE | {"stateful_callbacks": {"RunMark": {"args": 7}}})),
        ("trainer_state.json", json.dumps(STATE | {"stateful_callbacks": {"RunMark": {"args": {"x": 7}}}})),
        *((name, text) for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth") for text in ("", "x")),
        ("model.safetensors", "x"),
    ],
    ids=range(27),
)
def test_files_of_another_kind_are_named_in_one_line(
    run: Path, options: list[str], capsys: pytest.CaptureFixture[str], name: str, content: str
) -> None:
    checkpoint = run / "checkpoint-2"
    path = (run if name == "run.json" else checkpoint) / name
    path.write_text(content, errors="surrogateescape")
    assert main([*options, "--output_dir", str(run), "--resume_from_checkpoint", str(checkpoint)]) == 2
    error = one_line(capsys)
    assert str(path) in error or f"{checkpoint}: its " in error or f"{checkpoint}: not a checkpoint" in error


@pytest.mark.slow
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("kind", ["code", [1], {}, {"state": 7, "param_groups": [7]}, {"last_epoch": "x"}], ids=str)
def test_pickles_of_another_kind_are_refused_and_never_run(
    run: Path, options: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, kind: Any
) -> None:
    path = run / "checkpoint-2" / name
    former = torch.load(path, weights_only=False)
    if kind == {"last_epoch": "x"}:
        kind = former | kind if name == "scheduler.pt" else {**former, "python": 7, "state": {0: 7}}
    torch.save(Code(tmp_path / "ran") if kind == "code" else kind, path)
    resumed = ["--resume_from_checkpoint", str(run / "checkpoint-2")]
    assert main([*options, "--output_dir", str(run), *resumed]) == 2
    assert f"{run / 'checkpoint-2'}: its " in one_line(capsys)
    assert not (tmp_path / "ran").exists()


def test_saved_arguments_are_never_read(run: Path, options: list[str], tmp_path: Path) -> None:
    torch.save(Code(tmp_path / "ran"), run / "checkpoint-2" / "training_args.bin")
    torch.save(Code(tmp_path / "ran"), run / "training_args.bin")
    resumed = ["--resume_from_checkpoint", str(run / "checkpoint-2")]
    assert main([*options, "--output_dir", str(run), *resumed]) == 0
    assert main(["eval", str(run), "--cache", options[2]]) == 0
    assert not (tmp_path / "ran").exists()


@contextmanager
def files_up_to(num_bytes: int) -> Iterator[None]:
    """As a full disk, in the middle of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "tokenizer.json", "training_args.bin"]
)
def test_a_checkpoint_that_a_full_disk_cuts_off_is_removed(
    finished: Path,
    options: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """Each file is the first that has no room, after one whole checkpoint."""
    size = (finished / "checkpoint-2" / name).stat().st_size
    former = _Trainer._save_checkpoint

    def save(self: Any, *args: Any, **given: Any) -> None:
        if self.state.global_step < 4:
            return former(self, *args, **given)
        with files_up_to(size - 1):
            return former(self, *args, **given)

    monkeypatch.setattr(_Trainer, "_save_checkpoint", save)
    assert main([*options, "--output_dir", str(tmp_path)]) == 2
    error = one_line(capsys)
    assert f"{tmp_path / 'checkpoint-4'} cannot be written" in error
    assert "its parts are removed: make room, then `--resume_from_checkpoint true` continues" in error
    assert not (tmp_path / "checkpoint-4").exists()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def test_a_model_that_a_full_disk_cuts_off_is_removed(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    former = _Trainer.save_model

    def save(self: Any, output_dir: str | None = None, **given: Any) -> None:
        if output_dir is not None:
            return former(self, output_dir, **given)
        with files_up_to((tmp_path / "checkpoint-4" / "model.safetensors").stat().st_size - 1):
            return former(self, **given)

    monkeypatch.setattr(_Trainer, "save_model", save)
    assert main([*options, "--output_dir", str(tmp_path)]) == 2
    assert "and its parts are removed: make room" in one_line(capsys)
    assert not list(tmp_path.glob("*.safetensors"))
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no space left"),
        (OSError(errno.EROFS, "Read-only file system"), "Read-only file system"),
        (Exception("No space left on device (os error 28)"), "no space left"),  # of libraries in Rust
        (RuntimeError("basic_ios::clear: iostream error"), "iostream error"),  # of torch
    ],
    ids=["full", "read-only", "Rust", "torch"],
)
def test_only_what_could_not_be_written_is_removed(tmp_path: Path, error: Exception, why: str) -> None:
    for name in ("checkpoint-2", "checkpoint-4"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").touch()
    refused = pytest.raises(UserError, match=rf"checkpoint-4 cannot be written \(.*{why}\)")
    with refused, whole_or_removed(tmp_path, ["checkpoint-4"], "make room"):
        raise error
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_a_whole_checkpoint_stays_whatever_fails_after_it(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(**_: Any) -> None:
        raise OSError(errno.EACCES, "Permission denied", "checkpoint-0")

    monkeypatch.setattr("transformers.trainer.rotate_checkpoints", full)
    assert main([*options, "--output_dir", str(tmp_path)]) == 2
    assert "checkpoint-0: Permission denied" in one_line(capsys)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def test_a_model_that_cannot_be_pushed_stays(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_hub(*_: Any, **__: Any) -> None:
        raise OSError("401 Client Error.\n\nInvalid credentials")

    monkeypatch.setattr(DistillTrainer, "push_to_hub", no_hub)
    monkeypatch.setattr(_Trainer, "init_hf_repo", lambda self, token=None: None)
    monkeypatch.setattr(_Trainer, "_push_from_checkpoint", lambda self, folder: None)
    assert main([*options, "--output_dir", str(tmp_path), "--push_to_hub"]) == 2
    assert f"--push_to_hub: 401 Client Error. Invalid credentials; the model is in {tmp_path}" in one_line(capsys)
    assert (tmp_path / "model.safetensors").exists()


def too_much_of_torch(*_: Any, **__: Any) -> None:
    torch.empty(1 << 50, dtype=torch.uint8)


def too_much_of_numpy(*_: Any, **__: Any) -> None:
    np.empty(1 << 50, np.uint8)


def too_much_of_a_gpu(*_: Any, **__: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has 1.00 GiB free.")


@pytest.mark.slow
@pytest.mark.parametrize("place", ["load_student", "training_step", "_prepare_for_training"])
@pytest.mark.parametrize("fails", [too_much_of_torch, too_much_of_numpy, too_much_of_a_gpu])
def test_out_of_memory_is_one_line_that_says_what_takes_less(
    options: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    fails: Any,
) -> None:
    monkeypatch.setattr(trainer.run.fit if place == "load_student" else DistillTrainer, place, fails)
    assert main([*options, "--output_dir", str(tmp_path / "run")]) == 2
    error = one_line(capsys)
    assert "trainer: error: out of memory (" in error
    assert "lower --per_device_train_batch_size" in error


def test_a_fault_of_ours_is_no_users_error(options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*_: Any) -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(_Trainer, "training_step", fault)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        main([*options, "--output_dir", str(tmp_path)])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--report_to", "nobody"], "nobody is not supported"),
        (["--optim_args", "x"], "not enough values to unpack"),
        (["--adam_beta1", "5"], "Invalid beta parameter"),
        (["--lr_scheduler_kwargs", '{"x": 1}'], "unexpected keyword argument 'x'"),
        (["--torch_compile_backend", "x"], "'X' is not a valid DynamoBackend"),
        (["--use_liger_kernel"], "liger-kernel"),
        (["--dataloader_num_workers", "-1"], "num_workers option should be non-negative"),
        (["--lora_r", str(10**20)], "the settings cannot be used"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_settings_that_are_refused_only_when_they_are_used_are_one_line(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], given: list[str], message: str
) -> None:
    assert main([*options, "--output_dir", str(tmp_path / "run"), *given]) == 2
    assert message in one_line(capsys)


def test_a_folder_that_cannot_be_written_is_refused_before_anything_loads(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer.run.prepare, "prepare", lambda config: pytest.fail("something was loaded"))
    (tmp_path / "file").touch()
    assert main([*options, "--output_dir", str(tmp_path / "file" / "run")]) == 2
    assert "file/run: a folder that can be written is wanted (Not a directory)" in one_line(capsys)
    read_only = tmp_path / "read-only"
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != read_only)  # the tests may run as root
    assert main([*options, "--output_dir", str(read_only)]) == 2
    assert f"--output_dir {read_only}: nothing can be written in this folder" in one_line(capsys)
    assert not read_only.exists()


def test_a_second_run_in_the_same_folder_is_refused(
    run: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    with folder_held(run, "--output_dir"):
        assert main([*options, "--output_dir", str(run / "checkpoint-2" / "..")]) == 2
        assert "another command is writing there" in one_line(capsys)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    assert main([*options, "--output_dir", str(run)]) == 0


def test_a_second_set_of_answers_in_the_same_folder_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data.jsonl").write_text('{"prompt": "word1", "completion": "word2"}\n')
    command = ["eval", str(run), "--generate", "--data", str(tmp_path / "data.jsonl"), "--max_new_tokens", "2"]
    with folder_held(run / "generate", "--answers"):
        assert main([*command, "--seeds", "1"]) == 2
        assert f"--answers {run / 'generate'}: another command is writing there" in one_line(capsys)
    assert main([*command, "--seeds", "1"]) == 0


def test_a_comparison_clears_no_folder_that_a_run_writes_to(
    cache: LogitCache, student_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = {"cache": cache.path, "eval_cache": cache.path, "student": student_folder, "max_steps": 1}
    recipe = {"output_dir": str(tmp_path / "runs"), "seeds": [1], "common": common, "runs": {"KD": {"loss": "fkl"}}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    weights = tmp_path / "runs" / "KD-1" / "model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.touch()
    with folder_held(weights.parent, "--output_dir"):
        assert main(["compare", str(tmp_path / "recipe.yaml"), "--overwrite"]) == 1
    assert f"{weights.parent}: another command is writing there" in capsys.readouterr().err
    assert weights.exists()

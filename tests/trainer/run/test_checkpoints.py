"""Which checkpoint a run continues from, and whether it is still the same run."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from logitcache import LogitCache
from tests.helpers.cachemaking import random_sequences, write_cache
from trainer.cli import main
from trainer.comparison.folder_state import folder_state
from trainer.comparison.recipe import PlannedRun
from trainer.config.arguments import parse
from trainer.run.callbacks import GracefulStop
from trainer.run.resume import last_checkpoint

STEPS = ("--use_cpu", "--disable_tqdm", "true", "--max_steps", "4", "--save_steps", "2")


def fit(out: Path, student: str, *options: str) -> int:
    return main(["fit", "--student", student, "--output_dir", str(out), *STEPS, *options])


def press_at(step: int) -> Any:
    """Ctrl-C during the step after this one."""

    def press(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step and not self.requested:
            os.kill(os.getpid(), signal.SIGINT)

    return press


def refused(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.fixture
def second(tmp_path: Path) -> LogitCache:
    return write_cache(tmp_path / "second", random_sequences(10, seed=6))


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--early_stopping_patience", "9")], ids=["best", "early stopping"])
def test_ctrl_c_keeps_its_checkpoint_where_the_best_one_alone_is_kept(
    options: tuple[str, ...],
    tmp_path: Path,
    cache: LogitCache,
    heldout: LogitCache,
    student_folder: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A learning rate of 0: the first evaluation stays the best."""
    out, through = tmp_path / "run", tmp_path / "through"
    options = (*options, "--cache", cache.path, "--eval_cache", heldout.path, "--learning_rate", "0")
    options += ("--load_best_model_at_end", "true", "--metric_for_best_model", "agreement", "--save_total_limit", "1")
    options += ("--eval_steps", "2", "--max_steps", "8")
    with monkeypatch.context() as patch:
        patch.setattr(GracefulStop, "on_step_begin", press_at(4))
        assert fit(out, student_folder, *options) == 130
    again = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert again[-1] == str(out / "checkpoint-5")
    assert (out / "checkpoint-5" / "model.safetensors").exists()
    assert (out / "checkpoint-2").exists(), "the best"

    assert main(again[1:]) == 0
    assert fit(through, student_folder, *options) == 0
    for folder in (out, through):
        assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]
        assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 8


def test_ctrl_c_in_the_last_step_ends_the_run_as_if_it_had_not_been_pressed(
    tmp_path: Path, cache: LogitCache, heldout: LogitCache, student_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GracefulStop, "on_step_begin", press_at(3))
    options = ("--cache", cache.path, "--eval_cache", heldout.path, "--eval_steps", "2", "--load_best_model_at_end")
    assert fit(tmp_path, student_folder, *options) == 0
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "eval_ce" in entry][:2] == [2, 4]


def test_a_finished_run_is_not_trained_on(
    tmp_path: Path, cache: LogitCache, student_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where its last step lies within an epoch: here of three steps."""
    options = ("--cache", cache.path)
    assert fit(tmp_path, student_folder, *options) == 0
    assert "nothing was left" not in capsys.readouterr().out
    before = (tmp_path / "model.safetensors").read_bytes()
    assert fit(tmp_path, student_folder, *options, "--resume_from_checkpoint", "true") == 0
    out = capsys.readouterr().out
    assert f"nothing was left to train: {tmp_path / 'checkpoint-4'} is where the run had ended\n4 steps done" in out
    assert "\nstep " not in out
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_checkpoints_of_a_former_run_in_the_folder_are_left_alone(
    tmp_path: Path, cache: LogitCache, student_folder: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    former, options = tmp_path / "checkpoint-4", ("--cache", cache.path)
    assert fit(tmp_path, student_folder, *options) == 0
    with monkeypatch.context() as patch:
        patch.setattr(GracefulStop, "on_step_begin", press_at(0))
        assert fit(tmp_path, student_folder, *options) == 130
    assert former.exists()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
    config = parse(["--student", student_folder, "--output_dir", str(tmp_path), *STEPS, *options])
    assert (
        folder_state(PlannedRun("KD", "recipe.yaml, line 1", [], config, ranks=1)).checkpoint
        == tmp_path / "checkpoint-1"
    )

    assert fit(tmp_path, student_folder, *options, "--resume_from_checkpoint", str(former)) == 2
    assert f"{former}: a former run left it" in refused(capsys)
    shutil.rmtree(tmp_path / "checkpoint-1")
    assert fit(tmp_path, student_folder, *options, "--resume_from_checkpoint", "true") == 2
    assert "holds no checkpoint to continue from (those of former runs do not count" in refused(capsys)
    (tmp_path / "run.json").unlink()
    assert last_checkpoint(tmp_path) == str(former), "nothing says whose it is"


@pytest.mark.slow
def test_a_continued_run_goes_on_being_the_same_run(tmp_path: Path, cache: LogitCache, student_folder: str) -> None:
    options = ("--cache", cache.path)
    assert fit(tmp_path, student_folder, *options) == 0
    first = json.loads((tmp_path / "run.json").read_text())["run_id"]
    resume = ("--max_steps", "6", "--resume_from_checkpoint")
    assert fit(tmp_path, student_folder, *options, *resume, str(tmp_path / "checkpoint-2")) == 0
    assert json.loads((tmp_path / "run.json").read_text())["run_id"] == first
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")
    assert fit(tmp_path, student_folder, *options) == 0
    assert json.loads((tmp_path / "run.json").read_text())["run_id"] != first


def test_a_checkpoint_that_was_being_written_is_passed_over(
    tmp_path: Path, cache: LogitCache, student_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(tmp_path, student_folder, "--cache", cache.path) == 0
    state = tmp_path / "checkpoint-4" / "trainer_state.json"
    state.write_text(state.read_text()[:100])
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert fit(tmp_path, student_folder, "--cache", cache.path, "--resume_from_checkpoint", str(state.parent)) == 2
    assert "no whole trainer_state.json" in refused(capsys)


@pytest.mark.slow
def test_runs_of_earlier_versions_are_continued(
    tmp_path: Path, cache: LogitCache, heldout: LogitCache, second: LogitCache, student_folder: str
) -> None:
    """Their run.json tells neither run, ranks nor weights; their checkpoints have no mark."""
    options = ["--cache", f"{cache.path}:2", f"{second.path}:1", "--eval_cache", heldout.path]
    options += ["--early_stopping_patience", "3", "--eval_steps", "2"]
    assert fit(tmp_path, student_folder, *options) == 0
    record = json.loads((tmp_path / "run.json").read_text())
    del record["run_id"], record["world_size"]
    for entry in record["cache"]["caches"]:
        del entry["weight"], entry["averaged"]
    (tmp_path / "run.json").write_text(json.dumps(record))
    for checkpoint in tmp_path.glob("checkpoint-*"):
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        del state["stateful_callbacks"]["RunMark"]
        state["stateful_callbacks"]["EarlyStoppingCallback"] = state["stateful_callbacks"].pop("EarlyStopping")
        (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    resume = ("--max_steps", "6", "--resume_from_checkpoint")
    assert fit(tmp_path, student_folder, *options, *resume, str(tmp_path / "checkpoint-2")) == 0
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")
    record = json.loads((tmp_path / "run.json").read_text())
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["RunMark"]["args"] == {"run_id": record["run_id"]}


@pytest.mark.slow
def test_other_weights_averaged_teachers_and_ranks_are_another_run(
    tmp_path: Path, cache: LogitCache, second: LogitCache, student_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    resume = ("--resume_from_checkpoint", "true")
    assert fit(out, student_folder, "--cache", f"{cache.path}:0.75", f"{second.path}:0.25") == 0
    for others, said in (
        ((f"{cache.path}:1", f"{second.path}:1"), "shares of the caches' rows were [0.75, 0.25], are [0.5, 0.5]"),
        ((cache.path, second.path), "were [0.75, 0.25], are [None, None] (None: each row once)"),
    ):
        assert fit(out, student_folder, "--cache", *others, *resume) == 2
        assert said in refused(capsys)
    assert fit(out, student_folder, "--cache", f"{cache.path}:3", f"{second.path}:1", *resume) == 0

    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(record | {"world_size": 2}))
    assert fit(out, student_folder, "--cache", f"{cache.path}:3", f"{second.path}:1", *resume) == 2
    message = refused(capsys)
    assert "the number of ranks was 2, is 1" in message
    assert "--per_device_train_batch_size × ranks" in message

    twin = write_cache(tmp_path / "twin", random_sequences(23, seed=1), k=6).path
    assert fit(tmp_path / "averaged", student_folder, "--cache", cache.path, "--average_with", twin) == 0
    assert fit(tmp_path / "averaged", student_folder, "--cache", cache.path, twin, *resume) == 2
    assert f"--average_with was ['{twin}'], is []" in refused(capsys)


@pytest.mark.slow
def test_a_best_checkpoint_is_judged_in_the_same_way_after_a_resume(
    tmp_path: Path, cache: LogitCache, heldout: LogitCache, student_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--cache", cache.path, "--eval_cache", heldout.path, "--resume_from_checkpoint", "true")
    judged = ("--early_stopping_patience", "3", "--metric_for_best_model", "ce", "--eval_steps", "2")
    assert fit(tmp_path / "judged", student_folder, *options[:-2], *judged) == 0
    for name, value in (
        ("early_stopping_patience", "2"),
        ("early_stopping_threshold", "0.1"),
        ("metric_for_best_model", "fkl"),
        ("eval_steps", "1"),
    ):
        assert fit(tmp_path / "judged", student_folder, *options, *judged, f"--{name}", value) == 2
        assert f"--{name} was" in refused(capsys)
    assert fit(tmp_path / "plain", student_folder, *options[:-2], "--eval_steps", "2") == 0
    assert fit(tmp_path / "plain", student_folder, *options, "--eval_steps", "1") == 0


@pytest.mark.slow
def test_a_resumed_run_stops_early_where_an_uninterrupted_one_does(
    tmp_path: Path, cache: LogitCache, heldout: LogitCache, student_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """At a learning rate of 0 nothing gets better: the first evaluation and three more."""
    options = ["--cache", cache.path, "--eval_cache", heldout.path, "--max_steps", "20", "--learning_rate", "0"]
    options += ["--early_stopping_patience", "3", "--eval_steps", "2"]

    def stopped_at(folder: Path) -> int:
        return int(json.loads((folder / "trainer_state.json").read_text())["global_step"])

    through, resumed = tmp_path / "through", tmp_path / "resumed"
    assert fit(through, student_folder, *options) == 0
    assert stopped_at(through) == 8
    for last in (4, 6):
        shutil.copytree(through, resumed, dirs_exist_ok=True)
        for step in range(last + 2, 10, 2):
            shutil.rmtree(resumed / f"checkpoint-{step}")
        assert fit(resumed, student_folder, *options, "--resume_from_checkpoint", "true") == 0
        assert stopped_at(resumed) == 8
    capsys.readouterr()

    assert fit(through, student_folder, *options, "--resume_from_checkpoint", "true") == 0
    out = capsys.readouterr().out
    assert "nothing was left to train" in out
    assert "stopped early at step 8 of 20; the best held-out loss" in out
    assert "\nstep 9/" not in out
    assert stopped_at(through) == 8
    first = AutoModelForCausalLM.from_pretrained(student_folder).lm_head.weight
    assert AutoModelForCausalLM.from_pretrained(through).lm_head.weight.equal(first)

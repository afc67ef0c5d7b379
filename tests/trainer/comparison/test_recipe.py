"""Recipes: what a YAML file means, what is refused and where, and how its runs are done, continued and reported."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from transformers import PreTrainedConfig

from logitcache import LogitCache, UserError
from logitcache.storage.atomic import file_sha256
from tests.helpers.cachemaking import random_sequences, write_cache
from tests.helpers.processes import FORKED
from trainer.cli import main
from trainer.commands import eval as trainer_eval
from trainer.comparison import execute, folder_state
from trainer.comparison.child import Child, last_step, locked_log
from trainer.comparison.launch import launcher
from trainer.comparison.recipe import read_recipe
from trainer.comparison.status_line import StatusLine
from trainer.evaluation.identity import model_identity

# Stands for `python -m trainer`: a run of ten steps, told by what lies in its folder how to behave.
STAND_IN = """
import json, os, pathlib, signal, sys, time
if sys.argv[1] == "eval":
    answers = pathlib.Path(sys.argv[2]) / "generate"
    answers.mkdir(exist_ok=True)
    plan = json.loads((answers.parents[1] / "plan.json").read_text())
    (answers / "dolly.json").write_text(json.dumps(plan["scores"]))
    for run in plan["scores"]["seeds"].values():
        (answers / run["answers"]).touch()
    (answers.parent / "arguments.json").write_text(json.dumps(sys.argv[3:]))
    sys.exit()
folder = pathlib.Path(next(a.split("=", 1)[1] for a in sys.argv if a.startswith("--output_dir=")))
plan = json.loads((folder.parent / "plan.json").read_text())
stopped = []
signal.signal(signal.SIGINT, lambda *_: stopped.append(1))
resumed = "--resume_from_checkpoint" in sys.argv
first = int(sys.argv[-1].rpartition("-")[2]) if resumed else 0
(folder / "run.json").write_text(json.dumps(plan["records"][folder.name]))
with (folder.parent / "started.txt").open("a") as file:
    file.write(f"{folder.name} {first} {os.environ.get('OMP_NUM_THREADS')}\\n")
for step in range(first + 1, 11):
    print(f"step {step}/10", flush=True)
    if folder.name in plan["failing"]:
        sys.exit("out of memory")
    time.sleep(plan["step_s"])
    if stopped:
        (folder / f"checkpoint-{step}").mkdir()
        (folder / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
        sys.exit(130)
seed = int(folder.name[-1])
(folder / "config.json").write_text('{"model_type": "llama"}')
(folder / "model.safetensors").write_text(plan["weights"])
(folder / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": 10, "eval_fkl": 0.5, "eval_ce": 2.0}]}))
(folder / "eval.json").write_text(json.dumps(plan["evaluation"] | {"metrics": {"ce": 2.0 + seed, "fkl": 0.5}}))
"""


@pytest.fixture
def recipe(tmp_path: Path, cache: LogitCache, heldout: LogitCache, student_folder: str) -> dict[str, Any]:
    """Hard labels and two losses, two seeds each."""
    return {
        "output_dir": str(tmp_path / "runs"),
        "seeds": [1, 2],
        "losses": ["fkl", "todi"],
        "common": {"cache": cache.path, "eval_cache": heldout.path, "student": student_folder, "max_steps": 10},
        "runs": {"hard labels": {"kd_weight": 0}, "KD": {"kd_weight": 0.9}},
    }


def written(folder: Path, recipe: dict[str, Any]) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def stood_in(
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    failing: tuple[str, ...] = (),
    step_s: float = 0.0,
    weights: str = "some",
) -> Path:
    """Puts the stand-in in place of `trainer fit`; returns the folder of the runs."""
    read = read_recipe(path)
    script = path.parent / "stand_in.py"
    script.write_text(STAND_IN)
    monkeypatch.setattr(execute, "TRAINER", (str(script),))
    monkeypatch.setattr(execute, "POLL_S", 0.01)
    records = {
        run.folder.name: {
            "settings": run.config.recorded(),
            "tail": "bucket",
            "cache": {"path": "a cache", "caches": folder_state._caches(tuple(run.config.cache or ()), ())},
        }
        for run in read.runs
    }
    held_out = str(read.runs[0].config.eval_cache)
    evaluation = {"cache": held_out, "cache_sha256": folder_state.identities_at(held_out)[0]}
    read.output_dir.mkdir(exist_ok=True)
    scores: dict[str, Any] = {}
    if read.generate:
        model = path.parent / "trained"
        model.mkdir(exist_ok=True)
        (model / "config.json").write_text('{"model_type": "llama"}')
        (model / "model.safetensors").write_text(weights)
        scores = {
            "model": "a student",
            "model_identity": model_identity(str(model), PreTrainedConfig()),
            "data_sha256": file_sha256(Path(read.generate.data[0])),
            "settings": read.generate.decisive("transformers"),
            "seeds": {name: {"rouge_l": 24.0, "answers": f"dolly-seed{name}.jsonl"} for name in read.generate.runs},
            "rouge_l": 24.0,
        }
    plan: dict[str, Any] = {"scores": scores, "records": records, "evaluation": evaluation}
    plan |= {"failing": failing, "step_s": step_s, "weights": weights}
    (read.output_dir / "plan.json").write_text(json.dumps(plan))
    return read.output_dir


def started(runs: Path) -> list[str]:
    """Folder and first step of every command that was started."""
    path = runs / "started.txt"
    return sorted(line.rpartition(" ")[0] for line in path.read_text().splitlines()) if path.exists() else []


ALL = ["KD-fkl-1", "KD-fkl-2", "KD-todi-1", "KD-todi-2", "hard-labels-1", "hard-labels-2"]


def test_runs_are_multiplied_by_losses_and_seeds_but_not_hard_labels(tmp_path: Path, recipe: dict[str, Any]) -> None:
    recipe["runs"]["own"] = {"loss": "rkl", "learning-rate": 1e-4}
    recipe["runs"]["both"] = {"loss_schedule": "fkl@0,rkl@0.5"}
    runs = read_recipe(written(tmp_path, recipe)).runs
    assert [(run.row, run.folder.name, run.config.loss) for run in runs[::2]] == [
        ("hard labels", "hard-labels-1", "todi"),
        ("KD FKL", "KD-fkl-1", "fkl"),
        ("KD ToDi", "KD-todi-1", "todi"),
        ("own", "own-1", "rkl"),
        ("both", "both-1", "rkl"),
    ]
    assert [run.config.seed for run in runs] == [1, 2] * 5
    assert [run.config.kd_weight for run in runs[::2]] == [0, 0.9, 0.9, 0.5, 0.5]
    assert runs[7].config.learning_rate == 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": None}, r"recipe.yaml, line 2: seeds: a list of different whole numbers .* got nothing"),
        ({"seeds": [2**32]}, r"line 2: seeds: .* up to 2³²−1 is expected"),
        ({"seeds": [1, 1]}, r"line 2: seeds: .* got \[1, 1\]"),
        ({"seed": [1]}, r"line \d+: unknown key seed \(is seeds meant\?\); accepted are output_dir, seeds"),
        ({"losses": [["fkl"]]}, "line 5: losses: a list of different divergences"),
        ({"losses": []}, "line 5: losses: a list of different divergences"),
        ({"output_dir": None}, "line 1: output_dir: the folder of all runs"),
        ({"runs": {}}, "runs: at least one is expected"),
        ({"runs": {"KD": {"kd_wieght": 0.9}}}, r"line \d+: unknown setting kd_wieght \(is kd_weight meant\?\)"),
        ({"runs": {"KD": {"kd_weight": 9}}}, r"line \d+: run KD FKL: --kd_weight 9: it must lie between"),
        ({"runs": {"KD": {"seed": 9}}}, r"seed is no setting of one run: seeds belong into"),
        ({"runs": {"K D": {}, "K-D": {}}}, "K-D FKL and K D FKL would share the folder"),
        ({"runs": {"x" * 300: {}}}, r"line \d+: runs: xxx.*-fkl-1 is longer than the 255 bytes"),
        ({"losses": ["fkl", "fkk"]}, "run hard labels|run KD FKK: --loss fkk: accepted are"),
        ({"generate": {"dat": ["x"]}}, r"unknown option dat \(is data meant\?\)"),
        ({"common": {"loss_schedule": "fkl@0"}}, "common names a loss_schedule, and so does `losses`"),
        ({"generate": {"data": ["missing.jsonl"]}}, "generate: --data missing.jsonl: no such file"),
        ({"generate": {"data": 5}}, "generate: --data 5: a text or a list of texts is expected"),
        ({"generate": {"data": [], "prompt_template": 5}}, "generate: --prompt_template 5: a text or a list"),
        ({"generate": {"data": [], "temperature": True}}, "generate: --temperature True: a number from 0"),
        ({"runs": {"KD": {"fsdp": True}}}, r"run KD FKL: fsdp shards a model over ranks: `launch: torchrun …`"),
        (
            {"launch": "mpirun -n 2"},
            r"line \d+: launch: `torchrun …` or `accelerate launch …` is expected, got 'mpirun",
        ),
        ({"launch": ["torchrun"]}, r"line \d+: launch: `torchrun …` or `accelerate launch …` is expected"),
        ({"launch": "torchrun --nproc-per-node"}, r"line \d+: launch: .*--nproc-per-node.*: expected one argument"),
        ({"launch": "torchrun --nproc-par-node 2"}, r"line \d+: launch: .*unrecognized arguments: --nproc-par-node"),
        ({"launch": "torchrun --nproc-per-node 0"}, "launch: .*: 0 ranks train nothing"),
        ({"launch": "torchrun --nproc-per-node 2 -m trainer fit"}, "options of the launcher alone are expected"),
        ({"launch": "accelerate launch train.py"}, "options of the launcher alone are expected"),
        ({"launch": "torchrun --max-restarts 3"}, "leave the restarts out"),
        ({"launch": "torchrun 'a"}, r"line \d+: launch: torchrun 'a: No closing quotation"),
    ],
)
def test_what_a_recipe_gets_wrong_is_named_with_its_line(
    tmp_path: Path, recipe: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        read_recipe(written(tmp_path, recipe | change))


@pytest.mark.parametrize(
    ("launch", "module"),
    [
        ("torchrun --standalone --nproc-per-node 8", "torch.distributed.run --standalone --nproc-per-node 8"),
        ("accelerate launch --config_file 'my nodes.yaml'", "accelerate.commands.launch --config_file 'my nodes.yaml'"),
    ],
)
def test_runs_are_started_by_the_launcher_of_this_interpreter(
    tmp_path: Path, recipe: dict[str, Any], launch: str, module: str
) -> None:
    read = read_recipe(written(tmp_path, recipe | {"launch": launch}))
    command = execute.fit_command(read.runs[0], None, read.launch)
    beginning = [sys.executable, "-m", *shlex.split(module), "-m", "trainer", "fit"]
    assert command[: len(beginning)] == beginning


@pytest.mark.parametrize(
    ("launch", "ranks"),
    [
        ("torchrun --standalone --nproc-per-node 8", 8),
        ("torchrun --nproc_per_node=4", 4),
        ("torchrun --nproc-per-node gpu", None),
        ("torchrun --nnodes 2 --nproc-per-node 8", None),
        ("accelerate launch --num_processes 16", 16),
        ("accelerate launch", None),
    ],
)
def test_the_ranks_of_a_launcher_are_known_where_it_says_so(launch: str, ranks: int | None) -> None:
    assert launcher(launch).ranks == ranks


def test_one_run_of_several_ranks_is_done_at_a_time(
    tmp_path: Path, recipe: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, recipe | {"launch": "torchrun --nproc-per-node 2"})
    assert main(["compare", str(path), "--jobs", "2"]) == 2
    assert f"--jobs 2: `launch` in {path} gives a run all devices" in capsys.readouterr().err


def test_the_demo_is_a_recipe() -> None:
    runs = read_recipe(Path(__file__).parents[3] / "tools" / "recipes" / "demo.yaml").runs
    assert len(runs) == 27
    assert {run.config.max_steps for run in runs} == {100}


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("output_dir: runs\nruns:\n  KD: {}\n  KD: {}\n")
    with pytest.raises(UserError, match=r"recipe\.yaml, line 4: KD stands in line 3 already"):
        read_recipe(path)


def test_checking_one_run_leaves_nothing_in_the_environment_of_another(tmp_path: Path, recipe: dict[str, Any]) -> None:
    recipe["runs"]["compiled"] = {"torch_compile": True, "torch_compile_backend": "eager"}
    before = dict(os.environ)
    read_recipe(written(tmp_path, recipe))
    assert dict(os.environ) == before


@pytest.mark.slow
def test_a_recipe_is_done_once_and_its_rows_are_shown(
    tmp_path: Path, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    path = written(tmp_path, recipe)
    runs = stood_in(path, monkeypatch)
    cores = len(os.sched_getaffinity(0))
    assert main(["compare", str(path), "--jobs", str(cores + 1)]) == 0
    out = capsys.readouterr().out
    assert started(runs) == [f"{name} 0" for name in ALL]
    assert {line.split()[-1] for line in (runs / "started.txt").read_text().splitlines()} == {"1"}
    assert "[6/6]" in out
    assert [line.split("  ")[0] for line in out.splitlines() if line.startswith(("hard", "KD"))][:3] == [
        "hard labels",
        "KD FKL",
        "KD ToDi",
    ]
    assert (runs / "compare.png").exists()
    assert "hard labels" in (runs / "compare.html").read_text()
    assert main(["compare", str(path)]) == 0
    assert "6 of 6 runs" in capsys.readouterr().out
    assert len(started(runs)) == 6


@pytest.mark.slow
def test_picture_and_page_may_be_named_in_the_recipes_missing_output_dir(
    tmp_path: Path, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, recipe)
    runs = read_recipe(path).output_dir
    monkeypatch.setattr(execute, "TRAINER", ("-c", "raise SystemExit(1)"))
    outputs = ["--out", str(runs / "c.png"), "--page", str(runs / "c.html")]
    assert not runs.exists() and main(["compare", str(path), *outputs]) == 1
    assert "failed; the end of its log.txt" in capsys.readouterr().err
    assert main(["compare", str(path), "--out", str(runs / "none" / "c.png")]) == 2
    assert "name an existing folder" in capsys.readouterr().err


@pytest.mark.slow
def test_answers_of_each_student_are_generated_once(
    tmp_path: Path, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = with_answers(tmp_path, recipe)
    path = written(tmp_path, recipe)
    answers = stood_in(path, monkeypatch) / "KD-fkl-1" / "generate"
    assert main(["compare", str(path)]) == 0
    assert "ROUGE-L dolly" in capsys.readouterr().out
    given = trainer_eval.make_parser().parse_args(
        [str(answers.parent), *json.loads((answers.parent / "arguments.json").read_text())]
    )
    assert given.generate
    assert (given.data, given.seeds, given.columns) == ([str(data)], [7, 8], {"prompt": "question"})
    assert given.max_new_tokens == 9
    (answers.parent / "arguments.json").unlink()
    assert main(["compare", str(path)]) == 0
    assert not (answers.parent / "arguments.json").exists()


def with_answers(folder: Path, recipe: dict[str, Any]) -> Path:
    """Makes it a recipe of one run that answers prompts; returns the file of these."""
    pytest.importorskip("rouge_score")
    recipe |= {"runs": {"KD": {}}, "losses": ["fkl"], "seeds": [1]}
    data = folder / "dolly.jsonl"
    data.write_text('{"question": "word1", "completion": "b"}\n')
    recipe["generate"] = {"data": [str(data)], "columns": {"prompt": "question"}, "seeds": [7, 8], "max_new_tokens": 9}
    return data


@pytest.mark.slow
def test_answers_are_made_again_when_data_or_options_change_and_only_then(
    tmp_path: Path, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = with_answers(tmp_path, recipe)
    recipe["generate"]["prompt_template"] = r"{question}\n"
    made = tmp_path / "runs" / "KD-fkl-1" / "arguments.json"

    def compared() -> bool:
        """Whether answers were made."""
        path = written(tmp_path, recipe)
        stood_in(path, monkeypatch)
        made.unlink(missing_ok=True)
        assert main(["compare", str(path)]) == 0
        return made.exists()

    assert compared()
    assert not compared()
    evaluation = made.with_name("eval.json")
    evaluation.write_text(evaluation.read_text())  # as `trainer eval` does, after the answers were made
    assert not compared()
    data.write_text(data.read_text() * 2)
    assert compared()
    recipe["generate"]["max_new_tokens"] = 8
    former = made.parent / "generate" / "dolly-seed7.jsonl"
    former.write_text("nine tokens")
    capsys.readouterr()
    assert compared()
    assert "its answers were made with another max_new_tokens: they are made again" in capsys.readouterr().out
    assert former.read_text() == ""
    recipe["generate"]["seeds"] = [7, 8, 9]
    assert compared()
    assert not compared()


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"question": "word1", "completion": "b"}, {}, "hold no prompt with a reference"),
        ({"prompt": "word1 " * 60, "completion": "b"}, {}, "60 tokens and max_new_tokens 9 are more than the 64"),
        ({"prompt": "word1 " * 60, "completion": "b"}, {"max_prompt_length": 50}, "as short as max_prompt_length 50"),
        ({"prompt": "word1", "completion": 5}, {}, "`completion` must be a text or a list of texts"),
    ],
)
def test_prompts_that_a_student_cannot_answer_are_refused_before_anything_starts(
    tmp_path: Path,
    recipe: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    row: dict[str, Any],
    options: dict[str, Any],
    message: str,
) -> None:
    with_answers(tmp_path, recipe).write_text(json.dumps(row))
    del recipe["generate"]["columns"]
    recipe["generate"] |= options
    path = written(tmp_path, recipe)
    runs = stood_in(path, monkeypatch)
    assert main(["compare", str(path)]) == 2
    assert message in capsys.readouterr().err
    assert started(runs) == []


def test_scores_of_someone_else_are_not_replaced(
    tmp_path: Path, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_answers(tmp_path, recipe)
    path = written(tmp_path, recipe)
    folder = stood_in(path, monkeypatch) / "KD-fkl-1"
    (folder / "generate").mkdir(parents=True)
    (folder / "generate" / "dolly.json").write_text("{}")
    assert main(["compare", str(path)]) == 2
    assert "dolly.json holds no scores" in capsys.readouterr().err


@pytest.mark.slow
def test_a_finished_run_is_known_by_its_content_not_by_its_times(
    tmp_path: Path, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe |= {"runs": {"KD": {}}, "losses": ["fkl"], "seeds": [1]}
    path = written(tmp_path, recipe)
    runs = stood_in(path, monkeypatch)
    assert main(["compare", str(path)]) == 0
    os.utime(runs / "KD-fkl-1" / "eval.json", (0, 0))
    assert main(["compare", str(path)]) == 0
    assert len(started(runs)) == 1


@pytest.mark.slow
def test_a_run_that_an_earlier_version_did_is_finished(
    tmp_path: Path, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe |= {"runs": {"KD": {}}, "losses": ["fkl"], "seeds": [1]}
    path = written(tmp_path, recipe)
    runs = stood_in(path, monkeypatch)
    assert main(["compare", str(path)]) == 0
    file = runs / "KD-fkl-1" / "run.json"
    record = json.loads(file.read_text())
    record["cache"] = {"path": "a cache", "fingerprint": record["cache"]["caches"][0]["fingerprint"]}
    record["settings"] |= {"cache": record["settings"]["cache"][0]}
    del record["settings"]["packing"], record["settings"]["lora_r"]
    file.write_text(json.dumps(record))
    assert main(["compare", str(path)]) == 0
    assert len(started(runs)) == 1


def test_runs_that_are_measured_on_different_caches_are_refused_before_anything_starts(
    tmp_path: Path,
    recipe: dict[str, Any],
    cache: LogitCache,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe["runs"]["other"] = {"eval_cache": cache.path}
    path = written(tmp_path, recipe)
    runs = stood_in(path, monkeypatch)
    assert main(["compare", str(path)]) == 2
    error = capsys.readouterr().err
    assert f"run other FKL: --eval_cache {cache.path}: hard labels is measured on another one" in error
    assert started(runs) == []


def test_a_place_that_can_hold_no_runs_is_refused(
    tmp_path: Path, recipe: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["compare", str(written(tmp_path, recipe | {"output_dir": str(tmp_path / "file")}))]) == 2
    assert "Not a directory" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "content"), [("run.json", "{}"), ("model.safetensors", "of someone")])
def test_a_folder_of_someone_else_is_not_overwritten(
    tmp_path: Path,
    recipe: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: str,
) -> None:
    path = written(tmp_path, recipe)
    runs = stood_in(path, monkeypatch)
    (runs / "KD-fkl-1").mkdir()
    (runs / "KD-fkl-1" / name).write_text(content)
    assert main(["compare", str(path)]) == 2
    error = capsys.readouterr().err
    assert "KD-fkl-1 holds another run: " in error
    assert name in error
    assert (runs / "KD-fkl-1" / name).read_text() == content


@pytest.mark.slow
def test_nothing_of_a_former_model_stays_when_a_run_is_done_again(
    tmp_path: Path, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe |= {"runs": {"KD": {}}, "losses": ["fkl"], "seeds": [1]}
    path = written(tmp_path, recipe)
    folder = stood_in(path, monkeypatch) / "KD-fkl-1"
    assert main(["compare", str(path)]) == 0
    former = ["adapter_config.json", "adapter_model.safetensors", "model-00001-of-00002.safetensors"]
    former += ["model.safetensors.index.json", "pytorch_model.bin"]
    for name in former:
        (folder / name).write_text("former")
    (folder / "generate").mkdir()
    (folder / "generate" / "dolly.json").write_text("{}")
    (folder / "notes.txt").write_text("mine")
    recipe["runs"]["KD"]["kd_weight"] = 0.8
    stood_in(written(tmp_path, recipe), monkeypatch, weights="new")
    assert main(["compare", str(path), "--overwrite"]) == 0
    assert sorted(file.name for file in folder.iterdir()) == sorted(
        [*("config.json", "eval.json", "log.txt", "model.safetensors"), "notes.txt", "run.json", "trainer_state.json"]
    )
    assert (folder / "model.safetensors").read_text() == "new"


@pytest.mark.slow
def test_a_result_that_cannot_be_read_loses_no_other(
    tmp_path: Path, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, recipe)
    runs = stood_in(path, monkeypatch, step_s=0.01)
    finished = StatusLine.finished

    def broken(line: Any, run: Any, *rest: Any, **more: Any) -> None:
        if run.folder.name == "hard-labels-1":
            raise KeyError("rouge_l")
        finished(line, run, *rest, **more)

    monkeypatch.setattr(StatusLine, "finished", broken)
    assert main(["compare", str(path), "--jobs", "2"]) == 1
    captured = capsys.readouterr()
    assert "hard-labels-1 failed" in captured.err
    assert "KeyError: 'rouge_l'" in captured.err
    assert len(started(runs)) == 6
    assert "KD ToDi" in captured.out


@pytest.mark.slow
def test_rows_stand_in_the_order_of_the_recipe(
    tmp_path: Path, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe |= {"runs": {"z": {}, "y": {"kd_weight": 0}, "a": {}}, "losses": ["todi"]}
    path = written(tmp_path, recipe)
    stood_in(path, monkeypatch)
    assert main(["compare", str(path), "--jobs", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines if line.startswith(("z ", "y ", "a "))][:3] == [
        "z ToDi",
        "y",
        "a ToDi",
    ]


def test_what_does_not_fit_a_cache_is_refused_before_anything_starts(
    tmp_path: Path, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe["runs"]["KD at T = 3"] = {"temperature": 3}
    path = written(tmp_path, recipe)
    runs = stood_in(path, monkeypatch)
    assert main(["compare", str(path)]) == 2
    error = capsys.readouterr().err
    assert "recipe.yaml, line 18: run KD at T = 3 FKL: --temperature 3: " in error
    assert started(runs) == []


@pytest.mark.slow
def test_a_run_that_fails_loses_no_other(
    tmp_path: Path, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, recipe)
    runs = stood_in(path, monkeypatch, failing=("KD-fkl-1",))
    assert main(["compare", str(path), "--jobs", "2"]) == 1
    captured = capsys.readouterr()
    assert "KD-fkl-1 failed" in captured.err
    assert "out of memory" in captured.err
    assert len([name for name in ALL if (runs / name / "eval.json").exists()]) == 5
    assert "KD FKL           1" in captured.out
    stood_in(path, monkeypatch)
    assert main(["compare", str(path), "--jobs", "2"]) == 0
    assert len(started(runs)) == 7


@pytest.mark.slow
def test_other_settings_in_a_folder_are_refused_before_anything_starts(
    tmp_path: Path, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, recipe)
    stood_in(path, monkeypatch)
    assert main(["compare", str(path)]) == 0
    recipe["runs"]["KD"]["kd_weight"] = 0.8
    recipe["common"]["logging_steps"] = 1  # does not make another run
    written(tmp_path, recipe)
    runs = stood_in(path, monkeypatch)
    assert main(["compare", str(path)]) == 2
    error = capsys.readouterr().err
    assert "KD-fkl-1 holds another run (and so 3 more): kd_weight was 0.9, is 0.8. " in error
    assert "--overwrite" in error
    assert len(started(runs)) == 6
    (runs / "KD-fkl-1" / "checkpoint-3").mkdir()
    assert main(["compare", str(path), "--overwrite"]) == 0
    assert started(runs) == sorted([f"{name} 0" for name in ALL] + [f"{name} 0" for name in ALL if "KD" in name])
    assert not (runs / "KD-fkl-1" / "checkpoint-3").exists()


@pytest.mark.slow
def test_a_run_whose_cache_has_changed_is_done_again(
    tmp_path: Path, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe |= {"runs": {"KD": {}}, "losses": ["fkl"], "seeds": [1]}
    recipe["common"]["cache"] = str(tmp_path / "cache")
    write_cache(tmp_path / "cache", random_sequences(9, seed=5))
    path = written(tmp_path, recipe)
    stood_in(path, monkeypatch)
    assert main(["compare", str(path)]) == 0
    for file in (tmp_path / "cache").rglob("*"):
        if file.is_file():
            file.unlink()
    write_cache(tmp_path / "cache", random_sequences(10, seed=6))
    folder_state._caches.cache_clear()
    runs = stood_in(path, monkeypatch)
    assert main(["compare", str(path)]) == 0
    assert started(runs) == ["KD-fkl-1 0", "KD-fkl-1 0"]
    assert main(["compare", str(path)]) == 0
    assert len(started(runs)) == 2


@pytest.mark.slow
def test_only_a_whole_checkpoint_is_continued_from(
    tmp_path: Path, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe |= {"runs": {"KD": {}}, "losses": ["fkl"], "seeds": [1]}
    path = written(tmp_path, recipe)
    runs = stood_in(path, monkeypatch)
    folder = runs / "KD-fkl-1"
    for step in (4, 7, 8):
        (folder / f"checkpoint-{step}").mkdir(parents=True)
    for step in (4, 7):
        (folder / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    plan = json.loads((runs / "plan.json").read_text())
    (folder / "run.json").write_text(json.dumps(plan["records"]["KD-fkl-1"]))
    assert main(["compare", str(path)]) == 0
    assert started(runs) == ["KD-fkl-1 7"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_runs_at_a_checkpoint_and_the_same_command_continues(
    tmp_path: Path,
    recipe: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    recipe |= {"runs": {"KD": {}}, "losses": ["fkl", "todi"], "seeds": [1]}
    path = written(tmp_path, recipe)
    runs = stood_in(path, monkeypatch, step_s=0.05)
    beginning = StatusLine.show

    def interrupt(line: Any, running: dict[str, str]) -> None:
        beginning(line, running)
        if len(running) == 2 and all("/" in where for where in running.values()):
            monkeypatch.setattr(StatusLine, "show", beginning)
            os.kill(os.getpid(), number)

    monkeypatch.setattr(StatusLine, "show", interrupt)
    assert main(["compare", str(path), "--jobs", "2"]) == 130
    out = capsys.readouterr().out
    assert f"The same command continues:\n  trainer compare {path} --jobs 2" in out
    steps = {
        name: sorted(runs.glob(f"{name}/checkpoint-*"))[0].name.split("-")[1] for name in ("KD-fkl-1", "KD-todi-1")
    }
    assert main(["compare", str(path), "--jobs", "2"]) == 0
    assert started(runs) == sorted(line for name, step in steps.items() for line in (f"{name} 0", f"{name} {step}"))


@pytest.mark.slow
def test_a_run_that_another_process_does_is_waited_for(
    tmp_path: Path, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe |= {"runs": {"KD": {}}, "losses": ["fkl"], "seeds": [1]}
    path = written(tmp_path, recipe)
    runs = stood_in(path, monkeypatch, step_s=0.05)
    folder = runs / "KD-fkl-1"
    folder.mkdir()
    log = locked_log(folder / "log.txt")
    assert log is not None
    command = [sys.executable, str(tmp_path / "stand_in.py"), f"--output_dir={folder}"]
    with subprocess.Popen(command, stdout=log, start_new_session=True):
        log.close()  # as when the process that started it has been killed
        assert main(["compare", str(path)]) == 0
    assert started(runs) == ["KD-fkl-1 0"]
    assert "is being trained by another process: waiting for it" in capsys.readouterr().out
    assert last_step(folder / "log.txt") == "10/10"


@pytest.mark.slow
def test_ranks_that_a_killed_launcher_left_are_waited_for(
    tmp_path: Path, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, recipe | {"runs": {"KD": {}}, "losses": ["fkl"], "seeds": [1]})
    stood_in(path, monkeypatch)
    rank = f"import pathlib, time; time.sleep(1); pathlib.Path({str(tmp_path / 'ended')!r}).touch()"
    launching = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {rank!r}]); sys.exit(1)"
    monkeypatch.setattr(execute, "fit_command", lambda *_: [sys.executable, "-c", launching])
    assert main(["compare", str(path)]) == 1
    assert (tmp_path / "ended").exists()


@pytest.mark.parametrize("last", ["trainer: error: --lora_r 0: it must be at least 1", "ValueError: of a rank"])
def test_a_rank_that_fails_is_shown_not_what_the_launcher_says_of_it(tmp_path: Path, last: str) -> None:
    (tmp_path / "log.txt").write_text("of a former run\n")
    log = locked_log(tmp_path / "log.txt")
    assert log is not None
    said = [
        last,
        "",
        "E1122 15:00:00.0 12 torch/distributed/elastic/multiprocessing/api.py:9] failed (exitcode: 2) local_rank: 0",
        "rank : 0 (local_rank: 0)",
    ]
    with log:
        child = Child([sys.executable, "-c", f"print({chr(10).join(said)!r})"], log, {}, launcher=True)
        while child.status() is None:
            time.sleep(0.01)
    assert child.last_lines(tmp_path / "log.txt", 6) == said[:1]


def test_options_of_a_recipe_are_refused_for_finished_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(tmp_path), "--overwrite"]) == 2
    assert "--overwrite belongs to a recipe" in capsys.readouterr().err
    assert main(["compare", "a.yaml", str(tmp_path)]) == 2
    assert "a.yaml is a recipe: name it alone" in capsys.readouterr().err


def compared(folder: Path, path: Path, *options: str) -> None:
    """Does what `trainer compare` does in a working folder, where its output goes."""
    os.chdir(folder)
    said = os.open("said.txt", os.O_WRONLY | os.O_CREAT)
    for descriptor in (1, 2):
        os.dup2(said, descriptor)
    sys.exit(main(["compare", str(path), *options]))


def begun(folder: Path, recipe: dict[str, Any], *options: str) -> Any:
    """`trainer compare` in a process of its own, in a folder with a file that a child might run in place of ours."""
    (folder / "trainer.py").write_text("raise SystemExit('a file of that name in the working folder ran')")
    process = FORKED.Process(target=compared, args=(folder, written(folder, recipe), *options))
    process.start()
    return process


@pytest.mark.programs
def test_a_comparison_that_was_killed_continues(tmp_path: Path, recipe: dict[str, Any]) -> None:
    recipe |= {"runs": {"hard": {"kd_weight": 0}, "KD": {}}, "losses": ["fkl"], "seeds": [1]}
    recipe["common"] |= {"max_steps": 120, "save_steps": 20, "logging_steps": 5, "eval_steps": 60}
    compare = begun(tmp_path, recipe, "--jobs", "2")
    folders = [tmp_path / "runs" / name for name in ("hard-1", "KD-fkl-1")]
    deadline = time.monotonic() + 120
    while not (whole := [folder for folder in folders if (folder / "checkpoint-20" / "trainer_state.json").exists()]):
        assert time.monotonic() < deadline and compare.is_alive()
        time.sleep(0.05)
    children = psutil.Process(compare.pid).children()
    compare.kill()  # with no chance to tell anybody
    compare.join()
    for child in children:  # one run is continued from its checkpoint, the other one is waited for
        if f"--output_dir={whole[0]}" in child.cmdline():
            child.kill()
    assert main(["compare", str(tmp_path / "recipe.yaml"), "--jobs", "2"]) == 0
    assert "continued from" in (whole[0] / "log.txt").read_text()
    for folder in folders:
        state = json.loads((folder / "trainer_state.json").read_text())
        assert state["global_step"] == 120
        steps = [entry["step"] for entry in state["log_history"] if "loss" in entry]
        assert steps == list(range(5, 121, 5))


@pytest.mark.programs
def test_ranks_stop_after_the_same_step_and_the_same_command_continues(
    tmp_path: Path, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe |= {
        "runs": {"KD": {}},
        "losses": ["fkl"],
        "seeds": [1],
        "launch": "torchrun --standalone --nproc-per-node 2",
    }
    recipe["common"] |= {"use_cpu": True, "max_steps": 150, "logging_steps": 1, "save_strategy": "no"}
    compare, folder = begun(tmp_path, recipe), tmp_path / "runs" / "KD-fkl-1"
    deadline = time.monotonic() + 120
    while not last_step(folder / "log.txt").endswith("/150"):
        assert time.monotonic() < deadline and compare.is_alive()
        time.sleep(0.05)
    os.kill(compare.pid, signal.SIGINT)
    compare.join(120)
    assert compare.exitcode == 130
    assert "The same command continues" in (tmp_path / "said.txt").read_text()
    [checkpoint] = folder.glob("checkpoint-*")
    log = (folder / "log.txt").read_text()
    stopped_at = int(checkpoint.name.removeprefix("checkpoint-"))
    assert stopped_at < 150
    assert f"stopped after step {stopped_at}. This continues, on 2 ranks as before" in log

    monkeypatch.chdir(tmp_path)
    assert main(["compare", str(tmp_path / "recipe.yaml")]) == 0
    state = json.loads((folder / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == list(range(1, 151))
    assert json.loads((folder / "run.json").read_text())["world_size"] == 2
    assert "continued from" in (folder / "log.txt").read_text()

    del recipe["launch"]
    assert main(["compare", str(written(tmp_path, recipe))]) == 2
    assert "KD-fkl-1 holds another run: the number of ranks was 2, is 1" in capsys.readouterr().err

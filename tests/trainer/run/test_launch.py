"""`trainer fit` on two ranks, as torchrun and accelerate start it: the student of one rank, written once."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from logitcache import LogitCache
from tests.helpers.kernels import DEVICE
from tests.helpers.processes import on_two_ranks, run_command
from tests.helpers.two_ranks_sharded_fit import fit_sharded
from trainer.cli import main
from trainer.run.output_folder import folder_held

TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--num_processes", "2")
TRAINER = str(Path(sys.executable).with_name("trainer"))
# Of 23 rows one rank reads 12, the other 11: a step takes all, and the second rank's last batch is the smaller.
WHOLE = ("--per_device_train_batch_size", "23")
SPLIT = ("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "3")
pytestmark = pytest.mark.programs


def settings(cache: LogitCache, heldout: LogitCache, student: str, out: Path, device: str = "cpu") -> list[str]:
    given = {"cache": cache.path, "eval_cache": heldout.path, "student": student, "output_dir": str(out)}
    given |= {"optim": "sgd", "num_train_epochs": "2", "learning_rate": "5e-2", "eval_strategy": "epoch"}
    return [
        *(["--use_cpu"] if device == "cpu" else []),
        "--disable_tqdm",
        "true",
        *(part for name, value in given.items() for part in (f"--{name}", value)),
    ]


@pytest.fixture(scope="module")
def alone(
    cache: LogitCache, heldout: LogitCache, student_folder: str, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What one rank makes of the student."""
    out = tmp_path_factory.mktemp("alone")
    assert main(["fit", *settings(cache, heldout, student_folder, out), *WHOLE]) == 0
    return out


@pytest.mark.parametrize(
    "command",
    [
        # torchrun starts `-m trainer` in test_recipe.
        pytest.param((*TORCHRUN, "--no-python", TRAINER, "fit"), marks=pytest.mark.matrix),
        (*ACCELERATE, "--no_python", TRAINER, "fit"),
        ("--fsdp",),
        (*TORCHRUN, "-m", "trainer", "fit", "--deepspeed", '{"stage": 2}'),
        (*TORCHRUN, "-m", "trainer", "fit", "--deepspeed", '{"stage": 3}'),
    ],
    ids=["torchrun", "accelerate", "FSDP2", "ZeRO-2", "ZeRO-3"],
)
def test_two_ranks_make_the_student_of_one(
    command: tuple[str, ...],
    alone: Path,
    cache: LogitCache,
    heldout: LogitCache,
    student_folder: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "--deepspeed" in command:
        pytest.importorskip("deepspeed")
        command = (*command[:-1], str(zero_settings(tmp_path, **json.loads(command[-1]))))
    if TRAINER in command:
        (tmp_path / "trainer.py").write_text("raise SystemExit('a file of that name in the working folder ran')")
    out = tmp_path / "together"
    given = [*command, *settings(cache, heldout, student_folder, out), *SPLIT]
    if "--fsdp" in command:
        printed = on_two_ranks(fit_sharded, given)[0]
    else:
        done = subprocess.run(
            [sys.executable, "-m", *given],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        )
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
        printed = done.stdout
    assert printed.count("2 steps done") == 1
    assert (out / "checkpoint-2" / "pytorch_model_fsdp.bin").exists() == ("--fsdp" in command)
    assert {"run.json", "eval.json", "trainer_state.json", "tokenizer.json"} <= {path.name for path in out.iterdir()}
    assert relative_difference(weights(out), weights(alone), weights(Path(student_folder))) < 1e-5
    metrics, expected = (json.loads((folder / "eval.json").read_text())["metrics"] for folder in (out, alone))
    for name in ("ce", "fkl", "rkl", "positions"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-5), name
    parameters = [json.loads((folder / "run.json").read_text())["student"]["num_parameters"] for folder in (out, alone)]
    assert parameters[0] == parameters[1]

    assert (
        main(["fit", *settings(cache, heldout, student_folder, out), *SPLIT, "--resume_from_checkpoint", "true"]) == 2
    )
    assert "the number of ranks was 2, is 1" in capsys.readouterr().err


@pytest.mark.gpu
def test_one_sharded_device_makes_the_student_of_a_cpu(
    alone: Path, cache: LogitCache, heldout: LogitCache, student_folder: str, tmp_path: Path
) -> None:
    fit = ("trainer", "fit") if DEVICE == "cuda" else ("tests.helpers.two_ranks_sharded_fit",)
    given = [*TORCHRUN[:-1], "1", "-m", *fit, "--fsdp", *settings(cache, heldout, student_folder, tmp_path, DEVICE)]
    done = subprocess.run([sys.executable, "-m", *given, *WHOLE], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    assert (tmp_path / "checkpoint-2" / "pytorch_model_fsdp.bin").exists()
    assert relative_difference(weights(tmp_path), weights(alone), weights(Path(student_folder))) < 1e-4


@pytest.mark.skipif(torch.cuda.is_available(), reason="ranks find their GPUs")
def test_ranks_that_would_each_train_alone_are_refused(tmp_path: Path) -> None:
    """As where there is no GPU: transformers then takes every process for the only one."""
    done = run_command("trainer", "fit", "--output_dir", str(tmp_path), env=os.environ | {"WORLD_SIZE": "2"})
    assert done.returncode == 2
    assert "2 processes were started, and each would train by itself" in done.stderr


def zero_settings(folder: Path, stage: int) -> Path:
    """The JSON of a ZeRO stage, with what transformers fills in."""
    automatic = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    stage_settings = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}
    path = folder / "zero.json"
    path.write_text(
        json.dumps(
            {"zero_optimization": stage_settings, "zero_allow_untested_optimizer": True}
            | dict.fromkeys(automatic, "auto")
        )
    )
    return path


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def relative_difference(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], start: dict[str, torch.Tensor]
) -> float:
    """Of the ways that two students have gone from where both began."""

    def distance(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
        assert left.keys() == right.keys()
        return math.sqrt(sum(float((left[name] - right[name]).double().square().sum()) for name in left))

    return distance(found, expected) / distance(expected, start)


def fit(arguments: list[str]) -> None:
    sys.exit(main(["fit", *arguments]))


def test_every_rank_is_refused_where_another_command_holds_the_folder(
    cache: LogitCache, heldout: LogitCache, student_folder: str, tmp_path: Path
) -> None:
    with folder_held(tmp_path, "--output_dir"):
        said = on_two_ranks(fit, settings(cache, heldout, student_folder, tmp_path), status=2)[1]
    told = [line for line in said.splitlines() if line.startswith("trainer: error: ")]
    assert told == [f"trainer: error: --output_dir {tmp_path}: another command is writing there"] * 2
    assert "trainer/cli.py" not in said  # of a traceback

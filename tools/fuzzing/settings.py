"""YAML of `trainer compare` and `trainer fit --config`, and the files that a run leaves, read by compare and by resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from damage import damaged_bytes, damaged_json, damaged_tree
from trial import FIT, Command, Trial

SNIPPETS = [
    "a: &a [1, 1]\nb: &b [*a, *a]\n",
    "loss: !!timestamp 2001-01-01\n",
    "loss: !!python/object/apply:os.system [x]\n",
    "save_steps: 1e400\n",
    "seed: 0x10\n",
    "? [a, b]\n: c\n",
    "<<: {loss: fkl}\n",
    "loss: !!binary x\n",
    "seed: .nan\n",
    "loss: fkl\nloss: rkl\n",
    "--- x\n--- y\n",
    "accelerator_config: x\n",
    "deepspeed: x.json\n",
    "fsdp: full_shard\n",
    "lr_scheduler_kwargs: {a: 1}\n",
    "loss_args: {beta: x}\n",
    "packing: true\npacked_length: 1\n",
    "cache: [a:0.5, b:x]\n",
    "optim: x\n",
    "logging_strategy: no\n",
    "temperature_schedule: [1@0, 2@0.5]\n",
    "student: ''\n",
    "\t- x\n",
    "a: " + "[" * 3000 + "\n",
]
SETTINGS: dict[str, Any] = {
    "loss": "fkl",
    "kd_weight": 0.5,
    "temperature": 1,
    "max_steps": 2,
    "use_cpu": True,
    "seed": 1,
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 2,
    "lr_scheduler_kwargs": {},
    "loss_schedule": ["fkl@0", "rkl@0.5"],
    "eval_strategy": "no",
    "report_to": "none",
    "lora_r": 2,
}
RECORDS = ("run.json", "eval.json", "trainer_state.json")


def recipes(trial: Trial) -> list[Command]:
    """Recipes, damaged; their runs are checked and not done."""
    common = {"student": str(trial.material / "student"), **_settings(trial, 2), "cache": str(trial.material / "cache")}
    recipe: dict[str, Any] = {
        "output_dir": str(trial.path()),
        "seeds": [1, 2],
        "common": common | {"eval_cache": str(trial.material / "exact"), "use_cpu": True, "max_steps": 2},
        "runs": {"hard": {"kd_weight": 0}, "KD": _settings(trial, 1)},
    }
    if trial.maybe(0.3):
        recipe["losses"] = ["fkl", "todi"]
    if trial.maybe(0.2):
        recipe["generate"] = {"data": [str(trial.material / "documents.jsonl")], "max_new_tokens": 2, "seeds": [1]}
    if trial.maybe(0.1):
        recipe["launch"] = trial.choose(
            ["torchrun --nproc-per-node 2", "python -m torch.distributed.run", "sh -c x", ""]
        )
    return [["trainer", "compare", _yaml(trial, recipe), *["--overwrite"] * trial.maybe(0.1)]]


def configs(trial: Trial) -> list[Command]:
    """Settings of a run, damaged; checked and not trained."""
    settings = _settings(trial, 4) | {
        "student": str(trial.material / "student"),
        "cache": str(trial.material / "cache"),
    }
    return [["trainer", "fit", "--config", _yaml(trial, settings), "--output_dir", str(trial.path())]]


def runs(trial: Trial) -> list[Command]:
    """What a run left, damaged, beside a good run; or taken for a run of a recipe."""
    folder = trial.path() / "KD-1"
    trial.copy(trial.material / "run").rename(_made(folder))
    _damage_record(trial, folder)
    if trial.maybe(0.7):
        pair = [str(folder), str(trial.material / "run")]
        return [["trainer", "compare", *trial.random.sample(pair, 2), "--out", str(trial.path(".png"))]]
    recipe = {
        "output_dir": str(folder.parent),
        "seeds": [1],
        "common": {"student": str(trial.material / "student"), "cache": str(trial.material / "cache"), "use_cpu": True}
        | {"eval_cache": str(trial.material / "exact")},
        "runs": {"KD": {"max_steps": 2}},
    }
    return [["trainer", "compare", trial.write(yaml.safe_dump(recipe), ".yaml"), *["--overwrite"] * trial.maybe(0.3)]]


def checkpoints(trial: Trial) -> list[Command]:
    """A checkpoint of which a file is damaged, continued from."""
    trial.trains = True
    run = trial.copy(trial.material / "run")
    checkpoint = run / "checkpoint-1"
    if trial.maybe(0.3):
        _damage_record(trial, run)
    else:
        file = trial.choose(sorted(path for path in checkpoint.iterdir() if path.is_file()))
        content = file.read_bytes()
        damaged = (damaged_json if file.suffix == ".json" and trial.maybe(0.8) else damaged_bytes)(
            trial.random, content
        )
        file.write_bytes(trial.choose([damaged, damaged, damaged, damaged, b"", b"x"]))
    caches = ["--cache", str(trial.material / "cache"), "--eval_cache", str(trial.material / "exact")]
    options = ["--student", str(trial.material / "student"), *FIT, "--output_dir", str(run)]
    return [["trainer", "fit", *caches, *options, "--resume_from_checkpoint", trial.choose(["true", str(checkpoint)])]]


def _settings(trial: Trial, count: int) -> dict[str, Any]:
    return {name: SETTINGS[name] for name in trial.random.sample(sorted(SETTINGS), count)}


def _yaml(trial: Trial, content: Any) -> str:
    if trial.maybe(0.8):
        content = damaged_tree(trial.random, content)
    text = yaml.safe_dump(content, allow_unicode=trial.maybe(0.5), default_flow_style=trial.maybe(0.3), width=10**6)
    if trial.maybe(0.25):
        lines = text.splitlines(keepends=True)
        lines.insert(trial.random.randrange(len(lines) + 1), trial.choose(SNIPPETS))
        text = "".join(lines)
    data = text.encode(errors="surrogatepass")
    return trial.write(damaged_bytes(trial.random, data) if trial.maybe(0.15) else data, ".yaml")


def _made(folder: Path) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    return folder


def _damage_record(trial: Trial, folder: Path) -> None:
    file = folder / trial.choose(RECORDS)
    file.write_bytes(damaged_json(trial.random, file.read_bytes()))

"""`trainer fit` from its command line: a run from cache to student, and everything that it refuses."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, T5Config

from logitcache import LogitCache, UserError
from logitcache.format.sequences import TokenSequence
from tests.helpers.cachemaking import VOCAB, llama, random_sequences, tokenizer, write_cache
from trainer.cli import main
from trainer.commands.fit import _begun_anew
from trainer.config.arguments import parse
from trainer.config.config import DistillConfig
from trainer.evaluation.evaluate import evaluate
from trainer.losses import registry
from trainer.losses.coarse import Coarse
from trainer.losses.registry import register_divergence
from trainer.run.callbacks import GracefulStop
from trainer.run.prepare import prepare
from trainer.run.ranks import RANKS_VARIABLE

STEPS = ["--use_cpu", "--max_steps", "6", "--learning_rate", "5e-3", "--disable_tqdm", "true"]


@pytest.mark.slow
def test_a_run_leaves_a_better_student_its_settings_and_its_evaluation(
    tmp_path: Path, cache: LogitCache, heldout: LogitCache, student_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    arguments = ["--cache", cache.path, "--eval_cache", heldout.path, "--student", student_folder, "--kd-weight", "1"]
    before = evaluate(AutoModelForCausalLM.from_pretrained(student_folder), heldout)
    assert main(["fit", *arguments, "--output_dir", str(out), *STEPS]) == 0

    after = json.loads((out / "eval.json").read_text())["metrics"]
    assert after["fkl"] < 0.98 * before["fkl"]
    saved = evaluate(AutoModelForCausalLM.from_pretrained(out), heldout)
    assert saved["fkl"] == pytest.approx(after["fkl"], rel=1e-5)
    assert AutoTokenizer.from_pretrained(out).get_vocab() == tokenizer().get_vocab()
    run = json.loads((out / "run.json").read_text())
    assert run["settings"]["loss"] == "todi"
    assert run["settings"]["kd_weight"] == 1.0
    assert run["tail"] == "groups"
    assert run["cache"]["caches"][0]["fingerprint"]["teacher"] == {"name": "random"}
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert sum("eval_fkl" in entry for entry in history) >= 6

    printed = capsys.readouterr().out
    assert "the cache's (the student has none)" in printed
    assert "groups (chosen: the cache holds groups)" in printed
    assert "6 of 8 sequences" in printed


def test_from_scratch_draws_other_weights_for_another_seed(
    tmp_path: Path, cache: LogitCache, student_folder: str
) -> None:
    def weights(seed: str, name: str) -> Any:
        common = ["--cache", cache.path, "--student", student_folder, "--from_scratch", "--learning_rate", "0"]
        options = ["--seed", seed, "--output_dir", str(tmp_path / name), "--use_cpu", "--max_steps", "1"]
        assert main(["fit", *common, *options]) == 0
        return AutoModelForCausalLM.from_pretrained(tmp_path / name).lm_head.weight

    first = weights("1", "a")
    assert first.equal(weights("1", "b"))
    assert not first.equal(weights("2", "c"))
    assert not first.equal(AutoModelForCausalLM.from_pretrained(student_folder).lm_head.weight)


def test_it_is_said_and_kept_how_the_loss_is_computed(
    cache: LogitCache, student_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--cache", cache.path, "--student", student_folder, "--output_dir", str(tmp_path / "run")]
    assert main(["fit", *options, "--use_cpu", "--max_steps", "1"]) == 0
    assert "computed        fused with the output projection" in capsys.readouterr().out
    assert "fused" in json.loads((tmp_path / "run" / "run.json").read_text())["choices"]["computed"]


def test_settings_come_from_yaml_and_the_command_line_wins(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "loss: rkl\nkd-weight: 0.25\nlearning_rate: 1e-4\nt_squared: false\nuse_cpu: true\ntf32: null\n"
        "lr_scheduler_kwargs: {num_cycles: 2}\nreport_to: [none]\nlabel_names: [a, b]\nfsdp: true\n"
    )
    config = parse(["--config", str(path), "--loss", "akl", "--output_dir", str(tmp_path)])
    assert config.loss == "akl"
    assert config.kd_weight == 0.25
    assert config.learning_rate == 1e-4
    assert config.t_squared is False
    fsdp: Any = config.fsdp
    assert fsdp is True
    assert config.lr_scheduler_kwargs == {"num_cycles": 2}
    assert config.label_names == ["a", "b"]


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ("beta=0.5", {"beta": 0.5}),
        ('{"beta": 2}', {"beta": 2.0}),
        ({"beta": "0.5"}, {"beta": 0.5}),
        ("beta=1", {}),  # the default, so the same run as without
        (None, {}),
    ],
)
def test_options_of_the_divergence_come_as_text_or_mapping(given: Any, stored: Any, tmp_path: Path) -> None:
    assert DistillConfig(output_dir=str(tmp_path), use_cpu=True, loss="todi", loss_args=given).loss_args == stored
    if isinstance(given, str):
        assert parse(["--output_dir", str(tmp_path), "--use_cpu", "--loss_args", given]).loss_args == stored
    if given is not None:
        path = tmp_path / "run.yaml"
        path.write_text(f"use_cpu: true\noutput_dir: out\nloss_args: {given}\n")
        assert parse(["--config", str(path)]).loss_args == stored


def test_options_have_the_type_of_their_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})

    @register_divergence("own")
    def own(coarse: Coarse, *, power: int = 1, mirrored: bool = False, name: str = "") -> Tensor:
        return (coarse.q * coarse.log_ratio).sum(1)

    def stored(text: str) -> Any:
        return DistillConfig(output_dir=str(tmp_path), use_cpu=True, loss="own", loss_args=text).loss_args

    assert stored("power=3,mirrored=true,name=a b") == {"power": 3, "mirrored": True, "name": "a b"}
    with pytest.raises(UserError, match=r"power=0\.5: a whole number"):
        stored("power=0.5")
    with pytest.raises(UserError, match="mirrored=maybe: true or false"):
        stored("mirrored=maybe")


def test_what_is_chosen_is_printed(rich_cache: LogitCache, student_folder: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "cache": rich_cache.path,
        "student": student_folder,
        "output_dir": str(tmp_path),
        "use_cpu": True,
    }
    options: dict[str, Any] = {"loss": "jsd", "loss_args": "beta=0.3", "temperature": 3.0}
    run = prepare(DistillConfig(**settings, **options, approximate_temperature=True))
    assert run.choices["loss"] == "0.5·CE + 0.5·T²·jsd(beta=0.3) at T = 3"
    assert "at T = 3 estimated" in run.choices["tail"]
    assert "estimated" not in prepare(DistillConfig(**settings)).choices["tail"]


def test_evaluations_are_spread_over_the_run_where_a_heldout_cache_is_named(tmp_path: Path) -> None:
    common = ["--output_dir", str(tmp_path), "--use_cpu"]
    assert parse([*common]).eval_strategy == "no"
    assert parse([*common, "--eval_cache", "x"]).eval_strategy == "steps"
    assert parse([*common, "--eval_cache", "x"]).eval_steps == 0.1
    assert parse([*common, "--eval_cache", "x", "--eval_strategy", "epoch"]).eval_strategy == "epoch"
    assert parse([*common, "--eval_cache", "x", "--eval_steps", "7"]).eval_steps == 7


@pytest.mark.slow
@pytest.mark.parametrize("save_strategy", ["steps", "no"])
def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_continue(
    save_strategy: str,
    tmp_path: Path,
    cache: LogitCache,
    student_folder: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def press(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    arguments = [
        "fit",
        "--cache",
        cache.path,
        "--student",
        student_folder,
        "--output_dir",
        str(tmp_path / "a b"),
        *STEPS,
        "--save_strategy",
        save_strategy,
    ]
    with monkeypatch.context() as patch:
        patch.setattr(GracefulStop, "on_step_begin", press)
        assert main(arguments) == 130
    last = capsys.readouterr().out.splitlines()[-2:]
    assert "stopped after step 3" in last[0]
    again = shlex.split(last[1])
    assert again == ["trainer", *arguments, "--resume_from_checkpoint", str(tmp_path / "a b" / "checkpoint-3")]
    assert not (tmp_path / "a b" / "model.safetensors").exists()

    assert main(again[1:]) == 0
    assert main(["fit", *arguments[1:], "--output_dir", str(tmp_path / "through")]) == 0
    through, resumed = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("through", "a b"))
    assert resumed.lm_head.weight.allclose(through.lm_head.weight, rtol=0, atol=1e-6)


def test_ctrl_c_in_the_last_evaluation_does_not_lose_the_finished_run(
    tmp_path: Path, cache: LogitCache, heldout: LogitCache, student_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def press_once(self: GracefulStop, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == state.max_steps and not self.requested:
            os.kill(os.getpid(), signal.SIGINT)

    out = tmp_path / "run"
    arguments = ["fit", "--cache", cache.path, "--eval_cache", heldout.path, "--student", student_folder, *STEPS]
    monkeypatch.setattr(GracefulStop, "on_prediction_step", press_once)
    assert main([*arguments, "--output_dir", str(out), "--save_strategy", "no"]) == 0
    metrics = json.loads((out / "eval.json").read_text())["metrics"]
    saved = evaluate(AutoModelForCausalLM.from_pretrained(out), heldout)
    assert saved["fkl"] == pytest.approx(metrics["fkl"], rel=1e-5)


@pytest.mark.slow
def test_a_new_run_in_a_used_folder_leaves_nothing_of_the_former_evaluation(
    tmp_path: Path, cache: LogitCache, heldout: LogitCache, student_folder: str
) -> None:
    class Stop(Exception):
        pass

    def stop(*args: Any, **kwargs: Any) -> None:
        raise Stop

    common = ["fit", "--cache", cache.path, "--student", student_folder, "--output_dir", str(tmp_path), *STEPS]
    assert main([*common, "--eval_cache", heldout.path]) == 0
    assert (tmp_path / "eval.json").exists()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(GracefulStop, "on_train_begin", stop)
        main([*common, "--eval_cache", heldout.path, "--resume_from_checkpoint", "true"])
    assert (tmp_path / "eval.json").exists()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(GracefulStop, "on_train_begin", stop)
        main([*common, "--loss", "fkl"])
    assert json.loads((tmp_path / "run.json").read_text())["settings"]["loss"] == "fkl"
    assert not (tmp_path / "eval.json").exists()
    assert not (tmp_path / "trainer_state.json").exists()


@pytest.mark.slow
def test_a_checkpoint_of_another_run_is_not_continued(
    tmp_path: Path, cache: LogitCache, heldout: LogitCache, student_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run, checkpoint = tmp_path / "run", tmp_path / "run" / "checkpoint-6"
    common = ["fit", "--student", student_folder, "--output_dir", str(run), *STEPS]
    assert main([*common, "--cache", cache.path]) == 0
    resume = [*common, "--resume_from_checkpoint", str(checkpoint)]
    refused([*resume, "--cache", heldout.path], ["the cache was", cache.path, heldout.path, "--tail was"], capsys)
    for name, value in (
        ("loss", "fkl"),
        ("kd_weight", "0.25"),
        ("temperature", "2.0"),
        ("t_squared", "False"),
        ("loss_args", "beta=2.0"),
        ("per_device_train_batch_size", "2"),
        ("gradient_accumulation_steps", "2"),
        ("seed", "1"),
        ("tail", "bucket"),
    ):
        now = "{'beta': 2.0}" if name == "loss_args" else value
        refused([*resume, "--cache", cache.path, f"--{name}", value], [f"--{name} was", f"is {now}"], capsys)
    assert main([*resume, "--cache", cache.path]) == 0
    capsys.readouterr()
    (run / "run.json").unlink()
    assert main([*resume, "--cache", cache.path]) == 0
    assert "has no run.json" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--per_device_train_batch_size", "0"], ["--per_device_train_batch_size 0", "at least 1"]),
        (["--loss", "hinge"], ["--loss", "hinge", "fkl", "todi"]),
        (["--loss", "jsd", "--loss_args", "beta=1"], ["--loss jsd --loss_args", "beta is 1.0", "between 0 and 1"]),
        (["--loss_args", "skew=0.1"], ["--loss todi --loss_args", "takes beta", "skew"]),
        (["--loss_args", "beta=steep"], ["--loss_args beta=steep", "a number"]),
        (["--loss_args", "beta"], ["--loss_args beta", "key=value"]),
        (["--loss_args", '{"beta": '], ["--loss_args", "not JSON"]),
        (["--loss", "akl", "--loss_args", "akl_split=mine"], ["--loss akl --loss_args", "mine", "official, todi"]),
        (["--kd_weight", "1.5"], ["--kd_weight 1.5", "between 0", "and 1"]),
        (["--kd_weight", "half"], ["--kd_weight", "half"]),
        (["--temperature", "0"], ["--temperature 0", "positive"]),
        (
            ["--temperature", "4"],
            ["--temperature 4", "T = 1, 2 only", "--temperatures 4", "--tail-entropy", "--approximate_temperature"],
        ),
        (["--loss", "rkl", "--tail", "ignore"], ["--loss rkl --tail ignore", "--ablation"]),
        (["--tail", "renormalise"], ["--tail renormalise", "--ablation"]),
        (["--tail", "uniform"], ["--tail uniform", "--ablation"]),
        (["--tail", "samples"], ["--tail samples", "holds no tail samples", "logitcache build --tail-samples"]),
        (["--tail", "groups", "--temperature", "2"], ["--tail groups --temperature 2", "bucket"]),
        (["--label_smoothing_factor", "0.1"], ["--label_smoothing_factor 0.1"]),
        (["--train_sampling_strategy", "batch_rebalance"], ["batch_rebalance", "random, sequential, group_by_length"]),
        (["--eval_strategy", "steps", "--eval_steps", "1"], ["--eval_strategy steps", "--eval_cache"]),
        (["--cache", "nowhere"], ["nowhere", "does not exist"]),
        (["--student", "nowhere"], ["nowhere", "no such folder"]),
        (["--resume_from_checkpoint", "nowhere"], ["--resume_from_checkpoint nowhere"]),
        (["--resume_from_checkpoint", "true"], ["holds no checkpoint"]),
        (["--los", "fkl"], ["unknown option --los", "is loss meant?"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
        (["--load_best_model_at_end"], ["--load_best_model_at_end"]),
        (["--fsdp"], ["--fsdp shards a model over ranks", "torchrun"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else "",
)
def test_what_cannot_be_meant_ends_in_one_line_and_status_2(
    options: list[str],
    said: list[str],
    tmp_path: Path,
    cache: LogitCache,
    student_folder: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    common = ["--cache", cache.path, "--student", student_folder, "--output_dir", str(tmp_path / "out"), "--use_cpu"]
    refused(["fit", *common, *options], said, capsys)
    assert not (tmp_path / "out").exists()


def test_fewer_ranks_than_asked_for_are_refused(
    tmp_path: Path,
    cache: LogitCache,
    student_folder: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(RANKS_VARIABLE, "2")
    common = ["--cache", cache.path, "--student", student_folder, "--output_dir", str(tmp_path / "out"), "--use_cpu"]
    refused(["fit", *common], ["2 ranks were asked for and the launcher started 1"], capsys)
    assert not (tmp_path / "out").exists()


def test_the_checkpoint_to_continue_from_is_named_once() -> None:
    given = ["--loss", "fkl", "--resume_from_checkpoint", "a", "--resume-from-checkpoint=b", "--seed", "1"]
    assert _begun_anew(given) == ["--loss", "fkl", "--seed", "1"]


def refused(arguments: list[str], said: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("trainer: error: ")
    for words in said:
        assert words in lines[0]


def test_groups_that_the_cache_does_not_hold_are_refused(
    heldout: LogitCache, student_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["fit", "--cache", heldout.path, "--student", student_folder, "--use_cpu", "--tail", "groups"]
    refused(arguments, ["holds no tail groups", "--tail bucket"], capsys)


def test_a_student_with_another_tokenizer_is_refused_before_its_weights_load(
    tmp_path: Path, cache: LogitCache, capsys: pytest.CaptureFixture[str]
) -> None:
    llama().config.save_pretrained(tmp_path)
    tokenizer(["<eos>", *(f"other{i}" for i in range(1, VOCAB))]).save_pretrained(tmp_path)
    arguments = ["fit", "--cache", cache.path, "--student", str(tmp_path), "--use_cpu"]
    refused(arguments, ["63 ids differ", "'word1'", "'other1'"], capsys)


def test_a_student_with_fewer_columns_than_the_teacher_has_tokens_is_refused(
    tmp_path: Path, cache: LogitCache, capsys: pytest.CaptureFixture[str]
) -> None:
    llama(vocab_size=VOCAB - 1).save_pretrained(tmp_path)
    refused(
        ["fit", "--cache", cache.path, "--student", str(tmp_path), "--use_cpu"], ["63 columns", "64 tokens"], capsys
    )


@pytest.mark.parametrize("option", ["--cache", "--eval_cache"])
def test_a_student_that_takes_shorter_sequences_is_refused_before_its_weights_load(
    option: str, tmp_path: Path, cache: LogitCache, capsys: pytest.CaptureFixture[str]
) -> None:
    llama(max_length=12).config.save_pretrained(tmp_path / "student")
    short = write_cache(tmp_path / "short", random_sequences(3, seed=0, longest=12))
    caches = {"--cache": short.path, "--eval_cache": short.path} | {option: cache.path}
    arguments = ["fit", "--student", str(tmp_path / "student"), "--use_cpu", *(w for c in caches.items() for w in c)]
    refused(arguments, [f"{cache.path} has {cache.manifest.longest} tokens", "--max-length 12"], capsys)


def test_a_student_that_is_no_causal_language_model_is_refused(
    tmp_path: Path, cache: LogitCache, capsys: pytest.CaptureFixture[str]
) -> None:
    T5Config().save_pretrained(tmp_path)
    refused(["fit", "--cache", cache.path, "--student", str(tmp_path), "--use_cpu"], ["t5", "causal"], capsys)


def test_a_student_without_weights_is_told_of_from_scratch(
    tmp_path: Path, cache: LogitCache, capsys: pytest.CaptureFixture[str]
) -> None:
    llama().config.save_pretrained(tmp_path)
    refused(["fit", "--cache", cache.path, "--student", str(tmp_path), "--use_cpu"], ["--from_scratch"], capsys)


def test_missing_settings_unknown_commands_and_bad_yaml_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(["fit", "--use_cpu"], ["--cache is missing"], capsys)
    refused(["fit", "--cache", "x", "--use_cpu"], ["--student is missing"], capsys)
    refused(["train"], ["unknown command train", "fit, eval, compare"], capsys)
    refused(["eval", "model"], ["--cache"], capsys)
    path = tmp_path / "run.yaml"
    path.write_text("loss: fkl\nkd_wieght: 1\n")
    refused(["fit", "--config", str(path)], [str(path), "kd_wieght", "is kd_weight meant?"], capsys)
    path.write_text("loss: [fkl\nkd_weight: 1\n")
    refused(["fit", "--config", str(path)], [str(path), "line 2", "not YAML"], capsys)
    path.write_bytes(b"loss: f\xffkl\n")
    refused(["fit", "--config", str(path)], [str(path), "UTF-8"], capsys)
    path.write_bytes(b"loss: f\x07kl\n")
    refused(["fit", "--config", str(path)], [str(path), "not YAML"], capsys)
    path.write_text("just words\n")
    refused(["fit", "--config", str(path)], [str(path), "mapping"], capsys)


def test_a_heldout_cache_of_another_teacher_is_refused(
    tmp_path: Path, cache: LogitCache, student_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["<eos>", *(f"other{i}" for i in range(1, VOCAB))]
    other = write_cache(tmp_path, random_sequences(2, seed=0), teacher_tokenizer=tokenizer(words))
    arguments = ["--cache", cache.path, "--student", student_folder, "--eval_cache", other.path, "--use_cpu"]
    refused(["fit", *arguments], [other.path, "63 ids differ"], capsys)


def test_an_empty_cache_is_refused(tmp_path: Path, student_folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    empty = write_cache(tmp_path, [])
    refused(["fit", "--cache", empty.path, "--student", student_folder, "--use_cpu"], ["is an empty cache"], capsys)


@pytest.mark.parametrize("command", [[], ["--help"]])
def test_help_names_the_commands(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("trainer fit", "trainer eval", "trainer compare"))


def test_help_of_fit_lists_distillation_and_training_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["fit", "--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("--kd_weight", "--kd-weight", "--gradient_accumulation_steps", "--config"))
    assert "alpha=0.2" in out, "the options of the divergences are listed"


def test_several_caches_are_mixed(
    tmp_path: Path, cache: LogitCache, heldout: LogitCache, student_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--cache", f"{cache.path}:0.7", "--student", student_folder, "--cache", f"{heldout.path}:0.3"]
    assert main(["fit", *arguments, "--output_dir", str(tmp_path / "run"), *STEPS]) == 0
    printed = capsys.readouterr().out
    assert f"{cache.path}:0.7 + {heldout.path}:0.3, 39 sequences" in printed
    assert "bucket (chosen: " in printed, "only one of them holds groups"
    record = json.loads((tmp_path / "run" / "run.json").read_text())["cache"]
    assert [entry["identity"] for entry in record["caches"]] == [cache.identity, heldout.identity]


def test_rows_that_are_trained_on_and_held_out_are_counted(
    tmp_path: Path, cache: LogitCache, student_folder: str
) -> None:
    overlapping = write_cache(tmp_path / "heldout", [*random_sequences(5, seed=1), *random_sequences(4, seed=9)])
    settings: dict[str, Any] = {"student": student_folder, "output_dir": str(tmp_path), "use_cpu": True}
    run = prepare(DistillConfig(cache=[cache.path], eval_cache=overlapping.path, **settings))
    assert len(run.warnings) == 1
    assert f"--eval_cache {overlapping.path}: 5 of its 9 rows are trained on too" in run.warnings[0]


def test_a_cache_of_less_than_a_batch_is_refused(tmp_path: Path, cache: LogitCache, student_folder: str) -> None:
    settings: dict[str, Any] = {"cache": [cache.path], "student": student_folder, "output_dir": str(tmp_path)}
    with pytest.raises(UserError, match=r"holds 23 sequences, fewer than one batch of 24: lower --per_device_train_ba"):
        prepare(DistillConfig(**settings, use_cpu=True, per_device_train_batch_size=24))


def test_a_line_of_progress_tells_the_rate_and_the_wait_for_data(
    tmp_path: Path, cache: LogitCache, student_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--cache", cache.path, "--student", student_folder, "--logging_steps", "2"]
    assert main(["fit", *arguments, "--output_dir", str(tmp_path), *STEPS]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(lines) == 3
    assert all(re.search(r"  [\d,]+ tokens/s  padding \d+\.\d%  waiting for data \d+\.\d%  ", line) for line in lines)
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    logged = [entry for entry in history if "data_wait" in entry]
    tokens = sum(len(sequence.input_ids) for sequence in cache)
    assert len(logged) == 3
    assert all(0 <= entry["data_wait"] < 1 and 0 < entry["padding"] < 1 for entry in logged)
    assert all(0 < entry["tokens_per_second"] < tokens * 1000 for entry in logged)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--attn_implementation flash_attention_2", "--attn_implementation flash_attention_2: "),
        ("--attn_implementation foo --from_scratch true", "--attn_implementation foo: "),
        ("--num_train_epochs nan", "--num_train_epochs nan: it must be a positive number"),
        ("--eval_steps 0 --eval_cache x", "--eval_steps 0: steps, or a share of the run"),
        ("--packing --dataloader_drop_last true", "--dataloader_drop_last: "),
    ],
)
def test_settings_of_training_that_cannot_work_end_in_one_line(
    options: str, said: str, cache: LogitCache, student_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--cache", cache.path, "--student", student_folder, "--output_dir", str(tmp_path / "run"), "--use_cpu"]
    assert main(["fit", *arguments, *options.split()]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"trainer: error: {said}" in error


def test_what_a_yaml_list_means_depends_on_the_setting(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "use_cpu: true\noutput_dir: out\ncache: [a:0.7, b:0.3]\nloss_schedule: [fkl@0, rkl@0.5]\nsave_strategy: no\n"
    )
    config = parse(["--config", str(path)])
    assert config.cache == ["a:0.7", "b:0.3"]
    assert config.losses == ("fkl", "rkl")
    assert config.save_strategy == "no"
    path.write_text("cache: [{a: 0.7}]\n")
    with pytest.raises(
        UserError, match=r"run\.yaml, line 1: cache: a list of plain values .* PATH:WEIGHT is written without"
    ):
        parse(["--config", str(path)])


def test_a_batch_without_trained_tokens_costs_no_run(tmp_path: Path, student_folder: str) -> None:
    untrained = TokenSequence(np.arange(1, 9, dtype=np.int32), np.zeros(8, dtype=bool))
    holey = write_cache(tmp_path / "holey", [*random_sequences(3, seed=5), untrained])
    options = ["--per_device_train_batch_size", "1", "--logging_steps", "1", "--num_train_epochs", "1", "--use_cpu"]
    arguments = ["--cache", holey.path, "--student", student_folder, "--output_dir", str(tmp_path / "run")]
    assert main(["fit", *arguments, *options]) == 0


def test_what_averaged_targets_do_not_hold_is_said(tmp_path: Path, cache: LogitCache, student_folder: str) -> None:
    other = write_cache(tmp_path / "other", random_sequences(23, seed=1), teacher=llama(seed=3), temperatures=(2.0,))
    settings: dict[str, Any] = {"cache": [cache.path], "average_with": [other.path], "student": student_folder}
    settings["use_cpu"] = True
    choices: tuple[dict[str, Any], ...] = {"temperature": 2.0}, {"tail": "groups"}
    for options in choices:
        with pytest.raises(UserError, match="the mean of several teachers is known by its entries and the mass"):
            prepare(DistillConfig(output_dir=str(tmp_path), **settings, **options))
    run = prepare(DistillConfig(output_dir=str(tmp_path), **settings))
    assert f"averaged with {other.path}" in run.choices["cache"]

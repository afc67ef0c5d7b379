"""Generated answers: how they are drawn, what is written of them, and what is not made twice."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from logitcache import LogitCache, UserError
from logitcache.engines.vllm_process import OWNER_PID
from trainer.cli import main
from trainer.evaluation import protocol, vllm_generation
from trainer.evaluation.generation import Draws, TransformersGenerator, answer_of, end_ids, keeps_prompts_apart
from trainer.evaluation.generation_settings import GenerationSettings
from trainer.evaluation.identity import model_identity
from trainer.evaluation.prompts import Prompt, read_prompts
from trainer.evaluation.protocol import generate_scores, scores_are_current
from trainer.evaluation.rouge import rouge_l
from trainer.model.student import load_student, student_config
from trainer.model.tokenizers import student_tokenizer

QUICK = ["--max_new_tokens", "12", "--seeds", "1", "2"]
TEXTS = [
    "The quick",
    "A student reads them again",
    "Numbers such as 3.14159, 2.71828 and 42 appear",
    "tail",
    "a to the",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [{"prompt": text, "completion": ["to a cache", f"the {text} and the tail"]} for text in TEXTS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def prompts(data: str, teacher_tokenizer: Any) -> list[Prompt]:
    return read_prompts(data, teacher_tokenizer)


@pytest.fixture
def model(teacher: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(teacher)


@pytest.fixture
def student(teacher: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(teacher, tmp_path / "student"))


@pytest.fixture
def other_student(student: Path, tmp_path: Path) -> Path:
    """As `student`, with other weights."""
    return change_weights(Path(shutil.copytree(student, tmp_path / "other-student")))


def change_weights(folder: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.get_output_embeddings().weight.data.mul_(-1)
    model.save_pretrained(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_greedy_answers_are_those_that_transformers_gives_to_each_prompt_alone(
    model: PreTrainedModel, teacher: Path, prompts: list[Prompt], teacher_tokenizer: Any
) -> None:
    generator = TransformersGenerator(model, teacher_tokenizer, [0], temperature=0, max_new_tokens=20, batch_size=3)
    alone: Any = AutoModelForCausalLM.from_pretrained(teacher)
    for prompt, answer in zip(prompts, generator.answers(prompts, seed=1), strict=True):
        ids = torch.tensor([prompt.token_ids])
        whole = alone.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20)
        assert answer.text == teacher_tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.slow
def test_a_sampled_answer_depends_on_seed_and_row_and_not_on_its_batch(
    model: PreTrainedModel, prompts: list[Prompt], teacher_tokenizer: Any
) -> None:
    def answers(some: list[Prompt], seed: int, batch_size: int) -> list[str]:
        generator = TransformersGenerator(model, teacher_tokenizer, [0], max_new_tokens=16, batch_size=batch_size)
        return [answer.text for answer in generator.answers(some, seed)]

    together = answers(prompts, 10, 32)
    assert answers(prompts, 10, 1) == answers(prompts, 10, 2) == together
    assert answers(prompts[2:4], 10, 32) == together[2:4]
    assert all(a != b for a, b in zip(answers(prompts, 20, 32), together, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "apart", "settings"),
    [
        ("Llama", True, {"num_attention_heads": 2, "intermediate_size": 48}),
        ("Mamba", True, {"state_size": 8}),
        ("Rwkv", False, {"intermediate_size": 48}),
        (
            "RecurrentGemma",
            False,
            {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 48}
            | {"block_types": ["recurrent", "attention"], "lru_width": 32, "attention_window_size": 64},
        ),
    ],
)
def test_a_model_that_mixes_the_prompts_of_a_batch_answers_one_at_a_time(
    name: str, apart: bool, settings: dict[str, Any], teacher_tokenizer: Any
) -> None:
    torch.manual_seed(1)
    sizes = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.5}
    config = getattr(transformers, f"{name}Config")(**(sizes | settings), bos_token_id=None, eos_token_id=0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    asked = [
        Prompt(row, str(row), "", [(7 * i + row) % 500 + 1 for i in range(length)], [])
        for row, length in enumerate((3, 9, 3, 17, 9))
    ]
    written = [
        TransformersGenerator(model, teacher_tokenizer, [0], max_new_tokens=8, batch_size=size).answers(asked, seed=1)
        for size in (1, 5)
    ]
    assert keeps_prompts_apart(model, 0) == apart
    assert written[0] == written[1]


def test_a_token_is_the_first_whose_cumulative_probability_exceeds_its_random_number() -> None:
    prompts = [Prompt(row, "", "", [1], []) for row in range(300)]
    logits = torch.tensor([2.0, -1.0, -torch.inf, 0.5, 1.0]).repeat(300, 1)
    probabilities = (logits[0].double() / 0.7).softmax(0).tolist()
    draws = Draws(prompts, seed=3, temperature=0.7, max_new_tokens=4, longest=6)
    for step in range(4):
        left = draws(torch.zeros(300, 6 + step, dtype=torch.long), logits)
        assert left.isfinite().sum(1).eq(1).all()
        for row, token in enumerate(left.argmax(1).tolist()):
            number, drawn = np.random.default_rng([3, row]).random(4)[step], 0
            while number >= sum(probabilities[: drawn + 1]):
                drawn += 1
            assert token == drawn
    draws.check()


def test_draws_have_the_models_frequencies() -> None:
    prompts = [Prompt(row, "", "", [1], []) for row in range(20_000)]
    logits = torch.tensor([2.0, -1.0, -torch.inf, 0.5])
    left = Draws(prompts, 1, 1.0, 1, 1)(torch.zeros(20_000, 1, dtype=torch.long), logits.repeat(20_000, 1))
    shares = left.argmax(1).bincount(minlength=4) / 20_000
    assert torch.allclose(shares, logits.softmax(0), atol=0.015)  # four standard deviations
    assert shares[2] == 0


def test_a_published_models_own_sampling_settings_change_nothing(
    teacher: Path, model: PreTrainedModel, prompts: list[Prompt], teacher_tokenizer: Any
) -> None:
    def answers(model: PreTrainedModel) -> Any:
        return TransformersGenerator(model, teacher_tokenizer, [0], max_new_tokens=16).answers(prompts, 1)

    other = AutoModelForCausalLM.from_pretrained(teacher)
    other.generation_config = GenerationConfig(
        do_sample=True, top_k=1, temperature=0.1, repetition_penalty=5.0, num_beams=3, suppress_tokens=list(range(99))
    )
    assert answers(other) == answers(model)


def test_an_answer_ends_at_the_first_of_its_models_ends(student: Path, teacher_tokenizer: Any) -> None:
    GenerationConfig(eos_token_id=[5, 0]).save_pretrained(student)
    model = AutoModelForCausalLM.from_pretrained(student)
    ends = end_ids(str(student), model.config, teacher_tokenizer)
    assert ends == [0, 5]
    words = teacher_tokenizer("the tail")["input_ids"]
    answer = answer_of([*words, 5, 7, 0], ends, teacher_tokenizer)
    assert (answer.text, answer.num_tokens, answer.ended) == ("the tail", len(words), True)
    assert not answer_of(words, ends, teacher_tokenizer).ended


def test_a_model_whose_training_diverged_is_told_so(
    model: PreTrainedModel, prompts: list[Prompt], teacher_tokenizer: Any
) -> None:
    model.get_output_embeddings().weight.data.fill_(torch.nan)
    with pytest.raises(UserError, match="logits are not finite"):
        TransformersGenerator(model, teacher_tokenizer, [0], max_new_tokens=4).answers(prompts, 1)


def test_a_padding_token_that_the_model_does_not_know_pads_nothing(
    model: PreTrainedModel, prompts: list[Prompt], teacher: Path
) -> None:
    def answers(pad: str | None) -> Any:
        tokenizer = AutoTokenizer.from_pretrained(teacher, **({"pad_token": pad} if pad else {}))
        if pad:
            assert tokenizer.pad_token_id == 512 == model.config.vocab_size
        return TransformersGenerator(model, tokenizer, [0], max_new_tokens=8).answers(prompts, 1)

    assert answers("<|pad|>") == answers(None)


def test_a_half_precision_model_answers_in_float32_on_a_cpu_and_the_scores_say_so(student: Path, data: str) -> None:
    AutoModelForCausalLM.from_pretrained(student, dtype=torch.bfloat16).save_pretrained(student)
    found = []
    for batch_size in (1, 5):
        folder = student / f"batch-{batch_size}"
        settings = GenerationSettings([data], seeds=(1,), max_new_tokens=16, batch_size=batch_size)
        scores = generate_scores(str(student), folder, settings)["pairs"]
        assert scores["seeds"]["1"]["dtype"] == "float32" and scores["settings"]["backend"] == "transformers"
        assert scores["seeds"]["1"]["engine"].startswith("transformers ")
        found.append(lines(folder / "pairs-seed1.jsonl"))
    assert found[0] == found[1]


def test_trainer_eval_generate_writes_scores_and_answers_and_prints_a_table(
    student: Path, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(student), "--generate", "--data", data, *QUICK]) == 0
    table = capsys.readouterr().out
    found = json.loads((student / "generate" / "pairs.json").read_text())
    assert found["rows"] == 5 and found["too_long"] == 0 and list(found["seeds"]) == ["1", "2"]
    means = []
    for seed, scores in found["seeds"].items():
        answers = lines(student / "generate" / f"pairs-seed{seed}.jsonl")
        assert [line["prompt"] for line in answers] == TEXTS
        each = [rouge_l(line["answer"], line["references"]) for line in answers]
        assert [line["rouge_l"] for line in answers] == pytest.approx(each, abs=0.005)
        assert scores["rouge_l"] == pytest.approx(statistics.fmean(each))
        assert scores["answer_tokens"] == statistics.fmean(line["answer_tokens"] for line in answers)
        assert scores["ended"] == statistics.fmean(line["ended"] for line in answers)
        means.append(statistics.fmean(each))
    assert found["rouge_l"] == pytest.approx(statistics.fmean(means))
    assert found["spread"] == pytest.approx(abs(means[0] - means[1]) / 2**0.5)
    assert f"{found['rouge_l']:.2f} ± {found['spread']:.2f}" in table


def test_greedy_is_one_run_without_a_spread(student: Path, data: str) -> None:
    settings = GenerationSettings([data], temperature=0, max_new_tokens=8)
    (found,) = generate_scores(str(student), student / "generate", settings).values()
    assert list(found["seeds"]) == ["greedy"] and found["spread"] is None
    assert (student / "generate" / "pairs-greedy.jsonl").is_file()


def test_an_interrupted_run_makes_what_is_missing_and_ends_with_the_same_numbers(
    student: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = GenerationSettings([data], seeds=(1, 2, 3), max_new_tokens=8)
    whole = generate_scores(str(student), tmp_path / "whole", settings)
    made: list[int] = []
    answers = TransformersGenerator.answers

    def interrupted(self: TransformersGenerator, prompts: Any, seed: int, label: str) -> Any:
        if seed == 2 and 2 not in made:
            made.append(seed)
            raise KeyboardInterrupt
        made.append(seed)
        return answers(self, prompts, seed, label)

    monkeypatch.setattr(TransformersGenerator, "answers", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate_scores(str(student), tmp_path / "parts", settings)
    assert generate_scores(str(student), tmp_path / "parts", settings) == whole
    assert made == [1, 2, 2, 3]
    monkeypatch.setattr(protocol, "load_student", None)  # finished: the model is not even loaded
    assert generate_scores(str(student), tmp_path / "parts", settings) == whole


def test_more_seeds_are_added_to_those_there(student: Path, data: str, tmp_path: Path) -> None:
    def scores(*seeds: int) -> Any:
        settings = GenerationSettings([data], seeds=seeds, max_new_tokens=8)
        return generate_scores(str(student), tmp_path / "out", settings)["pairs"]

    first = scores(1)
    assert scores(1, 2)["seeds"]["1"] == first["seeds"]["1"]
    assert len(scores(2)["seeds"]) == 2


def test_answers_of_other_settings_are_not_mixed_in(
    student: Path, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(student), "--generate", "--data", data, *QUICK]) == 0
    assert main(["eval", str(student), "--generate", "--data", data, *QUICK, "--temperature", "0.5"]) == 2
    error = capsys.readouterr().err
    assert "answers with temperature 1.0, now it is 0.5" in error and "--answers" in error


def test_a_model_that_was_trained_further_answers_anew(student: Path, data: str) -> None:
    settings = GenerationSettings([data], seeds=(1, 2), max_new_tokens=8)
    said: list[str] = []
    first = generate_scores(str(student), student / "generate", settings, said.append)["pairs"]
    change_weights(student)
    settings = GenerationSettings([data], seeds=(1,), max_new_tokens=8)
    second = generate_scores(str(student), student / "generate", settings, said.append)["pairs"]
    assert list(second["seeds"]) == ["1"] and second["model_identity"] != first["model_identity"]
    assert not (student / "generate" / "pairs-seed2.jsonl").exists()
    assert any("the model has changed" in line for line in said)


def test_answers_of_a_changed_model_stay_until_new_ones_replace_them(
    student: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = GenerationSettings([data], seeds=(1, 2), max_new_tokens=8)
    generate_scores(str(student), student / "generate", settings)
    before = contents(student / "generate")
    change_weights(student)

    def fails(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(TransformersGenerator, "answers", fails)
    with pytest.raises(KeyboardInterrupt):
        generate_scores(str(student), student / "generate", settings)
    assert contents(student / "generate") == before


def test_another_models_answers_are_refused_and_stay(
    student: Path, other_student: Path, data: str, tmp_path: Path
) -> None:
    shared, settings = tmp_path / "shared", GenerationSettings([data], seeds=(1,), max_new_tokens=8)
    generate_scores(str(student), shared, settings)
    before = contents(shared)
    with pytest.raises(
        UserError, match=rf"answers of the model {student}, now it is {other_student}: name another .*--answers"
    ):
        generate_scores(str(other_student), shared, settings)
    assert contents(shared) == before


def test_answers_in_a_models_own_folder_are_its_own_though_it_was_copied(
    student: Path, data: str, tmp_path: Path
) -> None:
    settings = GenerationSettings([data], seeds=(1,), max_new_tokens=8)
    first = generate_scores(str(student), student / "generate", settings)["pairs"]
    copied = change_weights(Path(shutil.copytree(student, tmp_path / "copied")))
    second = generate_scores(str(copied), copied / "generate", settings)["pairs"]
    assert second["model"] == str(copied) and second["model_identity"] != first["model_identity"]


def test_an_adapters_identity_changes_with_its_base_and_with_itself(
    student: Path, tmp_path: Path, model: PreTrainedModel
) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(student)}))
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    identities = [model_identity(str(adapter), model.config)]
    change_weights(student)
    identities.append(model_identity(str(adapter), model.config))
    (adapter / "adapter_model.safetensors").write_bytes(b"other weights")
    identities.append(model_identity(str(adapter), model.config))
    assert len(set(identities)) == 3
    assert model_identity(str(adapter), model.config) == identities[2]


def test_scores_are_current_by_content_and_not_by_the_times_of_files(
    student: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Path(shutil.copy(data, tmp_path / "pairs.jsonl"))
    folder = student / "generate"

    def current(**options: Any) -> bool:
        known: dict[str, Any] = {"seeds": (1, 2), "max_new_tokens": 8}
        return scores_are_current(str(student), folder, GenerationSettings([str(own)], **(known | options)))

    assert not current()
    generate_scores(str(student), folder, GenerationSettings([str(own)], seeds=(1, 2), max_new_tokens=8))
    monkeypatch.setattr(protocol, "load_student", None)
    os.utime(folder / "pairs.json", (0, 0))
    assert current() and current(seeds=(2,)) and current(backend="transformers", batch_size=3)
    assert not current(seeds=(1, 3)) and not current(temperature=0.5) and not current(backend="vllm")
    text = own.read_text()
    own.write_text(text + text)
    assert not current()
    own.write_text(text)
    answers = folder / "pairs-seed2.jsonl"
    answers.rename(tmp_path / "away")
    assert not current() and current(seeds=(1,))
    (tmp_path / "away").rename(answers)
    change_weights(student)
    assert not current()
    (folder / "pairs.json").write_text("[]")
    assert not current()


def test_a_file_that_holds_no_scores_is_not_overwritten(student: Path, data: str) -> None:
    (student / "generate").mkdir()
    (student / "generate" / "pairs.json").write_text('{"seeds": []}')
    with pytest.raises(UserError, match=r"pairs\.json holds no scores .*--answers"):
        generate_scores(str(student), student / "generate", GenerationSettings([data], max_new_tokens=8))


def test_a_moved_model_is_the_same_model(student: Path, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = GenerationSettings([data], seeds=(1,), max_new_tokens=8)
    first = generate_scores(str(student), student / "generate", settings)["pairs"]
    moved = student.rename(student.with_name("moved"))
    monkeypatch.setattr(protocol, "load_student", None)
    assert generate_scores(str(moved), moved / "generate", settings)["pairs"] == first | {"model": str(moved)}


def test_long_prompts_are_left_out_and_counted_or_refused(student: Path, data: str, prompts: list[Prompt]) -> None:
    longest = max(prompts, key=lambda prompt: len(prompt.token_ids))
    limit = len(longest.token_ids) - 1
    said: list[str] = []
    settings = GenerationSettings([data], seeds=(1,), max_new_tokens=4, max_prompt_length=limit)
    found = generate_scores(str(student), student / "generate", settings, said.append)["pairs"]
    assert (found["rows"], found["too_long"]) == (4, 1)
    assert "1 of 5 prompts are longer" in said[0]
    assert longest.row not in [line["row"] for line in lines(student / "generate" / "pairs-seed1.jsonl")]
    settings = GenerationSettings([data], max_new_tokens=256 - limit)
    with pytest.raises(UserError, match=rf"line {longest.row}: .*--max_prompt_length {limit}"):
        generate_scores(str(student), student / "other", settings)
    with pytest.raises(UserError, match="no prompt of pairs is as short"):
        generate_scores(str(student), student / "other", GenerationSettings([data], max_prompt_length=1))


def test_references_without_words_are_counted_and_refused_where_nothing_could_score(
    student: Path, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    said: list[str] = []
    rows = [{"prompt": "a", "completion": "ответ"}, {"prompt": "b", "completion": "c"}]
    settings: dict[str, Any] = {"seeds": (1,), "max_new_tokens": 2}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    generate_scores(str(student), tmp_path / "out", GenerationSettings([str(path)], **settings), said.append)
    assert "1 of 2 references have no word" in said[0]
    path.write_text(json.dumps(rows[0]))
    with pytest.raises(UserError, match="every score would be 0"):
        generate_scores(str(student), tmp_path / "out", GenerationSettings([str(path)], **settings))


def test_cache_and_prompts_are_measured_in_one_call(
    student: Path, data: str, heldout: LogitCache, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("trainer.evaluation.evaluate.check_tokenizer", lambda *_: [])
    assert main(["eval", str(student), "--cache", heldout.path, "--generate", "--data", data, *QUICK]) == 0
    out = capsys.readouterr().out
    assert "top-1 agreement" in out and "ROUGE-L" in out
    assert (student / "eval.json").is_file() and (student / "generate" / "pairs.json").is_file()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--generate", "--data", "DATA", "--answers", "DATA/answers"], "pairs.jsonl is a file; name a folder"),
        ([], "--cache, prompts with --generate"),
        (["--seeds", "1"], "--seeds needs --generate"),
        (["--out", "scores.json", "--generate"], "--out is for the numbers of --cache"),
        (["--generate"], "--generate needs --data"),
        (["--generate", "--data", "missing.jsonl"], "missing.jsonl: no such file"),
        (["--generate", "--data", "DATA", "DATA"], "would be named pairs"),
        (["--generate", "--data", "DATA", "--seeds", "1", "1"], "names 1 twice"),
        (["--generate", "--data", "DATA", "--temperature", "-1"], "--temperature -1.0"),
        (["--generate", "--data", "DATA", "--backend", "tgi"], "choose auto, transformers, vllm"),
        (["--generate", "--data", "DATA", "--columns", "prompt"], "OURS=THEIRS"),
        (["--generate", "--data", "DATA", "--max-new-tokens", "0"], "at least 1"),
    ],
)
def test_what_cannot_be_generated_is_refused_before_the_model_loads(
    options: list[str], said: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(tmp_path), *(option.replace("DATA", data) for option in options)]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("data", 5),
        ("data", None),
        ("data", {"a": "b"}),
        ("prompt_template", 5),
        ("columns", 5),
        ("columns", {"prompt": 2}),
        ("temperature", True),
        ("temperature", "1"),
        ("seeds", 5),
        ("seeds", [[1]]),
        ("max_new_tokens", True),
        ("backend", 5),
    ],
)
def test_settings_of_a_wrong_kind_are_refused_by_name(name: str, value: Any, data: str) -> None:
    with pytest.raises(UserError, match=rf"^--{name} "):
        GenerationSettings(**({"data": data} | {name: value}))


def test_a_template_means_the_same_to_every_caller(data: str) -> None:
    once = GenerationSettings(data, prompt_template=r"{a}\n{b}")
    assert once.prompt_template == ("{a}\n{b}",)
    again = GenerationSettings(data, prompt_template=once.prompt_template)
    assert again.decisive("vllm") == once.decisive("vllm")


def test_a_model_without_a_tokenizer_and_a_name_without_a_folder_are_refused(
    student_folder: str, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", student_folder, "--generate", "--data", data]) == 2
    assert "it has no tokenizer" in capsys.readouterr().err
    assert main(["eval", "no-such-model", "--generate", "--data", data]) == 2
    assert "--answers" in capsys.readouterr().err


def test_vllm_is_taken_by_itself_only_where_cuda_is_there_and_the_model_is_no_adapter(
    student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "why_not_vllm", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert protocol.choose_backend("auto", str(student)) == "transformers"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert protocol.choose_backend("auto", str(student)) == "vllm"
    (student / "adapter_config.json").write_text('{"base_model_name_or_path": "base"}')
    assert protocol.choose_backend("auto", str(student)) == "transformers"
    with pytest.raises(UserError, match=r"is an adapter: answer with --backend transformers"):
        protocol.choose_backend("vllm", str(student))
    monkeypatch.setattr(protocol, "why_not_vllm", lambda: "vLLM does not import (no such module)")
    with pytest.raises(UserError, match=r"no such module.*pip install"):
        protocol.choose_backend("vllm", str(student))


def test_vllms_processes_end_with_the_command_whatever_ends_it(
    student: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[dict[str, Any]] = []
    ended: list[float] = []

    class Engine:
        model_config = SimpleNamespace(dtype=torch.float32)
        llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=lambda timeout: ended.append(timeout)))

        def __init__(self, **options: Any) -> None:
            started.append({**options, "outlives not": os.environ.get(OWNER_PID)})

        def generate(self, *_: Any, **__: Any) -> Any:
            raise KeyboardInterrupt

    platform = SimpleNamespace(is_cpu=lambda: True)
    fake = SimpleNamespace(__version__="0", LLM=Engine, SamplingParams=dict)
    monkeypatch.setitem(sys.modules, "vllm", fake)
    monkeypatch.setitem(sys.modules, "vllm.platforms", SimpleNamespace(current_platform=platform))
    monkeypatch.setattr(vllm_generation, "set_environment", lambda: None)
    monkeypatch.setattr(protocol, "why_not_vllm", lambda: None)
    AutoModelForCausalLM.from_pretrained(student, dtype=torch.bfloat16).save_pretrained(student)
    with pytest.raises(KeyboardInterrupt):
        generate_scores(str(student), student / "generate", GenerationSettings(data, max_new_tokens=8, backend="vllm"))
    (engine,) = started
    assert engine["outlives not"] == str(os.getpid()) and OWNER_PID not in os.environ
    assert engine["dtype"] == "float32", "on a CPU"
    assert len(ended) == 1


@pytest.mark.engine
def test_vllm_gives_transformers_greedy_answers_and_samples_each_prompt_by_its_own_seed(
    forked_vllm: None, teacher: Path, data: str
) -> None:
    name = str(teacher)
    config, tokenizer = student_config(name), student_tokenizer(name)
    assert tokenizer is not None
    prompts = read_prompts(data, tokenizer)
    vllm = vllm_generation.VllmGenerator(name, config, tokenizer, [0], temperature=0, max_new_tokens=12, longest=64)

    def texts(prompts: Sequence[Prompt], seed: int) -> list[str]:
        return [answer.text for answer in vllm.answers(prompts, seed)]

    model = load_student(name, config, from_scratch=False, dtype="auto")
    reference = TransformersGenerator(model, tokenizer, [0], temperature=0, max_new_tokens=12)
    assert texts(prompts, 1) == [answer.text for answer in reference.answers(prompts, 1)]
    vllm._temperature = 1.0
    sampled = texts(prompts, 1)
    assert texts(prompts[2:], 1) == sampled[2:]
    assert all(a != b for a, b in zip(sampled, texts(prompts, 2), strict=True))
    vllm.close()

"""LoRA and DoRA: from settings to an adapter's folder, which evaluation and further training load as a student."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from logitcache import LogitCache, UserError
from tests.helpers.cachemaking import TINY, VOCAB, llama
from trainer.cli import main
from trainer.config.config import DistillConfig
from trainer.evaluation.evaluate import evaluate
from trainer.model.adapters import add_adapters, base_model, check_adapter_student, weights_dtype
from trainer.model.student import load_student, student_config
from trainer.run.distill_trainer import DistillTrainer

peft = pytest.importorskip("peft")
STEPS = ["--use_cpu", "--max_steps", "6", "--learning_rate", "5e-2", "--kd_weight", "1", "--disable_tqdm", "true"]


def config(folder: Path, **settings: Any) -> DistillConfig:
    return DistillConfig(output_dir=str(folder), **({"use_cpu": True, "disable_tqdm": True} | settings))


def train(cache: LogitCache, heldout: LogitCache, student: str, out: Path, *options: str) -> dict[str, float]:
    arguments = ["--cache", cache.path, "--eval_cache", heldout.path, "--student", student, "--output_dir", str(out)]
    assert main(["fit", *arguments, *STEPS, *options]) == 0
    metrics: dict[str, float] = json.loads((out / "eval.json").read_text())["metrics"]
    return metrics


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--use_dora",)], ids=["LoRA", "DoRA"])
def test_a_run_leaves_an_adapter_that_evaluates_and_trains_on(
    options: tuple[str, ...],
    tmp_path: Path,
    cache: LogitCache,
    heldout: LogitCache,
    student_folder: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = evaluate(AutoModelForCausalLM.from_pretrained(student_folder), heldout)
    first = train(cache, heldout, student_folder, tmp_path / "first", "--lora-r", "4", *options)
    assert first["fkl"] < 0.98 * before["fkl"]
    assert f"{'DoRA' if options else 'LoRA'} of rank 4, alpha 8" in capsys.readouterr().out
    assert not (tmp_path / "first" / "model.safetensors").exists()
    assert AutoTokenizer.from_pretrained(tmp_path / "first").eos_token_id == 0
    assert evaluate(str(tmp_path / "first"), heldout)["fkl"] == pytest.approx(first["fkl"], rel=1e-5)
    assert main(["eval", str(tmp_path / "first"), "--cache", heldout.path]) == 0

    second = train(cache, heldout, str(tmp_path / "first"), tmp_path / "second")
    assert second["fkl"] < 0.99 * first["fkl"]
    assert peft.PeftConfig.from_pretrained(tmp_path / "second").use_dora == bool(options)
    assert base_model(str(tmp_path / "second")) == student_folder


def test_the_adapters_names_its_model_from_wherever_it_is_loaded(
    tmp_path: Path, cache: LogitCache, heldout: LogitCache, student_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(student_folder).parent)
    train(cache, heldout, Path(student_folder).name, tmp_path / "run", "--lora_r", "2", "--max_steps", "1")
    monkeypatch.chdir(tmp_path)
    assert student_config("run").hidden_size == 16


@pytest.mark.slow
def test_an_interrupted_run_with_adapters_ends_like_an_uninterrupted_one(tmp_path: Path, cache: LogitCache) -> None:
    def trainer(folder: str, **settings: Any) -> DistillTrainer:
        options = {"lora_r": 4, "lora_dropout": 0.1, "max_steps": 4, "save_steps": 2, "learning_rate": 1e-2}
        settings_ = config(tmp_path / folder, **options, **settings)
        torch.manual_seed(5)
        return DistillTrainer(add_adapters(llama(seed=7), settings_), cache, settings_)

    through = trainer("through")
    through.train()
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "through" / "checkpoint-2"))
    assert through.model is not None and resumed.model is not None
    for name, parameter in through.model.named_parameters():
        torch.testing.assert_close(resumed.model.get_parameter(name), parameter, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing_kwargs": {"use_reentrant": True}}], ids=str)
def test_gradient_checkpointing_and_bfloat16_reach_the_adapters(
    settings: dict[str, Any], tmp_path: Path, cache: LogitCache, student_folder: str
) -> None:
    """The student's own weights are bfloat16 then, since no optimizer changes them; the adapters stay float32."""
    settings_ = config(
        tmp_path, student=student_folder, lora_r=4, bf16=True, gradient_checkpointing=True, max_steps=3, **settings
    )
    student = load_student(
        student_folder, student_config(student_folder), from_scratch=False, dtype=weights_dtype(settings_)
    )
    model = add_adapters(student, settings_)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert all(dtype == (torch.float32 if "lora_" in name else torch.bfloat16) for name, dtype in dtypes.items())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    DistillTrainer(model, cache, settings_).train()
    changed = {name for name, parameter in model.named_parameters() if not parameter.equal(before[name])}
    assert changed == {name for name in before if "lora_" in name}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lora_alpha": 8}, "--lora_alpha without --lora_r"),
        ({"use_dora": True}, "--use_dora without --lora_r"),
        ({"lora_r": 0}, "--lora_r 0: it must be at least 1"),
        ({"lora_r": 4, "lora_dropout": 1.0}, "--lora_dropout 1: .* below 1"),
    ],
    ids=str,
)
def test_settings_of_adapters_that_cannot_be_meant_are_refused(
    settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        config(tmp_path, **settings)


def test_what_suits_no_adapter_is_refused(tmp_path: Path, student_folder: str) -> None:
    add_adapters(llama(seed=7), config(tmp_path, lora_r=2)).save_pretrained(tmp_path / "adapter")
    adapter = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps(adapter | {"base_model_name_or_path": student_folder})
    )
    for settings, said in (
        ({"student": student_folder, "from_scratch": True, "lora_r": 4}, "--from_scratch --lora_r"),
        ({"student": str(tmp_path / "adapter"), "from_scratch": True}, f"Name the model it is of: {student_folder}"),
        ({"student": str(tmp_path / "adapter"), "lora_r": 4}, "Leave --lora_r out to go on training it"),
    ):
        with pytest.raises(UserError, match=said):
            check_adapter_student(config(tmp_path, **settings))
    with pytest.raises(UserError, match=r"--lora_target_modules missing_proj: .*missing_proj"):
        add_adapters(llama(seed=7), config(tmp_path, lora_r=2, lora_target_modules=["missing_proj"]))


SIZES: dict[str, Any] = TINY | {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "use_cache": False}
MIXER: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
MIXER2: dict[str, Any] = {"num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8}
HYBRID: dict[str, Any] = {"attn_layer_indices": [1], "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16}
GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 2}
FALCON: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
ADAPTED: dict[str, tuple[dict[str, Any], set[str]]] = {
    "Llama4Text": (
        SIZES | {"intermediate_size_mlp": 48, "interleave_moe_layer_step": 1},
        {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    ),
    "Phimoe": (SIZES, {"q_proj", "k_proj", "v_proj", "o_proj"}),
    "Mamba": (MIXER, {"in_proj"}),
    "FalconMamba": (MIXER, {"in_proj"}),
    "Mamba2": (MIXER | MIXER2, {"in_proj"}),
    "Bamba": (
        SIZES | HYBRID | {"mamba_n_groups": 1},
        {"in_proj", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    ),
    "Falcon": (FALCON, {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
    "Bloom": (
        {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 2},
        {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
    ),
    "GPT2": (SIZES | GPT2, {"c_attn", "c_proj", "c_fc"}),
}


def model_of(name: str) -> PreTrainedModel:
    torch.manual_seed(3)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        getattr(transformers, f"{name}Config")(**ADAPTED[name][0])
    )
    model.float()
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", ADAPTED)
def test_by_default_adapters_are_on_the_linear_layers_that_they_change(
    name: str, tmp_path: Path, cache: LogitCache
) -> None:
    settings = config(tmp_path, lora_r=2, max_steps=3, learning_rate=1e-2)
    model: Any = add_adapters(model_of(name), settings)
    adapted = {path.split(".lora_B")[0].split(".")[-1] for path, _ in model.named_parameters() if "lora_B" in path}
    assert adapted == ADAPTED[name][1]
    DistillTrainer(model, cache, settings).train()
    for path, weight in model.named_parameters():
        assert "lora_B" not in path or float(weight.detach().abs().max()) > 0, f"{path} was not trained"
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(model_of(name), tmp_path / "adapter")
    assert loaded.get_nb_trainable_parameters()[1] == model.get_nb_trainable_parameters()[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layers", "said"),
    [
        (
            "Llama4Text",
            ["router", "q_proj"],
            r"router q_proj: an adapter on .*\.router is of no use: it gives something",
        ),
        ("Mamba", ["dt_proj"], r"dt_proj: an adapter on .*dt_proj is of no use: the layer around it takes its weight"),
        ("Bamba", ["out_proj"], r"out_proj: an adapter on .*out_proj is of no use: the layer around it"),
        ("Mamba2", ["out_proj"], "--lora_target_modules out_proj: .*incompatible with Mamba"),
    ],
)
def test_layers_that_an_adapter_does_not_change_are_refused_by_name(
    name: str, layers: list[str], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        add_adapters(model_of(name), config(tmp_path, lora_r=2, lora_target_modules=layers))


def test_a_model_without_linear_layers_is_refused_with_the_option_that_was_given(tmp_path: Path) -> None:
    model = model_of("Mamba")
    for name in ("backbone.layers.0.mixer.in_proj", "backbone.layers.1.mixer.in_proj"):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, torch.nn.Identity())
    with pytest.raises(UserError, match=r"--lora_r 2: MambaForCausalLM has no linear layer that an adapter changes"):
        add_adapters(model, config(tmp_path, lora_r=2))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{}", "names no model in base_model_name_or_path"),
        ("no JSON", "not the JSON of an adapter"),
        ('{"base_model_name_or_path": "/gone"}', "is an adapter of /gone, and no model can be loaded"),
    ],
)
def test_an_adapter_without_its_model_is_refused(content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(UserError, match=said):
        student_config(str(tmp_path))


@pytest.mark.slow
def test_a_folder_that_held_an_adapter_is_the_full_model_trained_there_later(
    tmp_path: Path, cache: LogitCache, heldout: LogitCache, student_folder: str
) -> None:
    out = tmp_path / "run"
    common = ["fit", "--cache", cache.path, "--eval_cache", heldout.path, "--student", student_folder, "--use_cpu"]
    common += ["--output_dir", str(out), "--max_steps", "2", "--learning_rate", "1e-2"]
    assert main([*common, "--lora_r", "2"]) == 0
    assert (out / "adapter_config.json").exists()
    assert main(common) == 0
    trained = json.loads((out / "eval.json").read_text())["metrics"]["fkl"]
    assert main(["eval", str(out), "--cache", heldout.path]) == 0
    assert json.loads((out / "eval.json").read_text())["metrics"]["fkl"] == pytest.approx(trained, rel=1e-4)

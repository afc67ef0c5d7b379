"""The loss inside a model's own forward: the gradient of every parameter is that of the loss from its logits."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import trainer.losses.fused
from logitcache import LogitCache, UserError
from logitcache.format.tail_parts import TailParts
from tests.helpers.cachemaking import VOCAB, llama
from tests.helpers.heads import ARCHITECTURES, SIZES, call, fused, model_of
from tests.helpers.processes import on_two_ranks
from tests.helpers.two_ranks_sharded import take_gradient
from trainer.data.collator import Batch, Collator
from trainer.model.head import NoProjectionError, find_head
from trainer.model.objective import FusedObjective, LogitsObjective, Objective, objective_of


@pytest.fixture
def batch(cache: LogitCache) -> Batch:
    return Collator(TailParts(temperatures=(2.0,)))([cache[i] for i in range(4)])


def gradients(objective: Objective, model: nn.Module, batch: Batch, **options: Any) -> dict[str, Tensor]:
    model.zero_grad()
    call(objective, model, batch, **options)[0].backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        atol = 1e-5 * float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=atol, msg=partial("{}: {}".format, name))


def assert_fused_is_unfused(model: PreTrainedModel, batch: Batch, **options: Any) -> None:
    expected_total, expected = call(LogitsObjective(model), model, batch, **options)
    total, terms = call(fused(model), model, batch, **options)
    torch.testing.assert_close(total, expected_total, rtol=1e-5, atol=0)
    for name, found, of_logits in zip(terms._fields, terms, expected, strict=True):
        torch.testing.assert_close(found, of_logits, rtol=1e-4, atol=1e-5, msg=partial("{}: {}".format, name))
    assert_same(
        gradients(fused(model), model, batch, **options), gradients(LogitsObjective(model), model, batch, **options)
    )


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_fused_gradient_is_that_of_the_logits(name: str, temperature: float, batch: Batch) -> None:
    assert_fused_is_unfused(model_of(name), batch, temperature=temperature)


@pytest.mark.parametrize(
    ("name", "scale", "softcap"),
    [("Llama", 1, None), ("Gemma2", 1, 2), ("Cohere", 0.3, None), ("Granite", 1 / 7, None), ("HyperCLOVAX", 3, None)],
)
def test_what_a_model_does_to_its_logits_is_measured(name: str, scale: float, softcap: float | None) -> None:
    transform = find_head(model_of(name)).transform
    assert transform.scale == pytest.approx(scale, rel=1e-6)
    assert transform.softcap == (None if softcap is None else pytest.approx(softcap, rel=1e-6))


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor with a column for each token that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, tuple | list) else [result]:
            if isinstance(made, Tensor) and made.shape[-1:] == (VOCAB,):
                self.elements = max(self.elements, made.numel())
        return result


@pytest.mark.parametrize("training", [True, False])
def test_the_logits_never_exist(cache: LogitCache, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer.losses.fused, "MIN_CHUNK_ELEMENTS", 1)
    batch = Collator()([cache[i] for i in range(12)])
    num_logits = batch.num_positions * VOCAB
    model = llama(seed=7, hidden_size=8)
    sizes = {}
    for objective in (LogitsObjective(model), fused(model)):
        with torch.set_grad_enabled(training), Largest() as largest:
            total, _ = call(objective, model, batch)
            if training:
                total.backward()
        sizes[type(objective)] = largest.elements
    assert sizes[LogitsObjective] >= num_logits > 5 * sizes[FusedObjective] > 0


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(use_reentrant: bool, batch: Batch) -> None:
    model = model_of("Llama")
    expected = gradients(fused(model), model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.train()
    assert_same(gradients(fused(model), model, batch), expected)


def test_gradients_of_several_batches_add_up(cache: LogitCache, batch: Batch) -> None:
    model = model_of("Llama")
    expected = gradients(fused(model), model, batch)
    model.zero_grad()
    objective = fused(model)
    for part in ([cache[0], cache[1]], [cache[2], cache[3]]):
        call(objective, model, Collator()(part))[0].backward()
    assert_same({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, expected)


def test_a_batch_without_positions_has_loss_0_and_gradient_0(cache: LogitCache) -> None:
    batch = Collator()([cache[0]])
    empty = replace(batch, logit_indices=batch.logit_indices[:0], labels=batch.labels[:0], targets=batch.targets[:0])
    model = model_of("Llama")
    total, terms = call(fused(model), model, empty)
    total.backward()
    assert total.item() == 0
    assert len(terms.kd) == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Granite"])
def test_under_bfloat16_autocast_the_gradient_is_as_close_as_that_of_the_logits(name: str, batch: Batch) -> None:
    model = model_of(name)
    exact = gradients(LogitsObjective(model), model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        from_logits, found = (
            gradients(objective, model, batch) for objective in (LogitsObjective(model), fused(model))
        )

    def error(rounded: dict[str, Tensor]) -> float:
        parts = [(rounded[n] - gradient).norm() / gradient.norm() for n, gradient in exact.items()]
        return float(torch.stack(parts).square().mean().sqrt())

    assert 0 < error(found) < 1.2 * error(from_logits)


def test_a_frozen_head_gets_no_gradient_and_the_rest_the_same(batch: Batch) -> None:
    model = model_of("Llama")
    expected = gradients(LogitsObjective(model), model, batch)
    del expected["lm_head.weight"]
    model.get_output_embeddings().requires_grad_(False)
    assert_same(gradients(fused(model), model, batch), expected)


def adapted(base: PreTrainedModel, **settings: Any) -> Any:
    """With a LoRA adapter whose matrices are random, so that it changes the logits."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=12, **settings)).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["lm_head"]},
        {"target_modules": ["lm_head", "q_proj"], "lora_dropout": 0.3},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"]},
    ],
    ids=["head", "head and others", "trained copy", "frozen head"],
)
@pytest.mark.parametrize("name", ["Llama", "Granite"])
def test_adapters_on_and_beside_the_head_get_their_gradients(name: str, settings: dict[str, Any], batch: Batch) -> None:
    model = adapted(model_of(name, tie_word_embeddings=False), **settings)
    assert_fused_is_unfused(model, batch)
    with model.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(
            call(fused(model), model, batch)[0], call(LogitsObjective(model), model, batch)[0], rtol=1e-5, atol=0
        )


def test_two_active_adapters_both_count(batch: Batch) -> None:
    peft = pytest.importorskip("peft")
    model = adapted(model_of("Llama"), target_modules=["lm_head"])
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    assert_fused_is_unfused(model, batch)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}], ids=["DoRA", "a bias of the adapter"])
def test_adapters_that_are_no_two_maps_are_left_to_the_logits(settings: dict[str, Any]) -> None:
    with pytest.raises(NoProjectionError, match="LoRA adapter"):
        find_head(adapted(model_of("Phi"), target_modules=["lm_head"], **settings))


def test_prompt_learning_which_misplaces_positions_is_refused() -> None:
    peft = pytest.importorskip("peft")
    tuned = peft.get_peft_model(llama(seed=7), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(UserError, match=r"prompt learning .* use LoRA"):
        objective_of(tuned)


def test_a_merged_adapter_is_left_to_the_logits() -> None:
    model = adapted(model_of("Llama"), target_modules=["lm_head"])
    model.merge_adapter()
    with pytest.raises(NoProjectionError, match="merged"):
        find_head(model)


class OffsetByToken(LlamaForCausalLM):
    """Favours tokens by what it knows of them."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + torch.linspace(-3, 3, VOCAB)[: output.logits.shape[-1]]
        return output


class LearnedScale(LlamaForCausalLM):
    """Scales its logits by a parameter."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.logit_scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * self.logit_scale
        return output


class Squared(LlamaForCausalLM):
    """Bends its logits."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * output.logits.abs()
        return output


class TwoCalls(LlamaForCausalLM):
    """Calls its head twice."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        super().forward(*args, **kwargs)
        return super().forward(*args, **kwargs)


class OwnHead(LlamaForCausalLM):
    """Has a head with a nonlinearity."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.lm_head = Softened(config.hidden_size, config.vocab_size, bias=False)


class Softened(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.tanh())


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        (OffsetByToken, "no scale and no tanh cap"),
        (LearnedScale, "parameters act on its logits"),
        (Squared, "no scale and no tanh cap"),
        (TwoCalls, "not called once"),
        (OwnHead, "Softened"),
    ],
)
def test_an_architecture_that_is_not_understood_is_trained_from_its_logits_and_said_so(
    architecture: Callable[[LlamaConfig], PreTrainedModel], reason: str, batch: Batch, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(7)
    model = architecture(LlamaConfig(**SIZES)).eval()
    objective = objective_of(model)
    assert isinstance(objective, LogitsObjective)
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "trainer.model.objective"]
    assert architecture.__name__ in warning
    assert reason in warning
    gradient = gradients(objective, model, batch, loss="fkl")["model.layers.0.mlp.up_proj.weight"]
    assert_descends(objective, model, batch, gradient)


def assert_descends(objective: Objective, model: nn.Module, batch: Batch, gradient: Tensor) -> None:
    """The gradient of one weight is the slope of the loss along it."""
    weight, step = model.get_parameter("model.layers.0.mlp.up_proj.weight"), 1e-3
    direction = gradient / gradient.norm()
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            weight.add_(sign * step * direction)
            losses.append(float(call(objective, model, batch, loss="fkl")[0]))
            weight.sub_(sign * step * direction)
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(float(gradient.norm()), rel=0.02)


def test_an_architecture_that_scales_its_logits_by_a_number_of_its_own_is_understood(batch: Batch) -> None:
    class Tempered(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = 0.37 * output.logits
            return output

    torch.manual_seed(7)
    tempered: PreTrainedModel = Tempered(LlamaConfig(**SIZES))
    assert_fused_is_unfused(tempered.train(False), batch)


def test_a_head_that_a_device_map_placed_is_left_to_the_logits() -> None:
    model = model_of("Llama")
    add_hook_to_module(model.lm_head, ModelHook())
    with pytest.raises(NoProjectionError, match="placed by a device map"):
        find_head(model)


def test_a_head_that_deepspeed_shards_is_left_to_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.model.head.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(NoProjectionError, match="ZeRO-3"):
        find_head(model_of("Llama"))


def test_every_rank_computes_from_logits_where_one_has_to() -> None:
    assert isinstance(objective_of(model_of("Llama"), agree=lambda fits: False), LogitsObjective)


def test_the_probe_leaves_modes_random_numbers_and_gradients_as_they_were() -> None:
    model = model_of("GPT2").train()
    model.transformer.h[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    state = torch.get_rng_state()
    find_head(model)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.get_rng_state().equal(state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_between_calls_a_model_is_what_it_was(batch: Batch) -> None:
    model = model_of("Llama")
    ids = torch.tensor([[3, 5, 7]])
    names, logits = list(model.state_dict()), model(ids).logits
    objective = fused(model)
    call(objective, model, batch)[0].backward()
    with pytest.raises(Exception, match="no teacher gives"):
        impossible = replace(batch.targets, logprobs=batch.targets.logprobs + 1)
        call(objective, model, replace(batch, targets=impossible))
    assert "forward" not in vars(model)
    assert "forward" not in vars(model.lm_head)
    assert list(model.state_dict()) == names
    for same in (model, copy.deepcopy(model)):
        assert same(ids).logits.equal(logits)
        generate: Any = same.generate
        assert generate(ids, max_new_tokens=2, do_sample=False).shape == (1, 5)


def test_without_gradients_the_loss_has_none(batch: Batch) -> None:
    model = model_of("Llama")
    with torch.no_grad():
        total, _ = call(fused(model), model, batch)
    assert not total.requires_grad
    torch.testing.assert_close(total, call(fused(model), model, batch)[0].detach())


@pytest.mark.parametrize("place", ["hidden states", "weight"])
def test_it_is_said_where_a_number_is_missing(place: str, batch: Batch) -> None:
    model = model_of("Llama")
    objective = fused(model)
    parameter = model.lm_head.weight if place == "weight" else model.model.norm.weight
    parameter.data[3] = math.nan
    assert call(objective, model, batch)[0].isnan()
    said = objective.what_is_not_finite()
    assert place in said
    assert ("weight" in said) == (place == "weight")


@pytest.mark.slow
def test_a_compiled_model_gives_the_same_gradient(batch: Batch) -> None:
    model = model_of("Llama")
    objective = fused(model)
    expected = gradients(objective, model, batch)
    compiled: Any = torch.compile(model, backend="eager")
    for _ in range(3):
        model.zero_grad()
        call(objective, compiled, batch)[0].backward()
        assert_same({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, expected)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["fsdp2", "fsdp2 head", "fsdp2 tied", "fsdp1"])
def test_sharded_over_two_ranks_the_gradient_is_that_of_one(sharding: str, tmp_path: Path, cache: LogitCache) -> None:
    model = model_of("Gemma2", tie_word_embeddings="tied" in sharding)
    batch = Collator()([cache[i] for i in range(6)])
    expected = gradients(LogitsObjective(model), model, batch)
    on_two_ranks(take_gradient, cache.path, tmp_path, *sharding.split())
    assert_same(torch.load(tmp_path / "gradient.pt", weights_only=True), expected)

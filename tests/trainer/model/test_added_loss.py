"""What a model's own forward adds to its loss is trained here too: transformers' loss of the same model is the reference."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from logitcache import CachedSequence, LogitCache
from tests.helpers.cachemaking import VOCAB
from tests.helpers.distilling import CatchGradient, config, relative_difference
from tests.helpers.experts import EXPERTS, MAMBA, SIZES, labelled, model_of
from tests.helpers.processes import on_two_ranks
from tests.helpers.two_ranks import train_one_step
from trainer.model.added_loss import find_added_loss
from trainer.model.objective import FusedObjective, LogitsObjective
from trainer.run.distill_trainer import DistillTrainer

PACKABLE = ("Mixtral", "Qwen3Moe", "Olmoe", "GraniteMoe")


def own_loss(model: PreTrainedModel, batches: list[list[CachedSequence]]) -> tuple[float, dict[str, Tensor]]:
    """transformers' own loss and its gradient, a mean over the positions of all batches."""
    model.zero_grad()
    counts = [sum(len(sequence.positions) for sequence in batch) for batch in batches]
    total = torch.zeros(())
    for batch, count in zip(batches, counts, strict=True):
        output: Any = model(**labelled(batch))
        total = total + count / sum(counts) * output.loss
    total.backward()
    gradient = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return float(total.detach()), gradient


def trained(model: PreTrainedModel, cache: LogitCache, folder: Path, **settings: Any) -> tuple[Any, DistillTrainer]:
    """The gradient of the first step on hard labels, and the trainer."""
    options: dict[str, Any] = {"kd_weight": 0.0, "max_steps": 1, "logging_steps": 1}
    options |= {"train_sampling_strategy": "sequential", "per_device_train_batch_size": len(cache)}
    catch = CatchGradient()
    trainer = DistillTrainer(model, cache, config(folder, **(options | settings)), eval_cache=cache, callbacks=[catch])
    trainer.train()
    return catch.gradient, trainer


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERTS)
def test_the_balance_of_experts_is_part_of_the_loss_as_transformers_has_it(
    name: str, tmp_path: Path, cache: LogitCache
) -> None:
    model = model_of(name, EXPERTS[name])
    without = model_of(name, EXPERTS[name] | {"output_router_logits": False})
    (loss, expected), (bare, _) = own_loss(model, [list(cache)]), own_loss(without, [list(cache)])
    assert loss > bare + 0.1
    gradient, trainer = trained(model, cache, tmp_path)
    logged = trainer.state.log_history[0]
    assert isinstance(trainer.objective, FusedObjective)
    assert logged["loss"] == pytest.approx(loss, rel=1e-5)
    assert logged["aux_loss"] == pytest.approx(loss - bare, rel=1e-4)
    assert logged["ce"] == pytest.approx(bare, rel=1e-5)
    assert relative_difference(gradient, expected) < 1e-4


def test_split_into_accumulation_steps_every_batch_counts_by_its_positions(tmp_path: Path, cache: LogitCache) -> None:
    model, rows = model_of("Mixtral", SIZES), list(cache)
    loss, expected = own_loss(model, [rows[start : start + 6] for start in range(0, len(rows), 6)])
    gradient, trainer = trained(
        model, cache, tmp_path, per_device_train_batch_size=6, gradient_accumulation_steps=4, num_train_epochs=1
    )
    logged = trainer.state.log_history[0]
    assert relative_difference(gradient, expected) < 1e-4
    assert logged["loss"] == pytest.approx(loss, rel=1e-5)
    assert logged["aux_loss"] == pytest.approx(loss - logged["ce"], rel=1e-4)


@pytest.mark.slow
def test_two_ranks_weigh_it_alike(tmp_path: Path, cache: LogitCache) -> None:
    """Each rank takes one row at a time, and the rank that runs out of rows adds nothing."""
    loss, expected = own_loss(model_of("Mixtral", SIZES), [[row] for row in cache])
    on_two_ranks(train_one_step, cache.path, tmp_path, True)
    together = torch.load(tmp_path / "gradient.pt", weights_only=True)
    assert relative_difference(together["gradient"], expected) < 1e-4
    assert together["logged"]["loss"] == pytest.approx(loss, rel=1e-5)
    assert together["logged"]["aux_loss"] == pytest.approx(loss - together["logged"]["ce"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("name", PACKABLE)
def test_packed_the_balance_is_over_the_tokens_and_not_the_padding(
    name: str, size: int, tmp_path: Path, cache: LogitCache
) -> None:
    model = model_of(name, SIZES)
    loss, expected = own_loss(model, [list(cache)])
    rows = -(-sum(len(row.input_ids) for row in cache) // (48 * size)) + size
    settings = {"packing": True, "packed_length": 48 * size, "per_device_train_batch_size": rows}
    gradient, trainer = trained(model, cache, tmp_path, **settings)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-5)
    assert relative_difference(gradient, expected) < 1e-4


def test_adapters_and_gradient_checkpointing_have_the_same_term(tmp_path: Path, cache: LogitCache) -> None:
    peft = pytest.importorskip("peft")
    loss, _ = own_loss(model_of("Mixtral", SIZES), [list(cache)])
    adapted = peft.get_peft_model(model_of("Mixtral", SIZES), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    gradient, trainer = trained(adapted, cache, tmp_path, gradient_checkpointing=True)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-5)
    assert any(float(value.abs().max()) > 0 for value in gradient.values())


@pytest.mark.slow
def test_a_z_loss_is_of_the_logits_of_all_positions(
    tmp_path: Path, cache: LogitCache, caplog: pytest.LogCaptureFixture
) -> None:
    settings = SIZES | MAMBA | {"attn_layer_indices": [1], "z_loss_coefficient": 0.1}
    model = model_of("Bamba", settings)
    loss, expected = own_loss(model, [list(cache)])
    gradient, trainer = trained(model, cache, tmp_path)
    assert isinstance(trainer.objective, LogitsObjective)
    assert "adds a function of all its logits to its loss" in caplog.text
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-5)
    assert relative_difference(gradient, expected) < 1e-4
    assert find_added_loss(model_of("Bamba", settings | {"z_loss_coefficient": 0.0})) is None


def test_a_held_out_loss_has_no_added_term(tmp_path: Path, cache: LogitCache) -> None:
    _, trainer = trained(model_of("Mixtral", SIZES), cache, tmp_path, learning_rate=0.0)
    evaluated = trainer.evaluate()
    assert evaluated["eval_loss"] == pytest.approx(trainer.state.log_history[0]["ce"], rel=1e-5)


@pytest.fixture(params=["Llama", "GPT2", "Bart"])
def without_experts(request: pytest.FixtureRequest) -> Iterator[PreTrainedModel]:
    """Models that add nothing; Bart computes its cross-entropy itself."""
    heads = {"decoder_ffn_dim": 32, "decoder_layers": 1, "d_model": 32, "decoder_attention_heads": 2, "pad_token_id": 1}
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2} if request.param == "GPT2" else {}
    yield model_of(request.param, (heads | {"vocab_size": VOCAB}) if request.param == "Bart" else SIZES | sizes)


def test_a_model_that_adds_nothing_is_not_asked_for_it(without_experts: PreTrainedModel) -> None:
    before = dict(vars(without_experts))
    assert find_added_loss(without_experts.train()) is None
    assert without_experts.training
    assert vars(without_experts).keys() == before.keys()


def test_without_a_coefficient_nothing_is_added(tmp_path: Path, cache: LogitCache) -> None:
    assert find_added_loss(model_of("Mixtral", SIZES | {"router_aux_loss_coef": 0.0})) is None
    _, trainer = trained(model_of("Mixtral", SIZES | {"output_router_logits": False}), cache, tmp_path)
    assert "aux_loss" not in trainer.state.log_history[0]

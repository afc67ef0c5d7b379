"""Packed sequences: the loss and the gradient of each alone; models that mix them are refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from accelerate import skip_first_batches
from cachemaking import VOCAB, random_sequences, write_cache
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from logitcache import LogitCache, UserError
from trainer.config import DistillConfig
from trainer.data.collator import Batch, Collator
from trainer.data.loader import BatchLoader
from trainer.data.planning import Batching
from trainer.losses.fused import Mixture
from trainer.losses.settings import LossSettings
from trainer.objective import objective_of, teacher_targets
from trainer.packing import check_packing

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
    "use_cache": False,
}
GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 2, "attn_pdrop": 0, "resid_pdrop": 0, "embd_pdrop": 0}
MODELS: dict[str, dict[str, Any]] = {
    "Llama": SIZES,
    "Qwen3": SIZES,
    "Gemma2": SIZES | {"sliding_window": 6},
    "Gemma3Text": SIZES | {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "GPT2": SIZES | GPT2,
}
EXPERTS: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MIXING: dict[str, dict[str, Any]] = {
    "Mamba": {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2},
    "Bloom": {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 2},
    "OPT": SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32, "pad_token_id": 1},
    "Lfm2": SIZES | {"layer_types": ["conv", "full_attention"], "block_ff_dim": 48},
}


def model_of(name: str, attention: str = "sdpa", settings: dict[str, Any] | None = None) -> PreTrainedModel:
    torch.manual_seed(3)
    config = getattr(transformers, f"{name}Config")(**(settings or MODELS[name]))
    model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model.train()


@pytest.fixture(scope="module")
def long_cache(tmp_path_factory: pytest.TempPathFactory) -> LogitCache:
    """Sequences of up to 40 tokens, which is longer than the sliding windows above."""
    return write_cache(tmp_path_factory.mktemp("long"), random_sequences(12, seed=8, longest=40))


def loss_and_gradient(model: PreTrainedModel, batches: list[Batch]) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    objective = objective_of(model)
    total = torch.zeros(())
    for batch in batches:
        settings = LossSettings("akl")
        targets = teacher_targets(batch)
        mixture = Mixture(0.7, 0.3)
        total = (
            total
            + objective(model, batch, targets, mixture=mixture, settings=settings, vocab_size=VOCAB, validate=True)[0]
        )
    total.backward()
    return float(total.detach()), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_packed_sequences_have_the_loss_and_gradient_of_each_alone(
    name: str, attention: str, flat: bool, long_cache: LogitCache
) -> None:
    model = model_of(name, attention)
    check_packing(model, flat)
    assert model.training
    packed = list(BatchLoader(long_cache, Batching(3, packed_length=64), Collator(flat=flat), shuffle=True))
    assert len(packed) < 4
    loss, gradient = loss_and_gradient(model, packed)
    expected, expected_gradient = loss_and_gradient(model, [Collator()([row]) for row in long_cache])
    assert loss == pytest.approx(expected, rel=1e-5)
    for parameter, found in gradient.items():
        difference = (found - expected_gradient[parameter]).norm() / expected_gradient[parameter].norm()
        assert difference < 1e-5, parameter


def test_a_packed_batch_begins_anew_at_every_sequence_and_in_the_padding(cache: LogitCache) -> None:
    sequences = [cache[i] for i in (0, 1, 2)]
    lengths = [len(sequence.input_ids) for sequence in sequences]
    batch = Collator()(sequences, np.array([0, 1, 1]))
    assert "attention_mask" not in batch
    width = max(lengths[0], lengths[1] + lengths[2])
    first = [*range(lengths[0]), *range(width - lengths[0])]
    second = [*range(lengths[1]), *range(lengths[2]), *range(width - lengths[1] - lengths[2])]
    assert batch["position_ids"].tolist() == [first, second]
    assert int(batch["num_tokens"]) == sum(lengths)
    assert batch["input_ids"][1, lengths[1] :][: lengths[2]].tolist() == sequences[2].input_ids.tolist()


def test_flat_is_one_row_without_padding(cache: LogitCache) -> None:
    sequences = [cache[i] for i in (0, 1, 2)]
    batch = Collator(flat=True)(sequences, np.array([0, 1, 1]))
    assert batch["input_ids"].tolist() == [np.concatenate([s.input_ids for s in sequences]).tolist()]
    assert batch["position_ids"].tolist() == [[i for s in sequences for i in range(len(s.input_ids))]]


@pytest.mark.parametrize("flat", [False, True])
def test_stored_positions_of_a_packed_batch_are_those_of_its_sequences(flat: bool, cache: LogitCache) -> None:
    sequences = [cache[i] for i in (3, 4, 5, 6)]
    batch = Collator(flat=flat)(sequences, np.array([0, 0, 1, 1]))
    rows, columns = batch["input_ids"].shape
    assert batch["rows"].tolist() == sorted(batch["rows"].tolist())
    places = batch["rows"] // len(batch["columns"]), batch["columns"][batch["rows"] % len(batch["columns"])]
    assert int(places[0].max()) < rows and int(places[1].max()) + 1 < columns
    assert batch["input_ids"][places].tolist() == [t for s in sequences for t in s.input_ids[s.positions].tolist()]
    assert batch["labels"].tolist() == [t for s in sequences for t in s.input_ids[s.positions + 1].tolist()]
    assert batch["labels"].tolist() == batch["input_ids"][places[0], places[1] + 1].tolist()
    np.testing.assert_array_equal(batch["token_ids"], np.concatenate([s.targets.token_ids for s in sequences]))


@pytest.fixture(params=["weights float32", "weights bfloat16", "autocast bfloat16"])
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """The weights' dtype, perhaps in an autocast."""
    with torch.autocast("cpu", torch.bfloat16, enabled=request.param.startswith("autocast")):
        yield torch.bfloat16 if request.param == "weights bfloat16" else torch.float32


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("spread", [0.3, 0.01])
@pytest.mark.parametrize("name", MIXING)
def test_a_model_that_mixes_sequences_is_refused_however_little_it_mixes_them(
    name: str, spread: float, flat: bool, dtype: torch.dtype
) -> None:
    model = model_of(name, "eager", MIXING[name] | {"initializer_range": spread, "init_std": spread})
    nn.Module.to(model, dtype)
    with pytest.raises(UserError, match=f"--packing: {name}ForCausalLM with .*does not keep.* --packing out"):
        check_packing(model, flat)
    assert model.training


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", [*MODELS, "Qwen3Moe"])
def test_a_model_that_keeps_sequences_apart_is_accepted_in_any_precision(
    name: str, attention: str, flat: bool, dtype: torch.dtype
) -> None:
    model = model_of(name, attention, MODELS.get(name, SIZES | EXPERTS))
    nn.Module.to(model, dtype)
    check_packing(model, flat)
    assert all(weight.grad is None for weight in model.parameters())
    assert not model.get_input_embeddings()._forward_hooks


def test_frozen_weights_can_be_checked() -> None:
    for name, refused in (("Llama", False), ("OPT", True)):
        model = model_of(name, "eager", (MODELS | MIXING)[name]).requires_grad_(False)
        with pytest.raises(UserError, match="does not keep") if refused else nullcontext():
            check_packing(model, flat=False)


def test_a_model_that_counts_positions_through_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("GPT2")
    positions: Any = model.get_submodule("transformer.wpe")
    embed = positions.forward
    monkeypatch.setattr(positions, "forward", lambda ids: embed(torch.arange(ids.shape[1]).expand_as(ids)))
    with pytest.raises(UserError, match=r"GPT2LMHeadModel with .* does not count the positions .* anew"):
        check_packing(model, flat=False)


def test_a_cache_of_keys_and_values_is_refused_beside_packing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--packing --use_cache true: .*Leave --use_cache out"):
        DistillConfig(output_dir=str(tmp_path), use_cpu=True, packing=True, use_cache=True)
    DistillConfig(output_dir=str(tmp_path), use_cpu=True, use_cache=True)


@pytest.mark.parametrize("flat", [False, True])
def test_an_attention_implementation_that_mixes_sequences_is_refused_with_another_to_take(flat: bool) -> None:
    AttentionInterface.register("unmasked", sdpa_attention_forward)  # transformers makes no mask for a name of its own
    model = model_of("Llama", "unmasked")
    with pytest.raises(
        UserError, match=r"implementation unmasked does not keep .*--attn_implementation sdpa, or flash"
    ):
        check_packing(model, flat)


def test_a_loader_packs_every_row_once(cache: LogitCache) -> None:
    batches = list(BatchLoader(cache, Batching(2, packed_length=48), Collator(), shuffle=True, seed=1))
    assert sum(int(batch["num_tokens"]) for batch in batches) == sum(len(row.input_ids) for row in cache)
    assert sum(len(batch["labels"]) for batch in batches) == cache.num_positions
    assert all(batch["input_ids"].shape[0] <= 2 and batch["input_ids"].shape[1] <= 48 for batch in batches)


def test_packed_batches_of_two_ranks_go_on_after_any_batch(cache: LogitCache) -> None:
    for rank in range(2):
        loader = BatchLoader(
            cache, Batching(1, packed_length=32), Collator(), shuffle=True, shard=(rank, 2), num_epochs=2
        )
        loader.set_epoch(1)
        whole = list(loader)
        for skipped in (1, len(whole) - 1):
            rest = list(skip_first_batches(loader, skipped))
            assert len(rest) == len(whole) - skipped
            for found, expected in zip(rest, whole[skipped:], strict=True):
                assert all(found[name].equal(expected[name]) for name in expected)

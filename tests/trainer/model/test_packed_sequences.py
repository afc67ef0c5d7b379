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
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from logitcache import LogitCache, UserError
from logitcache.errors import one_line
from tests.helpers.batches import equal
from tests.helpers.cachemaking import TINY, VOCAB, random_sequences, write_cache
from tests.helpers.distilling import CatchGradient, Gradient, config, relative_difference
from tests.helpers.kernels import DEVICE
from tests.helpers.matrix import every_pair
from trainer.config.config import DistillConfig
from trainer.data.collator import Batch, Collator
from trainer.data.loader import BatchLoader
from trainer.data.sampler import Batching
from trainer.evaluation.evaluate import evaluate
from trainer.losses.fused import Mixture
from trainer.losses.settings import LossSettings
from trainer.model.objective import objective_of
from trainer.model.packing_check import check_packing
from trainer.run.distill_trainer import DistillTrainer

SIZES: dict[str, Any] = TINY | {"head_dim": 16, "max_position_embeddings": 256, "use_cache": False}
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
    model.train()
    return model


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
        mixture = Mixture(0.7, 0.3)
        total = (
            total
            + objective(
                model, batch, batch.targets, mixture=mixture, settings=settings, vocab_size=VOCAB, validate=True
            )[0]
        )
    total.backward()
    return float(total.detach()), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
@every_pair(name=list(MODELS), attention=["sdpa", "eager"], flat=[False, True])
def test_packed_sequences_have_the_loss_and_gradient_of_each_alone(
    name: str, attention: str, flat: bool, long_cache: LogitCache
) -> None:
    model = model_of(name, attention)
    check_packing(model, flat, row_length=64, longest=40)
    assert model.training
    packed = list(BatchLoader(long_cache, Batching(3, packed_length=64), Collator(flat=flat), shuffle=True))
    assert len(packed) < 4
    loss, gradient = loss_and_gradient(model, packed)
    expected, expected_gradient = loss_and_gradient(model, [Collator()([row]) for row in long_cache])
    assert loss == pytest.approx(expected, rel=1e-5)
    for parameter, found in gradient.items():
        difference = (found - expected_gradient[parameter]).norm() / expected_gradient[parameter].norm()
        assert difference < 1e-5, parameter


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["sdpa", *(f"flash_attention_{version}" for version in (2, 3, 4))])
def test_a_packed_step_on_a_device_takes_the_gradient_of_each_sequence_alone(
    attention: str, long_cache: LogitCache, tmp_path: Path
) -> None:
    """In bfloat16 on a GPU, as flash attention needs it; each alone in float32."""
    settings = SIZES | {"hidden_size": 128, "head_dim": 64, "initializer_range": 0.05}
    half = DEVICE == "cuda"

    def gradient(attention: str, **options: Any) -> Gradient:
        caught = CatchGradient()
        options |= {"use_cpu": DEVICE == "cpu", "per_device_train_batch_size": len(long_cache), "max_steps": 1}
        model = model_of("Llama", attention, settings)
        DistillTrainer(model, long_cache, config(tmp_path, **options), callbacks=[caught]).train()
        return caught.gradient

    try:
        found = gradient(attention, packing=True, packed_length=64, bf16=half)
    except ImportError as error:
        pytest.skip(f"{attention}: {one_line(error)}")
    assert relative_difference(found, gradient("eager")) < (0.03 if half else 1e-5)


def test_a_packed_batch_begins_anew_at_every_sequence_and_in_the_padding(cache: LogitCache) -> None:
    sequences = [cache[i] for i in (0, 1, 2)]
    lengths = [len(sequence.input_ids) for sequence in sequences]
    batch = Collator()(sequences, np.array([0, 1, 1]))
    assert batch.attention_mask is None
    assert batch.position_ids is not None
    width = max(lengths[0], lengths[1] + lengths[2])
    first = [*range(lengths[0]), *range(width - lengths[0])]
    second = [*range(lengths[1]), *range(lengths[2]), *range(width - lengths[1] - lengths[2])]
    assert batch.position_ids.tolist() == [first, second]
    assert batch.num_tokens == sum(lengths)
    assert batch.input_ids[1, lengths[1] :][: lengths[2]].tolist() == sequences[2].input_ids.tolist()


def test_flat_is_one_row_without_padding(cache: LogitCache) -> None:
    sequences = [cache[i] for i in (0, 1, 2)]
    batch = Collator(flat=True)(sequences, np.array([0, 1, 1]))
    assert batch.position_ids is not None
    assert batch.input_ids.tolist() == [np.concatenate([s.input_ids for s in sequences]).tolist()]
    assert batch.position_ids.tolist() == [[i for s in sequences for i in range(len(s.input_ids))]]


@pytest.mark.parametrize("flat", [False, True])
def test_stored_positions_of_a_packed_batch_are_those_of_its_sequences(flat: bool, cache: LogitCache) -> None:
    sequences = [cache[i] for i in (3, 4, 5, 6)]
    batch = Collator(flat=flat)(sequences, np.array([0, 0, 1, 1]))
    rows, columns = batch.input_ids.shape
    assert batch.logit_indices.tolist() == sorted(batch.logit_indices.tolist())
    places = (
        batch.logit_indices // len(batch.logits_to_keep),
        batch.logits_to_keep[batch.logit_indices % len(batch.logits_to_keep)],
    )
    assert int(places[0].max()) < rows and int(places[1].max()) + 1 < columns
    assert batch.input_ids[places].tolist() == [t for s in sequences for t in s.input_ids[s.positions].tolist()]
    assert batch.labels.tolist() == [t for s in sequences for t in s.input_ids[s.positions + 1].tolist()]
    assert batch.labels.tolist() == batch.input_ids[places[0], places[1] + 1].tolist()
    np.testing.assert_array_equal(batch.targets.token_ids, np.concatenate([s.targets.token_ids for s in sequences]))


PRECISIONS = ["weights float32", "weights bfloat16", "autocast bfloat16"]


@pytest.fixture
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """The weights' dtype, perhaps in an autocast."""
    with torch.autocast("cpu", torch.bfloat16, enabled=request.param.startswith("autocast")):
        yield torch.bfloat16 if request.param == "weights bfloat16" else torch.float32


@pytest.mark.slow
@every_pair(["dtype"], name=list(MIXING), spread=[0.3, 0.01], flat=[False, True], dtype=PRECISIONS)
def test_a_model_that_mixes_sequences_is_refused_however_little_it_mixes_them(
    name: str, spread: float, flat: bool, dtype: torch.dtype
) -> None:
    model = model_of(name, "eager", MIXING[name] | {"initializer_range": spread, "init_std": spread})
    nn.Module.to(model, dtype)
    with pytest.raises(UserError, match=f"--packing: {name}ForCausalLM with .*does not keep.* --packing out"):
        check_packing(model, flat, row_length=64, longest=40)
    assert model.training


@pytest.mark.slow
@every_pair(["dtype"], name=[*MODELS, "Qwen3Moe"], attention=["sdpa", "eager"], flat=[False, True], dtype=PRECISIONS)
def test_a_model_that_keeps_sequences_apart_is_accepted_in_any_precision(
    name: str, attention: str, flat: bool, dtype: torch.dtype
) -> None:
    model = model_of(name, attention, MODELS.get(name, SIZES | EXPERTS))
    nn.Module.to(model, dtype)
    check_packing(model, flat, row_length=64, longest=40)
    assert all(weight.grad is None for weight in model.parameters())
    assert not model.get_input_embeddings()._forward_hooks


def test_frozen_weights_can_be_checked() -> None:
    for name, refused in (("Llama", False), ("OPT", True)):
        model = model_of(name, "eager", (MODELS | MIXING)[name]).requires_grad_(False)
        with pytest.raises(UserError, match="does not keep") if refused else nullcontext():
            check_packing(model, flat=False, row_length=64, longest=40)


def test_a_model_that_counts_positions_through_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("GPT2")
    positions: Any = model.get_submodule("transformer.wpe")
    embed = positions.forward
    monkeypatch.setattr(positions, "forward", lambda ids: embed(torch.arange(ids.shape[1]).expand_as(ids)))
    with pytest.raises(UserError, match=r"GPT2LMHeadModel with .* does not count the positions .* anew"):
        check_packing(model, flat=False, row_length=64, longest=40)


def test_a_cache_of_keys_and_values_is_refused_beside_packing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--packing --use_cache true: .*Leave --use_cache out"):
        DistillConfig(output_dir=str(tmp_path), use_cpu=True, packing=True, use_cache=True)
    DistillConfig(output_dir=str(tmp_path), use_cpu=True, use_cache=True)


LLAMA4: dict[str, Any] = SIZES | {
    "intermediate_size_mlp": 48,
    "num_local_experts": 4,
    "no_rope_layers": [1, 0],
    "layer_types": ["chunked_attention", "full_attention"],
    "attention_chunk_size": 256,
    "attn_temperature_tuning": False,
}
CHUNKED = LLAMA4 | {"attention_chunk_size": 48}
TEMPERED = LLAMA4 | {"attn_temperature_tuning": True, "floor_scale": 49, "attn_scale": 2.0}
BLOCKS: dict[str, Any] = SIZES | EXPERTS | {"num_local_experts": 8, "layer_types": ["minimax_m3_sparse"] * 2}
BLOCKS |= {"index_block_size": 48, "index_topk_blocks": 1, "index_n_heads": 2, "index_head_dim": 16}
LATENT: dict[str, Any] = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
INDEXED: dict[str, Any] = SIZES | LATENT | {"v_head_dim": 16, "index_topk": 16, "index_n_heads": 32}
INDEXED |= {"index_head_dim": 16, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
SCALED: dict[str, Any] = SIZES | {
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 16.0,
        "original_max_position_embeddings": 16,
        "llama_4_scaling_beta": 0.5,
    }
}


def differs_in_a_row(model: PreTrainedModel, lengths: list[int]) -> float:
    """By how much logits of sequences in one packed row differ from those of each alone, written out."""
    parts = torch.randint(0, VOCAB, (sum(lengths),), generator=torch.Generator().manual_seed(1)).split(lengths)
    positions = torch.cat([torch.arange(length) for length in lengths])
    with torch.no_grad():
        packed = model.eval()(input_ids=torch.cat(parts)[None], position_ids=positions[None]).logits[0]
        alone = torch.cat([model(input_ids=part[None]).logits[0] for part in parts])
    return float((packed - alone).abs().max())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("Llama4Text", CHUNKED, r"cuts its attention every 48 tokens .* up to 64 tokens. Take --packed_length 48"),
        ("Llama4Text", TEMPERED, r"scales its attention anew every 49 tokens .* Take --packed_length 48, or leave"),
        ("MiniMaxM3VLText", BLOCKS, r"does not treat the tokens of a long row as it does those of a sequence alone"),
    ],
    ids=["chunks", "temperatures", "blocks"],
)
@pytest.mark.parametrize("dtype", PRECISIONS, indirect=True)
def test_what_goes_by_the_column_far_into_a_row_bounds_its_length(
    name: str, settings: dict[str, Any], said: str, dtype: torch.dtype
) -> None:
    model = model_of(name, "eager", settings)
    assert differs_in_a_row(model, [8, 40]) < 1e-3
    assert differs_in_a_row(model, [30, 34]) > 0.1
    nn.Module.to(model, dtype)
    with pytest.raises(UserError, match=said):
        check_packing(model, False, row_length=64, longest=40)
    check_packing(model, False, row_length=48, longest=40)


def test_a_cache_whose_sequences_alone_are_too_long_for_a_row_is_not_advised_a_shorter_one() -> None:
    with pytest.raises(UserError, match=r"up to 64 tokens. Leave --packing out") as caught:
        check_packing(model_of("Llama4Text", "eager", CHUNKED), False, row_length=64, longest=60)
    assert "--packed_length" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("DeepseekV32", INDEXED), ("Ministral3", SCALED), ("GPTNeo", SIZES | GPT2), ("Qwen3", SIZES)],
    ids=["sparse by scores", "scaled by position", "local", "full"],
)
def test_what_goes_by_the_position_in_a_sequence_may_be_packed(name: str, settings: dict[str, Any]) -> None:
    if name == "GPTNeo":
        settings = settings | {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 2}
        settings |= {"window_size": 16}
    model = model_of(name, "eager", settings)
    assert differs_in_a_row(model, [30, 34, 64]) < 1e-3
    check_packing(model, False, row_length=128, longest=60)


@pytest.mark.parametrize("columns", [16, 60])
def test_a_fault_that_begins_anywhere_in_a_row_is_found(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("GPT2")
    positions: Any = model.get_submodule("transformer.wpe")
    embed = positions.forward

    def by_column_at_the_end(ids: Tensor) -> Tensor:
        through = torch.arange(ids.shape[1]).expand_as(ids)
        embedded: Tensor = embed(torch.where(through < columns, ids, through))
        return embedded

    monkeypatch.setattr(positions, "forward", by_column_at_the_end)
    check_packing(model, False, row_length=columns, longest=columns - 3)
    with pytest.raises(UserError, match=r"--packing: GPT2LMHeadModel .* long row .* differ by up to"):
        check_packing(model, False, row_length=columns + 4, longest=columns - 3)


def test_the_long_row_is_compared_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = model_of("Llama"), []
    monkeypatch.setattr("trainer.model.packing_check.COMPARED_LOGITS", 40 * VOCAB)
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    check_packing(model, False, row_length=200, longest=30)
    assert max(seen) <= 40 and sum(seen) > 80


def test_frequencies_that_the_longest_sequence_of_a_batch_decides(
    tmp_path: Path, long_cache: LogitCache, caplog: pytest.LogCaptureFixture
) -> None:
    rotation = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    settings = SIZES | {"original_max_position_embeddings": 16, "rope_parameters": rotation}
    options: dict[str, Any] = {"output_dir": str(tmp_path), "use_cpu": True}
    with pytest.raises(
        UserError, match=r"rotates all sequences .* 16 tokens .*--per_device_train_batch_size 1, or build"
    ):
        DistillTrainer(model_of("Phi3", settings=settings), long_cache, DistillConfig(**options, packing=True))
    assert "rotates" not in caplog.text
    for size, warned in ((1, False), (4, True)):
        DistillTrainer(
            model_of("Phi3", settings=settings), long_cache, DistillConfig(**options, per_device_train_batch_size=size)
        )
        assert ("shorter ones are not trained as they are alone" in caplog.text) == warned
    caplog.clear()
    evaluate(model_of("Phi3", settings=settings), long_cache)
    assert "shorter ones are not measured as they are alone" in caplog.text
    short = settings | {"original_max_position_embeddings": 64}
    check_packing(model_of("Phi3", settings=short), False, row_length=128, longest=40)


@pytest.mark.parametrize("flat", [False, True])
def test_an_attention_implementation_that_mixes_sequences_is_refused_with_another_to_take(flat: bool) -> None:
    AttentionInterface.register("unmasked", sdpa_attention_forward)  # transformers makes no mask for a name of its own
    model = model_of("Llama", "unmasked")
    with pytest.raises(
        UserError, match=r"implementation unmasked does not keep .*--attn_implementation sdpa, or flash"
    ):
        check_packing(model, flat, row_length=64, longest=40)


def test_a_loader_packs_every_row_once(cache: LogitCache) -> None:
    batches = list(BatchLoader(cache, Batching(2, packed_length=48), Collator(), shuffle=True, seed=1))
    assert sum(batch.num_tokens for batch in batches) == sum(len(row.input_ids) for row in cache)
    assert sum(len(batch.labels) for batch in batches) == cache.num_positions
    assert all(batch.input_ids.shape[0] <= 2 and batch.input_ids.shape[1] <= 48 for batch in batches)


def test_packed_batches_of_two_ranks_go_on_after_any_batch(cache: LogitCache) -> None:
    for rank in range(2):
        loader = BatchLoader(
            cache, Batching(1, packed_length=32), Collator(), shuffle=True, shard=(rank, 2), num_epochs=2
        )
        loader.set_epoch(1)
        whole = list(loader)
        for skipped in (1, len(whole) - 1):
            rest = list(skip_first_batches(loader, skipped))
            assert equal(rest, whole[skipped:])

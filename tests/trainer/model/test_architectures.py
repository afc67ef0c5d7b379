"""Students with recurrent layers, and others that differ from Llama, from `trainer fit` to `trainer eval` on a CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from logitcache import LogitCache
from tests.helpers.cachemaking import TINY, VOCAB
from tests.helpers.experts import labelled
from trainer.cli import main

SIZES: dict[str, Any] = TINY | {"head_dim": 16, "max_position_embeddings": 256}
MIXER: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LINEAR: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "shared_expert_intermediate_size": 24,
    "layer_types": ["linear_attention", "full_attention"],
}
LAYERS: dict[str, Any] = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2}
STUDENTS: dict[str, dict[str, Any]] = {
    "Mamba": MIXER,
    "FalconMamba": MIXER,
    "Mamba2": MIXER | {"num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8},
    "Bamba": SIZES
    | {"attn_layer_indices": [1], "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1},
    "Jamba": SIZES | EXPERTS | LAYERS | {"expert_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4},
    "Zamba2": SIZES
    | {"layers_block_type": ["mamba", "hybrid"], "hybrid_layer_ids": [1], "attention_head_dim": 32}
    | {"mamba_d_state": 8, "n_mamba_heads": 4, "mamba_headdim": 16, "mamba_ngroups": 1, "num_mem_blocks": 1},
    "RecurrentGemma": SIZES | {"block_types": ["recurrent", "attention"], "lru_width": 32, "attention_window_size": 8},
    "Qwen3Next": SIZES | EXPERTS | LINEAR,
    "Helium": SIZES,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_trains_on_transformers_own_loss_is_saved_and_measured(
    name: str, tmp_path: Path, cache: LogitCache, heldout: LogitCache, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(3)
    config = getattr(transformers, f"{name}Config")(**STUDENTS[name])
    student: PreTrainedModel = AutoModelForCausalLM.from_config(config).float().train()
    student.save_pretrained(tmp_path / "student")
    own_loss = float(student(**labelled(list(cache))).loss.detach())

    out = tmp_path / "run"
    options = {"cache": cache.path, "eval_cache": heldout.path, "student": str(tmp_path / "student")}
    options |= {"output_dir": str(out), "kd_weight": "0", "learning_rate": "1e-2", "max_steps": "3"}
    options |= {"per_device_train_batch_size": str(len(cache)), "logging_steps": "1"}
    arguments = [part for option, value in options.items() for part in (f"--{option}", value)]
    assert main(["fit", *arguments, "--use_cpu", "--disable_tqdm", "true"]) == 0
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[0] == pytest.approx(own_loss, rel=1e-5)
    assert losses[2] < losses[0]

    trained = json.loads((out / "eval.json").read_text())["metrics"]["ce"]
    assert main(["eval", str(out), "--cache", heldout.path]) == 0
    assert json.loads((out / "eval.json").read_text())["metrics"]["ce"] == pytest.approx(trained, rel=1e-5)
    held_out = labelled(list(heldout))
    assert trained == pytest.approx(
        float(AutoModelForCausalLM.from_pretrained(out)(**held_out).loss.detach()), rel=1e-4
    )

    capsys.readouterr()
    packed = main(["fit", *arguments, "--use_cpu", "--output_dir", str(tmp_path / "packed"), "--packing"])
    assert packed == (0 if name == "Helium" else 2)
    assert packed == 0 or "does not keep packed sequences apart" in capsys.readouterr().err

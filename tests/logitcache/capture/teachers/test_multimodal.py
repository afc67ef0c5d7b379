"""Checkpoints with a vision tower as teachers of text."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import logitcache
from logitcache import UserError
from logitcache.capture.engine import EngineChoice, choose_engine
from logitcache.capture.settings import CaptureSettings
from logitcache.capture.teachers.base import TeacherModel
from logitcache.capture.teachers.hf import TransformersTeacher
from logitcache.format.sequences import TokenSequence
from logitcache.format.targets import SparseTargets
from tests.helpers.processes import CORE_HERE, run_command

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "max_position_embeddings": 256}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}
TOKENS = {"vocab_size": 640, "eos_token_id": 0, "bos_token_id": None, "pad_token_id": None}
TEXT = SIZES | HEADS | TOKENS
VISION = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
CONFIGS: dict[str, dict[str, Any]] = {
    "Gemma3": {
        "text_config": TEXT | {"head_dim": 32, "sliding_window": 64, "query_pre_attn_scalar": 32},
        "vision_config": VISION | {"num_hidden_layers": 1},
        **{"mm_tokens_per_image": 4, "image_token_index": 1, "boi_token_index": 2, "eoi_token_index": 3},
    },
    "Qwen2_5_VL": {
        "text_config": TEXT
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}},
        "vision_config": {
            "hidden_size": 64,
            "intermediate_size": 64,
            "depth": 1,
            "num_heads": 2,
            "out_hidden_size": 64,
        },
        **{"image_token_id": 1, "video_token_id": 2, "vision_start_token_id": 3, "vision_end_token_id": 4},
    },
    "Mistral3": {
        "text_config": TEXT | {"model_type": "mistral", "head_dim": 32},
        "vision_config": VISION | {"model_type": "pixtral", "num_hidden_layers": 1, "head_dim": 32},
        "image_token_index": 4,
    },
}
# Text never reaches torchvision, but the code of the architectures imports it, and beside PyTorch's CPU build it may be missing.
STANDIN = """
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from unittest.mock import MagicMock

__version__ = "0.28.0"

class Anything(ModuleType):
    __path__ = []
    __getattr__ = MagicMock()

class Finder:
    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self, is_package=True) if name.startswith("torchvision.") else None
    def create_module(self, spec):
        return Anything(spec.name)
    def exec_module(self, module):
        pass

sys.meta_path.insert(0, Finder())
"""


def make_checkpoint(path: Path, tokenizer: Any, name: str) -> Path:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**CONFIGS[name], dtype="float32")
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.2)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def assert_agrees(path: Path, scored: Iterable[tuple[np.ndarray, np.ndarray, SparseTargets]], tolerance: float) -> None:
    """The teacher's log-probabilities are those of the checkpoint's own class, in eager attention and float32.

    scored: token ids, stored positions and targets of each sequence.
    """
    config = transformers.AutoConfig.from_pretrained(path)
    model = getattr(transformers, config.architectures[0]).from_pretrained(path, attn_implementation="eager").eval()
    for input_ids, positions, targets in scored:
        with torch.no_grad():
            logits = model(torch.tensor(input_ids).long()[None]).logits[0, torch.tensor(positions).long(), :512]
        full = logits.double().log_softmax(-1)
        own = full.gather(1, torch.tensor(targets.token_ids).long()).numpy()
        assert np.abs(own - targets.logprobs).max() < tolerance
        assert np.abs(full.topk(16).values.numpy() - targets.logprobs).max() < tolerance


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_loads_the_class_that_the_checkpoint_names(
    name: str, teacher_tokenizer: Any, tmp_path: Path
) -> None:
    path = make_checkpoint(tmp_path, teacher_tokenizer, name)
    model = TeacherModel.load(str(path), None, "auto", False)
    teacher = choose_engine(EngineChoice("transformers"), model, []).start(model, 0, 0)
    random = np.random.default_rng(0)
    sequences = [
        TokenSequence(random.integers(8, 512, length, dtype=np.int32), np.arange(length) > 0)
        for length in random.integers(2, 201, 6)
    ]
    scored = zip(sequences, teacher.score(sequences, CaptureSettings(top_k=16)), strict=True)
    assert_agrees(path, [(sequence.input_ids, sequence.positions, targets) for sequence, targets in scored], 1e-4)


def test_the_dtype_of_a_multimodal_checkpoint_is_its_own(teacher_tokenizer: Any, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, teacher_tokenizer, "Gemma3")
    written = json.loads((path / "config.json").read_text())
    written["text_config"].pop("dtype", None)  # as published ones are: it stands above the parts
    (path / "config.json").write_text(json.dumps(written | {"dtype": "bfloat16"}))
    assert TeacherModel.load(str(path), None, "auto", False).dtype == "bfloat16"


def test_weights_that_are_not_in_the_files_are_not_drawn_at_random(teacher: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(teacher)
    weights = {name: weight for name, weight in model.state_dict().items() if "layers.1.mlp.up_proj" not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    transformers.AutoTokenizer.from_pretrained(teacher).save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"1 of its weights are not in its files, model.layers.1.mlp.up_proj.weight for one"
    ):
        TransformersTeacher(TeacherModel.load(str(tmp_path), None, "auto", False))


def build_command(path: Path, corpus: Path, out: Path) -> list[str]:
    return [
        *("logitcache", "build", "--teacher", str(path), "--data", str(corpus), "--out", str(out), "--backend", "vllm"),
        *("--top-k", "16", "--tail-rank", "0", "--precision", "exact", "--max-length", "100", "--max-num-seqs", "8"),
        *("--distributed-executor-backend", "mp"),
    ]


@pytest.mark.engine
def test_vllm_scores_text_with_a_multimodal_checkpoint(teacher_tokenizer: Any, corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    path = make_checkpoint(tmp_path / "model", teacher_tokenizer, "Gemma3")
    package = tmp_path / "packages" / "torchvision"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(STANDIN)
    environment = {
        "PYTHONPATH": f"{package.parent}:{os.environ.get('PYTHONPATH', '')}",
        "VLLM_CACHE_ROOT": str(tmp_path / "vllm"),  # without what vLLM noted with another torchvision
        # One process imports vLLM: it is the engine's core too, and its worker is a fork of it.
        **CORE_HERE,
        "VLLM_WORKER_MULTIPROC_METHOD": "fork",
    }
    command = [sys.executable, "-m", *build_command(path, corpus, tmp_path / "cache")]
    run = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    cache = logitcache.open(tmp_path / "cache")
    assert cache.manifest.fingerprint["teacher"]["route"] == "pooling"
    assert_agrees(path, [(row.input_ids, row.positions, row.targets) for row in list(cache)[::8]], 1e-4)


@pytest.mark.engine
def test_a_missing_torchvision_is_one_line(forked_vllm: None, teacher_tokenizer: Any, tmp_path: Path) -> None:
    if importlib.util.find_spec("torchvision"):
        pytest.skip("torchvision is installed")
    path = make_checkpoint(tmp_path / "model", teacher_tokenizer, "Mistral3")
    command = build_command(path, tmp_path / "none.jsonl", tmp_path / "cache")  # told before the corpus is read
    run = run_command(*command, env=os.environ | {"VLLM_CACHE_ROOT": str(tmp_path / "vllm")})
    assert run.returncode == 2
    assert [line for line in run.stderr.splitlines() if "error" in line.lower()] == [
        f"logitcache: error: --teacher {path}: vLLM does not take this teacher (its code in vLLM needs torchvision, which is "
        "not installed or does not import here); --backend transformers does without vLLM"
    ]
    assert "Traceback" not in run.stderr

"""The teacher's attention computes what its configuration says, on transformers too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, Gemma2Config, Gemma2ForCausalLM, GPTNeoConfig, LlamaConfig

import logitcache
from logitcache import UserError
from logitcache.attention import choose_attention, left_out
from logitcache.cli import main

CAP = 3.0


@pytest.fixture(scope="module")
def capped(tmp_path_factory: pytest.TempPathFactory, teacher_tokenizer: Any) -> Path:
    """A Gemma 2 whose attention scores its cap changes a lot."""
    path = tmp_path_factory.mktemp("capped")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 32}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 2, "query_pre_attn_scalar": 4}
    config = Gemma2Config(
        **sizes,
        **heads,
        vocab_size=512,
        initializer_range=0.3,
        attn_logit_softcapping=CAP,
        dtype="float32",
        eos_token_id=0,
    )
    Gemma2ForCausalLM(config).save_pretrained(path)
    teacher_tokenizer.save_pretrained(path)
    return path


def build(teacher: Path, corpus: Path, out: Path, **options: Any) -> logitcache.LogitCache:
    stored: dict[str, Any] = {"top_k": 8, "tail_rank": 0, "precision": "exact"}
    cache: logitcache.LogitCache = logitcache.build(
        str(teacher), str(corpus), out, backend="transformers", max_length=64, **stored, **options
    )
    return cache


def furthest(cache: logitcache.LogitCache, model: Any) -> float:
    """Largest |Δ log p| of the stored entries from a model's own full softmax."""
    found = 0.0
    for row in list(cache)[:5]:
        with torch.no_grad():
            full = model(torch.tensor(row.input_ids).long()[None]).logits[0].double().log_softmax(-1)
        own = full[torch.tensor(row.positions).long()].gather(1, torch.tensor(row.targets.token_ids).long())
        found = max(found, float(np.abs(own.numpy() - row.targets.logprobs).max()))
    return found


@pytest.mark.slow
def test_a_cap_on_attention_scores_is_applied(
    capped: Path, corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "logitcache")
    cache = build(capped, corpus, tmp_path / "cache")
    eager = Gemma2ForCausalLM.from_pretrained(capped, attn_implementation="eager").eval()
    assert furthest(cache, eager) < 1e-4
    sdpa = Gemma2ForCausalLM.from_pretrained(capped, attn_implementation="sdpa").eval()
    assert furthest(cache, sdpa) > 1e-2, "this teacher would not show the fault"
    assert "attention: eager, since sdpa leaves out attn_logit_softcapping = 3" in caplog.text
    assert cache.manifest.fingerprint["teacher"]["attn_implementation"] == "eager"


def test_an_attention_that_leaves_something_out_is_refused_before_the_corpus_is_read(
    capped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--backend", "transformers", "--attn-implementation", "sdpa", "--out", str(tmp_path / "cache")]
    assert main(["build", "--teacher", str(capped), "--data", str(tmp_path / "none.jsonl"), *options]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert "--attn-implementation sdpa: it leaves out attn_logit_softcapping = 3" in errors[0]


@pytest.mark.slow
def test_the_attention_can_be_chosen_and_stands_in_the_fingerprint(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    chosen = build(teacher, corpus, tmp_path / "eager", attn_implementation="eager")
    default = build(teacher, corpus, tmp_path / "default")
    assert chosen.manifest.fingerprint["teacher"]["attn_implementation"] == "eager"
    assert "attn_implementation" not in default.manifest.fingerprint["teacher"]  # as in caches of former versions
    for one, other in zip(chosen, default, strict=True):
        assert np.abs(one.targets.logprobs - other.targets.logprobs).max() < 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attn_implementation": "foo"}, r"--attn-implementation foo: transformers does not load this teacher \("),
        (
            {"attn_implementation": "eager", "backend": "openai", "base_url": "http://localhost:1/v1"},
            "--attn-implementation eager is an option of transformers, and the backend is openai",
        ),
    ],
)
def test_a_wrong_choice_is_refused_before_the_corpus_is_read(
    options: dict[str, Any], message: str, teacher: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        logitcache.build(
            str(teacher), str(tmp_path / "none.jsonl"), tmp_path / "c", **({"backend": "transformers"} | options)
        )


@pytest.mark.slow
def test_an_architecture_that_transformers_does_not_know_is_refused_before_the_corpus_is_read(
    capped: Path, teacher_tokenizer: Any, tmp_path: Path
) -> None:
    teacher_tokenizer.save_pretrained(tmp_path)
    settings = {"model_type": "clip_text_model", "vocab_size": 512, "architectures": ["CLIPTextModel"]}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="transformers does not load this teacher"):
        logitcache.build(str(tmp_path), str(tmp_path / "none.jsonl"), tmp_path / "c", backend="transformers")


def test_what_is_left_out_is_known_by_name(capped: Path) -> None:
    gemma, local, plain = AutoConfig.from_pretrained(capped), GPTNeoConfig(), LlamaConfig()
    assert left_out(gemma, None) == left_out(gemma, "sdpa") == "attn_logit_softcapping = 3"
    assert left_out(gemma, "eager") is left_out(gemma, "flash_attention_2") is left_out(gemma, "flex_attention") is None
    assert left_out(local, "flash_attention_2") == "window_size = 256 of the local layers"
    assert left_out(local, None) is left_out(local, "eager") is None
    assert all(left_out(plain, name) is None for name in (None, "sdpa", "eager", "flash_attention_2"))
    assert choose_attention(gemma, None, "--x") == "eager"
    assert choose_attention(plain, None, "--x") is None
    assert choose_attention(plain, "sdpa", "--x") == "sdpa"

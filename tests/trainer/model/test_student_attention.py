"""A student's attention computes what its configuration says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma2PreTrainedModel

import logitcache
import trainer
from logitcache import UserError
from trainer.config.config import DistillConfig
from trainer.evaluation.evaluate import evaluate
from trainer.model.student import load_student, student_config
from trainer.run.prepare import prepare

CAP = 3.0


@pytest.fixture(autouse=True)
def _transformers_takes_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    """As earlier releases of transformers did with this model."""
    monkeypatch.setattr(Gemma2PreTrainedModel, "_supports_sdpa", True)


@pytest.fixture(scope="module")
def capped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 2 whose attention scores its cap changes a lot."""
    path = tmp_path_factory.mktemp("capped")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 32}
    sizes |= {"vocab_size": 512, "num_attention_heads": 2, "num_key_value_heads": 2, "query_pre_attn_scalar": 4}
    config = Gemma2Config(**sizes, initializer_range=0.3, attn_logit_softcapping=CAP, dtype="float32")
    Gemma2ForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def cache(teacher: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> logitcache.LogitCache:
    out = tmp_path_factory.mktemp("caches") / "cache"
    return logitcache.build(str(teacher), str(corpus), out, backend="transformers", top_k=8, tail_rank=0)


def config(cache: logitcache.LogitCache, student: Path, out: Path, **settings: Any) -> DistillConfig:
    return DistillConfig(
        cache=[cache.path], student=str(student), output_dir=str(out), use_cpu=True, report_to=[], **settings
    )


def test_a_cap_on_attention_scores_is_trained(capped: Path) -> None:
    loaded = load_student(str(capped), student_config(str(capped)), from_scratch=False, dtype=torch.float32)
    ids = torch.arange(60)[None]
    changes: list[dict[str, Any]] = [{}, {"attn_logit_softcapping": None}]
    with_cap, without = (
        Gemma2ForCausalLM.from_pretrained(capped, attn_implementation="eager", **change).eval()(ids).logits
        for change in changes
    )
    found = loaded.eval()(ids).logits
    assert (found - with_cap).abs().max() < 1e-5
    assert (found - without).abs().max() > 1e-2, "this student would not show the fault"


def test_the_choice_is_told_once(cache: logitcache.LogitCache, capped: Path, tmp_path: Path) -> None:
    run = prepare(config(cache, capped, tmp_path))
    told = [warning for warning in run.warnings if "its attention is" in warning]
    assert told == [f"--student {capped}: its attention is eager, since sdpa leaves out attn_logit_softcapping = 3"]
    assert run.student_config._attn_implementation == "eager"


def test_an_attention_that_leaves_something_out_is_refused(
    cache: logitcache.LogitCache, capped: Path, tmp_path: Path
) -> None:
    wanted = r"--attn_implementation sdpa: it leaves out attn_logit_softcapping = 3.*Take eager"
    with pytest.raises(UserError, match=wanted):
        prepare(config(cache, capped, tmp_path, attn_implementation="sdpa"))
    model = Gemma2ForCausalLM.from_pretrained(capped)  # by the user, in Python: transformers takes sdpa
    with pytest.raises(UserError, match=wanted):
        trainer.DistillTrainer(model, cache, config(cache, capped, tmp_path))
    with pytest.raises(UserError, match=wanted):
        evaluate(model, cache)

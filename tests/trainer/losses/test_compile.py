"""torch.compile through transformers' own options: the loss and the student are those of the run without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from logitcache import LogitCache
from tests.helpers.cachemaking import llama
from trainer.config.config import DistillConfig
from trainer.run.distill_trainer import DistillTrainer


def trained(folder: Path, cache: LogitCache, **settings: Any) -> DistillTrainer:
    options: dict[str, Any] = {
        "max_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "optim": "sgd",
        "save_strategy": "no",
    }
    config = DistillConfig(output_dir=str(folder), use_cpu=True, disable_tqdm=True, **options, **settings)
    trainer = DistillTrainer(llama(seed=7), cache, config, eval_cache=cache)
    trainer.train()
    trainer.evaluate()
    return trainer


@pytest.mark.slow
def test_a_compiled_student_learns_the_same(tmp_path: Path, cache: LogitCache) -> None:
    """Dynamo and autograd's capture are what can break; aot_eager has both and no code generation."""
    plain = trained(tmp_path, cache)
    torch._dynamo.reset()
    compiled = trained(tmp_path, cache, torch_compile=True, torch_compile_backend="aot_eager")
    assert isinstance(compiled.model_wrapped, torch._dynamo.OptimizedModule)
    for logged, expected in zip(compiled.state.log_history, plain.state.log_history, strict=True):
        for name in ("loss", "ce", "fkl", "eval_loss", "eval_fkl"):
            if name in expected:
                assert logged[name] == pytest.approx(expected[name], rel=1e-5), name
    assert plain.model is not None and compiled.model is not None
    for name, parameter in plain.model.named_parameters():
        torch.testing.assert_close(compiled.model.get_parameter(name), parameter, rtol=1e-5, atol=1e-6)

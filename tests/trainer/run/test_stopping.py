"""The best checkpoint by any held-out metric, and stopping when it gets no better."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from logitcache import LogitCache, UserError
from trainer.cli import main
from trainer.config.arguments import parse
from trainer.evaluation.evaluate import evaluate


@pytest.mark.slow
def test_a_run_that_gets_no_better_stops_and_keeps_its_best_weights(
    tmp_path: Path, cache: LogitCache, heldout: LogitCache, student_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    arguments = ["--cache", cache.path, "--eval_cache", heldout.path, "--student", student_folder, "--use_cpu"]
    arguments += ["--max_steps", "40", "--eval_steps", "2", "--learning_rate", "0.1", "--lr_scheduler_type", "constant"]
    arguments += ["--early_stopping_patience", "2", "--metric_for_best_model", "ce", "--output_dir", str(out)]
    assert main(["fit", *arguments]) == 0

    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    measured = {entry["step"]: entry["eval_ce"] for entry in history if "eval_ce" in entry}
    best = min(measured, key=lambda step: measured[step])
    assert max(measured) == best + 4 < 40, "two evaluations without a better one"
    assert f"the best held-out ce, {measured[best]:.4g}, was at step {best}" in capsys.readouterr().out
    saved = evaluate(AutoModelForCausalLM.from_pretrained(out), heldout)
    assert saved["ce"] == pytest.approx(measured[best], rel=1e-5)
    assert json.loads((out / "eval.json").read_text())["metrics"]["ce"] == pytest.approx(measured[best], rel=1e-5)


def test_agreement_is_better_when_greater_and_everything_else_when_less(tmp_path: Path) -> None:
    common = ["--output_dir", str(tmp_path), "--use_cpu", "--eval_cache", "x", "--load_best_model_at_end"]
    for metric, greater in (("agreement", True), ("fkl", False), ("ece", False), ("eval_rkl", False)):
        config = parse([*common, "--metric_for_best_model", metric])
        assert config.greater_is_better is greater
        assert config.metric_for_best_model == metric.removeprefix("eval_")
        assert config.save_steps == config.eval_steps


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--early_stopping_patience 2", "name the held-out cache with --eval_cache"),
        ("--eval_cache x --early_stopping_patience 0", "--early_stopping_patience 0: it must be at least 1"),
        ("--eval_cache x --early_stopping_threshold 0.1", "without --early_stopping_patience"),
        ("--eval_cache x --load_best_model_at_end --metric_for_best_model bleu", "accepted are loss, ce, perplexity"),
        (
            "--eval_cache x --load_best_model_at_end --save_strategy no",
            "--save_strategy no: the best checkpoint cannot",
        ),
    ],
)
def test_what_cannot_be_judged_is_refused(options: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        parse([*options.split(), "--output_dir", str(tmp_path), "--use_cpu"])

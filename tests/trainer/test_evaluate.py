"""Evaluation: every number against a slow float64 computation, one position at a time."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from cachemaking import VOCAB, llama, teacher_logprobs

from logitcache import LogitCache, UserError
from trainer.cli import main
from trainer.evaluate import evaluate, evaluate_folder
from trainer.losses.sparse import distillation_terms
from trainer.losses.tail import TeacherTargets
from trainer.metrics import Sums, evaluation_metrics, evaluation_sums


def slow_metrics(cache: LogitCache) -> dict[str, float]:
    """Of the student `llama(seed=7)` against the teacher `llama()`."""
    teacher, student = llama(), llama(seed=7)
    ce = fkl = rkl = agree = 0.0
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(15)]
    for sequence in cache:
        ids = torch.tensor(sequence.input_ids, dtype=torch.long)
        with torch.no_grad():
            log_q = student(ids[None]).logits[0].double().log_softmax(1)
        log_p = teacher_logprobs(teacher, sequence)
        for row, position in enumerate(sequence.positions):
            kept = torch.tensor(sequence.targets.token_ids[row]).long()
            q, p = log_q[position].exp(), log_p[row].exp()
            outcomes = [(p[j], q[j]) for j in kept] + [(1 - p[kept].sum(), 1 - q[kept].sum())]
            fkl += sum(float(a * (a / b).log()) for a, b in outcomes)
            rkl += sum(float(b * (b / a).log()) for a, b in outcomes)
            label = int(ids[position + 1])
            ce -= float(log_q[position, label])
            agree += int(q.argmax()) == int(p.argmax())
            confidence = float(q.max())
            bins[max(0, math.ceil(confidence * 15) - 1)].append((confidence, int(q.argmax()) == label))
    n = cache.num_positions
    ece = sum(abs(sum(c for c, _ in bin) - sum(hit for _, hit in bin)) for bin in bins) / n
    return {
        "ce": ce / n,
        "perplexity": math.exp(ce / n),
        "fkl": fkl / n,
        "rkl": rkl / n,
        "agreement": agree / n,
        "ece": ece,
        "positions": n,
    }


@pytest.mark.parametrize("batch_size", [1, 5])
def test_every_metric_is_its_definition(heldout: LogitCache, batch_size: int) -> None:
    found = evaluate(llama(seed=7), heldout, batch_size=batch_size)
    for name, expected in slow_metrics(heldout).items():
        assert found[name] == pytest.approx(expected, rel=1e-4), name


def test_calibration_keeps_neighbouring_bins_apart() -> None:
    confidence = torch.tensor([0.05, 0.1], dtype=torch.float64)  # the first and the second of 15 bins
    logits = ((1 - confidence) / (VOCAB - 1)).log()[:, None].repeat(1, VOCAB)
    logits[:, 3] = confidence.log()
    labels = torch.tensor([3, 4])  # the first is right, the second wrong
    batch = {"labels": labels, "tail_logprob": torch.full((2,), -1.0)}
    targets = TeacherTargets(torch.tensor([[3], [3]]), torch.full((2, 1), -1.0), torch.full((2,), -1.0))
    terms = distillation_terms(logits, targets, labels, loss="fkl")
    sums = Sums()
    sums.add(evaluation_sums(terms, logits, batch, VOCAB))
    assert evaluation_metrics(sums.totals())["ece"] == pytest.approx((0.95 + 0.1) / 2, rel=1e-5)


def test_a_teacher_is_at_distance_0_from_itself(heldout: LogitCache) -> None:
    found = evaluate(llama(), heldout)
    assert found["fkl"] == pytest.approx(0, abs=1e-6)
    assert found["rkl"] == pytest.approx(0, abs=1e-6)
    assert found["agreement"] == 1


def test_trainer_eval_prints_a_table_and_writes_json(
    tmp_path: Path, heldout: LogitCache, capsys: pytest.CaptureFixture[str]
) -> None:
    llama(seed=7).save_pretrained(tmp_path)
    assert main(["eval", str(tmp_path), "--cache", heldout.path]) == 0
    table = capsys.readouterr().out
    written = json.loads((tmp_path / "eval.json").read_text())
    assert written["cache"] == heldout.path
    assert written["metrics"]["fkl"] == pytest.approx(slow_metrics(heldout)["fkl"], rel=1e-4)
    assert f"{written['metrics']['perplexity']:,.5g}" in table
    assert "top-1 agreement" in table


def test_a_model_with_a_smaller_vocabulary_is_refused(tmp_path: Path, heldout: LogitCache) -> None:
    llama(vocab_size=40).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"40 columns, .* 64 tokens"):
        evaluate_folder(str(tmp_path), heldout.path)

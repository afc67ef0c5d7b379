"""Evaluation: every number against a slow float64 computation, one position at a time."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

import logitcache
from logitcache import LogitCache, UserError
from tests.helpers.cachemaking import VOCAB, llama, teacher_logprobs
from tests.helpers.distilling import not_understood
from trainer.cli import main
from trainer.evaluation.evaluate import evaluate
from trainer.evaluation.identity import identities
from trainer.evaluation.metrics import Sums, evaluation_metrics, evaluation_sums
from trainer.losses.settings import LossSettings
from trainer.losses.sparse import distillation_terms
from trainer.losses.targets import TeacherTargets


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


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 5])
def test_every_metric_is_its_definition(heldout: LogitCache, batch_size: int) -> None:
    found = evaluate(llama(seed=7), heldout, batch_size=batch_size)
    for name, expected in slow_metrics(heldout).items():
        assert found[name] == pytest.approx(expected, rel=1e-4), name


def test_a_model_that_is_measured_from_its_logits_gets_the_same_numbers(heldout: LogitCache) -> None:
    fused, from_logits = evaluate(llama(seed=7), heldout), evaluate(not_understood(), heldout)
    assert from_logits == pytest.approx(fused, rel=1e-4)


def test_calibration_keeps_neighbouring_bins_apart() -> None:
    confidence = torch.tensor([0.05, 0.1], dtype=torch.float64)  # the first and the second of 15 bins
    logits = ((1 - confidence) / (VOCAB - 1)).log()[:, None].repeat(1, VOCAB)
    logits[:, 3] = confidence.log()
    labels = torch.tensor([3, 4])  # the first is right, the second wrong
    targets = TeacherTargets(torch.tensor([[3], [3]]), torch.full((2, 1), -1.0), torch.full((2,), -1.0))
    terms = distillation_terms(logits, targets, labels, settings=LossSettings("fkl"))
    sums = Sums()
    sums.add(evaluation_sums(terms, targets))
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
        evaluate(str(tmp_path), heldout)


def test_a_model_that_takes_shorter_sequences_is_refused_before_its_weights_load(
    tmp_path: Path, heldout: LogitCache
) -> None:
    llama(max_length=8).config.save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=rf"has {heldout.manifest.longest} tokens, the student takes 8 .*--max-length 8"
    ):
        evaluate(str(tmp_path), heldout)


def test_an_evaluation_on_another_cache_is_not_overwritten(
    tmp_path: Path, cache: LogitCache, heldout: LogitCache, capsys: pytest.CaptureFixture[str]
) -> None:
    llama(seed=7).save_pretrained(tmp_path)
    assert main(["eval", str(tmp_path), "--cache", heldout.path]) == 0
    written = (tmp_path / "eval.json").read_text()
    assert json.loads(written)["cache_sha256"] == heldout.identity
    assert main(["eval", str(tmp_path), "--cache", cache.path]) == 2
    error = capsys.readouterr().err
    assert all(words in error for words in (heldout.path, cache.path, "--out"))
    assert (tmp_path / "eval.json").read_text() == written
    assert main(["eval", str(tmp_path), "--cache", cache.path, "--out", str(tmp_path / "other.json")]) == 0
    former = written.replace(*identities(heldout))
    assert former != written
    (tmp_path / "eval.json").write_text(former)
    assert main(["eval", str(tmp_path), "--cache", heldout.path]) == 0
    assert (tmp_path / "eval.json").read_text() == written


def test_a_cache_has_one_identity_wherever_it_lies(tmp_path: Path, cache: LogitCache, heldout: LogitCache) -> None:
    shutil.copytree(heldout.path, tmp_path / "copy")
    assert identities(logitcache.open(tmp_path / "copy")) == identities(heldout)
    assert identities(heldout)[0] == heldout.identity
    assert not {*identities(cache)} & {*identities(heldout)}


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--batch_size", "0"], "at least 1"), (["--out", "missing/folder/eval.json"], "--out missing/folder/eval.json")],
)
def test_what_eval_cannot_do_is_refused_before_the_model_loads(
    options: list[str], said: str, heldout: LogitCache, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "no-such-model", "--cache", heldout.path, "--out", "eval.json", *options]) == 2
    assert said in capsys.readouterr().err


def test_the_numbers_are_printed_even_where_they_cannot_be_written(
    tmp_path: Path, heldout: LogitCache, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def disk_full(*args: object) -> None:
        raise UserError("no space left")

    llama(seed=7).save_pretrained(tmp_path)
    monkeypatch.setattr("trainer.evaluation.evaluate.write_json", disk_full)
    assert main(["eval", str(tmp_path), "--cache", heldout.path]) == 2
    assert "top-1 agreement" in capsys.readouterr().out

"""Runs that learn from a low-rank tail: its gradient by brute force, and the weight of the residuals."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import logitcache
from logitcache import CachedSequence, LogitCache, UserError
from logitcache.format.layout import Layout
from logitcache.format.tail_basis import TailBasis
from logitcache.format.tail_parts import TailParts
from logitcache.storage.folder import Folder
from tests.helpers.cachemaking import VOCAB, llama, random_sequences, write_cache
from tests.helpers.distilling import CatchGradient, config, near_teacher
from tests.helpers.processes import on_two_ranks
from tests.helpers.smallcaches import FINGERPRINT, tail_basis
from tests.helpers.two_ranks import train_three_steps
from trainer.config.config import DistillConfig
from trainer.data.training_data import open_training_data
from trainer.evaluation.evaluate import evaluate
from trainer.run.distill_trainer import DistillTrainer
from trainer.run.prepare import prepare

RANK = 10
WEIGHTS = "residual_weight"


def basis(seed: int = 0) -> TailBasis:
    return tail_basis(Layout(VOCAB, TailParts(rank=RANK)), seed)


@pytest.fixture(scope="module")
def low_rank(tmp_path_factory: pytest.TempPathFactory) -> LogitCache:
    """Eight entries of 64, ten coefficients, two probes."""
    return write_cache(tmp_path_factory.mktemp("low_rank"), random_sequences(23, seed=1), tail_basis=basis())


def rebuilt(sequence: CachedSequence, of: TailBasis) -> Tensor:
    """The teacher's log-probabilities [M, V] as the definitions give them with residual_weight 0."""
    targets, rows = sequence.targets, []
    assert targets.tail_coefficients is not None
    for ids, logprobs, tail, z in zip(
        targets.token_ids, targets.logprobs, targets.tail_logprob, targets.tail_coefficients, strict=True
    ):
        logits = torch.tensor(of.offset + of.directions @ z).double()
        logits[torch.tensor(ids).long()] = -torch.inf
        log_p = logits.log_softmax(0) + float(tail)
        log_p[torch.tensor(ids).long()] = torch.tensor(logprobs).double()
        rows.append(log_p)
    return torch.stack(rows)


def student_logits(student: Any, sequence: CachedSequence) -> Tensor:
    ids = torch.tensor(sequence.input_ids, dtype=torch.long)
    logits: Tensor = student(ids[None]).logits[0, torch.tensor(sequence.positions).long(), :VOCAB].double()
    return logits


def logs(trainer: DistillTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("columns", [VOCAB, VOCAB + 8])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_gradient_is_that_of_the_definition(
    tmp_path: Path, low_rank: LogitCache, temperature: float, columns: int
) -> None:
    student, catch = llama(vocab_size=columns, seed=7), CatchGradient()
    whole = {"max_steps": 1, "per_device_train_batch_size": 23, "logging_steps": 1, "temperature": temperature}
    trainer = DistillTrainer(student, low_rank, config(tmp_path, loss="rkl", kd_weight=0.3, **whole), callbacks=[catch])
    assert trainer.tail == "low_rank"
    trainer.train()

    student = llama(vocab_size=columns, seed=7)
    losses, fkl = [], []
    for sequence in low_rank:
        logits = student_logits(student, sequence)
        log_p, log_q = rebuilt(sequence, basis()), logits.log_softmax(1)
        fkl.append((log_p.exp() * (log_p - log_q)).sum(1).detach())
        labels = torch.tensor(sequence.input_ids[sequence.positions + 1]).long()
        ce = -log_q.gather(1, labels[:, None])[:, 0]
        log_p, log_q = (log_p / temperature).log_softmax(1), (logits / temperature).log_softmax(1)
        losses.append(0.7 * ce + 0.3 * temperature**2 * (log_q.exp() * (log_q - log_p)).sum(1))
    loss = torch.cat(losses).mean()
    loss.backward()
    assert logs(trainer, "loss") == pytest.approx([loss.item()], rel=1e-5)
    assert logs(trainer, "fkl") == pytest.approx([torch.cat(fkl).mean().item()], rel=1e-5)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(catch.gradient[name], parameter.grad, rtol=1e-3, atol=1e-6)


def test_it_is_said_that_the_tail_was_chosen(tmp_path: Path, low_rank: LogitCache, student_folder: str) -> None:
    def said(**settings: Any) -> str:
        common: dict[str, Any] = {"cache": low_rank.path, "student": student_folder, "output_dir": str(tmp_path)}
        return prepare(DistillConfig(**common, use_cpu=True, **settings)).choices["tail"]

    assert said() == said(temperature=3.0) == "low_rank (chosen: the cache holds coefficients)"
    assert said(tail="low_rank") == "low_rank"


def test_the_weight_of_the_residuals_is_that_of_the_probes(tmp_path: Path, low_rank: LogitCache) -> None:
    student, of = near_teacher(), basis()
    m, u, w = (torch.tensor(part).double() for part in (of.offset, of.directions, of.weights))
    shared = own = 0.0
    for sequence in low_rank:
        targets = sequence.targets
        assert targets.probe_ids is not None
        centred = student_logits(student, sequence).detach() - m
        residual = centred - (centred * w) @ u @ u.T - (centred @ w)[:, None]
        of_student = residual.gather(1, torch.tensor(targets.probe_ids).long())
        shared += float((of_student * torch.tensor(targets.probe_residuals)).sum())
        own += float(of_student.square().sum())
    assert 0.2 < shared / own < 0.95

    settings = config(tmp_path, learning_rate=0.0, num_train_epochs=2, per_device_train_batch_size=23, logging_steps=1)
    trainer = DistillTrainer(student, low_rank, settings)
    trainer.train()
    assert logs(trainer, WEIGHTS) == pytest.approx([shared / own] * 2, rel=1e-4)
    first, second = logs(trainer, "fkl")
    assert first != pytest.approx(second), "the second step's teacher has the student's residuals"


def test_a_resumed_run_has_the_weights_and_losses_of_an_uninterrupted_one(tmp_path: Path, low_rank: LogitCache) -> None:
    settings: dict[str, Any] = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "learning_rate": 1e-2}
    settings |= {"logging_steps": 1, "save_strategy": "steps", "save_steps": 5, "loss": "rkl"}
    through = DistillTrainer(near_teacher(), low_rank, config(tmp_path, **settings))
    through.train()
    assert len(set(logs(through, WEIGHTS))) == 12
    also = {"restore_callback_states_from_checkpoint": True}
    resumed = DistillTrainer(near_teacher(), low_rank, config(tmp_path, **settings, **also))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    for name in (WEIGHTS, "loss", "rkl"):
        assert logs(resumed, name) == logs(through, name)
    again = DistillTrainer(near_teacher(), low_rank, config(tmp_path, **settings))
    state = tmp_path / "checkpoint-5" / "trainer_state.json"
    state.write_text(state.read_text().replace('"sums"', '"other"'))
    with pytest.raises(UserError, match="does not hold the sums of the low-rank tail's residuals"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


def test_the_weight_is_the_same_on_any_number_of_ranks_and_accumulation_steps(
    tmp_path: Path, low_rank: LogitCache
) -> None:
    """One rank reads 11 of the 23 rows, the other 12; the first takes part in the twelfth batch without a row."""
    whole = {"max_steps": 3, "logging_steps": 1, "learning_rate": 1e-2, "loss": "rkl"}
    alone = DistillTrainer(near_teacher(), low_rank, config(tmp_path, per_device_train_batch_size=23, **whole))
    alone.train()
    split = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 6}
    accumulated = DistillTrainer(near_teacher(), low_rank, config(tmp_path, **split, **whole))
    accumulated.train()
    on_two_ranks(train_three_steps, low_rank.path, tmp_path)
    together = json.loads((tmp_path / "log.json").read_text())
    for name in (WEIGHTS, "rkl"):
        expected = pytest.approx(logs(alone, name), rel=1e-4)
        assert logs(accumulated, name) == expected
        assert [entry[name] for entry in together] == expected


def test_without_probes_the_weight_stays_0_and_that_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bare = write_cache(tmp_path / "bare", random_sequences(4, seed=1), tail_basis=basis(), num_probes=0)
    with caplog.at_level("WARNING", logger="trainer.run.distill_trainer"):
        trainer = DistillTrainer(near_teacher(), bare, config(tmp_path, max_steps=2, logging_steps=1))
        trainer.train()
    assert logs(trainer, WEIGHTS) == [0.0, 0.0]
    assert [record.message for record in caplog.records] == [
        f"{bare.path} holds no probes of its low-rank tail: residual_weight stays 0"
    ]


def test_caches_of_several_bases_are_refused_by_name(tmp_path: Path, low_rank: LogitCache, heldout: LogitCache) -> None:
    same, other = (
        write_cache(tmp_path / name, random_sequences(6, seed=6), tail_basis=basis(seed))
        for name, seed in (("same", 0), ("other", 1))
    )
    averaged = write_cache(tmp_path / "averaged", random_sequences(23, seed=1), teacher=llama(seed=3))

    def tail(*caches: LogitCache, average_with: tuple[str, ...] = (), **settings: Any) -> str:
        data = open_training_data([cache.path for cache in caches], average_with)
        return DistillTrainer(near_teacher(), data, config(tmp_path, **settings)).tail

    assert tail(low_rank, same) == tail(low_rank, same, temperature=2.0) == "low_rank"
    assert tail(low_rank, heldout) == tail(low_rank, average_with=(averaged.path,)) == "bucket"
    assert tail(low_rank, other, tail="bucket") == "bucket"
    for chosen in (None, "low_rank"):
        with pytest.raises(UserError, match=r"low_rank.* and .*other hold coefficients in different tail bases"):
            tail(low_rank, other, tail=chosen)
    with pytest.raises(UserError, match=r"heldout.* holds no tail coefficients.*logitcache build --tail-rank 64"):
        tail(low_rank, heldout, tail="low_rank")
    with pytest.raises(UserError, match="the mean of several teachers is known by its entries and the mass"):
        tail(low_rank, average_with=(averaged.path,), tail="low_rank")


def test_caches_with_different_numbers_of_coefficients_count_as_with_the_fewest(
    tmp_path: Path, low_rank: LogitCache
) -> None:
    other = write_cache(tmp_path / "other", random_sequences(6, seed=6), tail_basis=basis())
    fewer: list[LogitCache] = []
    for cache in (low_rank, other):
        copy = Folder(shutil.copytree(cache.path, tmp_path / f"copy{len(fewer)}"))
        fingerprint = {**cache.manifest.fingerprint, **FINGERPRINT}
        replace(cache.manifest, fingerprint=fingerprint).write(copy)
        fewer.append(logitcache.recode(copy.path, tmp_path / f"fewer{len(fewer)}", tail_rank=4))
    expected = open_training_data([cache.path for cache in fewer])
    for caches in ([low_rank, fewer[1]], [fewer[0], other]):
        data = open_training_data([cache.path for cache in caches])
        assert data.tail_parts == expected.tail_parts and data.tail_parts.rank == 4
        assert data.tail_basis is not None and data.tail_basis.directions.shape == (VOCAB, 4)
        found, wanted = ([*one.stream(0, shuffle=False, seed=0)] for one in (data, expected))
        assert len(found) == len(wanted) == 29
        for ours, theirs in zip(found, wanted, strict=True):
            a, b = data.tail_parts.of(ours.targets).to_torch(), data.tail_parts.of(theirs.targets).to_torch()
            assert a.keys() == b.keys() >= {"tail_coefficients", "probe_residuals"}
            assert all(torch.equal(a[name], b[name]) for name in a if name != "tempered_tail")
        assert DistillTrainer(near_teacher(), data, config(tmp_path)).tail == "low_rank"
    mixed = DistillTrainer(near_teacher(), data, config(tmp_path, max_steps=2))
    mixed.train()


def test_a_student_is_measured_against_the_rebuilt_distribution(tmp_path: Path, low_rank: LogitCache) -> None:
    student, fkl, rkl = llama(seed=7), [], []
    for sequence in low_rank:
        log_p, log_q = rebuilt(sequence, basis()), student_logits(student, sequence).detach().log_softmax(1)
        fkl.append((log_p.exp() * (log_p - log_q)).sum(1))
        rkl.append((log_q.exp() * (log_q - log_p)).sum(1))
    found = evaluate(student, low_rank, batch_size=5)
    assert found["fkl"] == pytest.approx(float(torch.cat(fkl).mean()), rel=1e-5)
    assert found["rkl"] == pytest.approx(float(torch.cat(rkl).mean()), rel=1e-5)
    settings = config(tmp_path, kd_weight=1.0, loss="rkl", tail="bucket")
    in_training = DistillTrainer(student, low_rank, settings, eval_cache=low_rank).evaluate()
    assert in_training["eval_rkl"] == pytest.approx(found["rkl"], rel=1e-5)
    assert in_training["eval_loss"] == pytest.approx(found["rkl"], rel=1e-5)

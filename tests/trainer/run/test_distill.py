"""DistillTrainer: the loss of LOSSES.md, normalised by the positions of the whole global batch, on a real Trainer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, TrainerCallback

from logitcache import LogitCache, UserError
from tests.helpers.cachemaking import VOCAB, llama, random_sequences, teacher_logprobs, write_cache
from tests.helpers.distilling import CatchGradient, Gradient, config, not_understood, relative_difference
from tests.helpers.processes import on_two_ranks
from tests.helpers.two_ranks import train_one_step
from trainer.losses import registry
from trainer.losses.coarse import Coarse
from trainer.losses.registry import register_divergence
from trainer.run.distill_trainer import DistillTrainer


def first_gradient(folder: Path, cache: LogitCache, student: LlamaForCausalLM, **settings: Any) -> Gradient:
    catch = CatchGradient()
    DistillTrainer(student, cache, config(folder, max_steps=1, **settings), callbacks=[catch]).train()
    return catch.gradient


@pytest.mark.slow
@pytest.mark.parametrize("tail", ["bucket", "groups"])
def test_a_global_batch_has_one_gradient_however_it_is_split(tmp_path: Path, cache: LogitCache, tail: str) -> None:
    whole = first_gradient(tmp_path, cache, llama(seed=7), tail=tail, per_device_train_batch_size=12)
    for size, steps in ((1, 12), (4, 3), (6, 2)):
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "tail": tail}
        assert relative_difference(whole, first_gradient(tmp_path, cache, llama(seed=7), **settings)) < 1e-5


def test_a_last_incomplete_accumulation_is_normalised_by_its_own_positions(tmp_path: Path, cache: LogitCache) -> None:
    whole = first_gradient(tmp_path, cache, llama(seed=7), per_device_train_batch_size=23)
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 50}
    assert relative_difference(whole, first_gradient(tmp_path, cache, llama(seed=7), **settings)) < 1e-5


def full_divergence(loss: str, log_p: Tensor, log_q: Tensor) -> Tensor:
    """The four definitions over the whole vocabulary, written out; float64 [N, V] → [N]."""
    p, q, r = log_p.exp(), log_q.exp(), log_q - log_p
    fkl, rkl = -(p * r).sum(1), (q * r).sum(1)
    if loss == "akl":
        order = p.argsort(dim=1, descending=True)
        head = (p.gather(1, order).cumsum(1) <= 0.5) | (torch.arange(p.shape[1]) == 0)
        gap = (p - q).abs().gather(1, order)
        w = (gap * head).sum(1) / gap.sum(1)
        return w * fkl + (1 - w) * rkl
    if loss == "todi":
        alpha = torch.sigmoid(-r)
        return (-alpha * p * r + (1 - alpha) * q * r).sum(1)
    return {"fkl": fkl, "rkl": rkl}[loss]


@torch.no_grad()
def reference(cache: LogitCache, student: LlamaForCausalLM, loss: str, temperature: float) -> tuple[float, float]:
    """Mean cross-entropy and mean divergence over all stored positions, in float64, one sequence at a time."""
    teacher, ce, kd = llama(), [], []
    for sequence in cache:
        positions = torch.as_tensor(sequence.positions, dtype=torch.long)
        ids = torch.tensor(sequence.input_ids, dtype=torch.long)
        logits = student(ids[None]).logits[0, positions].double()
        log_p = (teacher_logprobs(teacher, sequence) / temperature).log_softmax(1)
        ce.append(-logits.log_softmax(1).gather(1, ids[positions + 1, None])[:, 0])
        kd.append(full_divergence(loss, log_p, (logits / temperature).log_softmax(1)))
    return float(torch.cat(ce).mean()), float(torch.cat(kd).mean())


@pytest.mark.parametrize("loss", ["fkl", "rkl", "akl", "todi"])
def test_with_every_token_stored_the_loss_is_the_definition(tmp_path: Path, full_cache: LogitCache, loss: str) -> None:
    student = llama(seed=7)
    ce, kd = reference(full_cache, student, loss, temperature=1.0)
    settings = config(tmp_path, loss=loss, kd_weight=0.3, max_steps=1, per_device_train_batch_size=6, logging_steps=1)
    trainer = DistillTrainer(student, full_cache, settings)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(0.7 * ce + 0.3 * kd, rel=1e-5)
    assert logged["ce"] == pytest.approx(ce, rel=1e-5)
    if loss in ("fkl", "rkl"):
        assert logged[loss] == pytest.approx(kd, rel=1e-5)


@pytest.mark.parametrize("t_squared", [True, False])
def test_kd_is_multiplied_by_t_squared_unless_switched_off(tmp_path: Path, t_squared: bool) -> None:
    tempered = write_cache(tmp_path / "cache", random_sequences(6, seed=3), k=VOCAB, temperatures=(2.0,))
    student = llama(seed=7)
    ce, kd = reference(tempered, student, "todi", temperature=2.0)
    settings = config(tmp_path, temperature=2.0, t_squared=t_squared, max_steps=1, logging_steps=1)
    trainer = DistillTrainer(student, tempered, settings)
    trainer.train()
    expected = 0.5 * ce + 0.5 * (4 if t_squared else 1) * kd
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("kd_weight", "hard"), [(0.0, True), (1.0, False)])
def test_kd_weight_0_is_hard_labels_only_and_1_the_teacher_only(
    tmp_path: Path, full_cache: LogitCache, kd_weight: float, hard: bool
) -> None:
    student = llama(seed=7)
    ce, kd = reference(full_cache, student, "todi", temperature=1.0)
    trainer = DistillTrainer(student, full_cache, config(tmp_path, kd_weight=kd_weight, max_steps=1, logging_steps=1))
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(ce if hard else kd, rel=1e-5)


def test_logged_means_run_over_the_positions_since_the_last_log(tmp_path: Path, cache: LogitCache) -> None:
    student = llama(seed=7)
    settings = {"learning_rate": 0.0, "per_device_train_batch_size": 4, "num_train_epochs": 1}
    every_step = DistillTrainer(student, cache, config(tmp_path, logging_steps=1, **settings))
    every_step.train()
    once = DistillTrainer(student, cache, config(tmp_path, logging_steps=6, **settings))
    once.train()
    logged = once.state.log_history[0]

    tails = np.concatenate([s.targets.tail_logprob for s in cache])
    assert logged["teacher_tail"] == pytest.approx(np.exp(tails).mean(), rel=1e-5)
    assert logged["half_mass_missing"] == pytest.approx((tails > math.log(0.5)).mean(), abs=1e-6)
    ce, _ = reference(cache, student, "fkl", temperature=1.0)
    assert logged["ce"] == pytest.approx(ce, rel=1e-5)
    single = [entry["ce"] for entry in every_step.state.log_history if "ce" in entry]
    positions = [batch.num_positions for batch in every_step.get_train_dataloader()]
    assert np.average(single, weights=positions) == pytest.approx(ce, rel=1e-5)
    assert np.mean(single) != pytest.approx(ce, rel=1e-5), "a mean of means would not have been noticed"


def test_the_tail_is_groups_where_the_cache_has_them(tmp_path: Path, cache: LogitCache, heldout: LogitCache) -> None:
    student = llama(seed=7)
    assert DistillTrainer(student, cache, config(tmp_path)).tail == "groups"
    assert DistillTrainer(student, heldout, config(tmp_path)).tail == "bucket"
    assert DistillTrainer(student, cache, config(tmp_path, temperature=2.0)).tail == "bucket"


def test_evaluation_during_training_logs_the_distance_to_the_teacher(
    tmp_path: Path, cache: LogitCache, heldout: LogitCache
) -> None:
    student = llama(seed=7)
    settings = config(tmp_path, eval_strategy="steps", eval_steps=2, max_steps=4, learning_rate=5e-3, kd_weight=1.0)
    trainer = DistillTrainer(student, cache, settings, eval_cache=heldout)
    before = trainer.evaluate()
    trainer.train()
    evaluated = [entry for entry in trainer.state.log_history if "eval_fkl" in entry]
    assert [entry["step"] for entry in evaluated] == [2, 4]
    assert evaluated[-1]["eval_fkl"] < before["eval_fkl"]
    assert evaluated[-1]["eval_positions"] == heldout.num_positions
    ce, _ = reference(heldout, student, "fkl", temperature=1.0)
    assert evaluated[-1]["eval_ce"] == pytest.approx(ce, rel=1e-5)


@pytest.mark.slow
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path: Path, cache: LogitCache) -> None:
    settings: dict[str, Any] = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    settings |= {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 5, "learning_rate": 1e-3}
    through = DistillTrainer(llama(seed=7), cache, config(tmp_path, **settings))
    through.train()
    assert through.state.global_step == 12  # four a step: step 5 lies in the second epoch

    resumed = DistillTrainer(llama(seed=8), cache, config(tmp_path, **settings))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert resumed.state.global_step == 12
    assert through.model is not None and resumed.model is not None
    for name, parameter in through.model.named_parameters():
        torch.testing.assert_close(resumed.model.get_parameter(name), parameter, rtol=0, atol=1e-6)


def test_bfloat16_and_gradient_checkpointing_give_nearly_the_float32_gradient(
    tmp_path: Path, cache: LogitCache
) -> None:
    exact = first_gradient(tmp_path, cache, llama(seed=7))
    rounded = first_gradient(tmp_path, cache, llama(seed=7), bf16=True, gradient_checkpointing=True)
    assert 0 < relative_difference(exact, rounded) < 0.03


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("lm_head.weight", r"step 3: the loss is nan: NaN or infinity is in the output projection's weight\."),
        ("model.norm.weight", r"step 3: the loss is nan: .* in the hidden states that reach the output projection\."),
    ],
)
def test_a_loss_that_is_no_number_stops_the_run_and_names_the_step_and_the_tensor(
    broken: str, said: str, tmp_path: Path, cache: LogitCache
) -> None:
    class BreakWeights(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 2:
                model.get_parameter(broken).data[3] = math.nan

    trainer = DistillTrainer(llama(seed=7), cache, config(tmp_path, max_steps=5), callbacks=[BreakWeights()])
    with pytest.raises(UserError, match=said):
        trainer.train()


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"tail": "cap"}, {"temperature": 2.0, "loss": "jsd"}], ids=str)
def test_with_or_without_logits_the_gradient_and_the_evaluation_are_the_same(
    settings: dict[str, Any], tmp_path: Path, cache: LogitCache, caplog: pytest.LogCaptureFixture
) -> None:
    fused = first_gradient(tmp_path, cache, llama(seed=7), **settings)
    assert "loss is computed from the logits" not in caplog.text
    from_logits = first_gradient(tmp_path, cache, not_understood(), **settings)
    assert "loss is computed from the logits" in caplog.text
    assert relative_difference(fused, from_logits) < 1e-5
    evaluated, expected = (
        DistillTrainer(student, cache, config(tmp_path, **settings), eval_cache=cache).evaluate()
        for student in (llama(seed=7), not_understood())
    )
    for name in ("loss", "ce", "fkl", "rkl", "agreement", "ece", "teacher_tail", "student_tail"):
        assert evaluated[f"eval_{name}"] == pytest.approx(expected[f"eval_{name}"], rel=1e-4), name


def test_adapters_train_and_the_rest_stays(tmp_path: Path, cache: LogitCache) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(seed=7), peft.LoraConfig(r=4, target_modules=["lm_head", "q_proj"]))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trainer = DistillTrainer(model, cache, config(tmp_path, max_steps=3, learning_rate=1e-2), eval_cache=cache)
    fkl = trainer.evaluate()["eval_fkl"]
    trainer.train()
    assert trainer.evaluate()["eval_fkl"] < fkl
    for name, parameter in model.named_parameters():
        assert parameter.equal(before[name]) == ("lora_" not in name), name


@pytest.mark.slow
def test_samples_of_the_tail_estimate_the_whole_teacher(tmp_path: Path) -> None:
    """Drawn so often, the 56 tokens of a tail bring forward KL near its full-vocabulary value."""
    torch.manual_seed(0)
    many = write_cache(tmp_path / "cache", random_sequences(4, seed=3), num_tail_samples=20_000)
    _, kd = reference(many, llama(seed=7), "fkl", temperature=1.0)
    loss = {}
    for tail in ("bucket", "samples"):
        settings = config(tmp_path, loss="fkl", tail=tail, kd_weight=1.0, max_steps=1, logging_steps=1)
        trainer = DistillTrainer(llama(seed=7), many, settings)
        trainer.train()
        loss[tail] = trainer.state.log_history[0]["loss"]
    assert loss["bucket"] < 0.9 * kd
    assert loss["samples"] == pytest.approx(kd, rel=0.02)


def test_a_temperature_that_was_not_captured_is_estimated_where_that_is_allowed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sequences = random_sequences(6, seed=3)
    captured = write_cache(tmp_path / "captured", sequences, temperatures=(2.0,))
    with_entropy = write_cache(tmp_path / "entropy", sequences, tail_entropy=True)
    with pytest.raises(UserError, match=r"--temperature 2.*--approximate_temperature.*--temperatures 2"):
        DistillTrainer(llama(seed=7), with_entropy, config(tmp_path, temperature=2.0))
    settings = {"temperature": 2.0, "loss": "fkl", "approximate_temperature": True}
    with pytest.raises(UserError, match=r"--temperature 4.*--tail-entropy"):
        DistillTrainer(llama(seed=7), captured, config(tmp_path, **settings | {"temperature": 4.0}))
    exact = first_gradient(tmp_path, captured, llama(seed=7), **settings)
    assert "estimated" not in caplog.text
    with caplog.at_level("INFO", logger="trainer.run.distill_trainer"):
        estimated = first_gradient(tmp_path, with_entropy, llama(seed=7), **settings)
    assert "tail at T = 2 is estimated" in caplog.text
    assert 0 < relative_difference(exact, estimated) < 0.02


def test_a_registered_divergence_with_options_is_trained_on(
    tmp_path: Path, full_cache: LogitCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_registered", {})

    @register_divergence("weighted")
    def weighted(coarse: Coarse, *, factor: float = 1.0) -> Tensor:
        return -factor * (coarse.p * coarse.log_ratio).sum(1)

    fkl = first_gradient(tmp_path, full_cache, llama(seed=7), loss="fkl", kd_weight=1.0)
    own = first_gradient(
        tmp_path, full_cache, llama(seed=7), loss="weighted", loss_args={"factor": 2}, kd_weight=1.0, tail="bucket"
    )
    assert relative_difference({name: 2 * gradient for name, gradient in fkl.items()}, own) < 1e-5


def test_a_sequence_longer_than_the_student_takes_is_refused(tmp_path: Path, cache: LogitCache) -> None:
    with pytest.raises(UserError, match=r"takes 8 .*--max-length 8"):
        DistillTrainer(llama(seed=7, max_length=8), cache, config(tmp_path))


def test_logit_columns_beyond_the_teachers_vocabulary_change_nothing(tmp_path: Path, cache: LogitCache) -> None:
    student, wide = llama(seed=7), llama(vocab_size=VOCAB + 16, seed=8)
    state = student.state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        extra = torch.full((16, state[name].shape[1]), 0.5)
        state[name] = torch.cat([state[name], extra])
    wide.load_state_dict(state)
    exact, masked = first_gradient(tmp_path, cache, student), first_gradient(tmp_path, cache, wide)
    torch.testing.assert_close(masked["lm_head.weight"][:VOCAB], exact["lm_head.weight"])
    assert (masked["lm_head.weight"][VOCAB:] == 0).all()


@pytest.mark.slow
def test_two_ranks_give_the_gradient_of_one(tmp_path: Path, cache: LogitCache) -> None:
    """One rank reads 11 of the 23 rows, the other 12; the first takes part in the twelfth batch without a row."""
    alone = first_gradient(tmp_path, cache, llama(seed=7), per_device_train_batch_size=23)
    on_two_ranks(train_one_step, cache.path, tmp_path)
    together = torch.load(tmp_path / "gradient.pt", weights_only=True)
    assert relative_difference(alone, together["gradient"]) < 1e-5
    assert together["logged"]["ce"] == pytest.approx(reference(cache, llama(seed=7), "fkl", 1.0)[0], rel=1e-5)

"""The loss on logits: finite differences, blocks, memory, and what is reported beside it."""

from math import inf
from typing import Any

import pytest
import torch
from torch import Tensor

import trainer
from tests.helpers.largest_tensors import LargestTensors
from tests.helpers.lossmaking import (
    LOSSES,
    SMOOTH,
    TREATMENTS,
    autograd_of,
    bands,
    every_loss_with_every_tail,
    known,
    random_logits,
    reference_full,
    reference_sparse,
    seeded,
    top_entries,
    value_and_gradient,
)
from trainer.losses import blocks
from trainer.losses.coarse import Coarse
from trainer.losses.registry import evaluate_divergence
from trainer.losses.settings import LossSettings
from trainer.losses.sparse import distillation_terms
from trainer.losses.targets import TeacherTargets
from trainer.losses.terms import DistillationTerms

every_loss = pytest.mark.parametrize("loss", LOSSES)
every_treatment = pytest.mark.parametrize(("tail", "temperature"), TREATMENTS)


@pytest.mark.slow
@every_loss_with_every_tail()
def test_the_gradient_is_that_of_finite_differences(loss: str, tail: str, temperature: float) -> None:
    if loss not in SMOOTH:
        pytest.skip("the value is not what the gradient is the derivative of")
    if (loss, tail) == ("ab", "cap"):
        pytest.skip("no f-divergence, so moving the completed teacher changes its value")
    for row, kept in enumerate([[4], [2], [3]]):
        teacher, logits = random_logits(1, 9, seed=1 + row), random_logits(1, 9, seed=11 + row)
        arguments = known(teacher, top_entries(teacher, kept), bands(9, 3), temperature)

        def value(z: Tensor, held: dict[str, Any] = arguments) -> Tensor:
            every_row = {
                name: t if name == "tail_groups" else t.repeat_interleave(len(z), 0) for name, t in held.items()
            }
            return trainer.sparse_divergence(z, loss=loss, tail=tail, temperature=temperature, **every_row)

        _, gradient = autograd_of(logits, value)
        step = 1e-5 * torch.eye(9, dtype=torch.float64)
        differences = (value(logits + step) - value(logits - step)) / 2e-5  # each of them a row of its own
        torch.testing.assert_close(gradient[0], differences, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("loss", ["akl", "todi"])
@pytest.mark.parametrize(("tail", "temperature"), [("bucket", 1.0), ("bucket", 2.0), ("groups", 1.0), ("samples", 1.0)])
def test_gradient_is_the_finite_difference_of_the_value_with_its_weight_held_still(
    loss: str, tail: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # ToDi's α and AKL's w carry no gradient, so both are frozen at the point itself before taking differences.
    teacher, logits = random_logits(1, 8, seed=3), random_logits(1, 8, seed=4)
    held = known(teacher, top_entries(teacher, [3]), bands(8, 2), temperature)
    arguments = {"loss": loss, "tail": tail, "temperature": temperature, **held}
    _, gradient = value_and_gradient("unfused", logits, **arguments)

    seen: list[Coarse] = []

    def spied(name: str, coarse: Coarse, options: Any) -> tuple[Tensor, Tensor]:
        seen.append(coarse)
        return evaluate_divergence(name, coarse, options)

    monkeypatch.setattr("trainer.losses.terms.evaluate_divergence", spied)
    base = trainer.sparse_divergence(logits, **arguments)
    at_point = seen.pop()
    if loss == "todi":
        alpha = at_point.p / (at_point.p + at_point.q)
    else:
        fkl, rkl = (evaluate_divergence(name, at_point, {})[0] for name in ("fkl", "rkl"))
        alpha = ((base - rkl) / (fkl - rkl))[:, None]

    def frozen(z: Tensor) -> float:
        trainer.sparse_divergence(z, **arguments)
        coarse = seen.pop()
        r = coarse.log_ratio
        return torch.nansum((1 - alpha) * coarse.q * r - alpha * coarse.p * r, 1).item()  # 0/0 where nothing counts

    step = 1e-5
    for j in range(8):
        offset = torch.zeros_like(logits)
        offset[0, j] = step
        difference = (frozen(logits + offset) - frozen(logits - offset)) / (2 * step)
        assert gradient[0, j].item() == pytest.approx(difference, rel=1e-6, abs=1e-9)


@every_loss
def test_tempered_bucket_meets_the_tempered_full_divergence_as_the_tail_shrinks_to_one_token(loss: str) -> None:
    logits, teacher = random_logits(8, 40, seed=9, scale=3), random_logits(8, 40, seed=10, scale=3)
    full, full_gradient = autograd_of(logits, lambda z: reference_full(loss, z, teacher, 2.0))
    for k, error in ((37, 0.2), (39, 1e-10)):
        arguments = known(teacher, top_entries(teacher, [k] * 8), bands(40, 1), 2.0)
        value, gradient = value_and_gradient("unfused", logits, loss=loss, temperature=2.0, **arguments)
        assert (value - full).norm() < error * full.norm()
        assert (gradient - full_gradient).norm() < error * full_gradient.norm()


def test_float64_logits_give_a_float64_loss() -> None:
    teacher = random_logits(1, 5, seed=20)
    arguments = known(teacher, top_entries(teacher, [2]), bands(5, 1))
    assert trainer.sparse_divergence(teacher, **arguments).dtype == torch.float64


def test_a_masked_position_has_no_gradient_and_does_not_touch_the_others() -> None:
    teacher, logits = random_logits(4, 10, seed=27), random_logits(4, 10, seed=28).requires_grad_()
    arguments = known(teacher, top_entries(teacher, [3] * 4), bands(10, 2))
    mask = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    (gradient,) = torch.autograd.grad((trainer.sparse_divergence(logits, **arguments) * mask).sum(), logits)
    row_arguments = {name: t if name == "tail_groups" else t[[0, 2]] for name, t in arguments.items()}
    alone = logits[[0, 2]].detach().requires_grad_()
    (expected,) = torch.autograd.grad(trainer.sparse_divergence(alone, **row_arguments).sum(), alone)
    torch.testing.assert_close(gradient[[0, 2]], expected)
    assert torch.equal(gradient[[1, 3]], torch.zeros(2, 10, dtype=torch.float64))


# Blocks of rows, and memory.


@every_treatment
def test_blocks_of_rows_change_nothing(tail: str, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, logits = random_logits(7, 12, seed=30), random_logits(7, 12, seed=31)
    targets = TeacherTargets(**known(teacher, top_entries(teacher, [3, 4, 5, 1, 2, 12, 3]), bands(12, 3), temperature))
    chosen = LossSettings(tail=tail, temperature=temperature)
    results = []
    for elements in (7 * 12, 3 * 12, 1):
        monkeypatch.setattr(blocks, "BLOCK_ELEMENTS_CPU", elements)
        z = logits.clone().requires_grad_()
        terms = distillation_terms(z, targets, torch.arange(7), settings=chosen)
        (gradient,) = torch.autograd.grad(mixture_of(terms, 1, 1).sum(), z)
        results.append((*terms, gradient))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-13, atol=1e-15)


@pytest.mark.slow
@every_treatment
def test_the_gradient_is_the_only_tensor_as_large_as_the_logits(
    tail: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS_CPU", 1)
    rows = 16
    teacher = random_logits(rows, 500, seed=32)
    targets = TeacherTargets(**known(teacher, top_entries(teacher, [8] * rows), bands(500, 4), temperature))
    logits = random_logits(rows, 500, seed=33).requires_grad_()
    chosen = LossSettings(tail=tail, temperature=temperature)
    with LargestTensors(rows * 500) as forward:
        terms = distillation_terms(logits, targets, torch.zeros(rows, dtype=torch.long), settings=chosen)
        loss = mixture_of(terms, 1, 1).sum()
    with LargestTensors(rows * 500) as backward:
        torch.autograd.grad(loss, logits)
    assert forward.allocations == 0
    assert backward.allocations == 1


def test_a_second_derivative_is_refused() -> None:
    teacher, logits = random_logits(2, 6, seed=34), random_logits(2, 6, seed=35).requires_grad_()
    value = trainer.sparse_divergence(logits, **known(teacher, top_entries(teacher, [2, 2]), bands(6, 1)))
    (gradient,) = torch.autograd.grad((value**2).sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# Cross-entropy and metrics from the same pass.


def mixture_of(terms: DistillationTerms, kd_weight: Tensor | float, ce_weight: Tensor | float) -> Tensor:
    assert terms.cross_entropy is not None
    return kd_weight * terms.kd + ce_weight * terms.cross_entropy


@pytest.mark.slow
@every_loss_with_every_tail()
def test_cross_entropy_and_its_mixture_with_the_divergence_have_the_gradients_of_their_definitions(
    loss: str, tail: str, temperature: float
) -> None:
    teacher, logits = random_logits(5, 9, seed=38), random_logits(5, 12, seed=39)
    kept, groups = top_entries(teacher, [3, 1, 9, 2, 4]), bands(9, 3)
    held = known(teacher, kept, groups, temperature)
    labels = torch.tensor([kept[0][0], 8, 3, kept[3][1], 0])  # in the entries and outside
    kd_weight, ce_weight = torch.rand(2, 5, dtype=torch.float64, generator=seeded(40))
    chosen = LossSettings(loss, tail, temperature)

    def reference(z: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(z[:, :9], labels, reduction="none")

    def mixture(z: Tensor) -> Tensor:
        kd = reference_sparse(loss, z[:, :9], teacher, kept, tail, groups, temperature, held["sample_ids"])
        mixed: Tensor = kd_weight * kd + ce_weight * reference(z)
        return mixed

    def ours(z: Tensor) -> Tensor:
        terms = distillation_terms(z, TeacherTargets(**held), labels, settings=chosen, vocab_size=9)
        return mixture_of(terms, kd_weight, ce_weight)

    torch.testing.assert_close(autograd_of(logits, ours), autograd_of(logits, mixture), rtol=1e-9, atol=1e-12)

    def cross_entropy_alone(z: Tensor) -> Tensor:
        terms = distillation_terms(z, TeacherTargets(**held), labels, settings=chosen, vocab_size=9)
        assert terms.cross_entropy is not None
        return terms.cross_entropy

    torch.testing.assert_close(
        autograd_of(logits, cross_entropy_alone), autograd_of(logits, reference), rtol=1e-9, atol=1e-12
    )


@pytest.mark.slow
@every_loss_with_every_tail()
def test_what_is_reported_is_the_buckets_at_temperature_one_whatever_is_trained(
    loss: str, tail: str, temperature: float
) -> None:
    teacher, logits = random_logits(5, 9, seed=41), random_logits(5, 9, seed=42)
    kept, groups = top_entries(teacher, [3, 1, 9, 2, 4]), bands(9, 3)
    targets = TeacherTargets(**known(teacher, kept, groups, temperature))
    terms = distillation_terms(logits.requires_grad_(), targets, settings=LossSettings(loss, tail, temperature))
    for name, reported in (("fkl", terms.fkl), ("rkl", terms.rkl)):
        expected = reference_sparse(name, logits, teacher, kept, "bucket", groups, 1.0)
        torch.testing.assert_close(reported, expected.detach(), rtol=1e-9, atol=1e-12)
    tail_mass = [1 - logits[row].softmax(0)[ids].sum().item() for row, ids in enumerate(kept)]
    torch.testing.assert_close(terms.student_tail_mass, torch.tensor(tail_mass, dtype=torch.float64))
    torch.testing.assert_close(terms.confidence, logits.softmax(1).amax(1).detach())
    assert terms.kd.requires_grad
    assert not any(term.requires_grad for term in terms[2:] if term is not None)
    assert terms.cross_entropy is None
    assert terms.top1_correct is None


@pytest.mark.parametrize("tail", ["bucket", "groups", "cap", "samples"])
def test_top1_agrees_where_the_students_likeliest_token_is_the_teachers(tail: str) -> None:
    teacher = torch.tensor([[3.0, 2, 1, 0]] * 4, dtype=torch.float64)
    logits = torch.tensor([[9.0, 1, 1, 1], [1, 9, 1, 1], [1, 1, 1, 9], [9, 1, 1, 1]], dtype=torch.float64)
    kept = [[1, 0], [0, 1], [0, 1], []]  # descending or not; agreement, another entry, a token of the tail, no entry
    targets = TeacherTargets(**known(teacher, kept, bands(4, 2)))
    labels = torch.tensor([0, 0, 3, 2])
    terms = distillation_terms(logits, targets, labels, settings=LossSettings(tail=tail))
    assert terms.top1_agrees.tolist() == [True, False, False, False]
    assert terms.top1_correct is not None
    assert terms.top1_correct.tolist() == [True, False, True, False]


def test_without_entries_nothing_agrees_and_the_bucket_knows_nothing() -> None:
    teacher, logits = random_logits(2, 6, seed=43), random_logits(2, 6, seed=44)
    terms = distillation_terms(logits, TeacherTargets(**known(teacher, [[], []], bands(6, 1))), settings=LossSettings())
    assert terms.top1_agrees.tolist() == [False, False]
    assert terms.kd.abs().max() < 1e-12
    torch.testing.assert_close(terms.student_tail_mass, torch.ones(2, dtype=torch.float64))


def test_a_divergence_of_ones_own_is_a_decorator_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.losses.registry._registered", {})

    @trainer.register_divergence("chi2")
    def chi_square(coarse: Coarse, *, strength: float = 1.0) -> Tensor:
        return strength * (coarse.q * coarse.log_ratio.expm1()).sum(1)  # the README's

    teacher, logits = random_logits(3, 8, seed=36), random_logits(3, 8, seed=37).requires_grad_()
    arguments = known(teacher, top_entries(teacher, [8, 3, 1]), bands(8, 2))
    for tail in ("bucket", "groups"):
        assert torch.autograd.gradcheck(
            lambda z, tail=tail: trainer.sparse_divergence(z, loss="chi2", tail=tail, strength=0.5, **arguments),
            (logits,),
        )
    p, q = teacher.softmax(1)[0], logits.softmax(1)[0]
    full = 0.5 * ((q - p) ** 2 / p).sum()
    torch.testing.assert_close(trainer.sparse_divergence(logits, loss="chi2", strength=0.5, **arguments)[0], full)


def test_a_student_that_excludes_a_stored_token_is_infinitely_far() -> None:
    teacher, logits = random_logits(2, 6, seed=47), random_logits(2, 6, seed=48)
    logits[1, 0] = -inf
    arguments = known(teacher, [[0, 1], [0, 1]], bands(6, 1))
    assert trainer.sparse_divergence(logits, loss="fkl", **arguments).isinf().tolist() == [False, True]


def test_a_divergence_of_ones_own_works_in_inference_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.losses.registry._registered", {})

    @trainer.register_divergence("own_rkl")
    def own_rkl(coarse: Coarse) -> Tensor:
        return (coarse.q * coarse.log_ratio).sum(1)

    with torch.inference_mode():
        teacher, logits = random_logits(3, 8, seed=36), random_logits(3, 8, seed=37)
        arguments = known(teacher, top_entries(teacher, [8, 3, 1]), bands(8, 2))
        own, rkl = (trainer.sparse_divergence(logits, loss=loss, **arguments) for loss in ("own_rkl", "rkl"))
        torch.testing.assert_close(own, rkl)


def test_float32_groups_of_one_token_each_add_no_mass_in_a_large_vocabulary() -> None:
    # A teacher sure by 60 nats: a floor under every group would make 4096 of them worth 1 %.
    teacher = torch.zeros(2, 4096, dtype=torch.float64)
    teacher[:, 7] = 60.0
    arguments = known(teacher, [[7], [7]], torch.arange(4096))
    value, gradient = value_and_gradient("unfused", teacher.float(), loss="fkl", tail="groups", **arguments)
    assert value.abs().max() < 1e-5
    assert gradient.abs().sum() < 1e-5

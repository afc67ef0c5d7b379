"""The loss fused with the output projection, against the same loss on logits that autograd made."""

import inspect
import itertools
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import trainer
from tests.helpers.kernels import DEVICE
from tests.helpers.largest_tensors import LargestTensors
from tests.helpers.lossmaking import (
    INTERPRETED,
    LOSSES,
    TREATMENTS,
    bands,
    every_loss_with_every_tail,
    known,
    random_logits,
    seeded,
    take,
    top_entries,
)
from tests.helpers.matrix import every_pair
from trainer.losses import fused, registry
from trainer.losses.coarse import Coarse
from trainer.losses.fused import Mixture, Projection, fused_distillation_terms
from trainer.losses.settings import LossSettings
from trainer.losses.targets import TeacherTargets

VOCABULARY, WIDTH = 11, 4


@pytest.fixture(autouse=True)
def _kernels_in_their_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:  # started so by test_kernels
        take("kernel", monkeypatch)


every_loss = pytest.mark.parametrize("loss", LOSSES)
every_treatment = pytest.mark.parametrize(("tail", "temperature"), TREATMENTS)


def student(rows: int, seed: int = 50, columns: int = VOCABULARY) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, output projection and bias that require gradients."""
    hidden, weight, bias = (
        torch.randn(*shape, dtype=torch.float64, generator=seeded(seed + i)).requires_grad_()
        for i, shape in enumerate([(rows, WIDTH), (columns, WIDTH), (columns,)])
    )
    return hidden, weight, bias


def teacher_of(rows: int, temperature: float = 1.0, seed: int = 60) -> dict[str, Any]:
    teacher = random_logits(rows, VOCABULARY, seed)
    sizes = [(3, 1, VOCABULARY, 2, 4)[row % 5] for row in range(rows)]
    return known(teacher, top_entries(teacher, sizes), bands(VOCABULARY, 3), temperature)


def labels_of(rows: int) -> Tensor:
    return torch.arange(rows) * 7 % VOCABULARY


def unfused(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    kd_weight: float,
    *,
    t_squared: bool = True,
    scale: float = 1.0,
    softcap: float | None = None,
    **arguments: Any,
) -> Tensor:
    """The same objective from logits that exist, by autograd up to them."""
    logits = torch.nn.functional.linear(hidden, weight, bias) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    kd = trainer.sparse_divergence(logits, **arguments).mean()
    total = kd_weight * kd * (arguments.get("temperature", 1.0) ** 2 if t_squared else 1.0)
    if labels is not None:
        vocabulary = arguments.get("vocab_size", logits.shape[1])
        total = total + (1 - kd_weight) * torch.nn.functional.cross_entropy(logits[:, :vocabulary], labels)
    return total


def assert_same(ours: Tensor, theirs: Tensor, parameters: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), rtol=1e-9, atol=1e-11
    )


@pytest.mark.slow
@every_loss_with_every_tail()
def test_objective_and_gradients_are_those_of_the_loss_on_logits(loss: str, tail: str, temperature: float) -> None:
    parameters, labels = student(7), labels_of(7)
    arguments = {"loss": loss, "tail": tail, "temperature": temperature, **teacher_of(7, temperature)}
    ours = trainer.fused_linear_divergence(*parameters, labels=labels, kd_weight=0.3, **arguments)
    assert_same(ours, unfused(*parameters, labels, 0.3, **arguments), parameters)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="the kernels' gradients are held against brute force")
@pytest.mark.parametrize(
    ("loss", "tail", "temperature", "t_squared"),
    [
        ("fkl", "bucket", 1.0, True),
        ("rkl", "bucket", 2.0, True),
        ("jsd", "bucket", 2.0, False),
        ("rkl", "groups", 1.0, True),
        ("jsd", "cap", 2.0, True),
    ],
)
def test_the_reported_objective_is_what_its_gradient_is_the_derivative_of(
    loss: str, tail: str, temperature: float, t_squared: bool
) -> None:
    chosen = {"loss": loss, "tail": tail, "temperature": temperature, "t_squared": t_squared, "kd_weight": 0.6}
    arguments: dict[str, Any] = chosen | teacher_of(3, temperature)

    def objective(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return trainer.fused_linear_divergence(
            hidden, weight, bias, labels=labels_of(3), logit_scale=0.7, logit_softcap=5.0, **arguments
        )

    assert torch.autograd.gradcheck(objective, student(3))


@pytest.mark.slow
@every_pair(
    scale=[1.0, 0.25],
    softcap=[None, 3.0],
    tail=["bucket", "groups"] if INTERPRETED else ["bucket", "groups", "cap", "samples", "uniform"],
    with_bias=[True, False],
)
def test_what_architectures_do_to_logits_is_differentiated_too(
    scale: float, softcap: float | None, tail: str, with_bias: bool
) -> None:
    hidden, weight, bias = student(6)
    arguments = {"tail": tail, **teacher_of(6)}
    parameters = (hidden, weight, bias) if with_bias else (hidden, weight)
    given_bias = bias if with_bias else None
    ours = trainer.fused_linear_divergence(
        hidden, weight, given_bias, labels=labels_of(6), logit_scale=scale, logit_softcap=softcap, **arguments
    )
    theirs = unfused(hidden, weight, given_bias, labels_of(6), 0.5, scale=scale, softcap=softcap, **arguments)
    assert_same(ours, theirs, parameters)


@pytest.mark.parametrize(("tail", "temperature"), TREATMENTS[:3] if INTERPRETED else TREATMENTS)
def test_rows_of_the_projection_beyond_the_teachers_vocabulary_get_no_gradient(tail: str, temperature: float) -> None:
    parameters = student(5, columns=VOCABULARY + 3)
    arguments = {"tail": tail, "temperature": temperature, "vocab_size": VOCABULARY, **teacher_of(5, temperature)}
    ours = trainer.fused_linear_divergence(*parameters, labels=labels_of(5), **arguments)
    assert_same(ours, unfused(*parameters, labels_of(5), 0.5, **arguments), parameters)
    _, weight_grad, bias_grad = torch.autograd.grad(
        trainer.fused_linear_divergence(*parameters, labels=labels_of(5), **arguments), parameters
    )
    assert weight_grad[VOCABULARY:].abs().max() == 0
    assert bias_grad[VOCABULARY:].abs().max() == 0


@settings(
    max_examples=6 if INTERPRETED else 30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.integers(0, 6), k=st.sampled_from([0, 1, VOCABULARY - 1, VOCABULARY]), chunk=st.integers(1, 40),
    loss=st.sampled_from(LOSSES),
)  # fmt: skip
def test_any_shape_in_chunks_of_any_size(
    rows: int, k: int, chunk: int, loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "MIN_CHUNK_ELEMENTS", chunk)
    parameters, teacher = student(rows), random_logits(rows, VOCABULARY, seed=61)
    arguments = {"loss": loss, **known(teacher, top_entries(teacher, [k] * rows), bands(VOCABULARY, 2))}
    ours = trainer.fused_linear_divergence(*parameters, labels=labels_of(rows), **arguments)
    if rows:
        assert_same(ours, unfused(*parameters, labels_of(rows), 0.5, **arguments), parameters)
    else:
        assert ours.item() == 0
        assert all(not grad.any() for grad in torch.autograd.grad(ours, parameters))


def test_a_position_with_the_ignored_label_counts_in_neither_term() -> None:
    parameters, labels = student(6), labels_of(6)
    arguments = teacher_of(6)
    kept = torch.tensor([True, False, True, True, False, True])
    ours = trainer.fused_linear_divergence(*parameters, labels=labels.masked_fill(~kept, -100), **arguments)
    hidden, weight, bias = parameters
    of_kept = {name: t if name == "tail_groups" else t[kept] for name, t in arguments.items()}
    assert_same(ours, unfused(hidden[kept], weight, bias, labels[kept], 0.5, **of_kept), parameters)
    nothing = trainer.fused_linear_divergence(*parameters, labels=torch.full_like(labels, -100), **arguments)
    assert nothing.item() == 0
    assert all(not grad.any() for grad in torch.autograd.grad(nothing, parameters))


def test_the_sum_is_divided_by_the_positions_of_the_global_batch() -> None:
    parameters, labels, arguments = student(6), labels_of(6), teacher_of(6)
    whole = torch.autograd.grad(
        trainer.fused_linear_divergence(*parameters, labels=labels, **arguments), parameters[1:]
    )
    parts = []
    for rows in (slice(0, 2), slice(2, 6)):
        of_rows = {name: t if name == "tail_groups" else t[rows] for name, t in arguments.items()}
        loss = trainer.fused_linear_divergence(
            parameters[0][rows], *parameters[1:], labels=labels[rows], num_items=torch.tensor(6), **of_rows
        )
        parts.append(torch.autograd.grad(loss, parameters[1:]))
    for expected, *received in zip(whole, *parts, strict=True):
        torch.testing.assert_close(sum(received), expected)


@pytest.mark.parametrize(("kd_weight", "labels_given"), [(None, True), (None, False), (1.0, True), (0.0, True)])
def test_the_mixture_by_default_is_half_and_half_with_labels_and_the_divergence_without(
    kd_weight: float | None, labels_given: bool
) -> None:
    parameters, arguments = student(5), teacher_of(5)
    labels = labels_of(5) if labels_given else None
    ours = trainer.fused_linear_divergence(*parameters, labels=labels, kd_weight=kd_weight, **arguments)
    expected = (0.5 if labels_given else 1.0) if kd_weight is None else kd_weight
    assert_same(ours, unfused(*parameters, labels, expected, **arguments), parameters)


def test_a_projection_of_several_maps_is_their_sum() -> None:
    hidden, weight, bias = student(5)
    low, high = (torch.randn(*s, dtype=torch.float64, generator=seeded(70)).requires_grad_() for s in [(5, 2), (11, 2)])
    targets = TeacherTargets(**teacher_of(5))
    total, terms = fused_distillation_terms(
        Projection([(hidden, weight), (low, high)], bias),
        targets,
        labels_of(5),
        mixture=Mixture(0.7, 0.3),
        settings=LossSettings(),
    )
    joined = torch.cat([hidden, low], 1), torch.cat([weight, high], 1), bias
    theirs = unfused(*joined, labels_of(5), 0.7, **teacher_of(5)) * 5
    assert_same(total, theirs, (hidden, weight, low, high, bias))
    assert not terms.kd.requires_grad


def test_a_frozen_projection_gets_no_gradient_and_costs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, _ = student(5)
    monkeypatch.setattr(fused, "accumulate_product", lambda *arguments: pytest.fail("∂W of a frozen weight was formed"))
    loss = trainer.fused_linear_divergence(hidden, weight.detach(), None, labels=labels_of(5), **teacher_of(5))
    expected = unfused(hidden, weight, None, labels_of(5), 0.5, **teacher_of(5))
    assert_same(loss, expected, (hidden,))


def test_without_gradients_none_is_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters, arguments = student(5), teacher_of(5)
    expected = trainer.fused_linear_divergence(*parameters, labels=labels_of(5), **arguments)
    monkeypatch.setattr(
        "trainer.losses.terms.LogitBlock.write_gradient_", lambda *a: pytest.fail("a gradient was formed")
    )
    with torch.no_grad():
        loss = trainer.fused_linear_divergence(*parameters, labels=labels_of(5), **arguments)
    assert not loss.requires_grad
    assert torch.equal(loss, expected.detach())


def test_a_second_backward_gives_the_same_where_the_first_kept_the_graph_and_is_refused_otherwise() -> None:
    parameters, arguments = student(5), teacher_of(5)
    loss = trainer.fused_linear_divergence(*parameters, labels=labels_of(5), **arguments)
    first = torch.autograd.grad(loss, parameters, torch.tensor(2.0, dtype=torch.float64), retain_graph=True)
    second = torch.autograd.grad(loss, parameters)
    for doubled, gradient in zip(first, second, strict=True):
        torch.testing.assert_close(doubled, 2 * gradient)
    total, _ = fused_distillation_terms(
        Projection([parameters[:2]], parameters[2]),
        TeacherTargets(**arguments),
        labels_of(5),
        mixture=Mixture(0.5, 0.5),
        settings=LossSettings(),
    )
    total.backward()
    with pytest.raises(RuntimeError, match=r"used up by the first; give that one retain_graph=True"):
        total.backward()


# Precision.


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.parametrize("loss", LOSSES[:1] if INTERPRETED else LOSSES)
@pytest.mark.parametrize(("tail", "temperature"), [("bucket", 1.0), ("bucket", 2.0), ("groups", 1.0), ("cap", 1.0)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float32, 1e-5)], ids=str)
def test_products_of_low_precision_with_float32_sums_stay_close_to_float64_on_a_cpu(
    dtype: torch.dtype, tolerance: float, loss: str, tail: str, temperature: float
) -> None:
    rows = 8 if INTERPRETED else 256
    hidden, weight, _ = student(rows)
    low = [tensor.detach().to(dtype) for tensor in (hidden, weight)]
    given = {"labels": labels_of(rows), **teacher_of(rows, temperature)}
    results = []
    for device, precision in ((DEVICE, dtype), ("cpu", torch.float64)):
        hidden, weight = parameters = [tensor.to(device, precision).requires_grad_() for tensor in low]
        value = trainer.fused_linear_divergence(
            *(hidden, weight, None), loss=loss, tail=tail, temperature=temperature,
            **{name: tensor.to(device) for name, tensor in given.items()},
        )  # fmt: skip
        results.append((value, *torch.autograd.grad(value, parameters)))
    (value, *gradients), (exact_value, *exact_gradients) = results
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(exact_value.item(), rel=tolerance / 5)
    for gradient, exact in zip(gradients, exact_gradients, strict=True):
        assert gradient.dtype == dtype
        kinks = 2 if loss == "tvd" else 1  # where q nearly equals p, rounding decides the sign
        assert (gradient.cpu().double() - exact).norm() < kinks * tolerance * exact.norm()


@pytest.mark.skipif(INTERPRETED, reason="a property of the sum over chunks, whatever computes the tails")
def test_the_weights_gradient_is_summed_in_float32_over_many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    # Summed in bfloat16, a thousand equal parts would stop growing at 256.
    monkeypatch.setattr(fused, "MIN_CHUNK_ELEMENTS", 1)
    rows = 1000
    hidden = torch.ones(rows, 1, dtype=torch.bfloat16)
    weight = torch.zeros(4, 1, dtype=torch.bfloat16, requires_grad=True)
    targets: dict[str, Any] = {
        "token_ids": torch.zeros(rows, 1, dtype=torch.long),
        "logprobs": torch.zeros(rows, 1),
        "tail_logprob": torch.full((rows,), -inf),
    }
    bias = torch.zeros(4, dtype=torch.bfloat16, requires_grad=True)
    loss = trainer.fused_linear_divergence(hidden, weight, bias, loss="fkl", num_items=1, **targets)
    loss.backward()
    assert weight.grad is not None
    assert weight.grad[0].item() == pytest.approx(-750, rel=1e-2)
    assert bias.grad is not None
    assert bias.grad[0].item() == pytest.approx(-750, rel=1e-2)


def test_autocast_runs_the_products_in_its_dtype_and_keeps_the_weights_gradient_in_float32() -> None:
    hidden, weight, bias = (tensor.detach().float().requires_grad_() for tensor in student(64))
    arguments = teacher_of(64)
    expected = trainer.fused_linear_divergence(hidden, weight, bias, labels=labels_of(64), **arguments)
    with torch.autocast("cpu", torch.bfloat16):
        received = trainer.fused_linear_divergence(hidden, weight, bias, labels=labels_of(64), **arguments)
    assert received.dtype == torch.float32
    assert 0 < (received - expected).abs() < 1e-2 * expected.abs()
    exact = torch.autograd.grad(expected, (hidden, weight, bias))
    for close, gradient in zip(torch.autograd.grad(received, (hidden, weight, bias)), exact, strict=True):
        assert close.dtype == torch.float32
        assert (close - gradient).norm() < 2e-2 * gradient.norm()


def test_float64_is_left_alone_under_autocast() -> None:
    parameters, arguments = student(4), teacher_of(4)
    expected = trainer.fused_linear_divergence(*parameters, labels=labels_of(4), **arguments)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(trainer.fused_linear_divergence(*parameters, labels=labels_of(4), **arguments), expected)


# Memory.


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="the interpreter copies the block")
@every_treatment
def test_no_tensor_is_as_large_as_a_quarter_of_the_logits(
    tail: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, vocabulary = 32, 500
    monkeypatch.setattr(fused, "MIN_CHUNK_ELEMENTS", 2 * vocabulary)
    monkeypatch.setattr("trainer.losses.blocks.BLOCK_ELEMENTS_CPU", vocabulary)
    teacher = random_logits(rows, vocabulary, seed=32)
    arguments = known(teacher, top_entries(teacher, [8] * rows), bands(vocabulary, 4), temperature)
    hidden = torch.randn(rows, 4, dtype=torch.float64).requires_grad_()
    weight = torch.randn(vocabulary, 4, dtype=torch.float64).requires_grad_()
    with LargestTensors(rows * vocabulary // 4) as largest:
        trainer.fused_linear_divergence(
            hidden, weight, None, labels=torch.zeros(rows, dtype=torch.long), tail=tail, temperature=temperature,
            **arguments,
        ).backward()  # fmt: skip
    assert largest.allocations == 0


# What is refused, and what is not hidden.


def test_not_a_number_is_not_hidden() -> None:
    for spoilt, place in itertools.product((0, 1, 2), (0, 1)):
        hidden, weight, bias = parameters = [tensor.detach().clone() for tensor in student(3)]
        parameters[spoilt].view(-1)[place] = float("nan")
        loss = trainer.fused_linear_divergence(hidden, weight, bias, labels=labels_of(3), **teacher_of(3))
        assert loss.isnan()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hidden": torch.zeros(2, 3, WIDTH)},
            r"hidden must be floating point with 2 dimensions, got torch.float32 \[2",
        ),
        (
            {"weight": torch.zeros(VOCABULARY, 3)},
            r"hidden \[N, D\] and weight \[V, D\] must agree in D, got \[3, 4\] and",
        ),
        ({"weight": torch.zeros(VOCABULARY, WIDTH, dtype=torch.long)}, r"weight must be floating point"),
        ({"bias": torch.zeros(3)}, r"bias must have shape \[11\], got \[3\]"),
        ({"labels": torch.zeros(4, dtype=torch.long)}, r"labels must have shape \[3\]"),
        ({"labels": torch.tensor([0, 11, 0])}, r"labels\[1\] is 11: accepted are 0 … 10"),
        ({"labels": torch.tensor([0, -1, 0])}, r"labels\[1\] is -1"),
        ({"kd_weight": 1.5}, r"kd_weight is 1.5; it must lie between 0 and 1"),
        ({"labels": None, "kd_weight": 0.5}, r"kd_weight is 0.5 but there are no labels"),
        ({"logit_scale": 0.0}, r"logit_scale is 0; it must be a positive number"),
        ({"logit_softcap": -1.0}, r"logit_softcap is -1"),
        ({"vocab_size": 12}, r"vocab_size is 12 but the student has 11 columns"),
        ({"loss": "kl"}, r"loss is 'kl'; accepted are fkl, rkl"),
        ({"num_items": 0}, r"num_items is 0; it must be the positive number"),
        ({"logit_scale": inf}, r"logit_scale is inf"),
        ({"temperature": "2"}, r"temperature is '2'; it must be a positive number"),
        ({"tail_logprob": torch.zeros(3, device="meta")}, r"tail_logprob is on meta, the student on cpu"),
        ({"labels": torch.tensor([-100, 0, 0]), "logprobs": torch.zeros(5, 11)}, r"logprobs must have shape \[3, 11\]"),
        ({"labels": torch.tensor([-100, 0, 12])}, r"labels\[2\] is 12: accepted are 0 … 10"),
        ({"temprature": 2.0}, r"loss 'todi' takes beta; got temprature"),
        ({"tail_logprob": torch.zeros(3)}, r"logprobs and tail_logprob in row 0 hold a probability of 1\."),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused(changes: dict[str, Any], message: str) -> None:
    hidden, weight, bias = student(3)
    arguments = {"hidden": hidden, "weight": weight, "bias": bias, "labels": labels_of(3), **teacher_of(3)}
    with pytest.raises(ValueError, match=message):
        trainer.fused_linear_divergence(**{**arguments, **changes})


def test_what_an_ignored_position_holds_does_not_matter_and_the_others_keep_their_names() -> None:
    parameters, arguments = student(4), teacher_of(4)
    labels = labels_of(4).masked_fill(torch.tensor([False, True, False, False]), -100)
    expected = trainer.fused_linear_divergence(*parameters, labels=labels, **arguments)
    spoilt = {
        **arguments,
        "token_ids": arguments["token_ids"].clone(),
        "tail_logprob": arguments["tail_logprob"].clone(),
    }
    spoilt["token_ids"][1], spoilt["tail_logprob"][1] = 99, float("nan")
    assert torch.equal(trainer.fused_linear_divergence(*parameters, labels=labels, **spoilt), expected)
    spoilt["token_ids"][2, 1] = 99
    with pytest.raises(ValueError, match=r"token_ids\[2, 1\] is 99"):
        trainer.fused_linear_divergence(*parameters, labels=labels, **spoilt)


def test_a_mixture_with_cross_entropy_needs_labels() -> None:
    hidden, weight, _ = student(3)
    with pytest.raises(ValueError, match="cross-entropy, which needs labels"):
        fused_distillation_terms(
            Projection([(hidden, weight)]),
            TeacherTargets(**teacher_of(3)),
            None,
            mixture=Mixture(0.5, 0.5),
            settings=LossSettings(),
        )


def test_targets_as_a_whole_are_the_same_as_their_parts_and_never_beside_them() -> None:
    parameters, parts, labels = student(5), teacher_of(5), labels_of(5)
    whole = TeacherTargets(**parts)
    for tail in ("bucket", "groups"):
        fused = trainer.fused_linear_divergence(*parameters, targets=whole, labels=labels, tail=tail)
        assert torch.equal(fused, trainer.fused_linear_divergence(*parameters, **parts, labels=labels, tail=tail))
        logits = torch.nn.functional.linear(*parameters)
        values = trainer.sparse_divergence(logits, targets=whole, tail=tail)
        assert torch.equal(values, trainer.sparse_divergence(logits, **parts, tail=tail))
    with pytest.raises(TypeError, match="tail_groups is given beside targets"):
        trainer.sparse_divergence(logits, targets=whole, tail_groups=parts["tail_groups"])
    with pytest.raises(TypeError, match="logprobs is missing: give token_ids, logprobs and tail_logprob, or targets"):
        trainer.fused_linear_divergence(*parameters, parts["token_ids"])


def test_the_readmes_own_divergence_runs_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.losses.registry._registered", {})
    readme = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")
    code = readme[readme.index("@trainer.register_divergence") :]
    definition, call = code[: code.index("```")].rsplit("\n\n", 1)
    assert len(code[: code.index("```")].strip().splitlines()) < 10
    exec(definition, {"trainer": trainer})
    parameters, arguments = student(5), teacher_of(5)
    scope = {"trainer": trainer, "given": {"hidden": parameters[0], "weight": parameters[1], "bias": None, **arguments}}
    assert eval(call.strip().replace("...", "**given"), scope).requires_grad


def test_no_option_of_a_divergence_can_be_called_like_an_argument_of_the_losses() -> None:
    for function in (trainer.fused_linear_divergence, trainer.sparse_divergence):
        own = {name for name in inspect.signature(function).parameters if name != "loss_args"}
        assert own <= registry.RESERVED
    assert "loss_args" not in registry.RESERVED
    with pytest.raises(ValueError, match="option 'weight', which is an argument of the losses"):

        @trainer.register_divergence("clash")
        def clash(coarse: Coarse, *, weight: float = 1.0) -> Tensor:
            return weight * coarse.q.sum(1)


def test_a_divergence_of_ones_own_runs_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.losses.registry._registered", {})

    @trainer.register_divergence("half_jeffreys")
    def half_jeffreys(coarse: Coarse) -> Tensor:
        return ((coarse.q - coarse.p) * coarse.log_ratio).sum(1) / 2

    parameters, arguments = student(5), teacher_of(5)
    own = trainer.fused_linear_divergence(*parameters, loss="half_jeffreys", **arguments)
    theirs = trainer.fused_linear_divergence(*parameters, loss="jeffreys", **arguments) / 2
    assert_same(own, theirs, parameters)

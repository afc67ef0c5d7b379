"""The low-rank tail against the whole teacher, against brute force, and against the bucket."""

from dataclasses import replace
from math import inf
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import trainer
from tests.helpers.kernels import DEVICE
from tests.helpers.largest_tensors import LargestTensors
from tests.helpers.lossmaking import (
    F_DIVERGENCES,
    LOSSES,
    autograd_of,
    definition,
    random_logits,
    reference_full,
    seeded,
)
from trainer.losses import registry
from trainer.losses.coarse import Coarse
from trainer.losses.fused import Mixture, Projection, fused_distillation_terms
from trainer.losses.settings import LossSettings
from trainer.losses.sparse import distillation_terms
from trainer.losses.targets import TailBasis, TeacherTargets
from trainer.losses.transform import LogitTransform

FEW = settings(max_examples=12, deadline=None)
every_loss = pytest.mark.parametrize("loss", LOSSES)
either_temperature = pytest.mark.parametrize("temperature", [1.0, 2.0])


def random_basis(vocabulary: int, rank: int, seed: int = 0) -> TailBasis:
    """Orthonormal and centred under random weights; rank is below the vocabulary."""
    weights = torch.rand(vocabulary, dtype=torch.float64, generator=seeded(seed)) + 0.1
    weights /= weights.sum()
    columns = torch.randn(vocabulary, rank, dtype=torch.float64, generator=seeded(seed + 1))
    scaled = weights.sqrt()[:, None] * (columns - weights @ columns)
    directions = torch.linalg.qr(scaled).Q / weights.sqrt()[:, None]
    return TailBasis(random_logits(1, vocabulary, seed + 2)[0], directions, weights)


def stored(teacher: Tensor, kept: list[list[int]], basis: TailBasis, num_probes: int = 0) -> TeacherTargets:
    """What a cache would have of logits [N, V], all of them probes if `num_probes` is not 0."""
    log_p = teacher.log_softmax(1)
    n, vocabulary = teacher.shape
    k = max(map(len, kept), default=0)
    ids = torch.full((n, k), -1)
    logprobs = torch.full((n, k), -inf, dtype=torch.float64)
    rest = log_p.clone()
    for row, entries in enumerate(kept):
        ids[row, : len(entries)] = torch.tensor(entries, dtype=torch.long)
        logprobs[row, : len(entries)] = log_p[row, entries]
        rest[row, entries] = -inf
    coefficients = basis.project(teacher)
    residuals = teacher - basis.offset - coefficients @ basis.directions.T
    residuals = residuals - (residuals @ basis.weights)[:, None]
    probes = torch.arange(vocabulary).repeat(n, 1)[:, :num_probes]
    return TeacherTargets(
        ids,
        logprobs,
        rest.logsumexp(1),
        tail_coefficients=coefficients,
        tail_basis=basis,
        probe_ids=probes if num_probes else None,
        probe_residuals=residuals.gather(1, probes) if num_probes else None,
    )


def on_device(targets: TeacherTargets) -> TeacherTargets:
    basis = targets.tail_basis
    assert basis is not None
    moved = TailBasis(*(tensor.to(DEVICE) for tensor in (basis.offset, basis.directions, basis.weights)))
    return replace(targets.each(lambda _, tensor: tensor.to(DEVICE)), tail_basis=moved)


def loss_of(logits: Tensor, targets: TeacherTargets, **options: Any) -> Tensor:
    return trainer.sparse_divergence(logits, targets=targets, tail="low_rank", **options)


def value_and_gradient(logits: Tensor, targets: TeacherTargets, **options: Any) -> tuple[Tensor, Tensor]:
    return autograd_of(logits, lambda z: loss_of(z, targets, **options))


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, list[list[int]], TailBasis]:
    """(student, teacher, entries of each row, basis), with k = 0, V − 1 and V and R = 0, 1 and V − 1 among the sizes."""
    rows, vocabulary, seed = draw(st.integers(1, 4)), draw(st.integers(2, 12)), draw(st.integers(0, 10**6))
    teacher = random_logits(rows, vocabulary, seed)
    order = teacher.argsort(1, descending=True).tolist()
    sizes = [draw(st.sampled_from([0, 1, vocabulary // 2, vocabulary - 1, vocabulary])) for _ in range(rows)]
    rank = draw(st.sampled_from([0, 1, vocabulary // 2, vocabulary - 1]))
    kept = [ids[:size] for ids, size in zip(order, sizes, strict=True)]
    return random_logits(rows, vocabulary, seed + 1), teacher, kept, random_basis(vocabulary, rank, seed)


def rebuilt(student: Tensor, targets: TeacherTargets, weight: float) -> Tensor:
    """Brute force: log p̂ [N, V] at T = 1, by the definitions of the basis, row by row."""
    basis = targets.tail_basis
    assert basis is not None and targets.tail_coefficients is not None
    m, u, w = basis.offset, basis.directions, basis.weights
    rows = []
    for s, z, ids, logprobs, tail in zip(
        student, targets.tail_coefficients, targets.token_ids, targets.logprobs, targets.tail_logprob, strict=True
    ):
        e = s - m - u @ (u.T @ torch.diag(w) @ (s - m))
        e = e - w @ e
        logits = m + u @ z + weight * e
        entries = {int(i): float(p) for i, p in zip(ids, logprobs, strict=True) if i >= 0}
        others = [j for j in range(len(s)) if j not in entries]
        log_p = torch.zeros_like(s)
        for j, p in entries.items():
            log_p[j] = p
        if others:
            log_p[others] = logits[others].log_softmax(0) + tail.clamp_min(-16.0)
        rows.append(log_p)
    return torch.stack(rows)


@every_loss
@either_temperature
def test_all_components_are_the_whole_teacher(loss: str, temperature: float) -> None:
    student, teacher = random_logits(5, 14, 1), random_logits(5, 14, 2)
    kept = [ids[:3] for ids in teacher.argsort(1, descending=True).tolist()]
    targets = stored(teacher, kept, random_basis(14, 13))
    found = value_and_gradient(student, targets, loss=loss, temperature=temperature)
    expected = autograd_of(student, lambda z: reference_full(loss, z, teacher, temperature))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_in_single_precision_all_components_are_the_whole_teacher_too() -> None:
    teacher = 4 * random_logits(20, 300, 1)
    kept = [ids[:3] for ids in teacher.argsort(1, descending=True).tolist()]
    targets = stored(teacher, kept, random_basis(300, 299)).for_arithmetic(torch.float32)
    for transform in (torch.clone, lambda logits: logits + 20):  # a shift is none of the softmax
        terms = distillation_terms(transform(teacher).float(), targets, settings=LossSettings("fkl", "low_rank"))
        assert terms.fkl.abs().max() < 1e-5 and terms.rkl.abs().max() < 1e-5


@every_loss
@either_temperature
@FEW
@given(problem=problems(), weight=st.sampled_from([0.0, 0.3, 0.9]))
def test_value_and_gradient_match_brute_force(
    loss: str, temperature: float, problem: tuple[Tensor, Tensor, list[list[int]], TailBasis], weight: float
) -> None:
    student, teacher, kept, basis = problem
    targets = stored(teacher, kept, basis)
    p = (rebuilt(student, targets, weight) / temperature).softmax(1)

    def by_definition(z: Tensor) -> Tensor:
        q = (z / temperature).softmax(1)
        return torch.stack([definition(loss, a, b, [True] * len(a)) for a, b in zip(p, q, strict=True)])

    found = value_and_gradient(student, targets, loss=loss, temperature=temperature, residual_weight=weight)
    torch.testing.assert_close(found, autograd_of(student, by_definition), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("loss", F_DIVERGENCES)
def test_without_components_and_with_the_students_own_tail_it_is_the_bucket(loss: str) -> None:
    student, teacher = random_logits(5, 14, 3), random_logits(5, 14, 4)
    targets = stored(teacher, [ids[:4] for ids in teacher.argsort(1).tolist()], random_basis(14, 0))
    found = value_and_gradient(student, targets, loss=loss, residual_weight=1.0)
    bucket = autograd_of(student, lambda z: trainer.sparse_divergence(z, targets=targets, loss=loss, tail="bucket"))
    torch.testing.assert_close(found, bucket, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss != "tvd"])  # whose gradient does not fade
@either_temperature
def test_a_student_that_equals_the_teacher_has_nothing_to_learn(loss: str, temperature: float) -> None:
    teacher = random_logits(5, 14, 5)
    targets = stored(teacher, [ids[:4] for ids in teacher.argsort(1).tolist()], random_basis(14, 3))
    value, gradient = value_and_gradient(teacher, targets, loss=loss, temperature=temperature, residual_weight=1.0)
    assert value.abs().max() < 1e-10 and gradient.abs().max() < 1e-10


def test_probes_tell_how_much_of_the_residual_is_the_students() -> None:
    teacher, other = random_logits(40, 60, 6), random_logits(40, 60, 7)
    basis = replace(random_basis(60, 5), offset=torch.zeros(60, dtype=torch.float64))  # the mean of both
    targets = stored(teacher, [[0]] * 40, basis, num_probes=60)

    def weight(student: Tensor) -> float:
        chosen = LossSettings("fkl", "low_rank")
        products = distillation_terms(student, targets, settings=chosen).residual_products
        assert products is not None
        shared, own = products.sum(0).tolist()
        return float(shared / own)

    assert weight(teacher) == pytest.approx(1.0)
    assert abs(weight(other)) < 0.1
    assert weight((teacher + other) / 2) == pytest.approx(1.0, abs=0.1)
    assert weight(teacher + other) == pytest.approx(0.5, abs=0.05)


def test_moments_of_logits_follow_from_hidden_states(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.losses.targets.MULTIPLIED_TOKENS", 5)
    basis, generator = random_basis(14, 4), seeded(3)
    hiddens = [torch.randn(9, size, dtype=torch.float64, generator=generator) for size in (6, 2)]
    weights = [torch.randn(14, size, dtype=torch.float64, generator=generator) for size in (6, 2)]
    bias = torch.randn(14, dtype=torch.float64, generator=generator)
    for added in (bias, None):
        logits = torch.stack([hidden @ weight.T for hidden, weight in zip(hiddens, weights, strict=True)]).sum(0)
        logits = logits if added is None else logits + added
        torch.testing.assert_close(basis.moments_of_maps(hiddens, weights, added), basis.moments(logits))
        torch.testing.assert_close(basis.moments(logits)[:, -1], (logits - basis.offset) @ basis.weights)


@either_temperature
@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(0.5), LogitTransform(1.0, 4.0)], ids=str)
def test_the_fused_loss_is_the_unfused_one_in_value_gradient_and_terms(
    temperature: float, transform: LogitTransform
) -> None:
    generator = seeded(8)
    hidden = torch.randn(9, 6, dtype=torch.float64, generator=generator)
    weight = torch.randn(14, 6, dtype=torch.float64, generator=generator)
    teacher, labels = random_logits(9, 14, 9), torch.arange(9)
    targets = stored(teacher, [[row, 13 - row][: row % 3] for row in range(9)], random_basis(14, 4), num_probes=3)
    chosen = LossSettings("todi", "low_rank", temperature, residual_weight=0.4)
    head = weight.clone().requires_grad_()
    total, terms = fused_distillation_terms(
        Projection([(hidden, head)], transform=transform), targets, labels, mixture=Mixture(0.7, 0.3), settings=chosen
    )
    total.backward()

    def by_definition(w: Tensor) -> Tensor:
        z = transform.apply(hidden @ w.T)
        p = (rebuilt(z.detach(), targets, 0.4) / temperature).softmax(1)
        kd = torch.stack(
            [definition("todi", a, b, [True] * 14) for a, b in zip(p, (z / temperature).softmax(1), strict=True)]
        )
        return 0.7 * kd + 0.3 * torch.nn.functional.cross_entropy(z, labels, reduction="none")

    value, gradient = autograd_of(weight, by_definition)
    torch.testing.assert_close(total.detach(), value.sum(), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(head.grad, gradient, rtol=1e-8, atol=1e-10)
    logits = transform.apply(hidden @ weight.T)
    p, log_q = rebuilt(logits, targets, 0.4).exp(), logits.log_softmax(1)
    torch.testing.assert_close(terms.fkl, (p * (p.log() - log_q)).sum(1), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(terms.rkl, (log_q.exp() * (log_q - p.log())).sum(1), rtol=1e-8, atol=1e-10)
    assert terms.residual_products is not None and terms.residual_products.shape == (9, 2)


@pytest.mark.slow
@pytest.mark.gpu
@either_temperature
@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss != "akl"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float32, 1e-5)], ids=str)
def test_products_of_low_precision_stay_close_to_float64_on_a_cpu(
    dtype: torch.dtype, tolerance: float, loss: str, temperature: float
) -> None:
    """Of AKL's head rounding decides the last token."""
    teacher = 2 * random_logits(64, 300, 12)
    targets = stored(teacher, teacher.topk(16).indices.tolist(), random_basis(300, 8), num_probes=4)
    low = [torch.randn(rows, 16, generator=seeded(rows)).to(dtype) / 2 for rows in (64, 300)]
    results = []
    for stored_there, device, precision in ((on_device(targets), DEVICE, dtype), (targets, "cpu", torch.float64)):
        hidden, weight = parameters = [tensor.to(device, precision).requires_grad_() for tensor in low]
        value = trainer.fused_linear_divergence(
            *(hidden, weight, None), labels=torch.arange(64, device=device), targets=stored_there, tail="low_rank",
            loss=loss, temperature=temperature, residual_weight=0.3,
        )  # fmt: skip
        results.append((value, *torch.autograd.grad(value, parameters)))
    (value, *gradients), (exact_value, *exact_gradients) = results
    assert value.item() == pytest.approx(exact_value.item(), rel=tolerance)
    for gradient, exact in zip(gradients, exact_gradients, strict=True):
        assert gradient.dtype == dtype
        assert (gradient.cpu().double() - exact).norm() < tolerance * exact.norm()


@either_temperature
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_one_tensor_is_formed_that_is_as_large_as_the_logits(
    softcap: float | None, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.losses.blocks.CACHED_ELEMENTS_CPU", 2 * 500)
    teacher = random_logits(8, 500, 17)
    targets = stored(teacher, [[0, 3]] * 8, random_basis(500, 4), num_probes=2)
    hidden, weight = torch.randn(8, 4, dtype=torch.float64), torch.randn(500, 4, dtype=torch.float64)
    with LargestTensors(8 * 500) as largest:
        trainer.fused_linear_divergence(
            hidden.requires_grad_(), weight.requires_grad_(), None, labels=torch.arange(8), targets=targets,
            tail="low_rank", temperature=temperature, residual_weight=0.3, logit_softcap=softcap,
        ).backward()  # fmt: skip
    assert largest.allocations == 2, "the logits and the teacher"


def test_under_autocast_the_teacher_is_rebuilt_in_full_precision() -> None:
    generator = seeded(11)
    hidden, weight = torch.randn(9, 16, generator=generator), torch.randn(60, 16, generator=generator)
    teacher = 3 * random_logits(9, 60, 12)
    targets = stored(teacher, [ids[:4] for ids in teacher.argsort(1, descending=True).tolist()], random_basis(60, 40))
    options: dict[str, Any] = {"targets": targets.for_arithmetic(torch.float32), "loss": "rkl", "residual_weight": 0.3}
    with torch.autocast("cpu", torch.bfloat16):
        found = trainer.fused_linear_divergence(hidden, weight, None, tail="low_rank", **options)
    logits = (hidden.bfloat16() @ weight.bfloat16().T).float()
    torch.testing.assert_close(found, loss_of(logits, **options).mean(), rtol=1e-4, atol=1e-5)


def test_a_registered_divergence_is_taken_over_the_whole_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})

    @trainer.register_divergence("own_rkl")
    def own_rkl(coarse: Coarse) -> Tensor:
        assert coarse.counted.shape == coarse.log_q.shape
        return (coarse.q * coarse.log_ratio).sum(1)

    student, teacher = random_logits(5, 14, 13), random_logits(5, 14, 14)
    targets = stored(teacher, [[0, 3]] * 5, random_basis(14, 4))
    found, expected = (value_and_gradient(student, targets, loss=loss) for loss in ("own_rkl", "rkl"))
    torch.testing.assert_close(found, expected)


def test_the_mass_of_the_tail_at_a_temperature_is_that_which_is_stored() -> None:
    student, teacher = random_logits(5, 14, 15), random_logits(5, 14, 16)
    targets = stored(teacher, [[0, 3]] * 5, random_basis(14, 4))
    tail = (teacher.log_softmax(1) / 2).index_fill(1, torch.tensor([0, 3]), -inf).logsumexp(1)
    log_p, kept = rebuilt(student, targets, 0.0) / 2, torch.tensor([0, 3])
    others = log_p.index_fill(1, kept, -inf).log_softmax(1) + tail[:, None]
    p = others.index_copy(1, kept, log_p[:, kept]).softmax(1)
    q = (student / 2).softmax(1)
    found = loss_of(student, replace(targets, tempered_tail=tail), loss="rkl", temperature=2.0)
    torch.testing.assert_close(found, (q * (q / p).log()).sum(1))
    assert (found - loss_of(student, targets, loss="rkl", temperature=2.0)).abs().max() > 1e-3


def test_what_is_missing_or_wrong_is_named() -> None:
    teacher = random_logits(2, 6, 10)
    targets = stored(teacher, [[0], [1]], random_basis(6, 2), num_probes=2)
    bare = trainer.sparse_divergence
    with pytest.raises(ValueError, match="needs tail_coefficients"):
        bare(teacher, targets.token_ids, targets.logprobs, targets.tail_logprob, tail="low_rank")
    with pytest.raises(ValueError, match=r"residual_weight is 1\.5"):
        loss_of(teacher, targets, residual_weight=1.5)
    basis = random_basis(6, 2)
    for change, told in (
        ({"tail_basis": random_basis(7, 2)}, r"tail_basis\.offset must have shape \[6\]"),
        ({"tail_basis": random_basis(6, 3)}, r"tail_basis\.directions must have shape \[6, 2\]"),
        ({"tail_coefficients": torch.full((2, 2), torch.nan)}, r"tail_coefficients\[0, 0\] is nan"),
        ({"probe_ids": torch.full((2, 2), 6)}, r"probe_ids\[0, 0\] is 6: accepted are 0 … 5"),
        ({"probe_residuals": torch.zeros(2, 1)}, r"probe_residuals must have shape \[2, 2\]"),
    ):
        given_fields = {**vars(targets), "tail_basis": basis, **change}
        with pytest.raises(ValueError, match=told):
            loss_of(teacher, TeacherTargets(**given_fields))

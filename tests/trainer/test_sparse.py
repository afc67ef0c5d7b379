"""The loss on logits against slow, obvious float64 references: value, gradient, and what must not change them."""

import itertools
from collections.abc import Iterator
from math import inf
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import trainer
from trainer.losses import masses
from trainer.losses.divergences import DIVERGENCES, Coarse, DivergenceOptions
from trainer.losses.sparse import DistillationTerms, distillation_terms
from trainer.losses.tail import TeacherTargets

LOSSES = ["fkl", "rkl", "akl", "todi"]
F_DIVERGENCES = ["fkl", "rkl", "todi"]  # AKL is a mixture with a weight of its own: no bound holds for it
TREATMENTS = [  # (tail, temperature)
    ("bucket", 1.0),
    ("groups", 1.0),
    ("ignore", 1.0),
    ("renormalise", 1.0),
    ("bucket", 2.0),
    ("ignore", 2.0),
    ("renormalise", 2.0),
]


# The reference: one position at a time, with autograd, as the papers define it.


def reference_divergence(
    loss: str, log_p: Tensor, log_q: Tensor, is_token: list[bool], akl_split: str = "official", beta: float = 1.0
) -> Tensor:
    """One position's divergence over outcomes [C]; only a token can be in AKL's head."""
    p, q = log_p.exp(), log_q.exp()
    if loss == "fkl":
        return (p * (log_p - log_q)).sum()
    if loss == "rkl":
        return (q * (log_q - log_p)).sum()
    if loss == "todi":
        alpha = torch.sigmoid(beta * (log_p - log_q)).detach()
        return (alpha * p * (log_p - log_q) + (1 - alpha) * q * (log_q - log_p)).sum()
    tokens = sorted((c for c in range(len(p)) if is_token[c]), key=lambda c: -p[c].item())
    head, mass = [], 0.0
    for rank, c in enumerate(tokens):
        inclusive = mass + p[c].item()
        if rank == 0 or (inclusive <= 0.5 if akl_split == "official" else mass < 0.5):
            head.append(c)
        mass = inclusive
    gap = (p - q).abs().detach()
    head_gap = sum(gap[c].item() for c in head)
    total_gap = gap.sum().item()
    w = head_gap / total_gap if total_gap else 0.0
    return w * (p * (log_p - log_q)).sum() + (1 - w) * (q * (log_q - log_p)).sum()


def reference_full(loss: str, logits: Tensor, teacher: Tensor, temperature: float = 1.0, **options: Any) -> Tensor:
    """The full-vocabulary definition at every position, [N]."""
    log_p, log_q = (teacher / temperature).log_softmax(1), (logits / temperature).log_softmax(1)
    every = [True] * logits.shape[1]
    return torch.stack([reference_divergence(loss, *row, every, **options) for row in zip(log_p, log_q, strict=True)])


def reference_sparse(
    loss: str, logits: Tensor, teacher: Tensor, kept: list[list[int]], tail: str, groups: Tensor, temperature: float
) -> Tensor:
    """The same on entries and tail outcomes formed by brute force from the whole teacher, [N]."""
    values = []
    for row, entries in enumerate(kept):
        log_p, log_q = (teacher[row] / temperature).log_softmax(0), (logits[row] / temperature).log_softmax(0)
        rest = [j for j in range(len(log_p)) if j not in entries]
        outcomes = [[j] for j in entries]
        if tail == "groups":
            outcomes += [part for g in range(int(groups.max()) + 1) if (part := [j for j in rest if groups[j] == g])]
        elif tail == "bucket" and rest:
            outcomes += [rest]
        coarse_p = torch.stack([log_p[part].logsumexp(0) for part in outcomes])
        coarse_q = torch.stack([log_q[part].logsumexp(0) for part in outcomes])
        if tail == "renormalise":
            coarse_p = coarse_p.log_softmax(0)
        is_token = [c < len(entries) for c in range(len(outcomes))]
        values.append(reference_divergence(loss, coarse_p, coarse_q, is_token))
    return torch.stack(values)


# What a cache would hold of a teacher.


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_logits(rows: int, vocabulary: int, seed: int, scale: float = 1.5) -> Tensor:
    return scale * torch.randn(rows, vocabulary, dtype=torch.float64, generator=seeded(seed))


def top_entries(teacher: Tensor, sizes: list[int]) -> list[list[int]]:
    order = teacher.argsort(1, descending=True).tolist()
    return [ids[:size] for ids, size in zip(order, sizes, strict=True)]


def known(teacher: Tensor, kept: list[list[int]], groups: Tensor, temperature: float = 1.0) -> dict[str, Tensor]:
    """The arguments of sparse_divergence for a teacher of whom `kept` was stored, padded to the longest row."""
    log_p = teacher.log_softmax(1)
    rows, k, num_groups = len(kept), max(map(len, kept), default=0), int(groups.max()) + 1
    token_ids = torch.full((rows, k), -1)
    logprobs = torch.full((rows, k), -inf, dtype=torch.float64)
    rest = log_p.clone()
    for row, ids in enumerate(kept):
        token_ids[row, : len(ids)] = torch.tensor(ids, dtype=torch.long)
        logprobs[row, : len(ids)] = log_p[row, ids]
        rest[row, ids] = -inf
    group_logprobs = [rest[:, groups == g].logsumexp(1) for g in range(num_groups)]
    return {
        "token_ids": token_ids,
        "logprobs": logprobs,
        "tail_logprob": rest.logsumexp(1),
        "tempered_tail": (rest / temperature).logsumexp(1),
        "tail_groups": groups,
        "group_logprobs": torch.stack(group_logprobs, 1),
    }


def bands(vocabulary: int, num_groups: int) -> Tensor:
    """Interleaved groups, so that none is a contiguous range."""
    return torch.arange(vocabulary) % num_groups


def value_and_gradient(logits: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    logits = logits.detach().clone().requires_grad_()
    value = trainer.sparse_divergence(logits, **arguments)
    weights = torch.linspace(0.5, 1.5, len(value), dtype=value.dtype)  # rows must not be mixed up
    (gradient,) = torch.autograd.grad((value * weights).sum(), logits)
    return value.detach(), gradient


def autograd_of(logits: Tensor, reference: Any) -> tuple[Tensor, Tensor]:
    logits = logits.detach().clone().requires_grad_()
    value = reference(logits)
    weights = torch.linspace(0.5, 1.5, len(value), dtype=value.dtype)
    (gradient,) = torch.autograd.grad((value * weights).sum(), logits)
    return value.detach(), gradient


@st.composite
def ragged_problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, list[list[int]], Tensor]:
    """(student logits, teacher logits, entries of each row, groups), with k = 0, 1, V−1 and V among the sizes."""
    rows, vocabulary = draw(st.integers(1, 4)), draw(st.integers(2, 12))
    size = st.one_of(st.sampled_from([0, 1, vocabulary - 1, vocabulary]), st.integers(0, vocabulary))
    sizes = draw(st.lists(size, min_size=rows, max_size=rows))
    seed = draw(st.integers(0, 2**16))
    teacher = random_logits(rows, vocabulary, seed)
    groups = bands(vocabulary, draw(st.integers(1, vocabulary)))
    return random_logits(rows, vocabulary, seed + 1), teacher, top_entries(teacher, sizes), groups


# Value and gradient.


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("tail", "temperature"), TREATMENTS)
@settings(max_examples=25, deadline=None)
@given(problem=ragged_problems())
def test_value_and_gradient_match_brute_force_on_any_ragged_shape(
    loss: str, tail: str, temperature: float, problem: tuple[Tensor, Tensor, list[list[int]], Tensor]
) -> None:
    logits, teacher, kept, groups = problem
    if tail in ("ignore", "renormalise"):
        kept = [ids or [0] for ids in kept]  # the reference has no empty sum
    expected = autograd_of(logits, lambda z: reference_sparse(loss, z, teacher, kept, tail, groups, temperature))
    received = value_and_gradient(
        logits, loss=loss, tail=tail, temperature=temperature, **known(teacher, kept, groups, temperature)
    )
    torch.testing.assert_close(received, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("loss", ["fkl", "rkl"])
@pytest.mark.parametrize(("tail", "temperature"), TREATMENTS)
def test_gradient_passes_gradcheck(loss: str, tail: str, temperature: float) -> None:
    teacher = random_logits(3, 9, seed=1)
    arguments = known(teacher, top_entries(teacher, [4, 2, 3]), bands(9, 3), temperature)
    logits = random_logits(3, 9, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z: trainer.sparse_divergence(z, loss=loss, tail=tail, temperature=temperature, **arguments), (logits,)
    )


@pytest.mark.parametrize("loss", ["akl", "todi"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gradient_is_the_finite_difference_of_the_value_with_its_weight_held_still(
    loss: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # ToDi's α and AKL's w carry no gradient, so both are frozen at the point itself before taking differences.
    teacher, logits = random_logits(1, 8, seed=3), random_logits(1, 8, seed=4)
    kept = top_entries(teacher, [3])
    arguments = {"loss": loss, "temperature": temperature, **known(teacher, kept, bands(8, 2), temperature)}
    _, gradient = value_and_gradient(logits, **arguments)
    gradient = gradient / 0.5  # the weight of row 0

    seen: list[Coarse] = []
    original = DIVERGENCES[loss]

    def spied(coarse: Coarse, options: DivergenceOptions) -> tuple[Tensor, Tensor]:
        seen.append(coarse)
        return original(coarse, options)

    monkeypatch.setitem(DIVERGENCES, loss, spied)
    base = trainer.sparse_divergence(logits, **arguments)
    at_point = seen.pop()
    if loss == "todi":
        alpha = at_point.p / (at_point.p + at_point.q)
    else:
        fkl, rkl = (DIVERGENCES[name](at_point, DivergenceOptions())[0] for name in ("fkl", "rkl"))
        alpha = ((base - rkl) / (fkl - rkl))[:, None]

    def frozen(z: Tensor) -> float:
        trainer.sparse_divergence(z, **arguments)
        coarse = seen.pop()
        r = coarse.log_ratio
        return ((1 - alpha) * coarse.q * r - alpha * coarse.p * r).sum().item()

    step = 1e-5
    for j in range(8):
        offset = torch.zeros_like(logits)
        offset[0, j] = step
        difference = (frozen(logits + offset) - frozen(logits - offset)) / (2 * step)
        assert gradient[0, j].item() == pytest.approx(difference, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("akl_split", ["official", "todi"])
@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_storing_the_whole_vocabulary_gives_the_full_definition(
    loss: str, temperature: float, akl_split: str, beta: float
) -> None:
    logits, teacher = random_logits(6, 15, seed=5), random_logits(6, 15, seed=6)
    options = {"akl_split": akl_split, "beta": beta}
    expected = autograd_of(logits, lambda z: reference_full(loss, z, teacher, temperature, **options))
    arguments = known(teacher, top_entries(teacher, [15] * 6), bands(15, 1), temperature)
    received = value_and_gradient(logits, loss=loss, temperature=temperature, **options, **arguments)
    torch.testing.assert_close(received, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("loss", F_DIVERGENCES)
def test_every_token_its_own_group_gives_the_full_definition(loss: str) -> None:
    logits, teacher = random_logits(5, 12, seed=7), random_logits(5, 12, seed=8)
    expected = autograd_of(logits, lambda z: reference_full(loss, z, teacher))
    for sizes in ([0] * 5, [3, 1, 0, 12, 5]):
        arguments = known(teacher, top_entries(teacher, sizes), bands(12, 12))
        received = value_and_gradient(logits, loss=loss, tail="groups", **arguments)
        torch.testing.assert_close(received, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
@settings(max_examples=25, deadline=None)
@given(problem=ragged_problems())
def test_a_single_group_is_the_bucket(loss: str, problem: tuple[Tensor, Tensor, list[list[int]], Tensor]) -> None:
    logits, teacher, kept, _ = problem
    arguments = known(teacher, kept, bands(logits.shape[1], 1))
    bucket = value_and_gradient(logits, loss=loss, tail="bucket", **arguments)
    group = value_and_gradient(logits, loss=loss, tail="groups", **arguments)
    torch.testing.assert_close(group, bucket, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("loss", LOSSES)
def test_tempered_bucket_meets_the_tempered_full_divergence_as_the_tail_shrinks_to_one_token(loss: str) -> None:
    logits, teacher = random_logits(8, 40, seed=9, scale=3), random_logits(8, 40, seed=10, scale=3)
    full, full_gradient = autograd_of(logits, lambda z: reference_full(loss, z, teacher, 2.0))
    for k, value_error, gradient_error in ((36, 0.1, 0.2), (39, 1e-10, 1e-10)):
        arguments = known(teacher, top_entries(teacher, [k] * 8), bands(40, 1), 2.0)
        value, gradient = value_and_gradient(logits, loss=loss, temperature=2.0, **arguments)
        assert (value - full).norm() < value_error * full.norm()
        assert (gradient - full_gradient).norm() < gradient_error * full_gradient.norm()


# The tail's promises.


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("tail", "temperature"), [("bucket", 1.0), ("groups", 1.0), ("bucket", 2.0)])
@settings(max_examples=25, deadline=None)
@given(problem=ragged_problems())
def test_a_student_that_equals_the_teacher_has_nothing_to_learn(
    loss: str, tail: str, temperature: float, problem: tuple[Tensor, Tensor, list[list[int]], Tensor]
) -> None:
    _, teacher, kept, groups = problem
    arguments = known(teacher, kept, groups, temperature)
    value, gradient = value_and_gradient(teacher + 3.0, loss=loss, tail=tail, temperature=temperature, **arguments)
    assert value.abs().max() < 1e-12
    assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize("loss", ["fkl", "rkl"])
@pytest.mark.parametrize("tail", ["ignore", "renormalise"])
def test_the_ablations_move_a_student_that_equals_the_teacher(loss: str, tail: str) -> None:
    teacher = random_logits(3, 20, seed=11)
    arguments = known(teacher, top_entries(teacher, [4] * 3), bands(20, 1))
    assert value_and_gradient(teacher, loss=loss, tail=tail, **arguments)[1].abs().max() > 0.01


@pytest.mark.parametrize("loss", F_DIVERGENCES)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), vocabulary=st.integers(2, 12))
def test_bucket_is_a_lower_bound_that_rises_with_every_entry(loss: str, seed: int, vocabulary: int) -> None:
    logits, teacher = random_logits(3, vocabulary, seed), random_logits(3, vocabulary, seed + 1)
    bounds = [
        trainer.sparse_divergence(
            logits, loss=loss, **known(teacher, top_entries(teacher, [k] * 3), bands(vocabulary, 1))
        )
        for k in range(vocabulary + 1)
    ]
    for smaller, larger in itertools.pairwise(bounds):
        assert (larger >= smaller - 1e-12).all()
    torch.testing.assert_close(bounds[-1], reference_full(loss, logits, teacher))


@pytest.mark.parametrize("loss", F_DIVERGENCES)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), k=st.integers(0, 12))
def test_splitting_groups_never_lowers_the_bound(loss: str, seed: int, k: int) -> None:
    logits, teacher = random_logits(3, 12, seed), random_logits(3, 12, seed + 1)
    kept = top_entries(teacher, [k] * 3)
    finest_first = [torch.randperm(12, generator=seeded(seed))]
    while finest_first[-1].max() > 0:
        finest_first.append(finest_first[-1] // 2)  # merges groups in pairs
    bounds = [
        trainer.sparse_divergence(logits, loss=loss, tail="groups", **known(teacher, kept, groups))
        for groups in reversed(finest_first)
    ]
    for coarser, finer in itertools.pairwise(bounds):
        assert (finer >= coarser - 1e-12).all()
    assert (reference_full(loss, logits, teacher) >= bounds[-1] - 1e-12).all()


def test_fkl_misses_exactly_the_divergence_inside_the_tail() -> None:
    logits, teacher = random_logits(4, 20, seed=12), random_logits(4, 20, seed=13)
    kept = top_entries(teacher, [5] * 4)
    arguments = known(teacher, kept, bands(20, 1))
    log_p, log_q = teacher.log_softmax(1), logits.log_softmax(1)
    for row, ids in enumerate(kept):
        rest = [j for j in range(20) if j not in ids]
        p_tail, q_tail = log_p[row, rest].log_softmax(0), log_q[row, rest].log_softmax(0)
        missed = log_p[row, rest].exp().sum() * (p_tail.exp() * (p_tail - q_tail)).sum()
        gap = reference_full("fkl", logits, teacher) - trainer.sparse_divergence(logits, loss="fkl", **arguments)
        torch.testing.assert_close(gap[row], missed)


# Numerics.


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("tail", ["bucket", "groups"])
@pytest.mark.parametrize("student_sure_of", [0, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_teacher_certain_of_one_token_gives_a_finite_loss_and_gradient(
    loss: str, tail: str, student_sure_of: int, dtype: torch.dtype
) -> None:
    logits = torch.zeros(1, 10, dtype=dtype)
    logits[0, student_sure_of] = 300.0
    value, gradient = value_and_gradient(
        logits,
        token_ids=torch.tensor([[0, -1]]),
        logprobs=torch.tensor([[0.0, -inf]]),
        tail_logprob=torch.tensor([-inf]),
        tail_groups=bands(10, 2),
        group_logprobs=torch.full((1, 2), -inf),
        loss=loss,
        tail=tail,
    )
    assert value.isfinite().all()
    assert gradient.isfinite().all()
    if student_sure_of == 0:
        assert value.abs().max() < 1e-3  # the floor of the teacher's tail, e^−16, times some 300 nats
        assert gradient.abs().max() < 1e-5
    elif loss == "fkl":
        assert value.item() == pytest.approx(300.0)
        assert gradient[0, 0].item() == pytest.approx(-0.5, rel=1e-2)  # −1, times row 0's weight
        assert gradient[0, 5].item() == pytest.approx(0.5, rel=1e-2)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("tail", ["bucket", "groups"])
def test_float32_is_exact_where_the_student_leaves_the_tail_all_but_empty(loss: str, tail: str) -> None:
    # The student's tail mass is about e^−120: 1 − Σ q would be 0, and a mass not even a float32.
    teacher, logits = random_logits(3, 12, seed=14), random_logits(3, 12, seed=15)
    kept, groups = top_entries(teacher, [4] * 3), bands(12, 3)
    for row, ids in enumerate(kept):
        logits[row, ids] += 120.0
    expected = autograd_of(
        logits.float().double(), lambda z: reference_sparse(loss, z, teacher, kept, tail, groups, 1.0)
    )
    value, gradient = value_and_gradient(logits.float(), loss=loss, tail=tail, **known(teacher, kept, groups))
    torch.testing.assert_close((value.double(), gradient.double()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_float32_is_exact_for_a_group_that_the_student_leaves_far_below_the_others(loss: str) -> None:
    teacher, logits = random_logits(3, 12, seed=45), random_logits(3, 12, seed=46).float()
    kept, groups = top_entries(teacher, [4] * 3), bands(12, 3)
    logits[:, groups == 2] -= 120.0
    expected = autograd_of(logits.double(), lambda z: reference_sparse(loss, z, teacher, kept, "groups", groups, 1.0))
    value, gradient = value_and_gradient(logits, loss=loss, tail="groups", **known(teacher, kept, groups))
    torch.testing.assert_close((value.double(), gradient.double()), expected, rtol=1e-5, atol=1e-5)


def test_an_infinite_divergence_is_not_hidden() -> None:
    teacher, logits = random_logits(2, 6, seed=47), random_logits(2, 6, seed=48)
    logits[1, 0] = -inf
    arguments = known(teacher, [[0, 1], [0, 1]], bands(6, 1))
    assert trainer.sparse_divergence(logits, loss="fkl", **arguments).isinf().tolist() == [False, True]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("tail", "temperature"), TREATMENTS)
def test_bfloat16_logits_lose_nothing_but_the_rounding_of_the_gradient(
    loss: str, tail: str, temperature: float
) -> None:
    teacher, logits = random_logits(6, 200, seed=16), random_logits(6, 200, seed=17).bfloat16()
    arguments = {
        "loss": loss,
        "tail": tail,
        "temperature": temperature,
        **known(teacher, top_entries(teacher, [16] * 6), bands(200, 5), temperature),
    }
    value, gradient = value_and_gradient(logits, **arguments)
    expected, expected_gradient = value_and_gradient(logits.double(), **arguments)
    assert value.dtype == torch.float32
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=2**-8, atol=1e-7)


def test_float16_logits_and_half_precision_targets_are_accepted() -> None:
    teacher, logits = random_logits(3, 20, seed=18), random_logits(3, 20, seed=19)
    arguments = known(teacher, top_entries(teacher, [5, 5, 2]), bands(20, 2))
    expected = trainer.sparse_divergence(logits, **arguments)
    half = {name: t.half() if t.is_floating_point() else t.int() for name, t in arguments.items()}
    received = trainer.sparse_divergence(logits.half(), **half)
    torch.testing.assert_close(received.double(), expected, rtol=1e-2, atol=1e-2)


def test_float64_logits_give_a_float64_loss() -> None:
    teacher = random_logits(1, 5, seed=20)
    arguments = known(teacher, top_entries(teacher, [2]), bands(5, 1))
    assert trainer.sparse_divergence(teacher, **arguments).dtype == torch.float64


def test_nan_logits_are_not_hidden() -> None:
    teacher = random_logits(3, 8, seed=21)
    arguments = known(teacher, [[0, 1], [0, 1], [0, 1]], bands(8, 2))
    for place, tail, loss in itertools.product((0, 5), ("bucket", "groups"), LOSSES):
        logits = random_logits(3, 8, seed=22)
        logits[1, place] = float("nan")
        value, gradient = value_and_gradient(logits, loss=loss, tail=tail, **arguments)
        assert value.isnan().tolist() == [False, True, False]
        assert gradient[1].isnan().all()
        assert gradient[[0, 2]].isfinite().all()


# What must not matter, and what must.


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("tail", "temperature"), TREATMENTS)
def test_logit_columns_beyond_the_teachers_vocabulary_change_nothing_and_get_no_gradient(
    loss: str, tail: str, temperature: float
) -> None:
    teacher, logits = random_logits(3, 10, seed=23), random_logits(3, 10, seed=24)
    arguments = {
        "loss": loss,
        "tail": tail,
        "temperature": temperature,
        **known(
            teacher, top_entries(teacher, [4, 0, 10] if tail == "bucket" else [4, 1, 10]), bands(10, 3), temperature
        ),
    }
    expected, expected_gradient = value_and_gradient(logits, **arguments)
    padded = torch.cat([logits, torch.full((3, 6), 50.0, dtype=torch.float64)], 1)
    value, gradient = value_and_gradient(padded, vocab_size=10, **arguments)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient[:, :10], expected_gradient)
    assert torch.equal(gradient[:, 10:], torch.zeros(3, 6, dtype=torch.float64))


@pytest.mark.parametrize("loss", LOSSES)
def test_more_padding_changes_nothing(loss: str) -> None:
    teacher, logits = random_logits(3, 10, seed=25), random_logits(3, 10, seed=26)
    arguments = known(teacher, top_entries(teacher, [4, 1, 2]), bands(10, 3))
    wider = {
        **arguments,
        "token_ids": torch.cat([torch.full((3, 1), -1), arguments["token_ids"], torch.full((3, 5), -1)], 1),
        "logprobs": torch.nn.functional.pad(arguments["logprobs"], (1, 5), value=-inf),
    }
    for tail in ("bucket", "groups", "ignore", "renormalise"):
        torch.testing.assert_close(
            value_and_gradient(logits, loss=loss, tail=tail, **wider),
            value_and_gradient(logits, loss=loss, tail=tail, **arguments),
        )


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


@pytest.mark.parametrize("loss", LOSSES)
def test_targets_moved_by_one_position_are_noticed(loss: str) -> None:
    teacher = random_logits(16, 30, seed=29)
    arguments = known(teacher, top_entries(teacher, [8] * 16), bands(30, 2))
    moved = {name: t if name == "tail_groups" else t.roll(1, 0) for name, t in arguments.items()}
    for tail in ("bucket", "groups"):
        assert trainer.sparse_divergence(teacher, loss=loss, tail=tail, **arguments).max() < 1e-12
        assert trainer.sparse_divergence(teacher, loss=loss, tail=tail, **moved).min() > 0.1


@pytest.mark.parametrize(("tail", "temperature"), TREATMENTS)
def test_no_positions_give_no_losses_and_an_empty_gradient(tail: str, temperature: float) -> None:
    for k in (0, 3):
        arguments = {
            "token_ids": torch.empty(0, k, dtype=torch.long),
            "logprobs": torch.empty(0, k),
            "tail_logprob": torch.empty(0),
            "tempered_tail": torch.empty(0),
            "tail_groups": bands(6, 2),
            "group_logprobs": torch.empty(0, 2),
        }
        value, gradient = value_and_gradient(torch.empty(0, 6), tail=tail, temperature=temperature, **arguments)
        assert value.shape == (0,)
        assert gradient.shape == (0, 6)


@pytest.fixture
def one_row_per_chunk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(masses, "CHUNK_ELEMENTS_CPU", 1)
    yield


@pytest.mark.parametrize(("tail", "temperature"), TREATMENTS)
def test_chunks_of_rows_change_nothing(tail: str, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, logits = random_logits(7, 12, seed=30), random_logits(7, 12, seed=31)
    labels = torch.arange(7)
    targets = TeacherTargets(**known(teacher, top_entries(teacher, [3, 4, 5, 1, 2, 12, 3]), bands(12, 3), temperature))
    results = []
    for elements in (7 * 12, 3 * 12, 1):
        monkeypatch.setattr(masses, "CHUNK_ELEMENTS_CPU", elements)
        z = logits.clone().requires_grad_()
        terms = distillation_terms(z, targets, labels, tail=tail, temperature=temperature)
        (gradient,) = torch.autograd.grad(mixture_of(terms, 1, 1).sum(), z)
        results.append((*terms, gradient))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-13, atol=1e-15)


class LargestTensors(TorchDispatchMode):
    """Counts the operations that allocate a result of at least `elements` elements."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.allocations = elements, 0
        self.storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.untyped_storage().nbytes() >= self.elements * result.element_size():
            pointer = result.untyped_storage().data_ptr()
            self.allocations += pointer not in given and pointer not in self.storages
            self.storages.add(pointer)
        return result


@pytest.mark.usefixtures("one_row_per_chunk")
@pytest.mark.parametrize(("tail", "temperature"), TREATMENTS)
def test_the_gradient_is_the_only_tensor_as_large_as_the_logits(tail: str, temperature: float) -> None:
    teacher = random_logits(64, 500, seed=32)
    targets = TeacherTargets(**known(teacher, top_entries(teacher, [8] * 64), bands(500, 4), temperature))
    logits = random_logits(64, 500, seed=33).requires_grad_()
    with LargestTensors(64 * 500) as forward:
        terms = distillation_terms(
            logits, targets, torch.zeros(64, dtype=torch.long), tail=tail, temperature=temperature
        )
        loss = mixture_of(terms, 1, 1).sum()
    with LargestTensors(64 * 500) as backward:
        torch.autograd.grad(loss, logits)
    assert forward.allocations == 0
    assert backward.allocations == 1


def test_a_second_derivative_is_refused() -> None:
    teacher, logits = random_logits(2, 6, seed=34), random_logits(2, 6, seed=35).requires_grad_()
    value = trainer.sparse_divergence(logits, **known(teacher, top_entries(teacher, [2, 2]), bands(6, 1)))
    (gradient,) = torch.autograd.grad((value**2).sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_another_divergence_is_one_entry_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def total_variation(coarse: Coarse, options: DivergenceOptions) -> tuple[Tensor, Tensor]:
        difference = coarse.q - coarse.p
        return difference.abs().sum(1) / 2, coarse.q * difference.sign() / 2

    monkeypatch.setitem(DIVERGENCES, "tvd", total_variation)
    teacher, logits = random_logits(3, 8, seed=36), random_logits(3, 8, seed=37).requires_grad_()
    arguments = known(teacher, top_entries(teacher, [8, 3, 1]), bands(8, 2))
    assert torch.autograd.gradcheck(lambda z: trainer.sparse_divergence(z, loss="tvd", **arguments), (logits,))
    full = (teacher.softmax(1) - logits.softmax(1)).abs().sum(1) / 2
    torch.testing.assert_close(trainer.sparse_divergence(logits, loss="tvd", **arguments)[0], full[0])


# Cross-entropy and metrics from the same pass.


def mixture_of(terms: DistillationTerms, kd_weight: Tensor | float, ce_weight: Tensor | float) -> Tensor:
    assert terms.cross_entropy is not None
    return kd_weight * terms.kd + ce_weight * terms.cross_entropy


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("tail", "temperature"), TREATMENTS)
def test_cross_entropy_and_its_mixture_with_the_divergence_have_the_gradients_of_their_definitions(
    loss: str, tail: str, temperature: float
) -> None:
    teacher, logits = random_logits(5, 9, seed=38), random_logits(5, 12, seed=39)
    kept, groups = top_entries(teacher, [3, 1, 9, 2, 4]), bands(9, 3)
    targets = TeacherTargets(**known(teacher, kept, groups, temperature))
    labels = torch.tensor([kept[0][0], 8, 3, kept[3][1], 0])  # in the entries and outside
    kd_weight, ce_weight = torch.rand(2, 5, dtype=torch.float64, generator=seeded(40))

    def mixture(z: Tensor) -> Tensor:
        kd = reference_sparse(loss, z[:, :9], teacher, kept, tail, groups, temperature)
        return kd_weight * kd + ce_weight * torch.nn.functional.cross_entropy(z[:, :9], labels, reduction="none")

    def ours(z: Tensor) -> Tensor:
        terms = distillation_terms(z, targets, labels, loss=loss, tail=tail, temperature=temperature, vocab_size=9)
        return mixture_of(terms, kd_weight, ce_weight)

    torch.testing.assert_close(autograd_of(logits, ours), autograd_of(logits, mixture), rtol=1e-9, atol=1e-12)

    def cross_entropy_alone(z: Tensor) -> Tensor:
        terms = distillation_terms(z, targets, labels, tail=tail, temperature=temperature, vocab_size=9)
        assert terms.cross_entropy is not None
        return terms.cross_entropy

    def cross_entropy_reference(z: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(z[:, :9], labels, reduction="none")

    torch.testing.assert_close(
        autograd_of(logits, cross_entropy_alone), autograd_of(logits, cross_entropy_reference), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("tail", "temperature"), TREATMENTS)
def test_reported_fkl_rkl_and_tail_mass_are_the_buckets_at_temperature_one_whatever_is_trained(
    loss: str, tail: str, temperature: float
) -> None:
    teacher, logits = random_logits(5, 9, seed=41), random_logits(5, 9, seed=42)
    kept, groups = top_entries(teacher, [3, 1, 9, 2, 4]), bands(9, 3)
    targets = TeacherTargets(**known(teacher, kept, groups, temperature))
    terms = distillation_terms(logits.requires_grad_(), targets, loss=loss, tail=tail, temperature=temperature)
    for name, reported in (("fkl", terms.fkl), ("rkl", terms.rkl)):
        expected = reference_sparse(name, logits, teacher, kept, "bucket", groups, 1.0)
        torch.testing.assert_close(reported, expected.detach(), rtol=1e-9, atol=1e-12)
    tail_mass = [1 - logits[row].softmax(0)[ids].sum().item() for row, ids in enumerate(kept)]
    torch.testing.assert_close(terms.student_tail_mass, torch.tensor(tail_mass, dtype=torch.float64))
    assert terms.kd.requires_grad
    assert not any(t.requires_grad for t in (terms.fkl, terms.rkl, terms.student_tail_mass, terms.top1_agrees))
    assert terms.cross_entropy is None


def test_top1_agrees_where_the_students_likeliest_token_is_the_teachers() -> None:
    teacher = torch.tensor([[3.0, 2, 1, 0]] * 4, dtype=torch.float64)
    logits = torch.tensor([[9.0, 1, 1, 1], [1, 9, 1, 1], [1, 1, 1, 9], [9, 1, 1, 1]], dtype=torch.float64)
    kept = [[1, 0], [0, 1], [0, 1], []]  # descending or not; agreement, another entry, a token of the tail, no entry
    for tail in ("bucket", "groups"):
        terms = distillation_terms(logits, TeacherTargets(**known(teacher, kept, bands(4, 2))), tail=tail)
        assert terms.top1_agrees.tolist() == [True, False, False, False]


def test_without_entries_nothing_agrees_and_the_bucket_knows_nothing() -> None:
    teacher, logits = random_logits(2, 6, seed=43), random_logits(2, 6, seed=44)
    terms = distillation_terms(logits, TeacherTargets(**known(teacher, [[], []], bands(6, 1))))
    assert terms.top1_agrees.tolist() == [False, False]
    assert terms.kd.abs().max() < 1e-12
    torch.testing.assert_close(terms.student_tail_mass, torch.ones(2, dtype=torch.float64))

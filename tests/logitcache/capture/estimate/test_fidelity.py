"""Gradient errors, against full-vocabulary autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from logitcache.capture.estimate import fidelity
from logitcache.capture.estimate.fidelity import (
    SLOPES,
    STUDENTS,
    Outcomes,
    gradient_errors,
    known_residual,
    rebuilt_outcomes,
    stand_in,
    tail_divergence,
)
from logitcache.format.layout import Layout
from logitcache.format.tail_basis import TailBasis
from logitcache.format.tail_parts import TailParts
from logitcache.format.targets import PAD_ID, SparseTargets
from tests.helpers.smallcaches import VOCAB, full_distributions, sparse_targets, tail_basis

N, V, G = 7, 60, 5


def distributions(seed: int, sharpness: float = 2.0) -> torch.Tensor:
    """Log-probabilities, float64 [N, V]."""
    generator = torch.Generator().manual_seed(seed)
    return (sharpness * torch.randn(N, V, generator=generator, dtype=torch.float64)).log_softmax(dim=1)


GROUPS = np.random.default_rng(0).permutation(np.arange(V) % G)
P, Q = distributions(1), distributions(2)
MEAN = P.exp().mean(dim=0).numpy()


def outcomes_of(logprobs: torch.Tensor = P) -> Outcomes:
    return Outcomes.of_logprobs(logprobs.numpy(), MEAN, GROUPS)


def student_of(outcomes: Outcomes, logprobs: torch.Tensor = Q) -> np.ndarray:
    """A full student in the order of the outcomes, all of which are tokens."""
    return np.take_along_axis(logprobs.numpy(), outcomes.ids, axis=1)


def coarse(logprobs: torch.Tensor, k: int, groups: np.ndarray) -> list[torch.Tensor]:
    """Probabilities of each position's stored outcomes, one position at a time: k tokens, then the groups without them."""
    rows = []
    for position in range(N):
        top = P[position].topk(k).indices
        rest = torch.ones(V, dtype=torch.bool).index_fill(0, top, False)
        probs = logprobs[position].exp()
        tails = [probs[rest & torch.tensor(groups == g)].sum() for g in np.unique(groups)]
        rows.append(torch.stack([*probs[top], *tails]))
    return rows


def adaptive_weight(p: torch.Tensor, q: torch.Tensor, k: int) -> float:
    """w of AKL: the head's part of all gaps. The head: entries in order while they hold half of the mass, at least one."""
    gaps, head, mass = [abs(float(a) - float(b)) for a, b in zip(p, q, strict=True)], 0.0, 0.0
    for i in range(min(k, len(gaps))):
        mass += float(p[i])
        head += gaps[i] if i == 0 or mass <= 0.5 else 0.0
    return head / sum(gaps)


def autograd_sum(loss: str, k: int, groups: np.ndarray, position: int | None = None) -> torch.Tensor:
    """The gradient of a divergence on stored outcomes by the student's logits, summed over all positions or of one [V]."""
    logits = Q.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    pairs = zip(coarse(P, k, groups), coarse(logits.log_softmax(dim=1), k, groups), strict=True)
    for index, (p, q) in enumerate(pairs):
        if position not in (None, index):
            continue
        possible = p > 0  # a group may lie within the entries
        p, q = p[possible], q[possible]
        forward, reverse = p * (p / q).log(), q * (q / p).log()
        share, w = (p / (p + q)).detach(), adaptive_weight(p, q.detach(), k)
        total = (
            total
            + {
                "fkl": forward,
                "rkl": reverse,
                "akl": w * forward + (1 - w) * reverse,
                "todi": share * forward + (1 - share) * reverse,
            }[loss].sum()
        )
    (gradient,) = torch.autograd.grad(total, logits)
    return gradient.sum(dim=0)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("loss", SLOPES)
def test_errors_are_those_of_full_vocabulary_autograd(loss: str, grouped: bool) -> None:
    outcomes = outcomes_of()
    ks = (1, 4, 16, 40)
    errors = gradient_errors(outcomes, student_of(outcomes), ks, grouped=grouped)
    full = autograd_sum(loss, V, GROUPS)
    for k, found in zip(ks, errors, strict=True):
        stored = autograd_sum(loss, k, GROUPS if grouped else np.zeros(V, dtype=int))
        assert found[loss] == pytest.approx(float((stored - full).norm() / full.norm()), rel=1e-9)
        assert found[loss] > 1e-3


def test_all_entries_leave_no_error() -> None:
    outcomes = outcomes_of()
    (errors,) = gradient_errors(outcomes, student_of(outcomes), [V], grouped=False)
    assert max(errors.values()) == 0


def test_rounded_group_masses_are_those_of_autograd() -> None:
    outcomes, step = outcomes_of(), 0.5
    (found,) = gradient_errors(outcomes, student_of(outcomes), [4], grouped=True, group_step_nats=step)
    full, logits = autograd_sum("fkl", V, GROUPS), Q.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for p, q in zip(coarse(P, 4, GROUPS), coarse(logits.log_softmax(dim=1), 4, GROUPS), strict=True):
        tail = p[4:].sum()
        rounded = ((p[4:] / tail).log() / step).round().mul(step).exp()
        stored = torch.cat([p[:4], tail * rounded / rounded.sum()])
        total = total - (stored * q.log()).sum()
    (gradient,) = torch.autograd.grad(total, logits)
    assert found["fkl"] == pytest.approx(float((gradient.sum(dim=0) - full).norm() / full.norm()), rel=1e-9)


def test_entries_may_differ_by_position() -> None:
    outcomes = outcomes_of()
    counts = np.arange(N) * 5
    held = np.arange(V) < counts[:, None]
    (found,) = gradient_errors(outcomes, student_of(outcomes), [held], grouped=True)
    error, full = torch.zeros(V, dtype=torch.float64), autograd_sum("rkl", V, GROUPS)
    for i, k in enumerate(counts):
        error += autograd_sum("rkl", int(k), GROUPS, position=i) - autograd_sum("rkl", V, GROUPS, position=i)
    assert found["rkl"] == pytest.approx(float(error.norm() / full.norm()), rel=1e-9)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = outcomes_of()
    whole = gradient_errors(outcomes, student_of(outcomes), [4, 16], grouped=True)
    monkeypatch.setattr(fidelity, "VALUES_PER_CHUNK", 3 * V)
    chunked = gradient_errors(outcomes, student_of(outcomes), [4, 16], grouped=True)
    for one, other in zip(whole, chunked, strict=True):
        assert one == pytest.approx(other, rel=1e-12)


def wide_targets(width: int) -> SparseTargets:
    """The top `width` tokens and the groups' masses beside them."""
    top = P.topk(width, dim=1)
    rest = P.exp().scatter(1, top.indices, 0.0)
    groups = torch.zeros(N, G, dtype=torch.float64).index_add(1, torch.tensor(GROUPS), rest)
    return SparseTargets(
        token_ids=top.indices.int().numpy(),
        logprobs=top.values.numpy(),
        tail_logprob=rest.sum(dim=1).log().numpy(),
        group_logprobs=groups.log().numpy(),
    )


def test_what_is_left_of_groups_completes_the_distribution() -> None:
    outcomes = Outcomes.of_targets(wide_targets(20), MEAN, GROUPS)
    assert np.exp(outcomes.logprobs).sum(axis=1) == pytest.approx(np.ones(N))
    assert outcomes.mean_probs.sum(axis=1) == pytest.approx(np.ones(N))
    assert (outcomes.sizes.sum(axis=1) == V).all()
    for g in range(G):
        mass = np.where(outcomes.groups == g, outcomes.mean_probs, 0.0).sum(axis=1)
        assert mass == pytest.approx(np.full(N, MEAN[g == GROUPS].sum()))


@pytest.mark.parametrize("grouped", [False, True])
def test_many_entries_stand_for_the_full_vocabulary_where_the_rest_is_even(grouped: bool) -> None:
    """Tokens left in a group share one probability in teacher and student: then nothing is lost by not telling them apart."""
    width, k = 20, 6
    rest = torch.ones(N, V, dtype=torch.bool).scatter(1, P.topk(width, dim=1).indices, False)

    def evened(logprobs: torch.Tensor) -> torch.Tensor:
        probs = logprobs.exp()
        for g in range(G):
            of_group = rest & torch.tensor(g == GROUPS)
            mean = (probs * of_group).sum(dim=1, keepdim=True) / of_group.sum(dim=1, keepdim=True).clamp(min=1)
            probs = torch.where(of_group, mean, probs)
        return probs.log()

    full, wide = outcomes_of(evened(P)), Outcomes.of_targets(wide_targets(width), MEAN, GROUPS)
    q = evened(Q)
    of_rests = [torch.where(rest & torch.tensor(g == GROUPS), q.exp(), 0.0).sum(dim=1).log() for g in range(G)]
    of_entries = np.take_along_axis(q.numpy(), wide.ids[:, :width], axis=1)
    q_wide = np.concatenate([of_entries, torch.stack(of_rests, dim=1).numpy()], axis=1)
    for i in range(N):  # one position at a time: what is left of a group are other tokens at the next
        (expected,) = gradient_errors(position(full, i), student_of(full, q)[[i]], [k], grouped=grouped)
        (found,) = gradient_errors(position(wide, i), q_wide[[i]], [k], grouped=grouped)
        assert found == pytest.approx(expected, rel=1e-9)


def position(outcomes: Outcomes, index: int) -> Outcomes:
    """One position alone."""
    return Outcomes(**{name: array[[index]] for name, array in vars(outcomes).items()})


@pytest.mark.parametrize("stage", STUDENTS)
def test_a_stand_in_is_a_distribution_between_the_teacher_and_its_mean(stage: str) -> None:
    outcomes = outcomes_of()
    student = stand_in(outcomes, stage)
    assert np.exp(student).sum(axis=1) == pytest.approx(np.ones(N))
    assert np.array_equal(student, stand_in(outcomes, stage))
    of_teacher, of_mean, deviation = STUDENTS[stage]
    noise = student - of_teacher * outcomes.logprobs - of_mean * np.log(outcomes.mean_probs)
    assert noise.std(axis=1) == pytest.approx(np.full(N, deviation), rel=0.3)


def test_the_late_stand_in_is_nearer_to_the_teacher() -> None:
    outcomes = outcomes_of()
    p = np.exp(outcomes.logprobs)
    divergence = {stage: (p * (outcomes.logprobs - stand_in(outcomes, stage))).sum() for stage in STUDENTS}
    assert divergence["late"] < divergence["early"] / 3


def test_impossible_tokens_and_absent_entries_count_for_nothing() -> None:
    banned = P.clone()
    banned[:, 3] = -np.inf
    targets = wide_targets(20)
    padded = SparseTargets(
        token_ids=np.pad(targets.token_ids, ((0, 0), (0, 2)), constant_values=PAD_ID),
        logprobs=np.pad(targets.logprobs, ((0, 0), (0, 2)), constant_values=-np.inf),
        tail_logprob=targets.tail_logprob,
        group_logprobs=targets.group_logprobs,
    )
    plain = Outcomes.of_targets(targets, MEAN, GROUPS)
    wider = Outcomes.of_targets(padded, MEAN, GROUPS)
    for stage in STUDENTS:
        for outcomes in (outcomes_of(banned), wider):
            errors = gradient_errors(outcomes, stand_in(outcomes, stage), [4], grouped=True)
            assert np.isfinite(list(errors[0].values())).all()
    student = np.insert(Q.numpy()[:, : plain.logprobs.shape[1]], [20, 20], -np.inf, axis=1)
    expected = gradient_errors(plain, np.delete(student, [20, 21], axis=1), [4], grouped=True)
    assert gradient_errors(wider, student, [4], grouped=True)[0] == pytest.approx(expected[0], rel=1e-12)


def test_rebuilt_logits_of_outcomes_are_those_of_their_tokens() -> None:
    random = np.random.default_rng(3)
    vocab_size, groups = 40, (np.arange(40) * 7 % 3).astype(np.int32)
    basis = TailBasis(
        random.standard_normal(vocab_size).astype(np.float32),
        random.standard_normal((vocab_size, 2)).astype(np.float32),
        np.full(vocab_size, 1 / vocab_size, np.float32),
        0.1,
        np.ones(2, np.float32),
    )
    coefficients = random.standard_normal((5, 2)).astype(np.float32)
    logits = basis.offset + coefficients @ basis.directions.T
    full = random.standard_normal((5, vocab_size))
    full -= np.logaddexp.reduce(full, axis=1, keepdims=True)
    mean = np.exp(full).mean(axis=0)
    every = Outcomes.of_logprobs(full, mean, groups)
    rebuilt = rebuilt_outcomes(every, basis, coefficients, groups)
    assert np.allclose(np.ptp(rebuilt - np.take_along_axis(logits, every.ids, axis=1), axis=1), 0, atol=1e-5)

    layout = Layout(vocab_size, TailParts(groups=3))
    some = Outcomes.of_targets(sparse_targets(full, [6] * 5, layout, groups), mean, groups)
    rebuilt = rebuilt_outcomes(some, basis, coefficients, groups)
    for row in range(5):
        entries = some.ids[row, :6]
        rest = np.setdiff1d(np.arange(vocab_size), entries)
        sums = [np.logaddexp.reduce(logits[row, rest[groups[rest] == group]]) for group in range(3)]
        assert np.ptp(rebuilt[row] - [*logits[row, entries], *sums]) <= 1e-5


def test_a_tail_that_is_rebuilt_as_it_is_leaves_no_error_and_another_what_it_diverges() -> None:
    random = np.random.default_rng(4)
    full = 2 * random.standard_normal((20, 50))
    full -= np.logaddexp.reduce(full, axis=1, keepdims=True)
    outcomes = Outcomes.of_logprobs(full, np.exp(full).mean(axis=0), np.zeros(50, np.int32))
    student = stand_in(outcomes, "early")
    shifted = outcomes.logprobs + 3
    (errors,) = gradient_errors(outcomes, student, [4], grouped=False, rebuilt=shifted)
    assert max(errors.values()) < 1e-12
    assert abs(tail_divergence(outcomes, shifted, 4)) < 1e-12

    others = outcomes.logprobs + random.standard_normal(full.shape)
    (some,) = gradient_errors(outcomes, student, [4], grouped=False, rebuilt=others)
    assert min(some.values()) > 0.01
    tail, wrong = (
        values[:, 4:] - np.logaddexp.reduce(values[:, 4:], axis=1)[:, None] for values in (outcomes.logprobs, others)
    )
    assert tail_divergence(outcomes, others, 4) == pytest.approx((np.exp(tail) * (tail - wrong)).sum(axis=1).mean())


def test_the_residual_that_a_student_knows_itself_is_what_training_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STUDENTS, "late", (1.4, 0.1, 0.0))
    layout = Layout(VOCAB, TailParts(rank=4, probes=60), precision="exact")
    basis = tail_basis(layout)
    full = full_distributions(np.random.default_rng(8), 300)
    mean = np.exp(full).mean(axis=0)
    groups = np.zeros(VOCAB, np.int32)
    targets = sparse_targets(full, [4] * 300, layout)
    assert targets.tail_coefficients is not None and targets.probe_ids is not None
    outcomes = Outcomes.of_logprobs(full, mean, groups)
    student = stand_in(outcomes, "late")
    known = known_residual(outcomes, student, "late", basis, targets.tail_coefficients, targets, mean, groups)

    weighted = basis.weights[:, None] * basis.directions
    by_token = np.empty_like(full)
    np.put_along_axis(by_token, outcomes.ids, student, axis=1)
    residuals = []
    for logits in (full, by_token):
        centred = logits - basis.offset
        centred -= (centred @ basis.weights)[:, None]
        residuals.append(centred - centred @ weighted @ basis.directions.T)
    probed, own = (np.take_along_axis(each, targets.probe_ids, axis=1) for each in residuals)
    share = (probed * own).mean() / (own**2).mean()
    assert 0.2 < share < 0.98
    expected = np.take_along_axis(share * residuals[1], outcomes.ids, axis=1)
    assert np.ptp(known - expected, axis=1).max() <= 1e-4
    better, worse = (
        gradient_errors(
            outcomes,
            student,
            [4],
            grouped=False,
            rebuilt=rebuilt_outcomes(outcomes, basis, targets.tail_coefficients, groups) + extra,
        )[0]
        for extra in (known, 0)
    )
    assert all(better[loss] < worse[loss] for loss in ("fkl", "rkl", "akl", "todi"))

"""The teacher's side: how what was not stored becomes outcomes, at T = 1 and elsewhere."""

from dataclasses import replace
from math import inf, log

import pytest
import torch
from torch import Tensor

from tests.helpers.lossmaking import random_logits, water_filled
from trainer.losses.tail import LOG_TAIL_FLOOR, TAILS, Outcomes, StudentRows, check_tail
from trainer.losses.targets import TeacherTargets
from trainer.losses.temperature import approximate_tempered_tail
from trainer.losses.transform import LogitTransform


def teacher(vocabulary: int, k: int, rows: int = 4, seed: int = 0) -> Tensor:
    """Full log-probabilities [rows, vocabulary] whose first k tokens are the likeliest, descending."""
    return random_logits(rows, vocabulary, seed, scale=2).log_softmax(1).sort(1, descending=True).values


def known(log_p: Tensor, k: int, temperature: float = 1.0) -> TeacherTargets:
    """The first k tokens, the tail's total at T = 1, and s(1/T)."""
    return TeacherTargets(
        token_ids=torch.arange(k).expand(len(log_p), k),
        logprobs=log_p[:, :k],
        tail_logprob=log_p[:, k:].logsumexp(1),
        tempered_tail=(log_p[:, k:] / temperature).logsumexp(1),
    )


def treat(tail: str, targets: TeacherTargets, temperature: float = 1.0, student: Tensor | None = None) -> Outcomes:
    """By a student with these logits, or none that matters."""
    raw = torch.zeros(len(targets.token_ids), 40, dtype=torch.float64) if student is None else student
    return TAILS[tail](targets.for_arithmetic(torch.float64), temperature, StudentRows(raw, LogitTransform()))


def test_bucket_hands_on_the_stored_masses_unrounded_at_temperature_one() -> None:
    targets = known(teacher(20, 5), 5)
    outcomes = treat("bucket", targets)
    assert torch.equal(outcomes.log_p, torch.cat([targets.logprobs, targets.tail_logprob[:, None]], 1))
    assert outcomes.counted.all()


@pytest.mark.parametrize("temperature", [0.5, 2.0, 4.0])
def test_bucket_at_a_temperature_is_the_tempered_full_distribution_in_coarse(temperature: float) -> None:
    full = teacher(40, 6)
    log_p = treat("bucket", known(full, 6, temperature), temperature).log_p
    tempered = (full / temperature).softmax(1)
    expected = torch.cat([tempered[:, :6], tempered[:, 6:].sum(1, keepdim=True)], 1)
    torch.testing.assert_close(log_p.exp(), expected)


def test_ignoring_the_tail_at_a_temperature_still_normalises_over_the_whole_vocabulary() -> None:
    full = teacher(40, 6)
    outcomes = treat("ignore", known(full, 6, 2.0), 2.0)
    torch.testing.assert_close(outcomes.log_p[:, :6].exp(), (full / 2).softmax(1)[:, :6])
    assert outcomes.counted.tolist() == [[True] * 6 + [False]] * 4


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_renormalising_spreads_the_tail_over_the_entries_and_needs_no_tempered_tail(temperature: float) -> None:
    full = teacher(40, 6)
    targets = replace(known(full, 6), tempered_tail=None)
    check_tail(targets, "renormalise", temperature, approximate=False)
    outcomes = treat("renormalise", targets, temperature)
    torch.testing.assert_close(outcomes.log_p[:, :6].exp(), (full[:, :6] / temperature).softmax(1))
    assert outcomes.counted.tolist() == [[True] * 6 + [False]] * 4


@pytest.mark.parametrize("tail", ["bucket", "ignore", "renormalise"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_padding_is_not_counted_and_does_not_move_the_entries(tail: str, temperature: float) -> None:
    targets = known(teacher(30, 4), 4, temperature)
    pad_id, pad = torch.full((4, 2), -1), torch.full((4, 2), -inf, dtype=torch.float64)
    padded = replace(
        targets, token_ids=torch.cat([targets.token_ids, pad_id], 1), logprobs=torch.cat([targets.logprobs, pad], 1)
    )
    expected, received = treat(tail, targets, temperature), treat(tail, padded, temperature)
    assert torch.equal(received.log_p[:, [0, 1, 2, 3, 6]], expected.log_p)
    assert torch.equal(received.counted[:, [0, 1, 2, 3, 6]], expected.counted)
    assert not received.counted[:, 4:6].any()


def test_an_entry_without_a_token_is_padding_whatever_it_holds() -> None:
    targets = TeacherTargets(torch.tensor([[3, -1]]), torch.tensor([[log(0.5), 0.0]]), torch.tensor([log(0.5)]))
    assert treat("bucket", targets).counted.tolist() == [[True, False, True]]


def test_a_token_of_probability_zero_is_left_to_the_tail() -> None:
    targets = TeacherTargets(torch.tensor([[3, 4]]), torch.tensor([[0.0, -inf]]), torch.tensor([-inf]))
    assert treat("bucket", targets).counted.tolist() == [[True, False, True]]


def test_an_empty_tail_keeps_a_finite_log_probability() -> None:
    targets = TeacherTargets(torch.tensor([[3]]), torch.tensor([[0.0]]), torch.tensor([-inf]), torch.tensor([-inf]))
    for temperature in (1.0, 2.0):
        assert treat("bucket", targets, temperature).log_p.tolist() == [[0.0, LOG_TAIL_FLOOR]]


def test_groups_follow_the_entries() -> None:
    targets = TeacherTargets(
        torch.tensor([[0]]),
        torch.tensor([[log(0.5)]]),
        torch.tensor([log(0.5)]),
        tail_groups=torch.tensor([0, 0, 1, 2]),
        group_logprobs=torch.tensor([[log(0.2), log(0.3), -inf]]),
    )
    outcomes = treat("groups", targets)
    torch.testing.assert_close(outcomes.log_p[:, :3].exp(), torch.tensor([[0.5, 0.2, 0.3]]).double())
    assert outcomes.log_p[0, 3].item() == pytest.approx(LOG_TAIL_FLOOR - log(3))
    assert outcomes.counted.all()


# Cap.


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("vocabulary", "k", "scale"), [(40, 6, 1.0), (40, 6, 6.0), (2000, 3, 4.0), (2000, 3, 0.01)])
def test_the_cap_fills_the_students_tail_up_to_the_least_probable_entry(
    temperature: float, vocabulary: int, k: int, scale: float
) -> None:
    # From a student with nothing above the cap to one where a first search among 64 tokens does not find them all.
    full, student = teacher(vocabulary, k), random_logits(4, vocabulary, seed=1, scale=scale)
    outcomes = treat("cap", known(full, k, temperature), temperature, student)
    p, q = (full / temperature).softmax(1), (student / temperature).softmax(1)
    for row in range(4):
        filled = water_filled(q[row, k:], p[row, k - 1], p[row, k:].sum())
        capped = (filled >= p[row, k - 1] * (1 - 1e-12)).nonzero()[:, 0] + k
        extra = [i for i in outcomes.token_ids[row, k:].tolist() if i >= 0]
        assert sorted(extra) == capped.tolist()
        torch.testing.assert_close(outcomes.log_p[row, k : k + len(extra)].exp(), p[row, k - 1].expand(len(extra)))
        uncapped = p[row, k:].sum() - len(extra) * p[row, k - 1]
        torch.testing.assert_close(
            outcomes.log_p[row, -1].exp(), uncapped.clamp_min(torch.tensor(LOG_TAIL_FLOOR).exp())
        )


def test_a_cap_that_rounding_left_too_low_for_the_tail_is_raised() -> None:
    targets = TeacherTargets(
        torch.tensor([[0]]), torch.tensor([[log(0.4999)]]).double(), torch.tensor([log(0.5001)]).double()
    )
    outcomes = treat("cap", targets, student=torch.zeros(1, 2, dtype=torch.float64))
    assert outcomes.log_p.exp()[outcomes.counted].sum().item() == pytest.approx(1, abs=1e-6)


# Samples.


def test_samples_join_the_entries_once_each_and_leave_the_rest_to_the_tail() -> None:
    full = teacher(10, 2, rows=1)
    draws = torch.tensor([[7, 4, 7, -1]])
    targets = replace(
        known(full, 2),
        sample_ids=draws,
        sample_logprobs=full.gather(1, draws.clamp_min(0)).masked_fill(draws < 0, -inf),
    )
    outcomes = treat("samples", targets)
    assert sorted(outcomes.token_ids[outcomes.token_ids >= 0].tolist()) == [0, 1, 4, 7]
    p = full.exp()[0]
    torch.testing.assert_close(outcomes.log_p[0, -1].exp(), 1 - p[[0, 1, 4, 7]].sum())
    assert outcomes.estimated_p is not None
    weights = {int(i): w.item() for i, w in zip(outcomes.token_ids[0], outcomes.estimated_p[0], strict=False) if i >= 0}
    t = (1 - p[:2].sum()).item()
    assert weights == pytest.approx({0: p[0].item(), 1: p[1].item(), 4: t / 3, 7: 2 * t / 3})
    assert outcomes.estimated_p[0, -1] == 0


def test_samples_that_are_the_whole_tail_leave_an_empty_one_with_a_finite_log_probability() -> None:
    full = teacher(4, 2, rows=1)
    targets = replace(known(full, 2), sample_ids=torch.tensor([[2, 3]]), sample_logprobs=full[:, 2:])
    assert treat("samples", targets).log_p[0, -1] == LOG_TAIL_FLOOR


# Temperatures that were not captured.


@pytest.mark.parametrize("temperature", [1.5, 2.0, 4.0])
def test_the_quadratic_through_the_entropy_is_close_where_the_power_of_the_tail_is_not(temperature: float) -> None:
    full = teacher(5000, 32, rows=64)
    targets = known(full, 32, temperature)
    shape = full[:, 32:].softmax(1)
    targets = replace(targets, tail_entropy=(shape * full[:, 32:]).sum(1))
    estimate = approximate_tempered_tail(targets, temperature, 5000)
    assert targets.tempered_tail is not None
    error = (estimate - targets.tempered_tail).abs().mean()
    assert error < 0.06
    assert error < 0.2 * (targets.tail_logprob / temperature - targets.tempered_tail).abs().mean()


def test_the_quadratic_meets_its_three_conditions() -> None:
    full = teacher(50, 5)
    targets = replace(known(full, 5), tail_entropy=(full[:, 5:].softmax(1) * full[:, 5:]).sum(1))
    assert targets.tail_entropy is not None
    torch.testing.assert_close(approximate_tempered_tail(targets, 1.0, 50), targets.tail_logprob)
    at_zero = approximate_tempered_tail(targets, 1e12, 50)
    torch.testing.assert_close(at_zero, torch.full_like(at_zero, log(45)))
    step = 1e-5
    slope = (
        approximate_tempered_tail(targets, 1 / (1 + step), 50) - approximate_tempered_tail(targets, 1 / (1 - step), 50)
    ) / (2 * step)
    torch.testing.assert_close(slope, targets.tail_entropy, rtol=1e-6, atol=1e-6)


def test_the_quadratic_leaves_an_empty_tail_empty() -> None:
    targets = TeacherTargets(
        torch.tensor([[0, 1], [0, -1]]),
        torch.tensor([[log(0.5), log(0.5)], [0.0, -inf]]),
        torch.tensor([-inf, -inf]),
        tail_entropy=torch.tensor([0.0, float("nan")]),
    )
    assert approximate_tempered_tail(targets, 2.0, 2).tolist() == [-inf, -inf]


# What is missing.


def test_groups_are_refused_at_another_temperature_and_the_bucket_is_named() -> None:
    targets = replace(
        known(teacher(4, 1), 1), tail_groups=torch.zeros(4, dtype=torch.long), group_logprobs=torch.zeros(4, 1)
    )
    with pytest.raises(ValueError, match=r"tail='groups'.*temperature 2.*tail='bucket'"):
        check_tail(targets, "groups", 2.0, approximate=False)


def test_groups_without_masses_are_refused_naming_what_is_missing() -> None:
    with pytest.raises(ValueError, match=r"tail_groups \[V\] and group_logprobs \[N, G\]"):
        check_tail(known(teacher(4, 1), 1), "groups", 1.0, approximate=False)


def test_samples_without_any_are_refused_naming_what_is_missing() -> None:
    with pytest.raises(ValueError, match=r"sample_ids \[N, s\] and sample_logprobs \[N, s\]"):
        check_tail(known(teacher(4, 1), 1), "samples", 1.0, approximate=False)


@pytest.mark.parametrize("tail", ["bucket", "ignore", "cap", "uniform"])
def test_a_temperature_without_its_tail_is_refused_naming_what_is_missing_and_the_way_out(tail: str) -> None:
    targets = replace(known(teacher(8, 2), 2), tempered_tail=None)
    with pytest.raises(ValueError, match=r"temperature 2 needs tempered_tail \[N\].*approximate_temperature=True"):
        check_tail(targets, tail, 2.0, approximate=False)
    check_tail(targets, tail, 2.0, approximate=True)

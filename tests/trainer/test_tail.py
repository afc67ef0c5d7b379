"""The teacher's side: how what was not stored becomes outcomes."""

from dataclasses import replace
from math import inf, log

import pytest
import torch

from trainer.losses.tail import LOG_TAIL_FLOOR, TAILS, TeacherTargets, bucket, groups, ignore, renormalise


def teacher(vocabulary: int, k: int, rows: int = 4, seed: int = 0) -> torch.Tensor:
    """Full log-probabilities [rows, vocabulary] whose first k tokens are the likeliest, descending."""
    logits = 2 * torch.randn(rows, vocabulary, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return logits.log_softmax(1).sort(1, descending=True).values


def known(log_p: torch.Tensor, k: int, temperature: float = 1.0) -> TeacherTargets:
    """The first k tokens, the tail's total at T = 1, and s(1/T)."""
    return TeacherTargets(
        token_ids=torch.arange(k).expand(len(log_p), k),
        logprobs=log_p[:, :k],
        tail_logprob=log_p[:, k:].logsumexp(1),
        tempered_tail=(log_p[:, k:] / temperature).logsumexp(1),
    )


def test_bucket_hands_on_the_stored_masses_unrounded_at_temperature_one() -> None:
    targets = known(teacher(20, 5), 5)
    log_p, counted = bucket(targets)
    assert torch.equal(log_p, torch.cat([targets.logprobs, targets.tail_logprob[:, None]], 1))
    assert counted.all()


@pytest.mark.parametrize("temperature", [0.5, 2.0, 4.0])
def test_bucket_at_a_temperature_is_the_tempered_full_distribution_in_coarse(temperature: float) -> None:
    full = teacher(40, 6)
    log_p, _ = bucket(known(full, 6, temperature), temperature)
    tempered = (full / temperature).softmax(1)
    expected = torch.cat([tempered[:, :6], tempered[:, 6:].sum(1, keepdim=True)], 1)
    torch.testing.assert_close(log_p.exp(), expected)


def test_ignoring_the_tail_at_a_temperature_still_normalises_over_the_whole_vocabulary() -> None:
    full = teacher(40, 6)
    log_p, counted = ignore(known(full, 6, 2.0), 2.0)
    torch.testing.assert_close(log_p[:, :6].exp(), (full / 2).softmax(1)[:, :6])
    assert counted.tolist() == [[True] * 6 + [False]] * 4


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_renormalising_spreads_the_tail_over_the_entries_and_needs_no_tempered_tail(temperature: float) -> None:
    full = teacher(40, 6)
    targets = replace(known(full, 6), tempered_tail=None)
    log_p, counted = renormalise(targets, temperature)
    torch.testing.assert_close(log_p[:, :6].exp(), (full[:, :6] / temperature).softmax(1))
    assert counted.tolist() == [[True] * 6 + [False]] * 4


@pytest.mark.parametrize("tail", ["bucket", "ignore", "renormalise"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_padding_is_not_counted_and_does_not_move_the_entries(tail: str, temperature: float) -> None:
    targets = known(teacher(30, 4), 4, temperature)
    pad_id, pad = torch.full((4, 2), -1), torch.full((4, 2), -inf, dtype=torch.float64)
    padded = replace(
        targets, token_ids=torch.cat([targets.token_ids, pad_id], 1), logprobs=torch.cat([targets.logprobs, pad], 1)
    )
    log_p, counted = TAILS[tail](targets, temperature)
    padded_log_p, padded_counted = TAILS[tail](padded, temperature)
    assert torch.equal(padded_log_p[:, [0, 1, 2, 3, 6]], log_p)
    assert torch.equal(padded_counted[:, [0, 1, 2, 3, 6]], counted)
    assert not padded_counted[:, 4:6].any()


def test_an_entry_without_a_token_is_padding_whatever_it_holds() -> None:
    targets = TeacherTargets(torch.tensor([[3, -1]]), torch.tensor([[log(0.5), 0.0]]), torch.tensor([log(0.5)]))
    assert bucket(targets)[1].tolist() == [[True, False, True]]


def test_a_token_of_probability_zero_is_left_to_the_tail() -> None:
    targets = TeacherTargets(torch.tensor([[3, 4]]), torch.tensor([[0.0, -inf]]), torch.tensor([-inf]))
    assert bucket(targets)[1].tolist() == [[True, False, True]]


def test_an_empty_tail_keeps_a_finite_log_probability() -> None:
    targets = TeacherTargets(torch.tensor([[3]]), torch.tensor([[0.0]]), torch.tensor([-inf]), torch.tensor([-inf]))
    for temperature in (1.0, 2.0):
        assert bucket(targets, temperature)[0].tolist() == [[0.0, LOG_TAIL_FLOOR]]


def test_groups_follow_the_entries() -> None:
    targets = TeacherTargets(
        torch.tensor([[0]]),
        torch.tensor([[log(0.5)]]),
        torch.tensor([log(0.5)]),
        tail_groups=torch.tensor([0, 0, 1, 2]),
        group_logprobs=torch.tensor([[log(0.2), log(0.3), -inf]]),
    )
    log_p, counted = groups(targets)
    torch.testing.assert_close(log_p[:, :3].exp(), torch.tensor([[0.5, 0.2, 0.3]]))
    assert log_p[0, 3] == LOG_TAIL_FLOOR
    assert counted.all()


def test_groups_are_refused_at_another_temperature_and_the_bucket_is_named() -> None:
    targets = replace(
        known(teacher(4, 1), 1), tail_groups=torch.zeros(4, dtype=torch.long), group_logprobs=torch.zeros(4, 1)
    )
    with pytest.raises(ValueError, match=r"tail='groups'.*temperature 2.*tail='bucket'"):
        groups(targets, 2.0)


def test_groups_without_masses_are_refused_naming_what_is_missing() -> None:
    with pytest.raises(ValueError, match=r"tail_groups \[V\] and group_logprobs \[N, G\]"):
        groups(known(teacher(4, 1), 1))


@pytest.mark.parametrize("tail", ["bucket", "ignore"])
def test_a_temperature_without_its_tail_is_refused_naming_what_is_missing(tail: str) -> None:
    with pytest.raises(ValueError, match=r"temperature 2 needs tempered_tail \[N\]"):
        TAILS[tail](replace(known(teacher(8, 2), 2), tempered_tail=None), 2.0)

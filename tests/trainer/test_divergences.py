"""The divergences as functions of two coarse distributions: values, slopes, masks."""

from math import log
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.losses.divergences import AKL_SPLITS, DIVERGENCES, Coarse, DivergenceOptions

LOSSES = ["fkl", "rkl", "akl", "todi"]


def coarse_of(p: list[list[float]], q: list[list[float]], num_entries: int, padding: int = 0) -> Coarse:
    """From masses; the last `padding` entries of every row are padding."""
    log_p, log_q = torch.tensor(p, dtype=torch.float64).log(), torch.tensor(q, dtype=torch.float64).log()
    counted = torch.ones_like(log_p, dtype=torch.bool)
    if padding:
        counted[:, num_entries - padding : num_entries] = False
    return Coarse(log_p, log_q, counted, num_entries)


def divergence(loss: str, coarse: Coarse, **options: Any) -> tuple[Tensor, Tensor]:
    return DIVERGENCES[loss](coarse, DivergenceOptions(**options))


def test_table_offers_the_four_divergences() -> None:
    assert list(DIVERGENCES) == LOSSES


def test_values_of_two_outcomes_match_the_definitions_worked_by_hand() -> None:
    coarse = coarse_of([[0.75, 0.25]], [[0.5, 0.5]], num_entries=1)
    fkl = 0.75 * log(1.5) + 0.25 * log(0.5)
    rkl = 0.5 * log(0.5 / 0.75) + 0.5 * log(2)
    # α = σ(log(p/q)) = p/(p+q): .6 for the entry, 1/3 for the tail.
    todi = 0.6 * 0.75 * log(1.5) + 0.4 * 0.5 * log(1 / 1.5) + 1 / 3 * 0.25 * log(0.5) + 2 / 3 * 0.5 * log(2)
    expected = {"fkl": fkl, "rkl": rkl, "todi": todi, "akl": 0.5 * fkl + 0.5 * rkl}
    for loss, value in expected.items():
        assert divergence(loss, coarse)[0].item() == pytest.approx(value, rel=1e-12), loss


@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_to_learn_where_the_distributions_agree(loss: str) -> None:
    masses = [[0.5, 0.2, 0.1, 0.2], [0.3, 0.3, 0.3, 0.1]]
    coarse = coarse_of(masses, masses, num_entries=3)
    value, slope = divergence(loss, coarse)
    assert value.abs().max() == 0
    in_logits = slope - coarse.q * slope.sum(1, keepdim=True)
    assert in_logits.abs().max() < 1e-15


def test_todi_at_beta_one_has_the_value_of_fkl_plus_rkl_but_not_the_slope() -> None:
    coarse = coarse_of([[0.6, 0.3, 0.1]], [[0.2, 0.3, 0.5]], num_entries=2)
    (todi, todi_slope), (fkl, fkl_slope), (rkl, rkl_slope) = (
        divergence(loss, coarse) for loss in ("todi", "fkl", "rkl")
    )
    torch.testing.assert_close(todi, fkl + rkl)
    assert (todi_slope - fkl_slope - rkl_slope).abs().max() > 0.01


def test_todi_with_a_steep_weight_takes_fkl_where_the_teacher_is_above_and_rkl_where_below() -> None:
    coarse = coarse_of([[0.6, 0.3, 0.1]], [[0.2, 0.3, 0.5]], num_entries=2)
    value, _ = divergence("todi", coarse, beta=1e4)
    assert value.item() == pytest.approx(0.6 * log(3) + 0.5 * log(5))


def test_todi_with_beta_zero_is_the_mean_of_fkl_and_rkl() -> None:
    coarse = coarse_of([[0.6, 0.3, 0.1]], [[0.2, 0.3, 0.5]], num_entries=2)
    expected = (divergence("fkl", coarse)[0] + divergence("rkl", coarse)[0]) / 2
    torch.testing.assert_close(divergence("todi", coarse, beta=0.0)[0], expected)


def test_akl_splits_differ_in_where_the_token_that_crosses_half_goes() -> None:
    # Cumulative mass .4, .7, .9: the second token crosses .5.
    coarse = coarse_of([[0.4, 0.3, 0.2, 0.1]], [[0.1, 0.2, 0.3, 0.4]], num_entries=3)
    fkl, rkl = divergence("fkl", coarse)[0], divergence("rkl", coarse)[0]
    gap = [0.3, 0.1, 0.1, 0.3]
    for split, head_gap in (("official", gap[0]), ("todi", gap[0] + gap[1])):
        w = head_gap / sum(gap)
        torch.testing.assert_close(divergence("akl", coarse, akl_split=split)[0], w * fkl + (1 - w) * rkl)


@pytest.mark.parametrize("split", AKL_SPLITS)
def test_akl_head_ends_with_the_token_that_fills_half_exactly(split: str) -> None:
    coarse = coarse_of([[0.25, 0.25, 0.25, 0.25]], [[0.4, 0.1, 0.15, 0.35]], num_entries=3)
    assert coarse.p[0, :2].sum() == 0.5
    fkl, rkl = divergence("fkl", coarse)[0], divergence("rkl", coarse)[0]
    w = (0.15 + 0.15) / (0.15 + 0.15 + 0.1 + 0.1)
    torch.testing.assert_close(divergence("akl", coarse, akl_split=split)[0], w * fkl + (1 - w) * rkl)


@pytest.mark.parametrize("split", AKL_SPLITS)
def test_akl_head_always_holds_the_first_token(split: str) -> None:
    coarse = coarse_of([[0.9, 0.1]], [[0.6, 0.4]], num_entries=1)
    fkl, rkl = divergence("fkl", coarse)[0], divergence("rkl", coarse)[0]
    torch.testing.assert_close(divergence("akl", coarse, akl_split=split)[0], 0.5 * fkl + 0.5 * rkl)


@pytest.mark.parametrize("split", AKL_SPLITS)
def test_akl_does_not_depend_on_the_order_of_the_entries(split: str) -> None:
    p, q = [0.4, 0.3, 0.15, 0.05, 0.1], [0.1, 0.2, 0.3, 0.2, 0.2]
    order = [2, 0, 3, 1, 4]  # the tail stays last
    value, slope = divergence("akl", coarse_of([p], [q], num_entries=4), akl_split=split)
    shuffled = coarse_of([[p[i] for i in order]], [[q[i] for i in order]], num_entries=4)
    shuffled_value, shuffled_slope = divergence("akl", shuffled, akl_split=split)
    torch.testing.assert_close(shuffled_value, value)
    torch.testing.assert_close(shuffled_slope, slope[:, order])


@pytest.mark.parametrize("split", AKL_SPLITS)
def test_akl_keeps_the_tail_out_of_the_head_however_heavy_it_is(split: str) -> None:
    coarse = coarse_of([[0.1, 0.05, 0.85]], [[0.2, 0.05, 0.75]], num_entries=2)
    fkl, rkl = divergence("fkl", coarse)[0], divergence("rkl", coarse)[0]
    torch.testing.assert_close(divergence("akl", coarse, akl_split=split)[0], 0.5 * fkl + 0.5 * rkl)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("split", AKL_SPLITS)
def test_padding_contributes_exactly_nothing(loss: str, split: str) -> None:
    p, q = [0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]
    value, slope = divergence(loss, coarse_of([p], [q], num_entries=3), akl_split=split)
    padded = coarse_of([[*p[:3], 0.0, 0.0, p[3]]], [[*q[:3], 0.0, 0.0, q[3]]], num_entries=5, padding=2)
    padded_value, padded_slope = divergence(loss, padded, akl_split=split)
    torch.testing.assert_close(padded_value, value, rtol=1e-14, atol=0)  # the sum's order may differ
    assert torch.equal(padded_slope[:, 3:5], torch.zeros(1, 2, dtype=torch.float64))
    torch.testing.assert_close(padded_slope[:, [0, 1, 2, 5]], slope, rtol=1e-14, atol=0)


@pytest.mark.parametrize("loss", ["fkl", "rkl"])
def test_slope_is_the_derivative_of_the_value(loss: str) -> None:
    log_p = torch.randn(4, 6, dtype=torch.float64).log_softmax(1)
    log_q = torch.randn(4, 6, dtype=torch.float64).log_softmax(1).requires_grad_()
    value, slope = divergence(loss, Coarse(log_p, log_q, torch.ones_like(log_p, dtype=torch.bool), 5))
    (expected,) = torch.autograd.grad(value.sum(), log_q)
    torch.testing.assert_close(slope, expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_student_mass_that_underflows_stays_finite(loss: str) -> None:
    coarse = Coarse(
        torch.tensor([[0.0, -16.0]]), torch.tensor([[-900.0, 0.0]]), torch.ones(1, 2, dtype=torch.bool), num_entries=1
    )
    value, slope = divergence(loss, coarse)
    assert value.isfinite().all()
    assert slope.isfinite().all()

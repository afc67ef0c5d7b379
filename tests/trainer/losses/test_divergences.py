"""The divergences as functions of two coarse distributions, and the registry: values, slopes, masks, refusals."""

from collections.abc import Callable
from itertools import pairwise
from math import inf, log, nan
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import trainer
from tests.helpers import lossmaking
from trainer.losses import registry
from trainer.losses.coarse import Coarse
from trainer.losses.divergences import AKL_SPLITS, DIVERGENCES, _largest_entries
from trainer.losses.registry import (
    check_divergence,
    divergence_names,
    evaluate_divergence,
    options_of,
    register_divergence,
)

LOSSES = ["fkl", "rkl", "akl", "todi", "jsd", "jeffreys", "sfkl", "srkl", "tvd", "ab"]

# Every built-in at its defaults and away from them.
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    *((loss, {}) for loss in LOSSES),
    ("akl", {"akl_split": "todi"}),
    ("todi", {"beta": 2.5}),
    ("jsd", {"beta": 0.1}),
    ("jsd", {"beta": 0.9}),
    ("sfkl", {"skew": 0.0}),
    ("sfkl", {"skew": 0.7}),
    ("srkl", {"skew": 0.0}),
    ("srkl", {"skew": 0.7}),
    ("ab", {"alpha": 0.3, "beta": 0.7}),
    ("ab", {"alpha": 1.5, "beta": -0.5}),
    ("ab", {"alpha": -0.4, "beta": 1.2}),
    ("ab", {"alpha": 0.0, "beta": 0.6}),
    ("ab", {"alpha": 0.6, "beta": 0.0}),
    ("ab", {"alpha": 0.0, "beta": 0.0}),
    ("ab", {"alpha": 0.5, "beta": -0.5}),
]
every_setting = pytest.mark.parametrize(("loss", "options"), SETTINGS, ids=str)

# ToDi's value is one at β = 1, αβ's at α + β = 1; AKL's weight is no function of single outcomes.
F_DIVERGENCES: list[tuple[str, dict[str, Any]]] = [
    *((loss, {}) for loss in ("fkl", "rkl", "todi", "jsd", "jeffreys", "sfkl", "srkl", "tvd")),
    ("jsd", {"beta": 0.1}),
    ("sfkl", {"skew": 0.7}),
    ("srkl", {"skew": 0.7}),
    ("ab", {"alpha": 0.3, "beta": 0.7}),
    ("ab", {"alpha": 1.5, "beta": -0.5}),
    ("ab", {"alpha": -0.4, "beta": 1.4}),
]


def coarse_of(p: list[list[float]], q: list[list[float]], num_entries: int, padding: int = 0) -> Coarse:
    """From masses; the last `padding` entries of every row are padding."""
    log_p, log_q = torch.tensor(p, dtype=torch.float64).log(), torch.tensor(q, dtype=torch.float64).log()
    counted = torch.ones_like(log_p, dtype=torch.bool)
    if padding:
        counted[:, num_entries - padding : num_entries] = False
    return Coarse(log_p, log_q, counted, num_entries)


def all_counted(log_p: Tensor, log_q: Tensor) -> Coarse:
    """The last outcome is the tail."""
    return Coarse(log_p, log_q, torch.ones_like(log_p, dtype=torch.bool), log_p.shape[1] - 1)


def random_coarse(seed: int, n: int = 8, outcomes: int = 6) -> Coarse:
    generator = torch.Generator().manual_seed(seed)
    log_p, log_q = (2 * torch.randn(2, n, outcomes, generator=generator, dtype=torch.float64)).log_softmax(2)
    return all_counted(log_p, log_q)


def divergence(loss: str, coarse: Coarse, **options: Any) -> tuple[Tensor, Tensor]:
    return DIVERGENCES[loss](coarse, **options)


def definition(loss: str, p: Tensor, q: Tensor, **options: Any) -> Tensor:
    """The textbook formula on outcomes [C] of which the last is no token."""
    return lossmaking.definition(loss, p, q, [True] * (len(p) - 1) + [False], **options)


@pytest.fixture(autouse=True)
def _nothing_stays_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})


def test_table_offers_the_divergences_in_this_order() -> None:
    assert list(DIVERGENCES) == LOSSES


@every_setting
def test_value_and_slope_match_autograd_of_the_definition(loss: str, options: dict[str, Any]) -> None:
    coarse = random_coarse(1)
    log_q = coarse.log_q.clone().requires_grad_()
    expected = torch.stack([definition(loss, p, q, **options) for p, q in zip(coarse.p, log_q.exp(), strict=True)])
    (expected_slope,) = torch.autograd.grad(expected.sum(), log_q)
    value, slope = divergence(loss, coarse, **options)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(slope, expected_slope, rtol=1e-10, atol=1e-13)


@every_setting
def test_value_can_be_differentiated_too_for_those_who_combine_values(loss: str, options: dict[str, Any]) -> None:
    coarse = random_coarse(2)
    log_q = coarse.log_q.clone().requires_grad_()
    value, slope = divergence(loss, all_counted(coarse.log_p, log_q), **options)
    (expected,) = torch.autograd.grad(value.sum(), log_q)
    torch.testing.assert_close(slope, expected)


@every_setting
def test_nothing_to_learn_where_the_distributions_agree(loss: str, options: dict[str, Any]) -> None:
    masses = [[0.5, 0.2, 0.1, 0.2], [0.3, 0.3, 0.3, 0.1]]
    coarse = coarse_of(masses, masses, num_entries=3)
    value, slope = divergence(loss, coarse, **options)
    assert value.abs().max() == 0
    in_logits = slope - coarse.q * slope.sum(1, keepdim=True)
    assert in_logits.abs().max() < 1e-15


@every_setting
def test_padding_contributes_exactly_nothing(loss: str, options: dict[str, Any]) -> None:
    p, q = [0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]
    value, slope = divergence(loss, coarse_of([p], [q], num_entries=3), **options)
    for p_pad, q_pad in ((0.0, 0.0), (0.0, 0.5), (nan, nan), (0.5, inf)):
        padded = coarse_of([[*p[:3], p_pad, p_pad, p[3]]], [[*q[:3], q_pad, q_pad, q[3]]], num_entries=5, padding=2)
        padded_value, padded_slope = divergence(loss, padded, **options)
        torch.testing.assert_close(padded_value, value, rtol=1e-14, atol=0)  # the sum's order may differ
        assert (padded_slope[:, 3:5] == 0).all()
        torch.testing.assert_close(padded_slope[:, [0, 1, 2, 5]], slope, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("loss", "options"),
    [(loss, options) for loss, options in SETTINGS if options.get("beta", 1) >= 0 and options.get("alpha", 1) >= 0],
    ids=str,
)
def test_extreme_masses_stay_finite(loss: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    log_p = torch.tensor([[0.0, -16.0], [-16.0, 0.0], [0.0, -16.0], [-100.0, 0.0], [-0.7, -0.7]], dtype=dtype)
    log_q = torch.tensor([[-900.0, 0.0], [0.0, -900.0], [0.0, -900.0], [0.0, -80.0], [-0.7, -900.0]], dtype=dtype)
    value, slope = divergence(loss, all_counted(log_p, log_q), **options)
    assert value.isfinite().all()
    assert slope.isfinite().all()


@pytest.mark.parametrize(
    ("loss", "options"),
    [setting for setting in SETTINGS if setting[0] != "akl"],  # its weight is a ratio of rounded gaps
    ids=str,
)
def test_float32_is_accurate_near_agreement(loss: str, options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(3)
    log_p = torch.randn(8, 6, generator=generator).log_softmax(1)
    log_q = log_p + 1e-3 * torch.randn(8, 6, generator=generator)
    coarse, exact = all_counted(log_p, log_q), all_counted(log_p.double(), log_q.double())
    value, slope = divergence(loss, coarse, **options)
    exact_value, exact_slope = divergence(loss, exact, **options)
    torch.testing.assert_close(value.double(), exact_value, rtol=1e-4, atol=2e-7)
    torch.testing.assert_close(slope.double(), exact_slope, rtol=1e-5, atol=2e-7)


def test_values_of_two_outcomes_match_the_definitions_worked_by_hand() -> None:
    coarse = coarse_of([[0.75, 0.25]], [[0.5, 0.5]], num_entries=1)
    fkl = 0.75 * log(1.5) + 0.25 * log(0.5)
    rkl = 0.5 * log(0.5 / 0.75) + 0.5 * log(2)
    # α = σ(log(p/q)) = p/(p+q): .6 for the entry, 1/3 for the tail.
    todi = 0.6 * 0.75 * log(1.5) + 0.4 * 0.5 * log(1 / 1.5) + 1 / 3 * 0.25 * log(0.5) + 2 / 3 * 0.5 * log(2)
    expected = {"fkl": fkl, "rkl": rkl, "todi": todi, "akl": 0.5 * fkl + 0.5 * rkl}
    for loss, value in expected.items():
        assert divergence(loss, coarse)[0].item() == pytest.approx(value, rel=1e-12), loss


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


def gradient_at_the_teacher(loss: str, tail: str, options: dict[str, Any], num_samples: int = 16) -> Tensor:
    """Gradient [N, V] of a loss in the logits of a student that is its teacher."""
    torch.manual_seed(0)
    logits = (2 * torch.randn(64, 40, dtype=torch.float64)).requires_grad_()
    log_p = logits.detach().log_softmax(1)
    entries, token_ids = log_p.topk(8, dim=1)
    rest = log_p.scatter(1, token_ids, -inf)
    groups = torch.arange(40) % 3
    captured: dict[str, Any] = {}
    if tail == "groups":
        by_group = [rest.masked_fill(groups != group, -inf).logsumexp(1) for group in range(3)]
        captured = {"tail_groups": groups, "group_logprobs": torch.stack(by_group, 1)}
    elif tail == "samples":
        sample_ids = torch.multinomial(rest.exp(), num_samples, replacement=True)
        captured = {"sample_ids": sample_ids, "sample_logprobs": rest.gather(1, sample_ids)}
    value = trainer.sparse_divergence(
        logits, token_ids, entries, rest.logsumexp(1), loss=loss, tail=tail, **captured, **options
    )
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    return gradient


@pytest.mark.slow
@pytest.mark.parametrize("tail", ["bucket", "groups", "cap", "samples"])
@every_setting
def test_at_the_teacher_the_gradient_is_zero_but_of_tvd(loss: str, options: dict[str, Any], tail: str) -> None:
    """Of forward KL with samples it is zero on average over them."""
    largest = float(gradient_at_the_teacher(loss, tail, options).abs().max())
    if loss == "tvd":
        assert largest > 0.1
    elif (loss, tail) == ("fkl", "samples"):
        assert largest > 0.01
        many = gradient_at_the_teacher(loss, tail, options, num_samples=20_000)
        assert float(many.abs().max()) < largest / 10
    else:
        assert largest < 1e-14


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


@pytest.mark.parametrize("sharpness", [6.0, 3.0, 0.1])
def test_akl_finds_its_head_among_a_whole_vocabulary(sharpness: float) -> None:
    """Of ten, hundreds, and thousands of tokens, that anywhere may be."""
    logits = sharpness * torch.randn(3, 9001, dtype=torch.float64, generator=lossmaking.seeded(0))
    p, q = logits.softmax(1), logits.flip(1).softmax(1)
    coarse = Coarse(p.log(), q.log(), torch.ones_like(p, dtype=torch.bool), 9001)
    in_order, order = p.sort(dim=1, descending=True)
    is_head = torch.zeros_like(p, dtype=torch.bool).scatter_(1, order, in_order.cumsum(1) <= 0.5)
    gap = (p - q).abs()
    w = (gap * is_head).sum(1) / gap.sum(1)
    fkl, rkl = divergence("fkl", coarse)[0], divergence("rkl", coarse)[0]
    torch.testing.assert_close(divergence("akl", coarse)[0], w * fkl + (1 - w) * rkl)
    entries, columns = _largest_entries(p)
    assert entries.equal(in_order[:, : entries.shape[1]]) and p.gather(1, columns).equal(entries)


@pytest.mark.parametrize("split", AKL_SPLITS)
def test_akl_keeps_the_tail_out_of_the_head_however_heavy_it_is(split: str) -> None:
    coarse = coarse_of([[0.1, 0.05, 0.85]], [[0.2, 0.05, 0.75]], num_entries=2)
    fkl, rkl = divergence("fkl", coarse)[0], divergence("rkl", coarse)[0]
    torch.testing.assert_close(divergence("akl", coarse, akl_split=split)[0], 0.5 * fkl + 0.5 * rkl)


def test_ab_at_its_corners_is_fkl_and_rkl_in_value_and_gradient() -> None:
    coarse = random_coarse(4)
    for corner, loss in (((1.0, 0.0), "fkl"), ((0.0, 1.0), "rkl")):
        value, slope = divergence("ab", coarse, alpha=corner[0], beta=corner[1])
        expected, expected_slope = divergence(loss, coarse)
        torch.testing.assert_close(value, expected)
        in_logits, expected_in_logits = (u - coarse.q * u.sum(1, keepdim=True) for u in (slope, expected_slope))
        torch.testing.assert_close(in_logits, expected_in_logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("limit", [(0.0, 0.7), (0.7, 0.0), (0.5, -0.5), (0.0, 0.0), (1.0, 0.0), (0.0, 1.0)], ids=str)
def test_ab_is_continuous_where_its_formula_divides_by_zero(limit: tuple[float, float], dtype: torch.dtype) -> None:
    coarse = random_coarse(5)
    coarse = all_counted(coarse.log_p.to(dtype), coarse.log_q.to(dtype))
    at_limit = divergence("ab", coarse, alpha=limit[0], beta=limit[1])
    for step in (1e-12, -1e-12, 1e-7, -1e-7):
        for alpha, beta in (
            (limit[0] + step, limit[1]),
            (limit[0], limit[1] + step),
            (limit[0] + step, limit[1] - step),
        ):
            beside = divergence("ab", coarse, alpha=alpha, beta=beta)
            torch.testing.assert_close(beside, at_limit, rtol=1e-5, atol=1e-5)


def test_ab_beside_its_series_agrees_with_the_quotient() -> None:
    # The two ways to a divided difference meet where the exponents span ½.
    r = torch.linspace(-0.6, 0.6, 1001, dtype=torch.float64)[:, None]
    log_p = torch.full_like(r, -1.0)
    for alpha, beta in ((0.2, 0.7), (1.5, -0.5), (0.5, 0.5)):
        value, _ = divergence("ab", all_counted(log_p, log_p + r), alpha=alpha, beta=beta)
        p, q = log_p.exp(), (log_p + r).exp()
        expected = torch.stack([definition("ab", a, b, alpha=alpha, beta=beta) for a, b in zip(p, q, strict=True)])
        torch.testing.assert_close(value, expected, rtol=1e-11, atol=2e-15)


def test_jsd_at_half_is_symmetric_and_never_above_log_two() -> None:
    coarse = random_coarse(6, n=64)
    value, _ = divergence("jsd", coarse)
    torch.testing.assert_close(value, divergence("jsd", all_counted(coarse.log_q, coarse.log_p))[0])
    assert value.max() < log(2)
    log_p, log_q = torch.tensor([[0.0, -700.0]]), torch.tensor([[-700.0, 0.0]])
    assert divergence("jsd", all_counted(log_p, log_q))[0].item() == pytest.approx(log(2))


def test_jsd_divided_by_its_weight_tends_to_fkl_and_rkl() -> None:
    coarse = random_coarse(7)
    near_zero, near_one = divergence("jsd", coarse, beta=1e-7), divergence("jsd", coarse, beta=1 - 1e-7)
    torch.testing.assert_close(near_zero[0] / 1e-7, divergence("fkl", coarse)[0], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(near_one[0] / 1e-7, divergence("rkl", coarse)[0], rtol=1e-3, atol=1e-5)


def test_skew_zero_is_the_plain_divergence_and_more_skew_is_less_divergence() -> None:
    coarse = random_coarse(8)
    for skewed, plain in (("sfkl", "fkl"), ("srkl", "rkl")):
        torch.testing.assert_close(divergence(skewed, coarse, skew=0.0), divergence(plain, coarse))
        torch.testing.assert_close(divergence(skewed, coarse, skew=1e-12), divergence(plain, coarse))
        values = [divergence(skewed, coarse, skew=skew)[0] for skew in (0.0, 0.1, 0.5, 0.9, 0.999)]
        assert all((more < less).all() for less, more in pairwise(values))


def test_tvd_gradient_does_not_fade_near_agreement() -> None:
    p = [0.5, 0.3, 0.2]
    slopes = [divergence("tvd", coarse_of([p], [[0.5 + gap, 0.3, 0.2 - gap]], num_entries=2))[1] for gap in (0.1, 1e-9)]
    assert [slope[0, 0].item() for slope in slopes] == pytest.approx([0.3, 0.25])


distributions = st.integers(2, 6).flatmap(
    lambda n: st.tuples(*(st.lists(st.floats(-12, 12), min_size=n, max_size=n) for _ in range(2)))
)


def from_scores(scores: tuple[list[float], list[float]]) -> Coarse:
    log_p, log_q = (torch.tensor([s], dtype=torch.float64).log_softmax(1) for s in scores)
    return all_counted(log_p, log_q)


@pytest.mark.slow
@given(scores=distributions)
def test_value_is_never_negative(scores: tuple[list[float], list[float]]) -> None:
    coarse = from_scores(scores)
    for loss, options in SETTINGS:
        assert divergence(loss, coarse, **options)[0].item() >= -1e-14, (loss, options)


@pytest.mark.slow
@given(scores=distributions)
def test_merging_two_outcomes_never_raises_an_f_divergence(scores: tuple[list[float], list[float]]) -> None:
    fine = from_scores(scores)
    merged = all_counted(
        *(
            torch.cat([log_mass[:, :-2], log_mass[:, -2:].logsumexp(1, keepdim=True)], dim=1)
            for log_mass in (fine.log_p, fine.log_q)
        )
    )
    for loss, options in F_DIVERGENCES:
        coarse_value, fine_value = (divergence(loss, c, **options)[0].item() for c in (merged, fine))
        assert coarse_value <= fine_value + 1e-12 * max(1.0, fine_value), (loss, options)


def test_ab_on_merged_outcomes_may_exceed_the_full_value_where_alpha_and_beta_do_not_sum_to_one() -> None:
    fine = coarse_of([[0.2, 0.2, 0.2, 0.2, 0.2]], [[0.1, 0.1, 0.1, 0.1, 0.6]], num_entries=4)
    merged = coarse_of([[0.8, 0.2]], [[0.4, 0.6]], num_entries=1)
    for alpha, beta, exceeds in ((1.0, 1.0, True), (0.3, 0.7, False)):
        values = [divergence("ab", c, alpha=alpha, beta=beta)[0].item() for c in (merged, fine)]
        assert (values[0] > values[1] + 1e-3) == exceeds


def test_estimate_stands_in_for_the_teacher_mass_where_counted() -> None:
    coarse = coarse_of([[0.5, 0.0, 0.5]], [[0.3, 0.0, 0.7]], num_entries=2, padding=1)
    estimate = torch.tensor([[0.6, 9.0, 0.4]], dtype=torch.float64)
    estimated = Coarse(coarse.log_p, coarse.log_q, coarse.counted, 2, estimated_p=estimate)
    assert estimated.p.tolist() == [[0.6, 0.0, 0.4]]
    assert torch.equal(estimated.log_ratio, coarse.log_ratio)
    value, slope = divergence("fkl", estimated)
    assert value.item() == pytest.approx(0.6 * log(0.5 / 0.3) + 0.4 * log(0.5 / 0.7))
    assert slope.tolist() == [[-0.6, 0.0, -0.4]]


@pytest.mark.parametrize("hole", [-inf, inf, nan])
def test_uncounted_outcomes_give_no_nan_in_a_formula_or_its_autograd(hole: float) -> None:
    log_q = torch.tensor([[log(0.3), hole, log(0.7)]], dtype=torch.float64, requires_grad=True)
    log_p = torch.tensor([[log(0.5), hole, log(0.5)]], dtype=torch.float64)
    coarse = Coarse(log_p, log_q, torch.tensor([[True, False, True]]), num_entries=2)
    p, q, r = coarse.p, coarse.q, coarse.log_ratio
    for numbers in (p, q, r):
        assert numbers[0, 1].item() == 0
    value = (q * r.square() + p * r.exp() + q.sqrt() * r.sigmoid() + r.abs()).sum(1)
    (slope,) = torch.autograd.grad(value.sum(), log_q)
    assert value.isfinite().all()
    assert slope.isfinite().all()
    assert slope[0, 1].item() == 0


# --- The registry ---


def own_rkl(coarse: Coarse) -> Tensor:
    return (coarse.q * coarse.log_ratio).sum(1)


def chi2(coarse: Coarse, *, strength: float = 1.0) -> Tensor:
    return strength * (coarse.q * coarse.log_ratio.expm1()).sum(1)


def test_a_registered_divergence_is_offered_after_the_built_in_ones_with_its_options() -> None:
    assert register_divergence("chi2")(chi2) is chi2
    assert divergence_names() == [*LOSSES, "chi2"]
    assert options_of("chi2") == {"strength": 1.0}
    check_divergence("chi2", {"strength": 2.0})
    value, _ = evaluate_divergence("chi2", coarse_of([[0.5, 0.5]], [[0.3, 0.7]], num_entries=1), {"strength": 2.0})
    assert value.item() == pytest.approx(2 * (0.3**2 / 0.5 + 0.7**2 / 0.5 - 1))


def test_options_of_the_built_in_divergences() -> None:
    assert {loss: options_of(loss) for loss in LOSSES} == {
        "fkl": {},
        "rkl": {},
        "akl": {"akl_split": "official"},
        "todi": {"beta": 1.0},
        "jsd": {"beta": 0.5},
        "jeffreys": {},
        "sfkl": {"skew": 0.1},
        "srkl": {"skew": 0.1},
        "tvd": {},
        "ab": {"alpha": 0.2, "beta": 0.7},
    }


@every_setting
def test_every_built_in_passes_its_own_check_and_evaluates_to_itself(loss: str, options: dict[str, Any]) -> None:
    check_divergence(loss, options)
    coarse = random_coarse(9)
    torch.testing.assert_close(evaluate_divergence(loss, coarse, options), divergence(loss, coarse, **options))


def test_registering_ones_own_name_again_replaces_it() -> None:
    register_divergence("mine")(chi2)
    register_divergence("mine")(own_rkl)
    assert divergence_names() == [*LOSSES, "mine"]
    assert options_of("mine") == {}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_built_in_name_is_refused(loss: str) -> None:
    with pytest.raises(ValueError, match=f"divergence '{loss}' is built in and cannot be replaced"):
        register_divergence(loss)


@pytest.mark.parametrize("name", ["", "two words", "a-b", "1st", None, chi2])
def test_a_name_that_is_no_identifier_is_refused(name: Any) -> None:
    with pytest.raises(ValueError, match="the name of a divergence is"):
        register_divergence(name)


def test_options_without_default_are_refused() -> None:
    def needy(coarse: Coarse, *, scale: float, power: float = 1.0) -> Tensor:
        return own_rkl(coarse)

    def open_ended(coarse: Coarse, **options: float) -> Tensor:
        return own_rkl(coarse)

    for function, option in ((needy, "scale"), (open_ended, "options")):
        with pytest.raises(ValueError, match=f"options without a default: {option}; give each a default"):
            register_divergence("mine")(function)
    assert divergence_names() == LOSSES


def test_an_unknown_name_is_refused_with_those_accepted() -> None:
    register_divergence("chi2")(chi2)
    for use in (
        lambda: check_divergence("xyz", {}),
        lambda: options_of("xyz"),
        lambda: evaluate_divergence("xyz", random_coarse(0), {}),
    ):
        with pytest.raises(ValueError, match=r"loss is 'xyz'; accepted are fkl, rkl, akl, .*, ab, chi2$"):
            use()


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        ("fkl", {"beta": 1.0}, "loss 'fkl' takes no options; got beta"),
        ("jsd", {"gamma": 1.0}, "loss 'jsd' takes beta; got gamma"),
        ("ab", {"alpha": 1.0, "gamma": 1.0}, "loss 'ab' takes alpha, beta; got gamma"),
        ("akl", {"akl_split": "thirds"}, "akl_split is 'thirds'; accepted are official, todi"),
        ("todi", {"beta": inf}, "beta is inf; it must be a finite number"),
        ("todi", {"beta": "1"}, "beta is '1'; it must be a finite number"),
        ("todi", {"beta": True}, "beta is True; it must be a finite number"),
        ("jsd", {"beta": 0.0}, "beta is 0.0; it must lie strictly between 0 and 1 .*fkl and rkl"),
        ("jsd", {"beta": 1}, "beta is 1; it must lie strictly between 0 and 1 .*fkl and rkl"),
        ("jsd", {"beta": nan}, "beta is nan; it must be a finite number"),
        ("sfkl", {"skew": 1.0}, "skew is 1.0; it must be at least 0 and below 1"),
        ("srkl", {"skew": -0.1}, "skew is -0.1; it must be at least 0 and below 1"),
        ("ab", {"alpha": nan}, "alpha is nan; it must be a finite number"),
        ("ab", {"beta": inf}, "beta is inf; it must be a finite number"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(loss: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_divergence(loss, options)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda coarse: coarse.q, r"its value must have shape \[2\], got \[2, 3\]"),
        (lambda coarse: own_rkl(coarse).mean(), r"its value must have shape \[2\], got \[\]"),
        (lambda coarse: 1.0, r"its value must have shape \[2\], got float"),
        (lambda coarse: None, r"its value must have shape \[2\], got NoneType"),
        (lambda coarse: (own_rkl(coarse), own_rkl(coarse)), r"its slope must have shape \[2, 3\], got \[2\]"),
        (lambda coarse: (own_rkl(coarse), coarse.q, coarse.q), r"its value must have shape \[2\], got tuple"),
        (lambda coarse: own_rkl(coarse).detach(), "gives a value that is not differentiable in log q"),
        (lambda coarse: coarse.p.sum(1), "gives a value that is not differentiable in log q"),
        (
            lambda coarse: ((coarse.q - coarse.p) ** 2 / coarse.q).sum(1),
            r"a value that is not finite: .*log_ratio\.exp",
        ),
        (lambda coarse: (own_rkl(coarse), coarse.q / 0), "a slope that is not finite"),
    ],
)
def test_a_function_that_returns_wrong_things_is_refused(function: Callable[..., Any], message: str) -> None:
    register_divergence("mine")(function)
    with pytest.raises(ValueError, match=f"loss 'mine' .*{message}"):
        check_divergence("mine", {})


def padded_coarse(requires_grad: bool = False) -> Coarse:
    coarse = coarse_of([[0.4, 0.3, 0.0, 0.3]], [[0.1, 0.2, 0.5, 0.2]], num_entries=3, padding=1)
    return Coarse(coarse.log_p, coarse.log_q.requires_grad_(requires_grad), coarse.counted, 3)


def test_autograd_of_a_value_equals_the_closed_form_everywhere_it_may_be_called() -> None:
    register_divergence("own_rkl")(own_rkl)
    expected = evaluate_divergence("rkl", padded_coarse(), {})
    found = {}

    class InForward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, log_q: Tensor) -> Tensor:
            coarse = padded_coarse()
            found["in a forward"] = evaluate_divergence("own_rkl", Coarse(coarse.log_p, log_q, coarse.counted, 3), {})
            return log_q.clone()

    found["plain"] = evaluate_divergence("own_rkl", padded_coarse(), {})
    found["student with a graph"] = evaluate_divergence("own_rkl", padded_coarse(requires_grad=True), {})
    with torch.no_grad():
        found["no grad"] = evaluate_divergence("own_rkl", padded_coarse(), {})
    InForward.apply(padded_coarse(requires_grad=True).log_q)
    for where, (value, slope) in found.items():
        torch.testing.assert_close((value, slope), expected, msg=where)
        assert not value.requires_grad and not slope.requires_grad, where
        assert slope[0, 2].item() == 0, where


def test_evaluating_leaves_the_students_numbers_as_they_were() -> None:
    register_divergence("own_rkl")(own_rkl)
    coarse = padded_coarse()
    evaluate_divergence("own_rkl", coarse, {})
    assert not coarse.log_q.requires_grad


def test_a_slope_that_the_user_gives_is_used_as_it_is_where_counted() -> None:
    @register_divergence("mine")
    def mine(coarse: Coarse) -> tuple[Tensor, Tensor]:
        return own_rkl(coarse), torch.full_like(coarse.log_q, 7.0)

    assert evaluate_divergence("mine", padded_coarse(), {})[1].tolist() == [[7.0, 7.0, 0.0, 7.0]]


def test_a_registered_divergence_may_combine_built_in_values() -> None:
    @register_divergence("half")
    def half(coarse: Coarse) -> Tensor:
        return 0.5 * DIVERGENCES["ab"](coarse)[0] + 0.5 * DIVERGENCES["jsd"](coarse)[0]

    check_divergence("half", {})
    ab, jsd = (evaluate_divergence(loss, padded_coarse(), {})[1] for loss in ("ab", "jsd"))
    torch.testing.assert_close(evaluate_divergence("half", padded_coarse(), {})[1], 0.5 * ab + 0.5 * jsd)

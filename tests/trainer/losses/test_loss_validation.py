"""Arguments that cannot be meant are refused in one line that says what and where."""

from math import inf, nan
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import trainer
from logitcache.format.quantization import PRESETS, mass_tolerances, rounded
from logitcache.format.scaling import scaled_beside_tail, scaled_to_tail
from trainer.losses.settings import LossSettings
from trainer.losses.sparse import distillation_terms
from trainer.losses.targets import TeacherTargets
from trainer.losses.validation import MASS_TOLERANCE, TAIL_NAMES

VOCABULARY = 6


def valid() -> dict[str, Any]:
    """Three positions, the second with one entry less."""
    return {
        "logits": torch.zeros(3, VOCABULARY),
        "token_ids": torch.tensor([[0, 1], [2, -1], [4, 5]]),
        "logprobs": torch.tensor([[0.5, 0.25], [0.5, 0.0], [0.5, 0.25]]).log(),
        "tail_logprob": torch.tensor([0.25, 0.5, 0.25]).log(),
        "tempered_tail": torch.tensor([0.5, 0.7, 0.5]).log(),
        "tail_groups": torch.arange(VOCABULARY) % 2,
        "group_logprobs": torch.tensor([[0.2, 0.05], [0.5, 0.0], [0.25, 0.0]]).log(),
        "tail_entropy": torch.tensor([-2.0, -1.5, -2.0]),
        "sample_ids": torch.tensor([[2, 3], [0, 0], [1, -1]]),
        "sample_logprobs": torch.tensor([[0.1, 0.05], [0.3, 0.3], [0.2, 0.0]]).log(),
        "tail_coefficients": torch.tensor([[0.5, -1.0], [0.0, 2.0], [3.0, 0.1]]),
        "tail_basis": trainer.TailBasis(
            torch.zeros(VOCABULARY), torch.eye(VOCABULARY)[:, :2], torch.full((VOCABULARY,), 1 / VOCABULARY)
        ),
        "probe_ids": torch.tensor([[2, 3], [0, 0], [1, -1]]),
        "probe_residuals": torch.tensor([[0.25, -1.0], [2.0, 2.0], [0.0, 0.0]]),
    }


def with_value(name: str, at: tuple[int, ...], value: float) -> dict[str, Any]:
    arguments = valid()
    tensor: Tensor = arguments[name].clone()
    tensor[at] = value
    return {**arguments, name: tensor}


def test_what_the_other_tests_spoil_is_accepted() -> None:
    for tail in TAIL_NAMES:
        assert trainer.sparse_divergence(**valid(), tail=tail).shape == (3,)
    assert trainer.sparse_divergence(**valid(), temperature=2.0).shape == (3,)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("loss", "kl", r"loss is 'kl'; accepted are fkl, rkl, akl, todi, jsd, jeffreys, sfkl, srkl, tvd, ab"),
        (
            "tail",
            "drop",
            r"tail is 'drop'; accepted are bucket, groups, cap, samples, ignore, renormalise, uniform, low_",
        ),
        ("temperature", 0.0, r"temperature is 0.0; it must be a positive number"),
        ("temperature", -1.0, r"temperature is -1.0"),
        ("temperature", nan, r"temperature is nan"),
        ("temperature", inf, r"temperature is inf"),
        ("beta", nan, r"beta is nan"),
        ("skew", 0.1, r"loss 'todi' takes beta; got skew"),
        ("vocab_size", 7, r"vocab_size is 7 but the student has 6 columns"),
        ("vocab_size", 0, r"vocab_size is 0"),
        ("residual_weight", -0.1, r"residual_weight is -0.1; it must lie between 0 and 1"),
        ("residual_weight", nan, r"residual_weight is nan"),
    ],
)
def test_a_setting_out_of_range_is_named_with_what_is_accepted(setting: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer.sparse_divergence(**valid(), **{setting: value}, validate=False)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("logits", (2, VOCABULARY)),
        ("logits", (1, 3, VOCABULARY)),
        ("token_ids", (3,)),
        ("token_ids", (3, 3)),
        ("logprobs", (3, 1)),
        ("tail_logprob", (3, 1)),
        ("tempered_tail", (2,)),
        ("tail_groups", (VOCABULARY - 1,)),
        ("group_logprobs", (3,)),
        ("group_logprobs", (2, 2)),
        ("tail_entropy", (3, 1)),
        ("sample_ids", (3,)),
        ("sample_logprobs", (3, 1)),
        ("tail_coefficients", (3, 3)),
        ("tail_coefficients", (2,)),
        ("probe_ids", (3, 1)),
        ("probe_residuals", (2, 2)),
    ],
)
def test_a_shape_that_does_not_agree_is_refused(name: str, shape: tuple[int, ...]) -> None:
    arguments = valid()
    arguments[name] = torch.zeros(shape, dtype=arguments[name].dtype)
    with pytest.raises(ValueError, match=r"must (be|have shape)"):
        trainer.sparse_divergence(**arguments, validate=False)


def test_a_shape_error_names_the_tensor_and_both_shapes() -> None:
    arguments = {**valid(), "logprobs": torch.zeros(3, 5)}
    with pytest.raises(
        ValueError, match=r"logprobs must have shape \[3, 2\] beside 3 positions and 6 tokens, got \[3, 5\]"
    ):
        trainer.sparse_divergence(**arguments)


@pytest.mark.parametrize(
    ("name", "dtype", "kind"),
    [
        ("token_ids", torch.float32, "integer"),
        ("tail_groups", torch.bool, "integer"),
        ("logprobs", torch.int64, "floating point"),
        ("tail_logprob", torch.int64, "floating point"),
    ],
)
def test_the_wrong_kind_of_number_is_refused(name: str, dtype: torch.dtype, kind: str) -> None:
    arguments = valid()
    arguments[name] = arguments[name].to(dtype)
    with pytest.raises(ValueError, match=rf"{name} must be {kind}, got {dtype}"):
        trainer.sparse_divergence(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (with_value("token_ids", (2, 1), 6), r"token_ids\[2, 1\] is 6: accepted are 0 … 5, and −1 for padding"),
        (with_value("token_ids", (1, 0), -2), r"token_ids\[1, 0\] is -2"),
        (with_value("token_ids", (2, 1), 4), r"token_ids\[2\] holds token 4 more than once"),
        (with_value("token_ids", (0, 1), -1), r"logprobs\[0, 1\] is -1.38629: an entry without a token"),
        (with_value("logprobs", (0, 1), 0.1), r"logprobs\[0, 1\] is 0.1: a log-probability is at most 0"),
        (with_value("logprobs", (2, 0), nan), r"logprobs\[2, 0\] is nan"),
        (with_value("logprobs", (0, 1), -0.1), r"logprobs and tail_logprob in row 0 hold a probability of 1.65"),
        (with_value("tail_logprob", (1,), -0.1), r"logprobs and tail_logprob in row 1 hold a probability of 1.4"),
        (with_value("tail_logprob", (1,), nan), r"tail_logprob\[1\] is nan"),
        (with_value("tail_logprob", (1,), 1.0), r"tail_logprob\[1\] is 1"),
        (with_value("tempered_tail", (2,), nan), r"tempered_tail\[2\] is nan"),
        (with_value("tempered_tail", (2,), inf), r"tempered_tail\[2\] is inf"),
        (with_value("group_logprobs", (2, 0), nan), r"group_logprobs\[2, 0\] is nan"),
        (with_value("group_logprobs", (2, 1), -0.1), r"logprobs and group_logprobs in row 2 hold a probability of 1.9"),
        (with_value("tail_entropy", (0,), nan), r"tail_entropy\[0\] is nan"),
        (with_value("sample_ids", (0, 1), 6), r"sample_ids\[0, 1\] is 6: accepted are 0 … 5, and −1 for padding"),
        (with_value("sample_ids", (2, 0), 5), r"sample_ids\[2, 0\] is 5: it is an entry already"),
        (with_value("sample_logprobs", (1, 0), 0.1), r"sample_logprobs\[1, 0\] is 0.1"),
        (with_value("sample_logprobs", (0, 1), -inf), r"sample_logprobs\[0, 1\] is -inf: a token of probability 0"),
        (
            with_value("sample_logprobs", (2, 0), -0.5),
            r"tail_logprob\[2\] is -1.38629: it is less than what the samples",
        ),
        (with_value("tail_groups", (3,), 2), r"tail_groups\[3\] is 2: accepted are 0 … 1"),
        (with_value("tail_groups", (3,), -1), r"tail_groups\[3\] is -1"),
        (with_value("tail_coefficients", (1, 0), nan), r"tail_coefficients\[1, 0\] is nan: it must be a number"),
        (with_value("tail_coefficients", (1, 0), inf), r"tail_coefficients\[1, 0\] is inf"),
        (with_value("probe_ids", (0, 1), 6), r"probe_ids\[0, 1\] is 6: accepted are 0 … 5, and −1 for padding"),
        (with_value("probe_residuals", (0, 1), nan), r"probe_residuals\[0, 1\] is nan"),
    ],
)
def test_a_value_that_no_teacher_gives_is_named_with_its_place(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer.sparse_divergence(**arguments)


def test_ids_are_checked_against_the_teachers_vocabulary_not_the_students_columns() -> None:
    arguments = {**valid(), "tail_groups": None, "group_logprobs": None, "tail_basis": None}
    with pytest.raises(ValueError, match=r"token_ids\[2, 1\] is 5: accepted are 0 … 4"):
        trainer.sparse_divergence(**arguments, vocab_size=5)


@pytest.mark.parametrize("label", [-100, VOCABULARY])
def test_a_label_outside_the_vocabulary_is_refused(label: int) -> None:
    arguments = valid()
    logits, targets = arguments.pop("logits"), TeacherTargets(**arguments)
    with pytest.raises(ValueError, match=rf"labels\[1\] is {label}: accepted are 0 … 5"):
        distillation_terms(logits, targets, torch.tensor([0, label, 2]), settings=LossSettings())


def test_rounding_of_half_precision_log_probabilities_is_no_error() -> None:
    arguments = valid()
    arguments["logprobs"] = arguments["logprobs"] + 3e-3
    with pytest.raises(ValueError, match="more than 1"):
        trainer.sparse_divergence(**arguments)
    arguments["logprobs"] = arguments["logprobs"].half()
    assert trainer.sparse_divergence(**arguments).isfinite().all()


def test_checking_of_values_can_be_left_to_the_loader() -> None:
    arguments = with_value("tail_logprob", (1,), nan)
    assert trainer.sparse_divergence(**arguments, validate=False).isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("precision", PRESETS)
def test_the_worst_that_a_cache_rounds_is_accepted_once_it_is_scaled(precision: str) -> None:
    """Entries of one probability, and groups of one share, are all rounded in the same direction."""
    quantization = PRESETS[precision]
    probs = np.repeat(np.linspace(1e-3, 0.1, 400)[:, None], 8, axis=1)
    logprobs, tail = np.log(probs).astype(np.float32), np.log1p(-probs.sum(1)).astype(np.float32)
    groups = tail[:, None] + np.log(np.full((1, 5), 0.2, np.float32))
    if quantization:
        levels = quantization.levels(logprobs)
        logprobs = quantization.logprobs(int(levels.max()) + 1)[levels]
        groups = tail[:, None] + rounded(groups - tail[:, None], quantization.group_step)
    missing = np.abs(np.exp(logprobs).sum(1) + np.exp(tail) - 1)
    assert (missing <= mass_tolerances(logprobs, precision, quantization)).all()
    assert (missing.max() > MASS_TOLERANCE) == (quantization is not None)
    scaled_groups = scaled_to_tail(groups, tail)
    assert scaled_groups is not None
    targets = TeacherTargets(
        torch.arange(8).repeat(400, 1),
        torch.tensor(scaled_beside_tail(logprobs, tail)),
        torch.tensor(tail),
        tail_groups=torch.arange(20) % 5,
        group_logprobs=torch.tensor(scaled_groups),
    )
    assert trainer.sparse_divergence(torch.zeros(400, 20), targets=targets, tail="groups").isfinite().all()

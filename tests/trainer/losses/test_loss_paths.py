"""Every divergence × tail × way to compute it: logits in, fused with the projection, through the GPU's kernels."""

import itertools
from math import inf
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import trainer
from tests.helpers.lossmaking import (
    F_DIVERGENCES,
    INTERPRETED,
    LOSSES,
    PATHS,
    TREATMENTS,
    autograd_of,
    bands,
    every_loss_with_every_tail,
    known,
    ragged_problems,
    random_logits,
    reference_full,
    reference_sparse,
    seeded,
    take,
    top_entries,
    value_and_gradient,
)
from tests.helpers.matrix import every_pair

FEW = settings(
    max_examples=2 if INTERPRETED else 6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    path: str = request.param
    take(path, monkeypatch)
    return path


every_loss = pytest.mark.parametrize("loss", LOSSES)
every_treatment = pytest.mark.parametrize(("tail", "temperature"), TREATMENTS)


# Value and gradient.


@pytest.mark.slow
@every_loss_with_every_tail(*PATHS)
@FEW
@given(problem=ragged_problems())
def test_value_and_gradient_match_brute_force_on_any_ragged_shape(
    loss: str, tail: str, temperature: float, path: str, problem: tuple[Tensor, Tensor, list[list[int]], Tensor]
) -> None:
    logits, teacher, kept, groups = problem
    if tail in ("ignore", "renormalise", "uniform"):
        kept = [ids or [0] for ids in kept]  # no empty sum, and no equal masses that end AKL's head at exactly a half
    arguments = known(teacher, kept, groups, temperature)
    expected = autograd_of(
        logits, lambda z: reference_sparse(loss, z, teacher, kept, tail, groups, temperature, arguments["sample_ids"])
    )
    received = value_and_gradient(path, logits, loss=loss, tail=tail, temperature=temperature, **arguments)
    torch.testing.assert_close(received, expected, rtol=1e-8, atol=1e-10)


@every_loss
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_storing_the_whole_vocabulary_gives_the_full_definition(loss: str, temperature: float, path: str) -> None:
    logits, teacher = random_logits(6, 15, seed=5), random_logits(6, 15, seed=6)
    arguments = known(teacher, top_entries(teacher, [15] * 6), bands(15, 1), temperature)
    choices: dict[str, list[dict[str, Any]]] = {
        "akl": [{"akl_split": "official"}, {"akl_split": "todi"}],
        "todi": [{"beta": 0.5}],
    }
    for options in choices.get(loss, [{}]):
        expected = autograd_of(
            logits, lambda z, options=options: reference_full(loss, z, teacher, temperature, **options)
        )
        received = value_and_gradient(path, logits, loss=loss, temperature=temperature, **options, **arguments)
        torch.testing.assert_close(received, expected, rtol=1e-9, atol=1e-11)


@every_loss
def test_every_token_its_own_group_gives_the_full_definition(loss: str, path: str) -> None:
    if loss == "akl":
        pytest.skip("a group is no token, so it cannot be in AKL's head")
    logits, teacher = random_logits(5, 12, seed=7), random_logits(5, 12, seed=8)
    expected = autograd_of(logits, lambda z: reference_full(loss, z, teacher))
    for sizes in ([0] * 5, [3, 1, 0, 12, 5]):
        arguments = known(teacher, top_entries(teacher, sizes), bands(12, 12))
        received = value_and_gradient(path, logits, loss=loss, tail="groups", **arguments)
        torch.testing.assert_close(received, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.slow
@every_loss
@FEW
@given(problem=ragged_problems())
def test_a_single_group_is_the_bucket(
    loss: str, path: str, problem: tuple[Tensor, Tensor, list[list[int]], Tensor]
) -> None:
    logits, teacher, kept, _ = problem
    arguments = known(teacher, kept, bands(logits.shape[1], 1))
    bucket = value_and_gradient(path, logits, loss=loss, tail="bucket", **arguments)
    group = value_and_gradient(path, logits, loss=loss, tail="groups", **arguments)
    torch.testing.assert_close(group, bucket, rtol=1e-11, atol=1e-12)


# The tail's promises.


@pytest.mark.slow
@every_loss_with_every_tail(*PATHS, tails=["groups", "bucket", "cap", "samples"])
@FEW
@given(problem=ragged_problems())
def test_a_student_that_equals_the_teacher_has_nothing_to_learn(
    loss: str, tail: str, temperature: float, path: str, problem: tuple[Tensor, Tensor, list[list[int]], Tensor]
) -> None:
    if (loss, tail) == ("fkl", "samples"):
        pytest.skip("unbiased, so zero in the mean only")
    _, teacher, kept, groups = problem
    arguments = known(teacher, kept, groups, temperature)
    value, gradient = value_and_gradient(
        path, teacher + 3.0, loss=loss, tail=tail, temperature=temperature, **arguments
    )
    assert value.abs().max() < 1e-11
    if loss != "tvd":  # whose gradient is the sign of rounding here
        assert gradient.abs().max() < 1e-11


@pytest.mark.parametrize("loss", ["fkl", "rkl"])
@pytest.mark.parametrize("tail", ["ignore", "renormalise", "uniform"])
def test_the_ablations_move_a_student_that_equals_the_teacher(loss: str, tail: str, path: str) -> None:
    teacher = random_logits(3, 20, seed=11)
    arguments = known(teacher, top_entries(teacher, [4] * 3), bands(20, 1))
    assert value_and_gradient(path, teacher, loss=loss, tail=tail, **arguments)[1].abs().max() > 0.01


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="a property of the tails, whatever computes them")
@pytest.mark.parametrize("loss", F_DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@FEW
@given(seed=st.integers(0, 2**16), vocabulary=st.integers(2, 8))
def test_bucket_is_a_lower_bound_that_rises_with_every_entry_and_the_cap_lies_between(
    loss: str, temperature: float, seed: int, vocabulary: int
) -> None:
    if loss == "todi" and temperature != 1.0:
        pytest.skip("one temperature is enough")
    logits, teacher = random_logits(3, vocabulary, seed), random_logits(3, vocabulary, seed + 1)
    full = reference_full(loss, logits, teacher, temperature)

    everything = range(vocabulary + 1)
    held = [known(teacher, top_entries(teacher, [k] * 3), bands(vocabulary, 1), temperature) for k in everything]
    chosen: dict[str, Any] = {"loss": loss, "temperature": temperature}
    buckets, caps = (
        [trainer.sparse_divergence(logits, tail=tail, **chosen, **held[k]) for k in everything]
        for tail in ("bucket", "cap")
    )
    for smaller, larger in itertools.pairwise(buckets):
        assert (larger >= smaller - 1e-11).all()
    for bucket, cap in zip(buckets, caps, strict=True):
        assert (cap >= bucket - 1e-11).all()
        assert (full >= cap - 1e-11).all()
    torch.testing.assert_close(buckets[-1], full)


@pytest.mark.slow
@pytest.mark.parametrize("loss", F_DIVERGENCES)
@FEW
@given(seed=st.integers(0, 2**16), k=st.integers(0, 12))
def test_splitting_groups_never_lowers_the_bound(loss: str, path: str, seed: int, k: int) -> None:
    logits, teacher = random_logits(3, 12, seed), random_logits(3, 12, seed + 1)
    kept = top_entries(teacher, [k] * 3)
    finest_first = [torch.randperm(12, generator=seeded(seed))]
    while finest_first[-1].max() > 0:
        finest_first.append(finest_first[-1] // 2)  # merges groups in pairs
    bounds = [
        value_and_gradient(path, logits, loss=loss, tail="groups", **known(teacher, kept, groups))[0]
        for groups in reversed(finest_first)
    ]
    for coarser, finer in itertools.pairwise(bounds):
        assert (finer >= coarser - 1e-11).all()
    assert (reference_full(loss, logits, teacher) >= bounds[-1] - 1e-11).all()


@pytest.mark.slow
@pytest.mark.parametrize("loss", [loss for loss in F_DIVERGENCES if loss != "fkl"])
@FEW
@given(problem=ragged_problems())
def test_samples_that_join_the_entries_only_tighten_the_bucket(
    loss: str, path: str, problem: tuple[Tensor, Tensor, list[list[int]], Tensor]
) -> None:
    logits, teacher, kept, groups = problem
    arguments = known(teacher, kept, groups, num_draws=8)
    bucket = value_and_gradient(path, logits, loss=loss, **arguments)[0]
    joined = value_and_gradient(path, logits, loss=loss, tail="samples", **arguments)[0]
    assert (joined >= bucket - 1e-11).all()
    assert (reference_full(loss, logits, teacher) >= joined - 1e-11).all()


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="a property of the estimate, whatever computes the tails")
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_gradient_of_fkl_on_samples_averages_to_the_full_vocabularys(temperature: float, path: str) -> None:
    # One teacher in many rows, each with its own draws: many estimates at once.
    rows = 4000
    logits, teacher = random_logits(1, 8, seed=12).repeat(rows, 1), random_logits(1, 8, seed=13).repeat(rows, 1)
    arguments = known(teacher, top_entries(teacher, [2] * rows), bands(8, 1), temperature, num_draws=2)
    value, gradient = value_and_gradient(path, logits, loss="fkl", tail="samples", temperature=temperature, **arguments)
    full, full_gradient = autograd_of(logits[:1], lambda z: reference_full("fkl", z, teacher[:1], temperature))
    error = gradient.std(0) / rows**0.5
    assert ((gradient.mean(0) - full_gradient[0]).abs() < 5 * error + 1e-9).all()
    assert (value.mean() - full[0]).abs() < 5 * value.std() / rows**0.5
    one_row = {name: tensor if name == "tail_groups" else tensor[:1] for name, tensor in arguments.items()}
    _, bucket = value_and_gradient(path, logits[:1], loss="fkl", temperature=temperature, **one_row)
    assert (bucket - full_gradient).abs().max() > 10 * error.max()  # what the samples repair


def test_fkl_misses_exactly_the_divergence_inside_the_tail(path: str) -> None:
    logits, teacher = random_logits(4, 20, seed=12), random_logits(4, 20, seed=13)
    kept = top_entries(teacher, [5] * 4)
    value, _ = value_and_gradient(path, logits, loss="fkl", **known(teacher, kept, bands(20, 1)))
    log_p, log_q = teacher.log_softmax(1), logits.log_softmax(1)
    for row, ids in enumerate(kept):
        rest = [j for j in range(20) if j not in ids]
        p_tail, q_tail = log_p[row, rest].log_softmax(0), log_q[row, rest].log_softmax(0)
        missed = log_p[row, rest].exp().sum() * (p_tail.exp() * (p_tail - q_tail)).sum()
        torch.testing.assert_close((reference_full("fkl", logits, teacher) - value)[row], missed)


# Numerics.


@pytest.mark.slow
@every_pair(
    loss=LOSSES,
    tail=["bucket", "groups", "cap", "samples"],
    student_sure_of=[0, 5],
    dtype=[torch.float32, torch.bfloat16],
)
def test_a_teacher_certain_of_one_token_gives_a_finite_loss_and_gradient(
    loss: str, tail: str, student_sure_of: int, dtype: torch.dtype, path: str
) -> None:
    logits = torch.zeros(1, 10, dtype=dtype)
    logits[0, student_sure_of] = 300.0
    value, gradient = value_and_gradient(
        path,
        logits,
        token_ids=torch.tensor([[0, -1]]),
        logprobs=torch.tensor([[0.0, -inf]]),
        tail_logprob=torch.tensor([-inf]),
        tail_groups=bands(10, 2),
        group_logprobs=torch.full((1, 2), -inf),
        sample_ids=torch.tensor([[-1, -1]]),
        sample_logprobs=torch.tensor([[-inf, -inf]]),
        loss=loss,
        tail=tail,
    )
    assert value.isfinite().all()
    assert gradient.isfinite().all()
    if student_sure_of == 0 and loss != "ab":
        assert value.abs().max() < 1e-3  # the floor of the teacher's tail, e^−16, times some 300 nats
        assert gradient.abs().max() < 1e-5
    elif loss == "fkl":
        assert value.item() == pytest.approx(300.0)
        assert gradient[0, 0].item() == pytest.approx(-1, rel=1e-2)
        assert gradient[0, 5].item() == pytest.approx(1, rel=1e-2)


@pytest.mark.slow
@every_loss
@pytest.mark.parametrize("tail", ["bucket", "groups", "cap", "samples"])
def test_float32_is_exact_where_the_student_leaves_the_tail_all_but_empty(loss: str, tail: str, path: str) -> None:
    # The student's tail mass is about e^−120: 1 − Σ q would be 0, and a mass not even a float32.
    teacher, logits = random_logits(3, 12, seed=14), random_logits(3, 12, seed=15)
    kept, groups = top_entries(teacher, [4] * 3), bands(12, 3)
    for row, ids in enumerate(kept):
        logits[row, ids] += 120.0
    arguments = known(teacher, kept, groups)
    expected = autograd_of(
        logits.float().double(),
        lambda z: reference_sparse(loss, z, teacher, kept, tail, groups, 1.0, arguments["sample_ids"]),
    )
    value, gradient = value_and_gradient(path, logits.float(), loss=loss, tail=tail, **arguments)
    torch.testing.assert_close((value.double(), gradient.double()), expected, rtol=1e-5, atol=1e-5)


@every_loss
def test_float32_is_exact_for_a_group_that_the_student_leaves_far_below_the_others(loss: str, path: str) -> None:
    teacher, logits = random_logits(3, 12, seed=45), random_logits(3, 12, seed=46).float()
    kept, groups = top_entries(teacher, [4] * 3), bands(12, 3)
    logits[:, groups == 2] -= 120.0
    expected = autograd_of(logits.double(), lambda z: reference_sparse(loss, z, teacher, kept, "groups", groups, 1.0))
    value, gradient = value_and_gradient(path, logits, loss=loss, tail="groups", **known(teacher, kept, groups))
    torch.testing.assert_close((value.double(), gradient.double()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path_without_product", [path for path in PATHS if path != "fused"])
def test_an_infinite_divergence_is_not_hidden(path_without_product: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take(path_without_product, monkeypatch)
    teacher, logits = random_logits(2, 6, seed=47), random_logits(2, 6, seed=48)
    logits[1, 0] = -inf
    arguments = known(teacher, [[0, 1], [0, 1]], bands(6, 1))
    value, _ = value_and_gradient(path_without_product, logits, loss="fkl", **arguments)
    assert value.isinf().tolist() == [False, True]


@pytest.mark.slow
@every_loss_with_every_tail(*PATHS)
def test_bfloat16_logits_lose_nothing_but_the_rounding_of_the_gradient(
    loss: str, tail: str, temperature: float, path: str
) -> None:
    rows = 2 if INTERPRETED else 6
    teacher, logits = random_logits(rows, 200, seed=16), random_logits(rows, 200, seed=17).bfloat16()
    arguments: dict[str, Any] = {
        "loss": loss,
        "tail": tail,
        "temperature": temperature,
        **known(teacher, top_entries(teacher, [16] * rows), bands(200, 5), temperature),
    }
    value, gradient = value_and_gradient(path, logits, **arguments)
    expected, expected_gradient = value_and_gradient(path, logits.double(), **arguments)
    assert value.dtype == torch.float32
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(value.double(), expected, rtol=4e-6, atol=4e-6)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=2**-7, atol=1e-6)


def test_float16_logits_and_half_precision_targets_are_accepted(path: str) -> None:
    teacher, logits = random_logits(3, 20, seed=18), random_logits(3, 20, seed=19)
    arguments = known(teacher, top_entries(teacher, [5, 5, 2]), bands(20, 2))
    expected, _ = value_and_gradient(path, logits, **arguments)
    half = {name: t.half() if t.is_floating_point() else t.int() for name, t in arguments.items()}
    received, _ = value_and_gradient(path, logits.half(), **half)
    torch.testing.assert_close(received.double(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("tail", ["bucket", "groups", "cap", "samples"])
def test_nan_logits_are_not_hidden(tail: str, path: str) -> None:
    teacher = random_logits(3, 8, seed=21)
    arguments = known(teacher, [[0, 1], [0, 1], [0, 1]], bands(8, 2))
    for place, loss in itertools.product((0, 5), LOSSES):
        logits = random_logits(3, 8, seed=22)
        logits[1, place] = float("nan")
        value, gradient = value_and_gradient(path, logits, loss=loss, tail=tail, **arguments)
        assert value.isnan().tolist() == [False, True, False]
        assert gradient[1].isnan().any()
        assert value[[0, 2]].isfinite().all()


# What must not matter, and what must.


@pytest.mark.parametrize("tail", ["bucket", "groups"])
def test_the_order_of_memory_does_not_matter(tail: str, path: str) -> None:
    teacher, logits = random_logits(5, 40, seed=70), random_logits(5, 40, seed=71)
    arguments = {"tail": tail, **known(teacher, top_entries(teacher, [4] * 5), bands(40, 3))}
    by_column = logits.t().contiguous().t()
    assert by_column.stride(1) != 1
    torch.testing.assert_close(
        value_and_gradient(path, by_column, **arguments), value_and_gradient(path, logits, **arguments)
    )


@every_loss
def test_a_row_without_draws_has_the_bucket_for_its_samples(loss: str, path: str) -> None:
    teacher, logits = random_logits(3, 12, seed=72), random_logits(3, 12, seed=73)
    arguments = known(teacher, top_entries(teacher, [4] * 3), bands(12, 1))
    arguments["sample_ids"][1] = -1
    arguments["sample_logprobs"][1] = -inf
    value, gradient = value_and_gradient(path, logits, loss=loss, tail="samples", **arguments)
    bucket, bucket_gradient = value_and_gradient(path, logits, loss=loss, tail="bucket", **arguments)
    torch.testing.assert_close((value[1], gradient[1]), (bucket[1], bucket_gradient[1]))


@pytest.mark.slow
@every_loss_with_every_tail(*PATHS)
def test_columns_beyond_the_teachers_vocabulary_change_nothing_and_get_no_gradient(
    loss: str, tail: str, temperature: float, path: str
) -> None:
    teacher, logits = random_logits(3, 10, seed=23), random_logits(3, 10, seed=24)
    sizes = [4, 1, 10] if tail in ("ignore", "renormalise") else [4, 0, 10]
    arguments: dict[str, Any] = {
        "loss": loss,
        "tail": tail,
        "temperature": temperature,
        **known(teacher, top_entries(teacher, sizes), bands(10, 3), temperature),
    }
    expected, expected_gradient = value_and_gradient(path, logits, **arguments)
    padded = torch.cat([logits, torch.full((3, 6), 50.0, dtype=torch.float64)], 1)
    value, gradient = value_and_gradient(path, padded, vocab_size=10, **arguments)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient[:, :10], expected_gradient)
    assert torch.equal(gradient[:, 10:], torch.zeros(3, 6, dtype=torch.float64))


@pytest.mark.slow
@every_loss_with_every_tail(*PATHS)
def test_more_padding_changes_nothing(loss: str, tail: str, temperature: float, path: str) -> None:
    teacher, logits = random_logits(3, 10, seed=25), random_logits(3, 10, seed=26)
    arguments = known(teacher, top_entries(teacher, [4, 1, 2]), bands(10, 3), temperature)
    wider = {
        **arguments,
        "token_ids": torch.cat([torch.full((3, 1), -1), arguments["token_ids"], torch.full((3, 5), -1)], 1),
        "logprobs": torch.nn.functional.pad(arguments["logprobs"], (1, 5), value=-inf),
    }
    chosen = {"loss": loss, "tail": tail, "temperature": temperature}
    torch.testing.assert_close(
        value_and_gradient(path, logits, **chosen, **wider), value_and_gradient(path, logits, **chosen, **arguments)
    )


@pytest.mark.slow
@every_loss
def test_targets_moved_by_one_position_are_noticed(loss: str, path: str) -> None:
    rows = 2 if INTERPRETED else 16
    teacher = random_logits(rows, 30, seed=29)
    arguments = known(teacher, top_entries(teacher, [8] * rows), bands(30, 2))
    moved = {name: t if name == "tail_groups" else t.roll(1, 0) for name, t in arguments.items()}
    for tail in ("bucket", "groups", "cap"):
        assert value_and_gradient(path, teacher, loss=loss, tail=tail, **arguments)[0].max() < 1e-11
        assert value_and_gradient(path, teacher, loss=loss, tail=tail, **moved)[0].min() > 0.05


@every_treatment
def test_no_positions_give_no_losses_and_an_empty_gradient(tail: str, temperature: float, path: str) -> None:
    for k in (0, 3):
        arguments = {
            "token_ids": torch.empty(0, k, dtype=torch.long),
            "logprobs": torch.empty(0, k),
            "tail_logprob": torch.empty(0),
            "tempered_tail": torch.empty(0),
            "tail_groups": bands(6, 2),
            "group_logprobs": torch.empty(0, 2),
            "sample_ids": torch.empty(0, 2, dtype=torch.long),
            "sample_logprobs": torch.empty(0, 2),
        }
        value, gradient = value_and_gradient(path, torch.empty(0, 6), tail=tail, temperature=temperature, **arguments)
        assert value.shape == (0,)
        assert gradient.shape == (0, 6)

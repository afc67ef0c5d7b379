"""The GPU kernels of the low-rank tail against plain torch in float64, and their passage through the real compiler."""

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.kernels import DEVICE, HAS_TRITON, Launch, compiled, compiles, recorded, runs_kernels
from tests.helpers.lossmaking import random_logits, seeded
from tests.trainer.losses.test_low_rank import on_device, random_basis, stored
from trainer.losses import low_rank
from trainer.losses.blocks import BlockTerms
from trainer.losses.settings import LossSettings
from trainer.losses.targets import TailBasis, TeacherTargets
from trainer.losses.terms import distillation_block
from trainer.losses.transform import LogitTransform

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
PLAIN, CAPPED = LogitTransform(), LogitTransform(0.5, 6.0)
FORMULAS = ["fkl", "rkl", "jeffreys", "akl", "todi", "jsd", "sfkl", "srkl", "tvd"]
VOCABULARY = 70
SIZES = (0, 1, 4, VOCABULARY - 1, VOCABULARY)
"""Entries of each row."""


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, with tiles so small that short rows need several, in several programs."""
    from trainer.losses import low_rank_triton

    for name, value in (("TILE_ROWS", 16), ("TILE_ROWS_HOPPER", 16), ("TILE_COLUMNS", 16), ("PROGRAMS", 3)):
        monkeypatch.setattr(low_rank_triton, name, value)
    return low_rank_triton


def problem(
    rank: int, dtype: torch.dtype = torch.float32, sizes: tuple[int, ...] = SIZES
) -> tuple[Tensor, TeacherTargets]:
    """A student's raw logits and what is stored of a teacher near it, a row for each number of entries."""
    student = random_logits(len(sizes), VOCABULARY, 1)
    teacher = 2 * student + random_logits(len(sizes), VOCABULARY, 2)
    order = teacher.argsort(1, descending=True).tolist()
    kept = [ids[:size] for ids, size in zip(order, sizes, strict=True)]
    return 2 * student.to(dtype), stored(teacher, kept, random_basis(VOCABULARY, rank), num_probes=2)


def assert_agrees(
    kernels: ModuleType,
    raw: Tensor,
    targets: TeacherTargets,
    settings: LossSettings,
    transform: LogitTransform = PLAIN,
    weighted: tuple[bool, bool] = (True, True),
    *,
    by_kernels: bool = True,
) -> None:
    """Terms and gradient of the kernels are those of plain torch in float64."""
    n = len(raw)
    labels = torch.randint(VOCABULARY, (n,), generator=seeded(3))
    weights = [torch.rand(n, generator=seeded(place)) if there else None for place, there in enumerate(weighted)]
    results: list[BlockTerms | None] = []

    def taken(*arguments: Any) -> BlockTerms | None:
        results.append(kernels.low_rank_block(*arguments))
        return results[-1]

    def run(block: Tensor, targets: TeacherTargets) -> tuple[BlockTerms, Tensor]:
        dtype = torch.promote_types(block.dtype, torch.float32)
        kd, ce = (None if weight is None else weight.to(block.device, dtype) for weight in weights)
        known = targets.for_arithmetic(dtype)
        return distillation_block(block, known, labels.to(block.device), settings, transform, (kd, ce)), block

    exact, gradient = run(raw.double(), targets)
    with pytest.MonkeyPatch.context() as patch:
        module = SimpleNamespace(has_kernels=kernels.has_kernels, low_rank_block=taken)
        patch.setattr(low_rank, "low_rank_kernels", lambda device_type: module)
        found, written = run(raw.clone().to(DEVICE), on_device(targets))
    assert [result is not None for result in results] == [by_kernels]

    def numbers(block: BlockTerms) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        named = {name: getattr(block, name) for name in ("kd", "log_masses", "largest", "label_logits")}
        first, second = ({name: t.cpu().double() for name, t in each.items()} for each in (named, block.own_terms))
        return first, second

    for received, expected, tolerance in zip(numbers(found), numbers(exact), (2e-5, 1e-4), strict=True):
        torch.testing.assert_close(received, expected, rtol=tolerance, atol=tolerance)
    rounding = 2**-7 if raw.dtype == torch.bfloat16 else 2e-5
    torch.testing.assert_close(written.cpu().double(), gradient, rtol=rounding, atol=5e-6)


def settings_of(loss: str, temperature: float = 1.0, residual_weight: float = 0.4, **options: Any) -> LossSettings:
    return LossSettings(loss, "low_rank", temperature, loss_args=options, residual_weight=residual_weight)


def sizes_for(loss: str) -> tuple[int, ...]:
    return (8, 20, VOCABULARY - 1) if loss == "akl" else SIZES


@runs_kernels
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("loss", FORMULAS)
def test_every_divergence_is_that_of_plain_torch(kernels: ModuleType, loss: str, temperature: float) -> None:
    raw, targets = problem(5, sizes=sizes_for(loss))
    assert_agrees(kernels, raw, targets, settings_of(loss, temperature))


@runs_kernels
@pytest.mark.parametrize(
    ("loss", "options"),
    [
        ("todi", {"beta": 0.5}),
        ("jsd", {"beta": 0.1}),
        ("sfkl", {"skew": 0.0}),
        ("srkl", {"skew": 0.5}),
        ("akl", {"akl_split": "todi"}),
    ],
)
def test_options_are_heeded(kernels: ModuleType, loss: str, options: dict[str, Any]) -> None:
    raw, targets = problem(5, sizes=sizes_for(loss))
    assert_agrees(kernels, raw, targets, settings_of(loss, **options))


@runs_kernels
@pytest.mark.parametrize("transform", [LogitTransform(0.5), CAPPED], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_and_transforms(kernels: ModuleType, dtype: torch.dtype, transform: LogitTransform) -> None:
    raw, targets = problem(3, dtype)
    for temperature in (1.0, 2.0):
        assert_agrees(kernels, raw, targets, settings_of("todi", temperature), transform)


@runs_kernels
@pytest.mark.parametrize("rank", [1, 17, VOCABULARY - 1])
@pytest.mark.parametrize("residual_weight", [0.0, 1.0])
def test_any_rank_and_share_of_the_students_residual(kernels: ModuleType, rank: int, residual_weight: float) -> None:
    raw, targets = problem(rank)
    assert_agrees(kernels, raw, targets, settings_of("rkl", residual_weight=residual_weight))


@runs_kernels
@pytest.mark.parametrize("weighted", [(True, False), (False, True)])
def test_either_term_alone_has_a_gradient(kernels: ModuleType, weighted: tuple[bool, bool]) -> None:
    raw, targets = problem(4)
    for loss in ("fkl", "todi"):
        assert_agrees(kernels, raw, targets, settings_of(loss), weighted=weighted)


@runs_kernels
def test_many_rows_and_an_estimated_mass_of_the_tail(kernels: ModuleType) -> None:
    raw, targets = problem(6, sizes=(3,) * 37)
    assert targets.tempered_tail is None
    assert_agrees(kernels, raw, targets, settings_of("jsd", 0.5))


@runs_kernels
def test_a_head_of_akl_that_reaches_beyond_the_entries_is_left_to_plain_torch(kernels: ModuleType) -> None:
    for sizes in ((8, 0), (8, 1)):
        raw, targets = problem(5, sizes=sizes)
        assert_agrees(kernels, raw, targets, settings_of("akl"), by_kernels=False)


@runs_kernels
def test_numbers_that_are_none_stay_so(kernels: ModuleType) -> None:
    raw, targets = problem(5, sizes=(2, 2))
    raw[0, 9] = torch.nan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(low_rank, "low_rank_kernels", lambda device_type: kernels)
        block = distillation_block(
            raw.to(DEVICE), on_device(targets).for_arithmetic(torch.float32), None, settings_of("rkl"), PLAIN, None
        )
    assert block.kd.isnan().tolist() == [True, False]


# The interpreter takes what the compiler refuses.


def launches(
    dtype: torch.dtype, loss: str, temperature: float, rank: int, transform: LogitTransform, capability: int
) -> list[Launch]:
    """Each launch for a block of a large vocabulary."""
    from trainer.losses import low_rank_triton

    vocabulary = 151_936
    raw, basis = (
        torch.zeros(2, vocabulary, dtype=dtype),
        TailBasis(*(torch.zeros(vocabulary, *size) for size in ((), (rank,), ()))),
    )
    with (
        recorded(low_rank_triton, "_read_kernel", "_sum_kernel", "_write_kernel") as made,
        pytest.MonkeyPatch.context() as patch,
    ):
        if capability >= 90:
            patch.setattr(low_rank_triton, "TILE_ROWS", low_rank_triton.TILE_ROWS_HOPPER)
        tail = low_rank_triton.LowRankTail(raw, torch.zeros(2, rank), basis, settings_of(loss, temperature), transform)
        tail.sums(torch.zeros(2, 2))
        mixture = torch.zeros(2, 2) if loss in low_rank_triton.MIXED else None
        gradient = low_rank_triton.TailGradient(torch.zeros(2), torch.zeros(2), mixture)
        tail.write_gradient_(
            torch.zeros(2, 2), torch.zeros(2), gradient, torch.zeros(2, dtype=torch.int64), torch.zeros(2)
        )
    return made


@pytest.mark.slow
@compiles
@pytest.mark.usefixtures("_compiler")
@pytest.mark.parametrize(
    ("dtype", "loss", "temperature", "rank", "transform", "capability"),
    [
        (torch.bfloat16, "todi", 1.0, 64, PLAIN, 90),
        (torch.float32, "akl", 2.0, 64, CAPPED, 90),
        (torch.bfloat16, "jsd", 2.0, 128, PLAIN, 80),
        (torch.float16, "srkl", 1.0, 5, PLAIN, 100),
    ],
)
def test_every_launch_compiles(
    dtype: torch.dtype, loss: str, temperature: float, rank: int, transform: LogitTransform, capability: int
) -> None:
    made = launches(dtype, loss, temperature, rank, transform, capability)
    assert len(made) == 3
    for launch in made:
        assert compiled(launch, capability)["cubin"]

"""The GPU kernels against slow float64 references, and their passage through the real compiler.

On a CUDA machine the kernels run there. Elsewhere Triton's interpreter runs them: it has to be switched on before
Triton is imported, and engines must never see the switch, so these tests then run in a process of their own.
"""

import os
import subprocess
import sys
from math import inf, nan
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.kernels import (
    CUDA,
    DEVICE,
    HAS_TRITON,
    INTERPRETED,
    Launch,
    compiled,
    compiles,
    recorded,
    runs_kernels,
)
from tests.helpers.matrix import every_pair
from trainer.losses.transform import LogitTransform

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
PLAIN = LogitTransform()
TRANSFORMS = [PLAIN, LogitTransform(scale=0.25), LogitTransform(softcap=30.0), LogitTransform(2.0, 5.0)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, with column blocks so small that the short rows of these tests need several."""
    from trainer.losses import tail_triton as kernels

    monkeypatch.setattr(kernels, "READ_COLUMNS", 32)
    monkeypatch.setattr(kernels, "WRITE_COLUMNS", 32)
    monkeypatch.setattr(kernels, "TILE_ELEMENTS", 256)
    return kernels


# The reference: the visible tokens of one row at a time, in float64, the gradient by autograd.


def reference(
    block: Tensor,
    transform: LogitTransform,
    temperatures: tuple[float, ...],
    groups: Tensor | None,
    num_groups: int,
    weights: list[Tensor | None] | None = None,
    labels: Tensor | None = None,
    label_weights: Tensor | None = None,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Log masses per temperature [n, G], largest z [n] and the gradient [n, V]."""
    n, vocabulary = block.shape
    log_masses = [torch.full((n, num_groups), -inf, dtype=torch.float64) for _ in temperatures]
    largest, gradient = torch.full((n,), -inf, dtype=torch.float64), torch.zeros(n, vocabulary, dtype=torch.float64)
    for i in range(n):
        visible = [j for j in range(vocabulary) if block[i, j] != -inf]
        raw = block[i, visible].detach().cpu().double().requires_grad_()
        z = transform.scale * raw
        if transform.softcap is not None:
            z = transform.softcap * torch.tanh(z / transform.softcap)
        if visible:
            largest[i] = z.detach().max()
        objective = 0 * raw.sum()
        for t, temperature in enumerate(temperatures):
            for g in range(num_groups):
                members = [v for v, j in enumerate(visible) if groups is None or groups[j] == g]
                if not members:
                    continue
                log_mass = torch.logsumexp(z[members] / temperature, 0)
                log_masses[t][i, g] = log_mass.detach()
                if weights is not None and (weight := weights[t]) is not None:
                    objective = objective + temperature * weight[i, g].cpu().double() * log_mass
        if labels is not None and label_weights is not None and labels[i] >= 0:
            objective = objective - label_weights[i].cpu().double() * z[visible.index(int(labels[i]))]
        (gradient[i, visible],) = torch.autograd.grad(objective, raw)
    return log_masses, largest, gradient


def random_block(n: int, vocabulary: int, dtype: torch.dtype, seed: int, hidden: float = 0.1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(n, vocabulary, generator=generator, dtype=torch.float64) * 6
    return block.masked_fill(torch.rand(n, vocabulary, generator=generator) < hidden, -inf).to(dtype).to(DEVICE)


def assert_agrees(
    kernels: ModuleType,
    block: Tensor,
    transform: LogitTransform = PLAIN,
    temperatures: tuple[float, ...] = (1.0,),
    groups: Tensor | None = None,
    num_groups: int = 1,
    weighted: tuple[bool, ...] = (True, True),
    labelled: bool = True,
) -> None:
    """Both launches agree with the reference, and the entries' gradient is exactly 0."""
    n, vocabulary = block.shape
    generator = torch.Generator().manual_seed(5)
    # D of k = 2 entries and the tail: the weights that the kernels get are slices of it.
    D = torch.randn(2, n, 2 + num_groups, generator=generator, dtype=torch.float64).to(DEVICE)
    D = D if block.dtype == torch.float64 else D.float()
    weights = [d[:, 2:] if w else None for d, w in zip(D, weighted, strict=True)][: len(temperatures)]
    labels = label_weights = None
    if labelled:
        guesses = torch.randint(vocabulary, (n,), generator=generator).tolist()
        labels = torch.tensor([j if block[i, j] != -inf else -1 for i, j in enumerate(guesses)]).to(DEVICE)
        label_weights = torch.rand(n, generator=generator).to(D)
    log_masses, largest, gradient = reference(
        block, transform, temperatures, groups, num_groups, weights, labels, label_weights
    )
    hidden = block == -inf

    tail = kernels.TritonTail(block, transform, temperatures, groups, num_groups)
    exact = block.dtype == torch.float64
    rtol, atol = (1e-12, 1e-12) if exact else (2e-6, 1e-5)
    for received, expected in zip(tail.log_masses, log_masses, strict=True):
        assert received.dtype == (torch.float64 if exact else torch.float32)
        torch.testing.assert_close(received.cpu().double(), expected, rtol=rtol, atol=atol)
    torch.testing.assert_close(tail.largest.cpu().double(), largest, rtol=rtol, atol=atol)

    tail.write_gradient_(weights, labels, label_weights)
    bfloat16 = 2**-7 if INTERPRETED else 2**-8  # the interpreter cuts bits off, see the compiled kernel's test
    rounding = {torch.float64: 1e-11, torch.float32: 3e-4, torch.bfloat16: bfloat16, torch.float16: 2**-10}[block.dtype]
    torch.testing.assert_close(block.cpu().double(), gradient, rtol=rounding, atol=1e-12 if exact else 2e-6)
    assert (block[hidden] == 0).all()


@runs_kernels
@every_pair(dtype=DTYPES, num_groups=[1, 3, 32], temperatures=[(1.0,), (1.0, 2.0), (1.0, 0.3)])
def test_masses_and_gradient_agree_with_the_reference_in_every_dtype(
    kernels: ModuleType, dtype: torch.dtype, num_groups: int, temperatures: tuple[float, ...]
) -> None:
    # The last group has no token at all.
    groups = None if num_groups == 1 else torch.arange(101).to(DEVICE) * 7 % (num_groups - 1)
    assert_agrees(kernels, random_block(2, 101, dtype, 0), PLAIN, temperatures, groups, num_groups)


@runs_kernels
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("num_groups", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scale_and_softcap_belong_to_masses_and_gradient(
    kernels: ModuleType, transform: LogitTransform, num_groups: int, dtype: torch.dtype
) -> None:
    groups = None if num_groups == 1 else torch.arange(70).to(DEVICE) % num_groups
    assert_agrees(kernels, random_block(3, 70, dtype, 1), transform, (1.0, 2.0), groups, num_groups)


@runs_kernels
@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(1, 4),
    vocabulary=st.integers(1, 140),
    num_groups=st.sampled_from([None, 1, 2, 5, 32]),
    hidden=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    temperature=st.sampled_from([None, 0.5, 3.0]),
    seed=st.integers(0, 99),
)
def test_any_shape_agrees_with_the_reference(
    kernels: ModuleType,
    n: int,
    vocabulary: int,
    num_groups: int | None,
    hidden: float,
    temperature: float | None,
    seed: int,
) -> None:
    temperatures = (1.0,) if temperature is None else (1.0, temperature)
    groups = None
    if num_groups is not None:
        groups = torch.randint(num_groups, (vocabulary,), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    block = random_block(n, vocabulary, torch.float32, seed, hidden)
    assert_agrees(kernels, block, PLAIN, temperatures, groups, num_groups or 1)


@runs_kernels
@pytest.mark.parametrize("weighted", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("labelled", [True, False])
def test_a_temperature_without_weights_contributes_nothing(
    kernels: ModuleType, weighted: tuple[bool, bool], labelled: bool
) -> None:
    block = random_block(2, 40, torch.float32, 2)
    assert_agrees(kernels, block, PLAIN, (1.0, 2.0), weighted=weighted, labelled=labelled)


@runs_kernels
@pytest.mark.parametrize("num_groups", [1, 3])
def test_a_strided_block_leaves_the_columns_beside_it_alone(kernels: ModuleType, num_groups: int) -> None:
    around = random_block(4, 90, torch.bfloat16, 3)
    before = around.clone()
    groups = None if num_groups == 1 else (torch.arange(71) % num_groups).to(DEVICE)
    assert_agrees(kernels, around[::2, 5:76], PLAIN, (1.0,), groups, num_groups)
    outside = torch.ones_like(around, dtype=torch.bool)
    outside[::2, 5:76] = False
    assert torch.equal(around[outside], before[outside])


@runs_kernels
@pytest.mark.parametrize("groups", [None, [0, 1, 0, 1, 0]])
def test_rows_beyond_two_billion_elements_are_reached(kernels: ModuleType, groups: list[int] | None) -> None:
    memory = torch.empty(2**31 + 5, dtype=torch.bfloat16, device=DEVICE)  # never touched but for the three rows
    block = memory.as_strided((3, 5), (2**30, 1))
    block.copy_(random_block(3, 5, torch.bfloat16, 10))
    tail_groups = None if groups is None else torch.tensor(groups).to(DEVICE)
    assert_agrees(kernels, block, PLAIN, (1.0,), tail_groups, 1 if groups is None else 2)


@runs_kernels
@pytest.mark.parametrize("temperatures", [(1.0, 2.0), (1.0, 0.05)], ids=str)
@pytest.mark.parametrize("order", [1, -1])
def test_groups_hundreds_of_nats_apart_each_keep_their_precision(
    kernels: ModuleType, temperatures: tuple[float, ...], order: int
) -> None:
    groups = torch.arange(130) % 4
    block = torch.randn(2, 130, generator=torch.Generator().manual_seed(4))
    block += torch.tensor([0.0, -200.0, -450.0, 90.0])[groups] + order * torch.arange(130) * 1.5
    assert_agrees(kernels, block.clone().to(DEVICE), PLAIN, temperatures, groups.to(DEVICE), 4)
    assert_agrees(kernels, block.to(DEVICE), PLAIN, temperatures)


@runs_kernels
@pytest.mark.parametrize("groups", [None, [0, 1] * 25])
def test_a_row_without_any_tail_has_no_mass_and_no_gradient(kernels: ModuleType, groups: list[int] | None) -> None:
    block = random_block(3, 50, torch.bfloat16, 6)
    block[1] = -inf
    num_groups = 1 if groups is None else 2
    tail_groups = None if groups is None else torch.tensor(groups).to(DEVICE)
    tail = kernels.TritonTail(block, LogitTransform(softcap=30.0), (1.0, 2.0), tail_groups, num_groups)
    assert all((log_mass[1] == -inf).all() for log_mass in tail.log_masses)
    assert tail.largest[1] == -inf
    tail.write_gradient_([torch.ones(3, num_groups).to(DEVICE)] * 2, None, None)
    assert (block[1] == 0).all()
    assert block[0].any() and block[2].any()


@runs_kernels
@pytest.mark.parametrize("value", [nan, inf])
@pytest.mark.parametrize("column", [0, 37, 49])
@pytest.mark.parametrize("num_groups", [1, 3])
def test_a_broken_logit_reaches_the_mass_of_its_group_and_no_other(
    kernels: ModuleType, value: float, column: int, num_groups: int
) -> None:
    groups = torch.arange(50) % num_groups
    block = random_block(2, 50, torch.float32, 7)
    tail_groups = None if num_groups == 1 else groups.to(DEVICE)
    sound = [x.clone() for x in kernels.TritonTail(block, PLAIN, (1.0, 2.0), tail_groups, num_groups).log_masses]
    block[1, column] = value
    for before, after in zip(
        sound, kernels.TritonTail(block, PLAIN, (1.0, 2.0), tail_groups, num_groups).log_masses, strict=True
    ):
        broken = torch.zeros_like(after, dtype=torch.bool)
        broken[1, groups[column]] = True
        assert (after[broken].isnan() | (after[broken] == inf)).all()
        torch.testing.assert_close(after[~broken], before[~broken], rtol=1e-6, atol=1e-6)


@runs_kernels
@pytest.mark.parametrize("groups", [None, [0] * 40])
def test_the_lowest_finite_logit_is_not_taken_for_a_hidden_one(kernels: ModuleType, groups: list[int] | None) -> None:
    block = torch.full((1, 40), torch.finfo(torch.float32).min).to(DEVICE)
    tail_groups = None if groups is None else torch.tensor(groups).to(DEVICE)
    tail = kernels.TritonTail(block, PLAIN, (1.0,), tail_groups, 1)
    assert tail.largest.item() == tail.log_masses[0].item() == torch.finfo(torch.float32).min
    tail.write_gradient_([torch.ones(1, 1).to(DEVICE)], None, None)
    assert (block == 1).all()


@runs_kernels
def test_a_saturated_softcap_gives_finite_masses_and_no_gradient(kernels: ModuleType) -> None:
    block = torch.tensor([[1e4, -1e4, 1e30, -1e30]]).to(DEVICE)
    tail = kernels.TritonTail(block, LogitTransform(softcap=30.0), (1.0,), None, 1)
    assert tail.log_masses[0].item() == pytest.approx(30 + torch.tensor(2.0).log().item(), rel=1e-6)
    tail.write_gradient_([torch.ones(1, 1).to(DEVICE)], None, None)
    assert (block == 0).all()


@runs_kernels
@pytest.mark.parametrize("shape", [(0, 7), (3, 0)])
def test_an_empty_block_has_no_mass(kernels: ModuleType, shape: tuple[int, int]) -> None:
    tail = kernels.TritonTail(torch.empty(shape).to(DEVICE), PLAIN, (1.0, 2.0), None, 1)
    tail.write_gradient_([None, None], None, None)
    assert [tuple(x.shape) for x in tail.log_masses] == [(shape[0], 1)] * 2
    assert all((x == -inf).all() for x in (*tail.log_masses, tail.largest))


@runs_kernels
@pytest.mark.parametrize("num_groups", [1, 200])
def test_a_whole_vocabulary_at_the_sizes_used_in_training(num_groups: int) -> None:
    from trainer.losses.tail_triton import TritonTail

    block = random_block(2, 20_011, torch.float32, 8, hidden=0.001)
    groups = torch.randint(num_groups, (20_011,), generator=torch.Generator().manual_seed(9))
    z = block.cpu().double()
    expected = torch.stack([z[:, groups == g].logsumexp(1) for g in range(num_groups)], 1)
    tail = TritonTail(block, PLAIN, (1.0,), None if num_groups == 1 else groups.to(DEVICE), num_groups)
    torch.testing.assert_close(tail.log_masses[0].cpu().double(), expected, rtol=1e-6, atol=1e-5)
    tail.write_gradient_([torch.ones(2, num_groups).to(DEVICE)], None, None)
    gradient = (z - expected[:, groups]).exp()
    torch.testing.assert_close(block.cpu().double(), gradient, rtol=1e-4, atol=1e-9)


@pytest.mark.slow
@pytest.mark.skipif(CUDA or INTERPRETED, reason="the kernels run here")
def test_the_kernels_and_the_losses_on_them_pass_in_the_interpreter() -> None:
    files = [
        str(Path(__file__).with_name(f"test_{name}.py"))
        for name in ("kernels", "low_rank_kernels", "loss_paths", "fused")
    ]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""}
    result = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


# The interpreter takes what the compiler refuses, and the compiler needs no GPU.


def launches(
    block: Tensor, softcap: float | None, temperatures: tuple[float, ...], num_groups: int | None
) -> list[Launch]:
    """Each launch for a block."""
    from trainer.losses import tail_triton as kernels

    with recorded(kernels, "_read_kernel", "_read_groups_kernel", "_write_kernel") as made:
        groups = None if num_groups is None else torch.zeros(block.shape[1], dtype=torch.int64)
        transform = LogitTransform(softcap=softcap)
        tail = kernels.TritonTail(block, transform, temperatures, groups, num_groups or 1)
        weights: list[Tensor | None] = [torch.zeros(len(block), num_groups or 1) for _ in temperatures]
        tail.write_gradient_(weights, torch.zeros(len(block), dtype=torch.int64), torch.zeros(len(block)))
    return made


@pytest.mark.slow
@compiles
@pytest.mark.usefixtures("_compiler")
@every_pair(
    dtype=[torch.bfloat16, torch.float32], num_groups=[None, 3, 32, 256], options=[((1.0,), None), ((1.0, 2.0), 30.0)]
)
def test_every_launch_compiles(
    dtype: torch.dtype, num_groups: int | None, options: tuple[tuple[float, ...], float | None]
) -> None:
    temperatures, softcap = options
    recorded = launches(torch.empty(2, 151_936, dtype=dtype), softcap, temperatures, num_groups)
    assert len(recorded) == 2
    assemblies = [compiled(launch) for launch in recorded]
    assert all(assembly["cubin"] for assembly in assemblies)
    assert ("cvt.rn.bf16" in assemblies[1]["ptx"]) == (dtype == torch.bfloat16)  # the gradient, rounded to nearest


@pytest.mark.slow
@compiles
@pytest.mark.usefixtures("_compiler")
@every_pair(
    block=[torch.empty(2, 50_257, dtype=torch.float16), torch.empty(2, 1), torch.empty(1, 77, dtype=torch.float64)],
    capability=[80, 100],
    num_groups=[None, 5],
)
def test_unusual_blocks_compile_for_older_and_newer_devices(
    block: Tensor, capability: int, num_groups: int | None
) -> None:
    for launch in launches(block, None, (1.0, 2.0), num_groups):
        assert compiled(launch, capability)["cubin"]

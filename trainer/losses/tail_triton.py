"""The tail of a block of raw logits on a GPU: its log masses, and the gradient written over the block.

Two launches. The first reads the block [n, V] once; the second, which needs the gradient in the log masses, reads it
again and overwrites it. What lies between is a few numbers per row, [n, k + G], and stays in torch, so that every
divergence, a user's own too, runs with these kernels. In all: two reads and one write of the block, and no other
tensor of its size. The formulae are those of tail_torch. Needs Triton 3.4, whose `gather` is the first to compile here.
"""
# mypy: allow-untyped-defs

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.losses.transform import LogitTransform

# Older releases have no tl.gather, or fail to compile its use here.
SUPPORTED = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 4)

# Sizes for blocks of some hundred rows of 150 000 columns, that is one program or two of a read kernel at a time per
# multiprocessor: 16 warps, with two more loads under way, keep HBM busy; what a thread holds stays in its registers.
READ_COLUMNS = 8192
WRITE_COLUMNS = 4096
TILE_ELEMENTS = 16384  # with groups: sums held by a program, groups × columns × temperatures
# How far (nats, at either temperature) a logit may exceed its group's reference before the reference is raised: far
# from what overflows float32 in a sum over any vocabulary, and seldom exceeded once a group has been met.
SLACK_NATS = 20.0
# A maximum starts here rather than at −inf, so that −inf − (−inf) never arises.
FLOAT32_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
FLOAT64_LOWEST = tl.constexpr(torch.finfo(torch.float64).min)


class TritonTail:
    """A TailBackend on a GPU. Rows of the block may be strided. Arithmetic is in the dtype of the results."""

    def __init__(
        self,
        block: Tensor,
        transform: LogitTransform,
        temperatures: tuple[float, ...],
        tail_groups: Tensor | None,
        num_groups: int,
    ) -> None:
        (n, vocabulary), dtype = block.shape, torch.float64 if block.dtype == torch.float64 else torch.float32
        tail_groups = None if tail_groups is None else tail_groups.to(torch.int32)
        self._block, self._tail_groups, self._num_groups = block, tail_groups, num_groups
        self.log_masses: list[Tensor] = [block.new_empty(n, num_groups, dtype=dtype) for _ in temperatures]
        self.largest = block.new_empty(n, dtype=dtype)
        tempered = temperatures[1] if len(temperatures) == 2 else None
        self._settings = {"SCALE": transform.scale, "SOFTCAP": transform.softcap, "TEMPERATURE": tempered}
        if not block.numel():
            for output in (*self.log_masses, self.largest):
                output.fill_(-torch.inf)
            return
        arguments = (block, block.stride(0), vocabulary, self.log_masses[0], self.log_masses[-1], self.largest)
        with torch.cuda.device_of(block):
            if tail_groups is None:
                _read_kernel[(n,)](*arguments, **self._settings, COLUMNS=READ_COLUMNS, num_warps=16)
            else:
                groups = triton.next_power_of_2(num_groups)
                columns = min(1024, max(16, TILE_ELEMENTS // (groups * len(temperatures))))
                tiles = {"SLACK": SLACK_NATS * min(temperatures), "GROUPS": groups, "COLUMNS": columns}
                _read_groups_kernel[(n,)](*arguments, tail_groups, num_groups, **self._settings, **tiles, num_warps=16)

    def write_gradient_(
        self, weights: Sequence[Tensor | None], labels: Tensor | None, label_weights: Tensor | None
    ) -> None:
        """See TailBackend; the gradient is rounded once, and exactly 0 at the entries."""
        if not self._block.numel():
            return
        n, vocabulary = self._block.shape
        arguments = [self._block, self._block.stride(0), vocabulary, self._tail_groups, self._num_groups]
        for log_mass, weight in ((self.log_masses[0], weights[0]), (self.log_masses[-1], weights[-1])):
            if weight is not None and weight.stride(1) != 1:  # a slice of [n, k + G] is taken as it is
                weight = weight.contiguous()
            arguments += [log_mass, weight, 0 if weight is None else weight.stride(0)]
        arguments += [None if x is None else x.contiguous() for x in (labels, label_weights)]
        with torch.cuda.device_of(self._block):
            grid = (n, triton.cdiv(vocabulary, WRITE_COLUMNS))
            _write_kernel[grid](*arguments, **self._settings, COLUMNS=WRITE_COLUMNS, num_warps=8)


@triton.jit
def load_logits(block_row, columns, V, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, dtype: tl.constexpr):
    """Load z and dz/draw; −inf for a hidden token and beyond V. tanh x = sign(x)·(1 − e)/(1 + e) with e = exp(−2|x|)."""
    raw = tl.load(block_row + columns, mask=columns < V, other=float("-inf")).to(dtype)
    z = raw * SCALE
    slope = tl.full(raw.shape, SCALE, dtype)
    if SOFTCAP is not None:
        e = tl.exp(-2 / SOFTCAP * tl.abs(z))
        size = SOFTCAP * (1 - e) / (1 + e)
        z = tl.where(z < 0, -size, size)
        slope *= 4 * e / ((1 + e) * (1 + e))
    return tl.where(raw == float("-inf"), float("-inf"), z), slope


@triton.jit
def _read_kernel(
    block, stride, V, log_mass, tempered_log_mass, largest,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, TEMPERATURE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Read one row: every lane keeps its own online maximum and sums, which meet only after the last column."""
    row = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = largest.dtype.element_ty
    maximum = tl.full([COLUMNS], FLOAT32_LOWEST if dtype == tl.float32 else FLOAT64_LOWEST, dtype)
    total = tl.full([COLUMNS], 0, dtype)
    tempered_total = tl.full([COLUMNS], 0, dtype)
    for start in tl.range(0, V, COLUMNS, num_stages=3):
        columns = start + tl.arange(0, COLUMNS)
        z, _ = load_logits(block + row * stride, columns, V, SCALE, SOFTCAP, dtype)
        # One exponential serves both cases: it rescales the sum if z is the new maximum, else it is z's term. A NaN is
        # no maximum, so it ends in the sum.
        higher = z > maximum
        distance = tl.abs(z - maximum)
        e = tl.exp(-distance)
        total = tl.where(higher, total * e + 1, total + e)
        if TEMPERATURE is not None:
            e = tl.exp(-distance * (1 / TEMPERATURE))
            tempered_total = tl.where(higher, tempered_total * e + 1, tempered_total + e)
        maximum = tl.where(higher, z, maximum)
    top = tl.max(maximum, 0)
    mass = tl.sum(total * tl.exp(maximum - top), 0)
    tl.store(log_mass + row, top + tl.log(mass))
    tl.store(largest + row, tl.where(mass == 0, float("-inf"), top))
    if TEMPERATURE is not None:
        tempered_mass = tl.sum(tempered_total * tl.exp((maximum - top) * (1 / TEMPERATURE)), 0)
        tl.store(tempered_log_mass + row, top * (1 / TEMPERATURE) + tl.log(tempered_mass))


@triton.jit
def _read_groups_kernel(
    block, stride, V, log_mass, tempered_log_mass, largest, tail_groups, num_groups,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, TEMPERATURE: tl.constexpr,
    SLACK: tl.constexpr, GROUPS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Read one row: sums relative to a reference per group, its largest logit when last raised, within SLACK of it."""
    row = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = largest.dtype.element_ty
    LOWEST: tl.constexpr = FLOAT32_LOWEST if dtype == tl.float32 else FLOAT64_LOWEST
    groups = tl.arange(0, GROUPS)
    top = tl.full([COLUMNS], float("-inf"), dtype)
    reference = tl.full([GROUPS], LOWEST, dtype)
    total = tl.full([GROUPS, COLUMNS], 0, dtype)
    tempered_total = tl.full([GROUPS, COLUMNS], 0, dtype)
    for start in tl.range(0, V, COLUMNS, num_stages=3):
        columns = start + tl.arange(0, COLUMNS)
        z, _ = load_logits(block + row * stride, columns, V, SCALE, SOFTCAP, dtype)
        group = tl.load(tail_groups + columns, mask=columns < V, other=0).to(tl.int32)
        top = tl.where(z > top, z, top)
        member = group[None, :] == groups[:, None]
        excess = z - tl.gather(reference, group, 0)
        if tl.max((excess > SLACK).to(tl.int32), 0) > 0:
            raised = tl.maximum(reference, tl.max(tl.where(member, z[None, :], LOWEST), 1))
            total *= tl.exp(reference - raised)[:, None]
            if TEMPERATURE is not None:
                tempered_total *= tl.exp((reference - raised) * (1 / TEMPERATURE))[:, None]
            reference = raised
            excess = z - tl.gather(reference, group, 0)
        total += tl.where(member, tl.exp(excess)[None, :], 0.0)
        if TEMPERATURE is not None:
            tempered_total += tl.where(member, tl.exp(excess * (1 / TEMPERATURE))[None, :], 0.0)
    output, exists = row * num_groups + groups, groups < num_groups
    tl.store(log_mass + output, reference + tl.log(tl.sum(total, 1)), mask=exists)
    tl.store(largest + row, tl.max(top, 0))
    if TEMPERATURE is not None:
        tempered = reference * (1 / TEMPERATURE) + tl.log(tl.sum(tempered_total, 1))
        tl.store(tempered_log_mass + output, tempered, mask=exists)


@triton.jit
def _write_kernel(
    block, stride, V, tail_groups, num_groups,
    log_mass, weight, weight_stride, tempered_log_mass, tempered_weight, tempered_weight_stride, labels, label_weights,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, TEMPERATURE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write some columns of one row; rows are the grid's first axis, which may exceed 65 535."""
    row = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = log_mass.dtype.element_ty
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    z, slope = load_logits(block + row * stride, columns, V, SCALE, SOFTCAP, dtype)
    group = 0 if tail_groups is None else tl.load(tail_groups + columns, mask=columns < V, other=0).to(tl.int32)
    grad = tl.full([COLUMNS], 0, dtype)
    if weight is not None:
        part = tl.exp(z - tl.load(log_mass + row * num_groups + group))
        grad += part * tl.load(weight + row * weight_stride + group).to(dtype)
    if TEMPERATURE is not None and tempered_weight is not None:
        part = tl.exp(z * (1 / TEMPERATURE) - tl.load(tempered_log_mass + row * num_groups + group))
        grad += part * tl.load(tempered_weight + row * tempered_weight_stride + group).to(dtype)
    if labels is not None:
        grad -= tl.where(columns == tl.load(labels + row), tl.load(label_weights + row).to(dtype), 0.0)
    # A hidden token has no gradient, and in a group without any other −inf − (−inf) made a NaN above.
    grad = tl.where(z == float("-inf"), 0.0, grad * slope)
    tl.store(block + row * stride + columns, grad.to(block.dtype.element_ty), mask=columns < V)

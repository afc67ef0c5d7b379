"""The low-rank tail of a block of raw logits on a GPU: the terms of low_rank.py, and the gradient written over the block.

The teacher's logits are never held: every launch rebuilds them, tile by tile, in registers. The first launch reads block and
basis for what normalises both tails, and for FKL and RKL at T = 1. The second, which FKL, RKL and Jeffreys do not need there,
sums the divergence over the tail. The third writes the gradient. The entries, and all numbers of a row, stay in torch. In all
that is two or three reads and one write of the block, and no other tensor of its size.
"""
# mypy: allow-untyped-defs

from dataclasses import dataclass
from math import inf
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.losses.blocks import BlockTerms, TermWeights
from trainer.losses.coarse import Coarse
from trainer.losses.divergences import HEAD_MASS, akl_head
from trainer.losses.registry import evaluate_divergence, options_of
from trainer.losses.settings import LossSettings
from trainer.losses.tail import LOG_TAIL_FLOOR
from trainer.losses.tail_triton import FLOAT32_LOWEST, load_logits
from trainer.losses.targets import TailBasis, TeacherTargets, mask_tokens_
from trainer.losses.temperature import tempered, with_rebuilt_tail
from trainer.losses.transform import LogitTransform

# A tile's rows share what is read of the basis, 256 bytes a column at a rank of 64: with 32 rows 8 bytes an element, out of the
# L2 cache, where the logits are 2 to 4. From sm_90 on the compiler has registers for 64 rows; before, it spills.
TILE_ROWS, TILE_ROWS_HOPPER = 32, 64
TILE_COLUMNS = 64
# Programs of a launch that reads: several for each multiprocessor of a large GPU, whatever the number of rows.
PROGRAMS = 1024
MIXED = ("fkl", "rkl", "jeffreys", "akl")
"""Divergences that are w·FKL + v·RKL."""
FORMULAS = (*MIXED, "todi", "jsd", "sfkl", "srkl", "tvd")
"""Divergences that the kernels know."""


def tile_rows(device: torch.device) -> int:
    """Return the rows of a tile on a device."""
    is_large = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return TILE_ROWS_HOPPER if is_large else TILE_ROWS


def has_kernels(raw: Tensor, targets: TeacherTargets, loss: str) -> bool:
    """Tell whether the kernels know this case."""
    basis = targets.tail_basis
    has_rank = basis is not None and basis.directions.shape[1] > 0
    return raw.numel() > 0 and has_rank and loss in FORMULAS and raw.dtype != torch.float64


@dataclass(frozen=True)
class TailGradient:
    """What the gradient in the tail follows from, beside the normalisers.

    kd_weights: of the divergence, over T, [n].  slopes: the sum of its slopes over all tokens, [n].  mixture: w and v of a
    divergence of MIXED, [2, n].
    """

    kd_weights: Tensor | None
    slopes: Tensor
    mixture: Tensor | None


class LowRankTail:
    """The tail of a block of raw logits [n, V], whose entries hold −inf, and the teacher that is rebuilt there.

    All numbers are float32. Those of a pair are the student's and the teacher's, −inf where the tail has no token.

    Attributes:
        largest: the largest logit, a pair of [n].
        log_masses: the logsumexp of the logits, a pair of [n].
        tempered: likewise, of logits divided by T.
        gaps: under the student's tail the mean of its logits less the teacher's, and under the teacher's tail of its logits
            less the student's; 0 without a token.
    """

    def __init__(
        self, raw: Tensor, coefficients: Tensor, basis: TailBasis, settings: LossSettings, transform: LogitTransform
    ) -> None:
        """Read the block. coefficients: z less ρ times the student's, [n, R]."""
        (n, vocabulary), rank, temperature = raw.shape, coefficients.shape[1], settings.temperature
        rows = tile_rows(raw.device)
        teacher = [each.contiguous() for each in (coefficients, basis.directions, basis.offset)]
        self._raw = raw
        self._arguments = (raw, raw.stride(0), n, vocabulary, *teacher, rank, float(settings.residual_weight))
        self._options: dict[str, Any] = {
            "SCALE": transform.scale,
            "SOFTCAP": transform.softcap,
            "TEMPERATURE": temperature,
            "RANK": max(16, triton.next_power_of_2(rank)),
            "ROWS": rows,
            "COLUMNS": TILE_COLUMNS,
            "num_warps": 8,
        }
        self._loss = {"LOSS": settings.loss, "OPTION": _option(settings)}
        row_tiles, tiles = triton.cdiv(n, rows), triton.cdiv(vocabulary, TILE_COLUMNS)
        self._tiles = triton.cdiv(tiles, max(1, PROGRAMS // row_tiles))  # of a program, one after the other
        self._grid = (row_tiles, triton.cdiv(tiles, self._tiles))
        found = raw.new_empty(2, 4, self._grid[1], n, dtype=torch.float32)
        with torch.cuda.device_of(raw):
            _read_kernel[self._grid](*self._arguments, found, self._tiles, **self._options)
        tops, totals, gaps, tempered_totals = found.unbind(1)  # [2, programs, n]
        top = tops.amax(1, keepdim=True)
        shares = (tops - top).exp()
        total = (totals * shares).sum(1)
        empty, top = total == 0, top[:, 0]
        self.largest = top.masked_fill(empty, -inf)
        self.log_masses = top + total.log()
        self.gaps = ((gaps * shares).sum(1) / total).masked_fill(empty, 0.0)
        self.tempered = top / temperature + (tempered_totals * shares ** (1 / temperature)).sum(1).log()

    def sums(self, normalisers: Tensor) -> Tensor:
        """Return three sums over the tail at T, [3, n]: of a divergence of MIXED FKL, RKL and |p − q|, else value and slope."""
        found = self._raw.new_empty(3, self._grid[1], len(self._raw), dtype=torch.float32)
        with torch.cuda.device_of(self._raw):
            _sum_kernel[self._grid](
                *self._arguments, normalisers.contiguous(), found, self._tiles, **self._options, **self._loss
            )
        return found.sum(1)

    def write_gradient_(
        self,
        normalisers: Tensor,
        log_normaliser: Tensor,
        divergence: TailGradient,
        labels: Tensor | None,
        ce_weights: Tensor | None,
    ) -> None:
        """Overwrite the block with its gradient, exactly 0 at the entries; once only.

        normalisers: of student and teacher at T, [2, n].  log_normaliser: the student's at T = 1, [n].  labels: int64 [n], −1 for
        one outside the tail.
        """
        grid = (self._grid[0], triton.cdiv(self._raw.shape[1], TILE_COLUMNS))
        given = [divergence.kd_weights, divergence.slopes, divergence.mixture, labels, ce_weights]
        with torch.cuda.device_of(self._raw):
            _write_kernel[grid](
                *self._arguments,
                normalisers.contiguous(),
                log_normaliser.contiguous(),
                *(None if each is None else each.contiguous() for each in given),
                **self._options,
                **self._loss,
            )


class _Pair:
    """Teacher and student at a temperature, over the entries and over the rest of the vocabulary together.

    normalisers: the logarithms of what the exponentials of student's and teacher's tail logits are divided by, [2, n].
    entries: both over the entries.  p, q: the masses of the rest, [n].
    """

    def __init__(self, log_p: Tensor, tail: Tensor, entries: Tensor, stored: Tensor, log_masses: Tensor) -> None:
        """log_p [n, k], tail [n]: the teacher.  entries: the student's logits, [n, k].  log_masses: both tails', [2, n]."""
        self._empty = log_masses[1] == -inf
        tail = tail.clamp_min(LOG_TAIL_FLOOR)
        log_normaliser = torch.logaddexp(entries.logsumexp(1), log_masses[0])
        self.normalisers = torch.stack([log_normaliser, log_masses[1] - tail])
        self.entries = Coarse(log_p, entries - log_normaliser[:, None], stored, log_p.shape[1])
        self.p, self.q = tail.exp().masked_fill(self._empty, 0.0), (log_masses[0] - log_normaliser).exp()

    def kl_of_tail(self, gaps: Tensor) -> Tensor:
        """Return the tail's part of FKL and RKL, [2, n], from the gaps of a LowRankTail."""
        shift = (self.normalisers[0] - self.normalisers[1]).masked_fill(self._empty, 0.0)
        return torch.stack([self.p * (gaps[1] + shift), self.q * (gaps[0] - shift)])


def low_rank_block(
    raw: Tensor,
    coefficients: Tensor,
    targets: TeacherTargets,
    labels: Tensor | None,
    settings: LossSettings,
    transform: LogitTransform,
    weights: TermWeights | None,
) -> BlockTerms | None:
    """Compute the terms of `low_rank.low_rank_block`, but for the probes'.

    coefficients: z less ρ times the student's, [n, R] float32. Returns None, with `raw` as it was, if a token of AKL's head
    may be none of the entries.
    """
    temperature, ids, basis = settings.temperature, targets.token_ids, targets.tail_basis
    assert basis is not None
    stored, columns = ids >= 0, ids.clamp_min(0)
    raw_entries = raw.gather(1, columns)
    entries = transform.apply(raw_entries.float()).masked_fill(~stored, -inf)
    label_logits = None if labels is None else transform.apply(raw.gather(1, labels[:, None])[:, 0].float())
    mask_tokens_(raw, ids)
    tail = LowRankTail(raw, coefficients, basis, settings, transform)

    at_one = pair = _Pair(targets.logprobs, targets.tail_logprob, entries, stored, tail.log_masses)
    kl_at_one = at_one.kl_of_tail(tail.gaps)
    if temperature != 1.0:
        targets = with_rebuilt_tail(targets, tail.log_masses[1], tail.tempered[1], temperature)
        log_p, mass, _ = tempered(targets, temperature)
        pair = _Pair(log_p, mass, entries / temperature, stored, tail.tempered)
    if settings.loss == "akl" and not _head_is_of_entries(pair, tail.largest[1] / temperature):
        raw.scatter_(1, columns, raw_entries)
        return None

    mixture, (p, q, r) = None, (pair.entries.p, pair.entries.q, pair.entries.log_ratio)
    if settings.loss in MIXED:
        fkl, rkl, gap = (*kl_at_one, None) if settings.loss != "akl" and pair is at_one else tail.sums(pair.normalisers)
        mixture = _mixture(settings, p, q, gap)
        of_fkl, of_rkl = mixture
        kd = of_fkl * (pair.entries.fkl + fkl) + of_rkl * (pair.entries.rkl + rkl)
        slope = of_rkl[:, None] * q * (1 + r) - of_fkl[:, None] * p
        slopes = slope.sum(1) + of_rkl * (pair.q + rkl) - of_fkl * pair.p
    else:
        of_entries, slope = evaluate_divergence(settings.loss, pair.entries, settings.loss_args)
        of_tail, slopes_of_tail, _ = tail.sums(pair.normalisers)
        kd, slopes = of_entries + of_tail, slope.sum(1) + slopes_of_tail

    if weights is not None:
        kd_weights, ce_weights = (None if each is None else each.float() for each in weights)
        kd_weights = None if kd_weights is None else kd_weights / temperature
        grad = torch.zeros_like(entries)
        if kd_weights is not None:
            grad += kd_weights[:, None] * (slope - q * slopes[:, None])
        if labels is not None and ce_weights is not None:
            is_label = ids == labels[:, None]
            grad += ce_weights[:, None] * (at_one.entries.q - is_label.float())
            labels = labels.masked_fill(is_label.any(1), -1)
        of_divergence = TailGradient(kd_weights, slopes, mixture)
        tail.write_gradient_(pair.normalisers, at_one.normalisers[0], of_divergence, labels, ce_weights)
        grad = (grad * transform.slope(entries)).masked_fill(~stored, 0.0)
        raw.scatter_add_(1, columns, grad.to(raw.dtype))
    own_terms = {"fkl": at_one.entries.fkl + kl_at_one[0], "rkl": at_one.entries.rkl + kl_at_one[1]}
    largest = torch.cat([entries, tail.largest[:1].t()], 1).amax(1)
    return BlockTerms(kd, torch.cat([entries, tail.log_masses[:1].t()], 1), largest, label_logits, own_terms)


def _option(settings: LossSettings) -> float:
    """Return the one number that a divergence of FORMULAS may be given, or 0."""
    options = {**options_of(settings.loss), **settings.loss_args}.values()
    return float(next((value for value in options if not isinstance(value, str)), 0.0))


def _mixture(settings: LossSettings, p: Tensor, q: Tensor, gap_of_tail: Tensor | None) -> Tensor:
    """Return the weights of FKL and RKL in a divergence of MIXED, [2, n]. p, q: [n, k], of the entries."""
    if settings.loss != "akl":
        fixed = {"fkl": (1.0, 0.0), "rkl": (0.0, 1.0), "jeffreys": (1.0, 1.0)}[settings.loss]
        return torch.stack([p.new_full((len(p),), weight) for weight in fixed])
    assert gap_of_tail is not None
    sorted_p, order = p.sort(dim=1, descending=True, stable=True)
    gap = (p - q).abs()
    split = {**options_of("akl"), **settings.loss_args}["akl_split"]
    head_gap = (gap.gather(1, order) * akl_head(sorted_p, split)).sum(1)
    of_fkl = head_gap / (gap.sum(1) + gap_of_tail).clamp_min(torch.finfo(gap.dtype).tiny)
    return torch.stack([of_fkl, 1 - of_fkl])


def _head_is_of_entries(pair: _Pair, largest: Tensor) -> bool:
    """Tell whether AKL's head, and the token that crosses its mass, are entries; waits for an accelerator.

    largest: the teacher's largest logit in the tail, at the pair's temperature.
    """
    p = pair.entries.p.sort(dim=1, descending=True).values
    if not p.shape[1]:
        return False
    least = p.masked_fill(~akl_head(p, "todi"), inf).amin(1)
    return bool(((p.sum(1) > HEAD_MASS) & ((largest - pair.normalisers[1]).exp() < least)).all())


@triton.jit
def _tile(
    block, stride, n, V, coefficients, directions, offset, R, residual_weight, rows, columns,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """Give the student's and the teacher's logits and dz/draw of a tile; −inf for a hidden token and outside the block."""
    ends = tl.where(rows < n, V, 0)
    row = block + rows.to(tl.int64) * stride
    s, slope = load_logits(row[:, None], columns[None, :], ends[:, None], SCALE, SOFTCAP, tl.float32)
    ranks = tl.arange(0, RANK)
    z = tl.load(
        coefficients + rows[:, None] * R + ranks[None, :], mask=(rows < n)[:, None] & (ranks < R)[None, :], other=0.0
    )
    u = tl.load(
        directions + columns[:, None].to(tl.int64) * R + ranks[None, :],
        mask=(columns < V)[:, None] & (ranks < R)[None, :],
        other=0.0,
    )
    m = tl.load(offset + columns, mask=columns < V, other=0.0)
    hidden = s == float("-inf")
    t = tl.dot(z, tl.trans(u), input_precision="tf32x3") + (1 - residual_weight) * m[None, :]
    t += residual_weight * tl.where(hidden, 0.0, s)
    return s, tl.where(hidden, float("-inf"), t), slope, hidden


@triton.jit
def _online(maximum, total, gap_total, tempered_total, logits, gap, TEMPERATURE: tl.constexpr):
    """Take a tile into a row's maximum and sums of exp(l − maximum), of these times the gap, and of exp((l − maximum) / T)."""
    top = tl.maximum(maximum, tl.max(logits, 1))
    e = tl.exp(logits - top[:, None])
    kept = tl.exp(maximum - top)
    total = total * kept + tl.sum(e, 1)
    gap_total = gap_total * kept + tl.sum(e * gap, 1)
    if TEMPERATURE == 1:
        return top, total, gap_total, total
    e = tl.exp((logits - top[:, None]) * (1 / TEMPERATURE))
    tempered_total = tempered_total * tl.exp((maximum - top) * (1 / TEMPERATURE)) + tl.sum(e, 1)
    return top, total, gap_total, tempered_total


@triton.jit
def _read_kernel(
    block, stride, n, V, coefficients, directions, offset, R, residual_weight, found, tiles,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, TEMPERATURE: tl.constexpr,
    RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Read some tiles of some rows: maximum, sum, sum of gaps and tempered sum of the student, then of the teacher."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    zero = tl.full([ROWS], 0, tl.float32)
    top_s, total_s, gap_s, tempered_s = zero + FLOAT32_LOWEST, zero, zero, zero
    top_t, total_t, gap_t, tempered_t = zero + FLOAT32_LOWEST, zero, zero, zero
    for tile in tl.range(0, tiles):
        columns = (tl.program_id(1) * tiles + tile) * COLUMNS + tl.arange(0, COLUMNS)
        s, t, _, hidden = _tile(
            block,
            stride,
            n,
            V,
            coefficients,
            directions,
            offset,
            R,
            residual_weight,
            rows,
            columns,
            SCALE,
            SOFTCAP,
            RANK,
        )
        gap = tl.where(hidden, 0.0, s - t)
        top_s, total_s, gap_s, tempered_s = _online(top_s, total_s, gap_s, tempered_s, s, gap, TEMPERATURE)
        top_t, total_t, gap_t, tempered_t = _online(top_t, total_t, gap_t, tempered_t, t, -gap, TEMPERATURE)
    programs = tl.num_programs(1)
    output = found + tl.program_id(1).to(tl.int64) * n + rows
    size = programs * n
    exists = rows < n
    tl.store(output, top_s, mask=exists)
    tl.store(output + size, total_s, mask=exists)
    tl.store(output + 2 * size, gap_s, mask=exists)
    tl.store(output + 3 * size, tempered_s, mask=exists)
    tl.store(output + 4 * size, top_t, mask=exists)
    tl.store(output + 5 * size, total_t, mask=exists)
    tl.store(output + 6 * size, gap_t, mask=exists)
    tl.store(output + 7 * size, tempered_t, mask=exists)


@triton.jit
def _expm1(x):
    """e^x − 1, as exact near 0 as elsewhere."""
    series = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7 * (1 + x / 8)))))))
    return tl.where(tl.abs(x) < 0.5, series, tl.exp(x) - 1)


@triton.jit
def _log1p(x):
    """log(1 + x), as exact near 0 as elsewhere."""
    s = x / (2 + x)
    h = s * s
    series = 2 * s * (1 + h * (1 / 3 + h * (1 / 5 + h * (1 / 7 + h * (1 / 9 + h * (1 / 11 + h / 13))))))
    return tl.where(tl.abs(x) < 0.5, series, tl.log(1 + x))


@triton.jit
def _log_mixture(r, weight: tl.constexpr):
    """log(weight + (1 − weight)·e^r), as `divergences._log_mixture`."""
    if weight == 0:
        return r
    near = _log1p((1 - weight) * _expm1(tl.minimum(tl.maximum(r, -1.0), 1.0)))
    # The larger of the two terms is taken out.
    far = tl.where(r > 0, r + tl.log((1 - weight) + weight * tl.exp(-r)), tl.log(weight + (1 - weight) * tl.exp(r)))
    return tl.where(tl.abs(r) <= 1, near, far)


@triton.jit
def _formula(p, q, r, LOSS: tl.constexpr, OPTION: tl.constexpr):
    """Give the value and the slope of a token, as the function of the same name in divergences.py."""
    if LOSS == "todi":
        of_rkl, of_fkl = 1 / (1 + tl.exp(-OPTION * r)), 1 / (1 + tl.exp(OPTION * r))
        value, slope = (of_rkl * q - of_fkl * p) * r, of_rkl * q * (1 + r) - of_fkl * p
    elif LOSS == "jsd":
        over_p, over_q = _log_mixture(r, OPTION), _log_mixture(-r, 1 - OPTION)
        value, slope = -(OPTION * p * over_p + (1 - OPTION) * q * over_q), -(1 - OPTION) * q * over_q
    elif LOSS == "sfkl":
        over_p = _log_mixture(r, OPTION)
        value, slope = -p * over_p, -(1 - OPTION) * p * tl.exp(r - over_p)
    elif LOSS == "srkl":
        over_q = _log_mixture(-r, OPTION)
        value, slope = -q * over_q, q * ((1 - OPTION) * tl.exp(-r - over_q) - over_q)
    else:
        tl.static_assert(LOSS == "tvd")
        difference = q - p
        value = tl.abs(difference) / 2
        slope = q / 2 * tl.where(difference > 0, 1.0, tl.where(difference < 0, -1.0, 0.0))
    return value, slope


@triton.jit
def _masses(s, t, hidden, normalisers, n, rows, TEMPERATURE: tl.constexpr):
    """Give p, q and log(q/p) at T of a tile's tokens; 0 for a hidden one."""
    exists = rows < n
    log_q = s * (1 / TEMPERATURE) - tl.load(normalisers + rows, mask=exists, other=0.0)[:, None]
    log_p = t * (1 / TEMPERATURE) - tl.load(normalisers + n + rows, mask=exists, other=0.0)[:, None]
    p, q = tl.where(hidden, 0.0, tl.exp(log_p)), tl.where(hidden, 0.0, tl.exp(log_q))
    return p, q, tl.where(hidden, 0.0, log_q - log_p)


@triton.jit
def _sum_kernel(
    block, stride, n, V, coefficients, directions, offset, R, residual_weight, normalisers, found, tiles,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, TEMPERATURE: tl.constexpr,
    RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LOSS: tl.constexpr, OPTION: tl.constexpr,
):  # fmt: skip
    """Sum over some tiles of some rows."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.full([ROWS], 0, tl.float32)
    second = tl.full([ROWS], 0, tl.float32)
    third = tl.full([ROWS], 0, tl.float32)
    for tile in tl.range(0, tiles):
        columns = (tl.program_id(1) * tiles + tile) * COLUMNS + tl.arange(0, COLUMNS)
        s, t, _, hidden = _tile(
            block,
            stride,
            n,
            V,
            coefficients,
            directions,
            offset,
            R,
            residual_weight,
            rows,
            columns,
            SCALE,
            SOFTCAP,
            RANK,
        )
        p, q, r = _masses(s, t, hidden, normalisers, n, rows, TEMPERATURE)
        if (LOSS == "fkl") | (LOSS == "rkl") | (LOSS == "jeffreys") | (LOSS == "akl"):
            first += tl.sum(-p * r, 1)
            second += tl.sum(q * r, 1)
            third += tl.sum(tl.abs(p - q), 1)
        else:
            value, slope = _formula(p, q, r, LOSS, OPTION)
            first += tl.sum(value, 1)
            second += tl.sum(slope, 1)
    output = found + tl.program_id(1).to(tl.int64) * n + rows
    size = tl.num_programs(1) * n
    exists = rows < n
    tl.store(output, first, mask=exists)
    tl.store(output + size, second, mask=exists)
    tl.store(output + 2 * size, third, mask=exists)


@triton.jit
def _write_kernel(
    block, stride, n, V, coefficients, directions, offset, R, residual_weight, normalisers, log_normaliser,
    kd_weights, slopes, mixture, labels, ce_weights,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, TEMPERATURE: tl.constexpr,
    RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LOSS: tl.constexpr, OPTION: tl.constexpr,
):  # fmt: skip
    """Write a tile; rows are the grid's first axis, which may exceed 65 535 programs."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    exists = rows < n
    s, t, slope_of_raw, hidden = _tile(
        block, stride, n, V, coefficients, directions, offset, R, residual_weight, rows, columns, SCALE, SOFTCAP, RANK
    )
    grad = tl.full([ROWS, COLUMNS], 0, tl.float32)
    if kd_weights is not None:
        p, q, r = _masses(s, t, hidden, normalisers, n, rows, TEMPERATURE)
        if mixture is not None:
            of_fkl = tl.load(mixture + rows, mask=exists, other=0.0)[:, None]
            of_rkl = tl.load(mixture + n + rows, mask=exists, other=0.0)[:, None]
            slope = of_rkl * q * (1 + r) - of_fkl * p
        else:
            _, slope = _formula(p, q, r, LOSS, OPTION)
        total = tl.load(slopes + rows, mask=exists, other=0.0)[:, None]
        grad += tl.load(kd_weights + rows, mask=exists, other=0.0)[:, None] * (slope - q * total)
    if ce_weights is not None:
        weight = tl.load(ce_weights + rows, mask=exists, other=0.0)[:, None]
        q = tl.exp(s - tl.load(log_normaliser + rows, mask=exists, other=0.0)[:, None])
        label = tl.load(labels + rows, mask=exists, other=-1)[:, None]
        grad += weight * (q - tl.where(columns[None, :] == label, 1.0, 0.0))
    grad = tl.where(hidden, 0.0, grad * slope_of_raw)
    output = block + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(output, grad.to(block.dtype.element_ty), mask=exists[:, None] & (columns < V)[None, :])

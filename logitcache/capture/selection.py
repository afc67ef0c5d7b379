"""The choice of what is stored of logits, on their device: entries, tail mass, and all parts of the tail.

Every pass over [N, V] counts here, so positions are taken in blocks: on a CPU as many as stay in its cache between passes,
on a GPU as many as fill it while scratch memory stays independent of N.
"""

from __future__ import annotations

import hashlib
from math import isqrt

import numpy as np
import torch
from torch import Tensor

from logitcache.capture.projection import DeviceBasis
from logitcache.capture.settings import CaptureSettings
from logitcache.capture.wire_format import fields
from logitcache.format.targets import PAD_ID, SparseTargets
from logitcache.format.truncation import in_nucleus, nucleus

CPU_BLOCK_LOGITS = 1 << 20
GPU_BLOCK_LOGITS = 1 << 26
"""Logits of a block of rows: 4 MiB and 256 MiB in float32. About three such blocks exist at a time."""
SUM_WIDTH = 128
"""Consecutive ids that are summed together before anything of float64 is made of them."""
TILE = 64
"""Ids of one tail group that are summed together in float32."""
NEGLIGIBLE_LOG = -200.0
"""exp of it is 0 in float32, its product with 0 is not NaN."""


class TailGroups:
    """The partition of the vocabulary, prepared once for a device.

    groups: int [V], the group of each id, 0…G−1.

    Ids are put in order of group, each group in tiles of `TILE` ids, filled up with a column that is always 0. A call then
    gathers, sums the tiles in float32, and adds up tiles of one group by a float64 product with a 0/1 matrix. No atomic
    additions, so the same result each time; and no setting for float32 products (TF32, bfloat16 reductions, autocast)
    reaches a float64 one.
    """

    def __init__(self, groups: np.ndarray, device: torch.device | str) -> None:
        num_tiles = -(-np.bincount(groups) // TILE)  # [G]
        first_tile = np.cumsum(num_tiles) - num_tiles
        by_group = np.argsort(groups, kind="stable")
        sorted_groups = groups[by_group]
        rank = np.arange(len(groups)) - np.searchsorted(sorted_groups, sorted_groups)  # of an id in its group
        ids = np.full((TILE, num_tiles.sum()), len(groups), dtype=np.int32)
        ids[rank % TILE, first_tile[sorted_groups] + rank // TILE] = by_group
        group_of_tile = np.repeat(np.arange(len(num_tiles)), num_tiles)
        self._ids = torch.from_numpy(ids.reshape(-1)).to(device)
        self._membership = torch.from_numpy(np.eye(len(num_tiles))[group_of_tile]).to(device)  # [tiles, G]

    def masses(self, probabilities: Tensor) -> Tensor:
        """Returns the sum of each group, float64 [N, G]. probabilities: float32 [N, ≥ V + 1], 0 in column V."""
        tiles = probabilities.index_select(1, self._ids).unflatten(1, (TILE, -1)).sum(dim=1)
        masses: Tensor = tiles.double() @ self._membership
        return masses


def draw_uniforms(row_id: str, num_positions: int, num_samples: int) -> np.ndarray:
    """Returns the numbers in [0, 1) that decide the tail samples of a sequence, float64 [M, s].

    They depend on the row's id alone, so that a resumed build draws the same samples.
    """
    seed = int.from_bytes(hashlib.blake2b(row_id.encode(), digest_size=8).digest(), "little")
    return np.random.default_rng(seed).random((num_positions, num_samples))


@torch.inference_mode()
def select(
    logits: Tensor,
    settings: CaptureSettings,
    tail_groups: TailGroups | None = None,
    uniforms: Tensor | None = None,
    tail_basis: DeviceBasis | None = None,
    probe_ids: Tensor | None = None,
) -> Tensor:
    """Returns the part of softmax(logits) that is stored, int32 [N, W], see `logitcache.capture.wire_format`.

    logits: [N, V], any float dtype, without padding columns; they are OVERWRITTEN.  uniforms: float64 [N, s] in [0, 1); the
    samples are the tail's inverse distribution function there, so that the caller's seed decides them on every device.
    probe_ids: int64 [N, P]. What belongs to a part is needed if the settings have it. Sums run in float32 or better.
    """
    described: dict[str, Tensor] = {}
    if settings.tail_parts.rank:
        assert tail_basis is not None
        described = tail_basis.describe(logits, probe_ids if settings.tail_parts.probes else None)
    on_cpu = logits.device.type == "cpu"
    rows = max(1, (CPU_BLOCK_LOGITS if on_cpu else GPU_BLOCK_LOGITS) // logits.shape[1])
    blocks = logits.split(rows)
    numbers = [None] * len(blocks) if uniforms is None else uniforms.split(rows)
    selected = [
        # A CPU computes slowly in half precision; a GPU would only read and write more.
        _select(block.float() if on_cpu else block, drawn, settings, tail_groups)
        for block, drawn in zip(blocks, numbers, strict=True)
    ]
    packed = {name: _bits(values) for name, values in described.items()}
    packed |= {name: torch.cat([of_block[name] for of_block in selected]) for name in selected[0]}
    return torch.cat([packed[name] for name in fields(settings)], dim=1)


def _select(
    logits: Tensor, uniforms: Tensor | None, settings: CaptureSettings, tail_groups: TailGroups | None
) -> dict[str, Tensor]:
    vocab_size = logits.shape[1]
    k = settings.top_k
    # The entry after the last one tells how large the tail's largest logit is: no pass for its maximum.
    values, ids = top_k(logits, min(k + 1, vocab_size))
    is_entry = torch.zeros_like(ids, dtype=torch.bool)
    # The mass of the entries matters only if it decides how many they are.
    normaliser = logits.float().logsumexp(dim=1, keepdim=True) if settings.top_p < 1 else 0.0
    is_entry[:, :k] = _nucleus(values[:, :k].double() - normaliser, settings)
    logits.scatter_(1, ids, values.masked_fill(is_entry, -torch.inf))

    # From here on everything is relative to the tail's largest logit, so that no tail is too small for float32.
    peak = values.masked_fill(is_entry, -torch.inf).amax(dim=1, keepdim=True)
    peak = torch.where(peak.isneginf(), 0, peak).float()
    relative = torch.sub(logits, peak, out=logits if logits.dtype == torch.float32 else None)  # [n, V], log
    scratch = relative.new_empty(len(logits), (vocab_size // SUM_WIDTH + 1) * SUM_WIDTH, dtype=torch.float32)
    scratch[:, vocab_size:] = 0
    weights = scratch[:, :vocab_size]
    tempered_masses = [
        torch.div(relative, temperature, out=weights).exp_().sum(dim=1, keepdim=True)
        for temperature in settings.tail_parts.temperatures
    ]
    torch.exp(relative, out=weights)
    block_masses = scratch.unflatten(1, (-1, SUM_WIDTH)).sum(dim=2).double()  # [n, blocks]
    mass = block_masses.sum(dim=1, keepdim=True)

    top = values[:, :1]
    entries = (values[:, :k].double() - top).masked_fill(~is_entry[:, :k], -torch.inf)
    below_top = peak.double() - top
    tail = below_top + mass.log()
    normaliser = torch.logaddexp(entries.logsumexp(dim=1, keepdim=True), tail)
    offset = below_top - normaliser  # relative + offset is a log-probability

    packed = {
        "token_ids": ids[:, :k].masked_fill(~is_entry[:, :k], PAD_ID),
        "logprobs": entries - normaliser,
        "tail_logprob": tail - normaliser,
    }
    if settings.tail_parts.groups:
        assert tail_groups is not None
        packed["group_logprobs"] = tail_groups.masses(scratch).log() + offset
    if settings.tail_parts.temperatures:
        tempered = zip(tempered_masses, settings.tail_parts.temperatures, strict=True)
        packed["tempered_tail"] = torch.cat([m.double().log() + offset / t for m, t in tempered], dim=1)
    if settings.tail_parts.samples:
        assert uniforms is not None
        drawn = _inverse_distribution_function(scratch, block_masses, uniforms).clamp_(max=vocab_size - 1)
        has_tail = mass > 0
        packed["sample_ids"] = torch.where(has_tail, drawn, PAD_ID)
        packed["sample_logprobs"] = torch.where(has_tail, relative.gather(1, drawn) + offset, -torch.inf)
    if settings.tail_parts.entropy:
        # Σ (p / t) log p over the tail; an empty tail has none.
        products = relative.clamp_min_(NEGLIGIBLE_LOG).mul_(weights).sum(dim=1, keepdim=True)
        packed["tail_entropy"] = torch.where(mass == 0, 0, products / mass + offset)
    return {name: _bits(values) for name, values in packed.items()}


def top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns the k largest logits of each row, descending, and their ids, both [N, k]; which of equal logits is open.

    Two stages: the k blocks of columns with the largest maxima contain the k largest logits, so only their columns are sorted.
    On a CPU about 1.2 to 2 times as fast as `torch.topk` (tools/bench_selection.py). On a GPU not measured: one pass over
    [N, V] in place of a radix selection's several.
    """
    vocab_size = logits.shape[1]
    # Balances V / size maxima against k · size candidates, of which the maxima cost less each.
    size = isqrt(vocab_size // k) // 2
    if size < 4:
        return logits.topk(k, dim=1)
    num_blocks = vocab_size // size
    rest = num_blocks * size
    # Block b holds the columns b, b + num_blocks, …: maxima are then taken elementwise between long rows.
    maxima = logits[:, :rest].unflatten(1, (size, num_blocks)).amax(dim=1)
    blocks = maxima.topk(k, dim=1, sorted=False).indices
    first = torch.arange(0, rest, num_blocks, device=logits.device)
    candidates = (blocks[:, None, :] + first[:, None]).flatten(1)  # [N, size · k]
    others = torch.arange(rest, vocab_size, device=logits.device).expand(len(logits), -1)
    candidates = torch.cat([candidates, others], dim=1)
    values, which = logits.gather(1, candidates).topk(k, dim=1)
    return values, candidates.gather(1, which)


def select_from_top_k(
    token_ids: np.ndarray, logprobs: np.ndarray, settings: CaptureSettings, vocab_size: int
) -> SparseTargets:
    """Returns what `select` stores, from an engine's top-k alone: the tail is log(1 − Σp), nothing else of it can be known.

    token_ids: int [N, ≥ top_k]; ids of padding columns, from vocab_size on, are left to the tail.  logprobs: float32,
    descending.
    """
    is_padding = token_ids >= vocab_size
    order = np.argsort(is_padding, axis=1, kind="stable")[:, : settings.top_k]
    token_ids = np.take_along_axis(token_ids, order, axis=1)
    logprobs = np.take_along_axis(np.where(is_padding, -np.inf, logprobs).astype(np.float32), order, axis=1)
    taken = nucleus(logprobs, settings.top_k, settings.top_p, settings.min_k)
    mass = np.where(taken, np.exp(logprobs, dtype=np.float64), 0.0).sum(axis=1)
    k = int(taken.sum(axis=1).max(initial=0))
    return SparseTargets(
        token_ids=np.where(taken, token_ids, PAD_ID)[:, :k].astype(np.int32),
        logprobs=np.where(taken, logprobs, -np.inf)[:, :k],
        # Below float32's resolution of 1 the complement is rounding noise.
        tail_logprob=np.log(np.maximum(1.0 - mass, 2.0**-24)).astype(np.float32),
    )


def _nucleus(logprobs: Tensor, settings: CaptureSettings) -> Tensor:
    """Returns `logitcache.format.truncation.nucleus`, computed on the device: bool [N, k] of float64 [N, k]."""
    rank = torch.arange(logprobs.shape[1], device=logprobs.device)
    taken: Tensor = ~logprobs.isneginf() & in_nucleus(logprobs.exp(), rank, settings.top_p, settings.min_k)
    return taken


def _inverse_distribution_function(weights: Tensor, block_masses: Tensor, uniforms: Tensor) -> Tensor:
    """Returns the ids at which the cumulated weights pass `uniforms` of their sum, int64 [N, s]; never one of weight 0.

    First among blocks, then inside the block, by cumulated sums in float64: no [N, V] of them.  weights: float32 [N, blocks ·
    SUM_WIDTH].  block_masses: float64 [N, blocks]. Rows without weight give anything.
    """
    cumulated = block_masses.cumsum(dim=1)
    wanted = uniforms * cumulated[:, -1:]
    block = torch.searchsorted(cumulated, wanted, right=True).clamp_(max=block_masses.shape[1] - 1)
    mass = block_masses.gather(1, block)
    share = (wanted - (cumulated.gather(1, block) - mass)) / mass
    inside = weights.unflatten(1, (-1, SUM_WIDTH)).gather(1, block[..., None].expand(-1, -1, SUM_WIDTH))
    cumulated = inside.double().cumsum(dim=2)  # [N, s, SUM_WIDTH]
    wanted = share.clamp(0, 1 - 2.0**-53)[..., None] * cumulated[..., -1:]
    return block * SUM_WIDTH + torch.searchsorted(cumulated, wanted, right=True)[..., 0]


def _bits(values: Tensor) -> Tensor:
    return values.float().view(torch.int32) if values.is_floating_point() else values.int()

"""Any language model as a pooling model that "embeds" a token as its packed position. It runs inside vLLM's engine.

A pooling request names its stored positions and what is asked about them. In each step the logits of all stored positions
scheduled are computed in chunks and selected from on the device; only packed positions leave it.
"""

from __future__ import annotations

import dataclasses
import json
from collections import UserDict
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.pooler.abstract import Pooler
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.interfaces_base import is_text_generation_model
from vllm.v1.pool.metadata import PoolingMetadata

from logitcache.capture.projection import CovarianceProduct, DeviceBasis, summed_probabilities
from logitcache.capture.selection import TailGroups, draw_uniforms, select
from logitcache.capture.settings import CaptureSettings
from logitcache.capture.teachers.vllm.protocol import (
    COVARIANCE,
    PROBABILITIES,
    TAIL_BASIS,
    TAIL_GROUPS,
    TASK,
    ScoringRequest,
    from_bytes,
)
from logitcache.capture.wire_format import position_width
from logitcache.format.probes import probe_ids
from logitcache.format.tail_parts import TailParts

POSITIONS_PER_CHUNK = 1024
"""Rows of logits that exist at a time."""


@dataclass(frozen=True)
class Piece:
    """A sequence's share of one step.

    rows: the indices of its stored positions among the step's hidden states, int64 [n].  positions: their places in the
    sequence, int64 [n].  first, total: they are number first … of total stored positions.  results: those of its earlier
    pieces, and then of this one.
    """

    request: ScoringRequest
    rows: np.ndarray
    positions: np.ndarray
    first: int
    total: int
    results: list[torch.Tensor]

    def uniforms(self, num_samples: int) -> np.ndarray:
        """Returns the numbers that decide its tail samples, float64 [n, s]: the same however the sequence is cut up."""
        return draw_uniforms(self.request.row_id, self.total, num_samples)[self.first : self.first + len(self.rows)]

    def probe_ids(self, num_probes: int) -> np.ndarray:
        """Returns its probe tokens, int64 [n, P]."""
        return probe_ids(self.request.row_id, self.positions, num_probes, self.request.vocab_size).astype(np.int64)


class PositionPooler(Pooler):  # type: ignore[misc]
    """The pooler that gives for each finished sequence its packed positions, int32 [M, W], or its sum of distributions.

    compute_logits: hidden states [n, D] → logits [n, num_logits], with padding; None on all ranks but the first.
    """

    def __init__(self, compute_logits: Callable[[torch.Tensor], torch.Tensor | None], num_logits: int) -> None:
        super().__init__()
        self._compute_logits = compute_logits
        self._num_logits = num_logits
        self._is_first_rank = get_tensor_model_parallel_rank() == 0
        self._tail_groups: TailGroups | None = None
        self._tail_basis: DeviceBasis | None = None
        self._product: CovarianceProduct | None = None
        self._num_added: dict[str, int] = {}

    def get_supported_tasks(self) -> Set[Any]:
        """Returns the one task under which requests come."""
        return {TASK}

    def forward(self, hidden_states: torch.Tensor, pooling_metadata: PoolingMetadata) -> list[torch.Tensor | None]:
        """Returns the result of each sequence that is finished, None for others.

        hidden_states: [scheduled tokens, D], all sequences of the step one after another.
        """
        cursor = pooling_metadata.get_pooling_cursor()
        scheduled = cursor.num_scheduled_tokens_cpu.tolist()
        ends = cursor.seq_lens_cpu.tolist()
        if pooling_metadata.pooling_params[0].extra_kwargs is None:
            return self._warm_up(hidden_states, scheduled)
        pieces: list[Piece | torch.Tensor] = []
        offset = 0
        for params, state, count, end in zip(
            pooling_metadata.pooling_params, pooling_metadata.pooling_states, scheduled, ends, strict=True
        ):
            asked = params.extra_kwargs or {}
            if "settings" in asked:
                pieces.append(_piece(ScoringRequest(**asked), end - count, end, offset, state.hidden_states_cache))
            else:
                pieces.append(self._prepare(asked, hidden_states.device))
            offset += count
        alike: dict[tuple[str, int], list[Piece]] = {}
        for piece in pieces:
            if isinstance(piece, Piece):
                alike.setdefault((piece.request.settings, piece.request.vocab_size), []).append(piece)
        for (settings, vocab_size), group in alike.items():
            if settings == PROBABILITIES:
                self._sum(hidden_states, group, vocab_size)
            elif settings == COVARIANCE:
                self._add(hidden_states, group, vocab_size)
            else:
                parsed = CaptureSettings.from_json(json.loads(settings))
                self._select(hidden_states, group, vocab_size, parsed, self._tail_groups, self._tail_basis)
        finished = [end == length for end, length in zip(ends, pooling_metadata.prompt_lens.tolist(), strict=True)]
        return [self._result(piece) if done else None for piece, done in zip(pieces, finished, strict=True)]

    def _prepare(self, asked: dict[str, Any], device: torch.device) -> torch.Tensor:
        """Sets what later requests build on, and returns the answer, often empty. Only the first rank has logits to use it on."""
        answer = torch.zeros(0)
        if COVARIANCE in asked:
            self._num_added.clear()
        if not self._is_first_rank:
            return answer
        if TAIL_GROUPS in asked:
            self._tail_groups = TailGroups(np.frombuffer(asked[TAIL_GROUPS], dtype=np.int32), device)
        elif TAIL_BASIS in asked:
            self._tail_basis = DeviceBasis(*from_bytes(asked[TAIL_BASIS]), device)
        elif asked[COVARIANCE]:
            self._product = CovarianceProduct(*from_bytes(asked[COVARIANCE]), device)
        else:
            assert self._product is not None
            answer, self._product = self._product.result(), None
        return answer

    def _select(
        self,
        hidden_states: torch.Tensor,
        pieces: list[Piece],
        vocab_size: int,
        settings: CaptureSettings,
        tail_groups: TailGroups | None,
        tail_basis: DeviceBasis | None,
    ) -> None:
        def chunks(of_pieces: list[np.ndarray]) -> tuple[torch.Tensor, ...]:
            joined = torch.from_numpy(np.concatenate(of_pieces)).to(hidden_states.device)
            return tuple(
                joined[i : i + POSITIONS_PER_CHUNK] for i in range(0, max(len(joined), 1), POSITIONS_PER_CHUNK)
            )

        uniforms = chunks([piece.uniforms(settings.tail_parts.samples) for piece in pieces])
        probes = chunks([piece.probe_ids(settings.tail_parts.probes) for piece in pieces])
        rows = np.concatenate([piece.rows for piece in pieces])
        packed = [
            select(logits, settings, tail_groups, uniforms[chunk], tail_basis, probes[chunk])
            for chunk, logits in enumerate(self._logits(hidden_states, rows, vocab_size))
        ]
        if not self._is_first_rank:
            return
        packed.append(torch.empty(0, position_width(settings), dtype=torch.int32, device=hidden_states.device))
        for piece, part in zip(pieces, torch.cat(packed).split([len(piece.rows) for piece in pieces]), strict=True):
            # Owned, since a view would be sent to another process with all that it is a view of.
            piece.results.append(part.clone())

    def _sum(self, hidden_states: torch.Tensor, pieces: list[Piece], vocab_size: int) -> None:
        for piece in pieces:
            total = torch.zeros(vocab_size, dtype=torch.float64, device=hidden_states.device)
            for logits in self._logits(hidden_states, piece.rows, vocab_size):
                total += summed_probabilities(logits)
            piece.results[:] = [total + piece.results[0] if piece.results else total]

    def _add(self, hidden_states: torch.Tensor, pieces: list[Piece], vocab_size: int) -> None:
        """Adds positions to the product; those of a sequence that was preempted, and began anew, only once."""
        for piece in pieces:
            known = self._num_added.get(piece.request.row_id, 0)
            for logits in self._logits(hidden_states, piece.rows[max(known - piece.first, 0) :], vocab_size):
                assert self._product is not None
                self._product.add(logits)
            self._num_added[piece.request.row_id] = max(known, piece.first + len(piece.rows))
            piece.results[:] = [torch.zeros(0)]

    def _logits(self, hidden_states: torch.Tensor, rows: np.ndarray, vocab_size: int) -> Iterator[torch.Tensor]:
        """Yields logits [≤ POSITIONS_PER_CHUNK, vocab_size] of hidden states; every rank computes, the first alone gets any."""
        index = torch.from_numpy(rows).to(hidden_states.device)
        for start in range(0, len(rows), POSITIONS_PER_CHUNK):
            logits = self._compute_logits(hidden_states[index[start : start + POSITIONS_PER_CHUNK]])
            if self._is_first_rank:
                assert logits is not None
                yield logits[:, :vocab_size]

    def _result(self, piece: Piece | torch.Tensor) -> torch.Tensor | None:
        if not self._is_first_rank:
            return None
        if isinstance(piece, torch.Tensor):
            return piece
        result = piece.results[0] if len(piece.results) == 1 else torch.cat(piece.results)
        piece.results.clear()
        return result

    def _warm_up(self, hidden_states: torch.Tensor, scheduled: list[int]) -> list[torch.Tensor | None]:
        """Does all that can be asked for on every hidden state: by this trial step vLLM learns how much memory to leave."""
        settings = CaptureSettings(
            top_k=min(256, self._num_logits),
            tail_parts=TailParts(
                groups=min(32, self._num_logits), temperatures=(2.0,), entropy=True, samples=8, rank=128, probes=2
            ),
        )
        tail_groups = TailGroups(
            np.arange(self._num_logits, dtype=np.int32) % settings.tail_parts.groups, hidden_states.device
        )
        offset = np.zeros(self._num_logits, dtype=np.float32)
        directions = np.zeros((self._num_logits, settings.tail_parts.rank), dtype=np.float32)
        tail_basis = DeviceBasis(directions, offset, offset, hidden_states.device)
        everything = np.arange(len(hidden_states))
        request = ScoringRequest(PROBABILITIES, self._num_logits, b"", "")
        piece = Piece(request, everything, everything, 0, len(hidden_states), [])
        self._select(hidden_states, [piece], self._num_logits, settings, tail_groups, tail_basis)
        return list(piece.results[0].split(scheduled)) if self._is_first_rank else [None] * len(scheduled)


def _piece(request: ScoringRequest, start: int, end: int, offset: int, results: list[torch.Tensor]) -> Piece:
    """Returns the piece of positions start … end − 1, which are the step's hidden states from `offset` on."""
    if start == 0:
        results.clear()  # a sequence that was preempted begins anew
    positions = np.flatnonzero(np.unpackbits(np.frombuffer(request.stored, dtype=np.uint8)))
    first, last = np.searchsorted(positions, (start, end))
    positions, total = positions[first:last], len(positions)
    return Piece(request, positions - start + offset, positions, int(first), total, results)


@cache
def scoring_class(base: type[nn.Module]) -> type[nn.Module]:
    """Returns a language model's class with a pooler of packed positions; everything else, its name included, stays."""

    class Scoring(base):  # type: ignore[valid-type, misc]
        is_pooling_model = True

        def __init__(self, *, vllm_config: Any, prefix: str = "", **options: Any) -> None:
            super().__init__(vllm_config=vllm_config, prefix=prefix, **options)
            self.pooler = PositionPooler(self.compute_logits, vllm_config.model_config.get_vocab_size())

    Scoring.__name__, Scoring.__qualname__, Scoring.__module__ = base.__name__, base.__qualname__, base.__module__
    return Scoring


@dataclass(frozen=True)
class ScoringEntry:
    """An entry of vLLM's model registry whose class scores, if it is a language model."""

    entry: Any

    def inspect_model_cls(self) -> Any:
        """Returns what vLLM knows about the class before it is loaded."""
        info = self.entry.inspect_model_cls()
        return dataclasses.replace(info, is_pooling_model=True) if info.is_text_generation_model else info

    def load_model_cls(self) -> type[nn.Module]:
        """Returns the class."""
        base = self.entry.load_model_cls()
        return scoring_class(base) if is_text_generation_model(base) else base


class ScoringModels(UserDict[str, Any]):
    """The models of vLLM's registry under their own names, so that all that vLLM does by name is still done."""

    def __init__(self, models: dict[str, Any]) -> None:
        self.data = models

    def __getitem__(self, architecture: str) -> ScoringEntry:
        return ScoringEntry(self.data[architecture])


def register_scoring_models() -> None:
    """Makes every language model that this process loads from now on a scoring one."""
    if not isinstance(ModelRegistry.models, ScoringModels):
        ModelRegistry.models = ScoringModels(ModelRegistry.models)


@contextmanager
def scoring_models() -> Iterator[None]:
    """Makes the language models that this process loads inside scoring ones."""
    plain = ModelRegistry.models
    register_scoring_models()
    try:
        yield
    finally:
        ModelRegistry.models = plain

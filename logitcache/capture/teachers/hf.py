"""The reference teacher: transformers, on CPU or GPU. It sees the logits, so it captures everything."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
)

from logitcache.capture.projection import CovarianceProduct, DeviceBasis, summed_probabilities
from logitcache.capture.selection import TailGroups, draw_uniforms, select
from logitcache.capture.settings import CaptureSettings
from logitcache.capture.teachers.base import TeacherModel
from logitcache.capture.wire_format import position_width, unpack
from logitcache.errors import UserError, one_line
from logitcache.format.probes import probe_ids
from logitcache.format.sequences import TokenSequence
from logitcache.format.tail_basis import TailBasis
from logitcache.format.targets import SparseTargets

LOGITS_PER_BATCH = 1 << 26
"""Logits that one forward pass may produce, unless a single sequence has more: 256 MiB in float32."""
WINDOW_TOKENS = 1 << 14
"""Tokens read ahead, so that a batch finds sequences of similar lengths."""
POSITIONS_PER_SELECTION = 1024


class TransformersTeacher:
    """A language model of transformers. Batches are of similar lengths, at most `LOGITS_PER_BATCH` logits each.

    attention: transformers' `attn_implementation`; None for its own choice. Raises UserError if the weights do not load, or if
    some are missing, which transformers would draw at random.
    """

    def __init__(self, model: TeacherModel, attention: str | None = None) -> None:
        self._vocab_size = model.vocab_size
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self._model, loading = auto_class(model.config).from_pretrained(
                model.name,
                revision=model.revision,
                dtype=model.dtype,
                trust_remote_code=model.trust_remote_code,
                attn_implementation=attention,
                output_loading_info=True,
            )
        except (ImportError, OSError, ValueError) as error:
            raise UserError(f"--teacher {model.name}: its weights do not load ({one_line(error)})") from error
        if missing := sorted(loading["missing_keys"]):
            raise UserError(
                f"--teacher {model.name}: {len(missing)} of its weights are not in its files, {missing[0]} for one, and "
                "would be drawn at random. Is the checkpoint whole, and of the architecture that its config.json names?"
            )
        self._model.eval().to(self._device)
        self._batch_tokens = max(LOGITS_PER_BATCH // model.num_logits, 1)
        self._tail_groups: TailGroups | None = None
        self._tail_basis: DeviceBasis | None = None

    def set_tail_groups(self, tail_groups: np.ndarray) -> None:
        """Sets the group of each id, int [V]. It comes before scoring with `settings.tail_parts.groups`."""
        self._tail_groups = TailGroups(tail_groups, self._device)

    def set_tail_basis(self, basis: TailBasis) -> None:
        """Sets the basis of the coefficients. It comes before scoring with `settings.tail_parts.rank`."""
        self._tail_basis = DeviceBasis(basis.directions, basis.offset, basis.weights, self._device)

    def score(self, sequences: Iterable[TokenSequence], settings: CaptureSettings) -> Iterator[SparseTargets]:
        """Yields the targets of each sequence, in order. About `WINDOW_TOKENS` tokens are read ahead."""
        for window in _windows(sequences):
            packed = [
                np.empty((len(sequence.positions), position_width(settings)), dtype=np.int32) for sequence in window
            ]
            uniforms = [
                draw_uniforms(sequence.row_id, len(sequence.positions), settings.tail_parts.samples)
                for sequence in window
            ]
            probes = [
                probe_ids(sequence.row_id, sequence.positions, settings.tail_parts.probes, self._vocab_size)
                for sequence in window
            ]
            for i, rows, logits in self._logits(window):
                drawn = torch.from_numpy(uniforms[i][rows]).to(self._device)
                probed = torch.from_numpy(probes[i][rows]).long().to(self._device)
                selected = select(logits, settings, self._tail_groups, drawn, self._tail_basis, probed)
                packed[i][rows] = selected.cpu().numpy()
            for targets in packed:
                yield unpack(targets, settings)

    def mean_probability(self, sequences: Iterable[TokenSequence]) -> np.ndarray:
        """Returns the mean over the stored positions of the full next-token distribution, float64 [V]; see `LogitTeacher`."""
        total = torch.zeros(self._vocab_size, dtype=torch.float64)
        for window in _windows(sequences):
            for _, _, logits in self._logits(window):
                total += summed_probabilities(logits).cpu()
        mean: np.ndarray = (total / total.sum()).numpy()
        return mean

    def covariance_product(
        self, sequences: Iterable[TokenSequence], block: np.ndarray, offset: np.ndarray, weights: np.ndarray
    ) -> np.ndarray:
        """Returns the product of the logits' covariance and a block of directions, see `LogitTeacher`."""
        product = CovarianceProduct(block, offset, weights, self._device)
        for window in _windows(sequences):
            for _, _, logits in self._logits(window):
                product.add(logits)
        sums: np.ndarray = product.result().cpu().numpy()
        return sums

    def _logits(self, sequences: Sequence[TokenSequence]) -> Iterator[tuple[int, slice, torch.Tensor]]:
        """Yields (sequence, slice of its stored positions, their logits [≤ POSITIONS_PER_SELECTION, V]), sequences by length.

        The logits are copies without padding columns, free to be overwritten.
        """
        for batch in self._batches(sequences):
            longest = max(len(sequences[i].input_ids) for i in batch)
            input_ids = torch.zeros(len(batch), longest, dtype=torch.long)
            attention_mask = torch.zeros_like(input_ids)
            for row, i in enumerate(batch):
                length = len(sequences[i].input_ids)
                input_ids[row, :length] = torch.tensor(sequences[i].input_ids)
                attention_mask[row, :length] = 1
            with torch.inference_mode():
                output = self._model(
                    input_ids=input_ids.to(self._device),
                    attention_mask=attention_mask.to(self._device),
                    use_cache=False,
                )
            for row, i in enumerate(batch):
                positions = torch.tensor(sequences[i].positions).to(self._device)
                for start in range(0, len(positions), POSITIONS_PER_SELECTION):
                    rows = slice(start, start + POSITIONS_PER_SELECTION)
                    yield i, rows, output.logits[row, positions[rows], : self._vocab_size]
            del output  # before the next forward pass

    def _batches(self, sequences: Sequence[TokenSequence]) -> Iterator[list[int]]:
        batch: list[int] = []
        for i in sorted(range(len(sequences)), key=lambda i: len(sequences[i].input_ids)):
            if batch and (len(batch) + 1) * len(sequences[i].input_ids) > self._batch_tokens:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def close(self) -> None:
        """Frees the weights."""
        del self._model


def auto_class(config: Any) -> Any:
    """Returns the auto class of transformers that gives the architecture which the checkpoint names.

    A multimodal architecture is no "causal language model" to transformers, or it is one without its vision tower.
    """
    for auto, mapping in (
        (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
        (AutoModelForMultimodalLM, MODEL_FOR_MULTIMODAL_LM_MAPPING),
    ):
        found = mapping.get(type(config), None)
        if getattr(found, "__name__", None) in (config.architectures or ()):
            return auto
    return AutoModelForCausalLM


def why_not_transformers(model: TeacherModel, attention: str | None) -> str | None:
    """Returns why transformers cannot load this teacher, or None if it can. Loads no weights."""
    options = {"trust_remote_code": model.trust_remote_code, "attn_implementation": attention}
    try:
        with torch.device("meta"):
            auto_class(model.config).from_config(deepcopy(model.config), **options)
    except (ImportError, OSError, ValueError) as error:
        return one_line(error)
    return None


def _windows(sequences: Iterable[TokenSequence]) -> Iterator[list[TokenSequence]]:
    """Yields consecutive sequences of at least `WINDOW_TOKENS` tokens together."""
    window: list[TokenSequence] = []
    tokens = 0
    for sequence in sequences:
        window.append(sequence)
        tokens += len(sequence.input_ids)
        if tokens >= WINDOW_TOKENS:
            yield window
            window, tokens = [], 0
    if window:
        yield window

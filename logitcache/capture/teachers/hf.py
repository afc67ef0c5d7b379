"""The reference teacher: transformers, on CPU or GPU. It sees the logits, so it captures everything."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from logitcache.capture.selection import select
from logitcache.capture.settings import CaptureSettings
from logitcache.capture.teachers.base import TeacherModel
from logitcache.errors import UserError, one_line
from logitcache.format.sequences import TokenSequence
from logitcache.format.targets import SparseTargets, concatenate

LOGITS_PER_BATCH = 1 << 26
"""Logits that one forward pass may produce, unless a single sequence has more: 256 MiB in float32."""
ROWS_PER_SELECTION = 1024


class TransformersTeacher:
    """A causal language model of transformers. Batches are of similar lengths, at most `LOGITS_PER_BATCH` logits each."""

    window_tokens = 1 << 14

    def __init__(self, model: TeacherModel, settings: CaptureSettings) -> None:
        self._vocab_size = model.vocab_size
        self._settings = settings
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self._model = AutoModelForCausalLM.from_pretrained(
                model.name, revision=model.revision, dtype=model.dtype, trust_remote_code=model.trust_remote_code
            )
        except (OSError, ValueError) as error:
            raise UserError(f"--teacher {model.name}: its weights do not load ({one_line(error)})") from error
        self._model.eval().to(self._device)
        self._batch_tokens = max(LOGITS_PER_BATCH // model.num_logits, 1)
        self._tail_groups: torch.Tensor | None = None

    def set_tail_groups(self, tail_groups: np.ndarray) -> None:
        """Group of each id, int [V]; needed before scoring when groups are captured."""
        self._tail_groups = torch.tensor(tail_groups, dtype=torch.long).to(self._device)

    def score(self, sequences: Sequence[TokenSequence]) -> list[SparseTargets]:
        """SparseTargets of the stored positions of each sequence, in order."""
        results: dict[int, SparseTargets] = {}
        for index, logits in self._logits(sequences):
            uniforms = self._uniforms(sequences[index])
            chunks = [slice(i, i + ROWS_PER_SELECTION) for i in range(0, len(logits), ROWS_PER_SELECTION)]
            results[index] = concatenate(
                [
                    select(
                        logits[rows], self._settings, self._tail_groups, None if uniforms is None else uniforms[rows]
                    )
                    for rows in chunks
                ]
            )
        return [results[index] for index in range(len(sequences))]

    def mean_probability(self, sequences: Sequence[TokenSequence]) -> np.ndarray:
        """Mean over the stored positions of the full next-token distribution, float64 [V]."""
        total, count = torch.zeros(self._vocab_size, dtype=torch.float64), 0
        for _, logits in self._logits(sequences):
            for rows in logits.split(ROWS_PER_SELECTION):
                total += rows.float().softmax(dim=-1).sum(dim=0).double().cpu()
                count += len(rows)
        return (total / count).numpy()

    @torch.inference_mode()
    def _logits(self, sequences: Sequence[TokenSequence]) -> Iterator[tuple[int, torch.Tensor]]:
        """(index, logits [M, V] of the stored positions) of every sequence, in order of length."""
        for batch in self._batches(sequences):
            longest = max(len(sequences[i].input_ids) for i in batch)
            input_ids = torch.zeros(len(batch), longest, dtype=torch.long)
            attention_mask = torch.zeros_like(input_ids)
            for row, i in enumerate(batch):
                length = len(sequences[i].input_ids)
                input_ids[row, :length] = torch.tensor(sequences[i].input_ids)
                attention_mask[row, :length] = 1
            output = self._model(
                input_ids=input_ids.to(self._device), attention_mask=attention_mask.to(self._device), use_cache=False
            )
            for row, i in enumerate(batch):
                positions = torch.tensor(sequences[i].positions).to(self._device)
                yield i, output.logits[row, positions, : self._vocab_size]

    def _batches(self, sequences: Sequence[TokenSequence]) -> Iterator[list[int]]:
        batch: list[int] = []
        for i in sorted(range(len(sequences)), key=lambda i: len(sequences[i].input_ids)):
            if batch and (len(batch) + 1) * len(sequences[i].input_ids) > self._batch_tokens:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def _uniforms(self, sequence: TokenSequence) -> torch.Tensor | None:
        """Numbers that decide the tail samples, drawn from the row's own id: a resumed build draws the same."""
        if not self._settings.tail_samples:
            return None
        seed = int.from_bytes(hashlib.blake2b(sequence.row_id.encode(), digest_size=8).digest(), "little")
        drawn = np.random.default_rng(seed).random((len(sequence.positions), self._settings.tail_samples))
        return torch.from_numpy(drawn).to(self._device)

    def close(self) -> None:
        """Frees the weights."""
        del self._model

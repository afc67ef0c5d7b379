"""A student against the whole distribution of its teacher, on fixed rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from definitions import akl_weight, least_of_head
from torch import Tensor
from transformers import PreTrainedModel

from logitcache import CachedSequence, LogitCache

ROWS_AT_A_TIME = 8


@dataclass(frozen=True)
class Batch:
    """input_ids [B, T] int64, padded on the right, where a causal model does not look; rows [N] into [B·T]; labels [N]."""

    input_ids: Tensor
    rows: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Teacher:
    """At a batch's positions, at one temperature.

    akl_least, half_least: [N] the least probability in AKL's head, and in the smallest head of half the mass or more.
    """

    log_p: Tensor  # [N, V]
    first: Tensor  # [N] id of the most probable token
    akl_least: Tensor
    half_least: Tensor


class Judge:
    """Holds the teacher's log-probabilities at the stored positions of the first rows of a cache, float32 [N, V]."""

    def __init__(
        self, teacher: PreTrainedModel, cache: LogitCache, num_rows: int, temperatures: tuple[float, ...] = (1.0,)
    ) -> None:
        """temperatures: at which to judge."""
        sequences = sorted((cache[row] for row in range(min(num_rows, len(cache)))), key=lambda s: len(s.input_ids))
        self._batches = [
            _batch(sequences[first : first + ROWS_AT_A_TIME], teacher.device)
            for first in range(0, len(sequences), ROWS_AT_A_TIME)
        ]
        self._teachers: dict[float, list[Teacher]] = {T: [] for T in temperatures}
        for batch in self._batches:
            logits = _stored_logits(teacher, batch)
            for temperature, known in self._teachers.items():
                known.append(_teacher(logits, temperature))

    def __call__(self, student: PreTrainedModel) -> dict[str, float]:
        """Means over the positions: ce (nats), agreement, and at each temperature, at T ≠ 1 with `@T` after their names:

        fkl, rkl: nats over the whole vocabulary.  akl: AKL's own value.  todi: ToDi's at β = 1, FKL + RKL.
        head_error, tail_error: Σ|p−q| over the fewest tokens that make up half of the teacher's mass, and over the rest.
        """
        was_training = student.training
        student.eval()
        sums: dict[str, float] = {}
        for number, batch in enumerate(self._batches):
            logits = _stored_logits(student, batch)
            values = {"ce": torch.nn.functional.cross_entropy(logits, batch.labels, reduction="none")}
            for temperature, teachers in self._teachers.items():
                suffix = "" if temperature == 1 else f"@{temperature:g}"
                compared = _compared(teachers[number], (logits / temperature).log_softmax(1))
                values |= {name + suffix: value for name, value in compared.items()}
            values["agreement"] = (logits.argmax(1) == teachers[number].first).float()
            sums = {name: sums.get(name, 0.0) + float(value.double().sum()) for name, value in values.items()}
        student.train(was_training)
        positions = sum(len(batch.rows) for batch in self._batches)
        return {name: total / positions for name, total in sums.items()}


def _compared(teacher: Teacher, log_q: Tensor) -> dict[str, Tensor]:
    """Of each position, [N]."""
    log_p, p, q = teacher.log_p, teacher.log_p.exp(), log_q.exp()
    ratio, gap = log_p - log_q, (p - q).abs()
    fkl, rkl = (p * ratio).sum(1), -(q * ratio).sum(1)
    weight = akl_weight(log_p, log_q, teacher.akl_least)
    head_error = (gap * (p >= teacher.half_least[:, None])).sum(1)
    return {
        "fkl": fkl,
        "rkl": rkl,
        "akl": weight * fkl + (1 - weight) * rkl,
        "todi": fkl + rkl,
        "head_error": head_error,
        "tail_error": gap.sum(1) - head_error,
    }


def _teacher(logits: Tensor, temperature: float) -> Teacher:
    log_p = (logits / temperature).log_softmax(1)
    p = log_p.exp()
    return Teacher(log_p, p.argmax(1), least_of_head(p, crossing=False), least_of_head(p, crossing=True))


@torch.no_grad()
def _stored_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    hidden = model.get_decoder()(input_ids=batch.input_ids).last_hidden_state.flatten(0, 1)
    logits: Tensor = model.get_output_embeddings()(hidden[batch.rows])  # [N, V]
    return logits.float()


def _batch(sequences: list[CachedSequence], device: torch.device) -> Batch:
    longest = max(len(sequence.input_ids) for sequence in sequences)
    input_ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    rows = []
    for number, sequence in enumerate(sequences):
        input_ids[number, : len(sequence.input_ids)] = torch.tensor(sequence.input_ids)
        rows.append(torch.tensor(sequence.positions, dtype=torch.long) + number * longest)
    joined = torch.cat(rows)
    labels = input_ids.flatten()[joined + 1]
    return Batch(input_ids.to(device), joined.to(device), labels.to(device))

"""Rows of a finished cache scored again: does it store what the teacher gives, and at the right positions?

Two engines, or two runs of one, differ in the last bits of their arithmetic, so that a tolerance is needed; it is on a row's
mean |Δ log p| over stored entries with p > 1e-3. Single entries differ by a multiple of the mean, so it is the mean that is
judged, of every row by itself: one wrong row among many shows. Per dtype it is some five times what engines that agree
differ by (float32 includes TF32 products of GPUs), plus half of what the precision rounds an entry of p = 1e-3 by at most.
Another teacher's row differs by half a nat and more. Coefficients in a tail basis are nats, too, and judged alike; of the tail
that they rebuild, the divergence is estimated by samples of the teacher's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack, cast

import numpy as np

from logitcache.assembly.resume import compared, first_of
from logitcache.capture.engine import Engine, EngineChoice, choose_engine, start_teacher
from logitcache.capture.options import EngineOptions
from logitcache.capture.settings import CaptureSettings
from logitcache.capture.teachers.base import LogitTeacher, TeacherModel
from logitcache.errors import UserError
from logitcache.format.manifest import Manifest
from logitcache.format.sequences import CachedSequence, TokenSequence
from logitcache.format.tail_basis import TailBasis
from logitcache.format.tail_parts import TailParts
from logitcache.format.targets import PAD_ID, SparseTargets
from logitcache.maintenance.verify.findings import Finding
from logitcache.reading.cache import LogitCache, opened
from logitcache.table import aligned

logger = logging.getLogger("logitcache")

TOLERANCE_NATS = {"float32": 0.01, "float16": 0.05, "bfloat16": 0.1}
JUDGED_PROBABILITY = 1e-3
OFFSETS = (-1, 0, 1)
TAIL_SAMPLES = 32
"""Of each position, by which the divergence of a rebuilt tail is estimated."""
POSITIONS_REBUILT = 64
"""Tails that are rebuilt at a time."""
SHIFT_RATIO = 0.5
"""Targets stand at the right positions if they are less than this share as far from the teacher's as at any other offset."""


def prepare_rescoring(
    cache: LogitCache | str | Path,
    num_rows: int,
    *,
    teacher: str | None = None,
    seed: int = 0,
    backend: str = "auto",
    capture_route: str = "auto",
    base_url: str | None = None,
    model: str | None = None,
    revision: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    **engine_options: Unpack[EngineOptions],
) -> Rescoring:
    """Returns the rescoring of random rows of a cache, with the options of `logitcache.verify`. Loads no weights.

    Raises UserError if there is no such teacher, or its vocabulary or tokenizer is not the cache's.
    """
    if num_rows < 1:
        raise UserError(f"--rescore {num_rows}: at least 1 row is needed")
    cache = opened(cache)
    recorded = cache.manifest.fingerprint.get("teacher", {})
    asked = EngineChoice(backend, capture_route, base_url, model, attn_implementation, engine_options)
    teacher = teacher or asked.default_teacher()
    if teacher is None:
        if "content_sha256" in recorded or "name" not in recorded:
            name = recorded.get("name", "unknown")
            raise UserError(f"--teacher is missing: the cache's was a folder named {name}, its place is not recorded")
        teacher, revision = recorded["name"], revision or recorded.get("revision")
    loaded = TeacherModel.load(teacher, revision, dtype or recorded.get("dtype") or "auto", trust_remote_code)
    _refuse_other_vocabulary(cache.manifest, loaded)
    engine = choose_engine(asked, loaded, [])
    return Rescoring(cache, loaded, engine, min(num_rows, len(cache)), seed)


def _refuse_other_vocabulary(manifest: Manifest, model: TeacherModel) -> None:
    if model.vocab_size != manifest.layout.vocab_size:
        raise UserError(
            f"--teacher {model.name}: its vocabulary has {model.vocab_size:,} tokens, that of the cache's teacher "
            f"{manifest.layout.vocab_size:,}; give the teacher that made the cache"
        )
    recorded = manifest.fingerprint.get("tokenizer", {})
    # A chat template decides which tokens a corpus becomes, not what they mean.
    decisive = ("vocab_size", "vocabulary_sha256", "merges_sha256")
    own = model.tokenizer_fingerprint()
    changes = compared(
        {n: recorded[n] for n in decisive if n in recorded}, {n: own[n] for n in decisive if n in recorded}
    )
    if differences := [f"{name} is {there} in the cache, {here} here" for name, there, here in changes]:
        raise UserError(
            f"--teacher {model.name}: its tokenizer is not the cache's ({first_of(differences)}); "
            "give the teacher that made the cache"
        )


@dataclass(frozen=True)
class Rescoring:
    """The rows of a cache that are scored again, and the teacher and engine that score them."""

    cache: LogitCache
    model: TeacherModel
    engine: Engine
    num_rows: int
    seed: int

    def run(self) -> Rescored:
        """Loads the teacher and scores. Raises UserError if it does not load, or if the cache cannot be read."""
        drawn = np.random.default_rng(self.seed).choice(len(self.cache), self.num_rows, replace=False)
        numbers = np.sort(drawn).tolist()
        rows = [self.cache[number] for number in numbers]
        k = max(max(row.targets.token_ids.shape[1] for row in rows), 1)
        logger.info("scoring %d rows again with %s on %s", len(rows), self.model.name, self.engine)
        basis = self.cache.tail_basis if self.engine.sees_logits else None
        parts = TailParts(samples=TAIL_SAMPLES, rank=basis.rank) if basis else TailParts()
        teacher = start_teacher(self.model, self.engine, self.cache.manifest.longest, k)
        try:
            if basis:
                cast(LogitTeacher, teacher).set_tail_basis(basis)
            again = list(teacher.score(map(_all_positions, rows), CaptureSettings(top_k=k, tail_parts=parts)))
        finally:
            teacher.close()
        compared_rows = [_compare(row, targets, basis) for row, targets in zip(rows, again, strict=True)]
        layout = self.cache.manifest.layout
        rounding = float(layout.quantization.bound(np.log([JUDGED_PROBABILITY]))[0]) if layout.quantization else 0.0
        recorded = self.cache.manifest.fingerprint.get("teacher", {})
        own = self.model.fingerprint()
        return Rescored(
            rows=tuple(compared_rows),
            places=tuple(self._place(number) for number in numbers),
            tolerance_nats=max(_tolerance_nats(recorded.get("dtype")), _tolerance_nats(self.model.dtype))
            + rounding / 2,
            coefficient_step=layout.quantization.coefficient_step or 0.0 if layout.quantization else 0.0,
            other_weights="content_sha256" in recorded
            and recorded["content_sha256"] != own.get("content_sha256", recorded["content_sha256"]),
        )

    def _place(self, number: int) -> tuple[str, int]:
        """Returns the file of a row, and its number there."""
        for shard in self.cache.manifest.shards:
            if number < shard.num_sequences:
                return shard.name, number
            number -= shard.num_sequences
        raise IndexError(number)


@dataclass(frozen=True)
class ComparedRow:
    """A row beside the teacher's scores of today.

    differences_nats: |Δ log p| of every entry of both with p > 1e-3, float64.  tail_differences: of the tail's mass at each
    position.  same_best: positions whose most probable token is the same, bool.  distances: mean over the positions of
    Σ |Δp| over the stored entries, by offset; nan if no position has a neighbour there.  coefficient_differences: |Δ| of the
    coefficients in the tail basis, float64 [M, R].  tail_divergences: of each position with a tail, from the teacher's to the
    rebuilt one, both outside the teacher's entries. Both are empty without coefficients.
    """

    row_id: str
    differences_nats: np.ndarray
    tail_differences: np.ndarray
    same_best: np.ndarray
    distances: dict[int, float]
    coefficient_differences: np.ndarray
    tail_divergences: np.ndarray

    @property
    def mean_nats(self) -> float:
        """Mean |Δ log p|."""
        return float(self.differences_nats.mean()) if len(self.differences_nats) else 0.0


@dataclass(frozen=True)
class Rescored:
    """The result of a rescoring.

    places: file and number there, of each row.  coefficient_step: of the coefficients' rounding, 0 without.  other_weights: the
    teacher is not the recorded one.
    """

    rows: Sequence[ComparedRow]
    places: Sequence[tuple[str, int]]
    tolerance_nats: float
    coefficient_step: float = 0.0
    other_weights: bool = False

    @property
    def distances(self) -> dict[int, float]:
        """Mean Σ |Δp| by offset, over the rows that have one."""
        found = {}
        for offset in OFFSETS:
            values = [row.distances[offset] for row in self.rows if np.isfinite(row.distances[offset])]
            found[offset] = float(np.mean(values)) if values else float("nan")
        return found

    def findings(self) -> Iterator[Finding]:
        """Yields rows beyond the tolerance, and targets that stand at other positions than their own."""
        for row, (file, number) in zip(self.rows, self.places, strict=True):
            if row.mean_nats > self.tolerance_nats:
                what = f"mean |Δ log p| {row.mean_nats:.3f} nats, at most {self.tolerance_nats:.3f} is tolerated"
                yield Finding("teacher", file, what, row=number, row_id=row.row_id)
            elif not row.same_best.any() and not len(row.differences_nats):
                yield Finding("teacher", file, "no entry in common with the teacher's", row=number, row_id=row.row_id)
            coefficients = row.coefficient_differences
            if coefficients.size and coefficients.mean() > self.tolerance_nats + self.coefficient_step / 2:
                what = f"mean |Δ coefficient| {coefficients.mean():.3f}, in steps of {self.coefficient_step:.3f}"
                yield Finding("teacher", file, what, row=number, row_id=row.row_id)
        distances = self.distances
        others = {offset: value for offset, value in distances.items() if offset and np.isfinite(value)}
        if others:
            best = min(others, key=lambda offset: others[offset])
            tolerated = float(np.expm1(self.tolerance_nats))
            if distances[0] > tolerated and distances[0] > SHIFT_RATIO * others[best]:
                what = (
                    f"the shift check fails: Σ|Δp| is {distances[0]:.3f} at the rows' own positions, "
                    f"{others[best]:.3f} at {best:+d}"
                )
                yield Finding("teacher", self.places[0][0], what)

    def table(self) -> str:
        """Returns everything measured as aligned text."""
        nats = np.concatenate([row.differences_nats for row in self.rows])
        tails = np.concatenate([row.tail_differences for row in self.rows])
        best = np.concatenate([row.same_best for row in self.rows])
        cells = [
            ("scored again", f"{len(self.rows):,} rows, {len(best):,} positions"),
            ("mean |Δ log p|, p > 1e-3", f"{nats.mean() if len(nats) else 0:.5f} nats"),
            ("largest |Δ log p|, p > 1e-3", f"{nats.max(initial=0):.5f} nats"),
            ("largest mean of a row", f"{max(row.mean_nats for row in self.rows):.5f} nats"),
            ("tolerated mean of a row", f"{self.tolerance_nats:.5f} nats"),
            ("mean |Δ tail mass|", f"{tails.mean() if len(tails) else 0:.6f}"),
            ("same most probable token", f"{best.mean() if len(best) else 1:.2%}"),
        ]
        if any(row.coefficient_differences.size for row in self.rows):
            coefficients = np.concatenate([row.coefficient_differences for row in self.rows])
            divergences = np.concatenate([row.tail_divergences for row in self.rows])
            cells.append(("mean |Δ coefficient|", f"{coefficients.mean():.5f}, step {self.coefficient_step:.5f}"))
            cells.append(("KL of the rebuilt tail", f"{divergences.mean() if len(divergences) else 0:.4f} nats"))
        for offset, distance in self.distances.items():
            cells.append((f"Σ|Δp| at offset {offset:+d}" if offset else "Σ|Δp| at offset 0", f"{distance:.4f}"))
        note = (
            "\nThe teacher's weights or configuration are not those that the fingerprint records."
            if self.other_weights
            else ""
        )
        return aligned(cells) + note


def _tolerance_nats(dtype: str | None) -> float:
    """Returns the tolerance for a dtype; the largest for that of a server, which nobody knows."""
    return TOLERANCE_NATS.get(str(dtype), max(TOLERANCE_NATS.values()))


def _all_positions(row: CachedSequence) -> TokenSequence:
    """Returns the row with every position to be scored, so that its neighbours can be compared with."""
    mask = np.ones(len(row.input_ids), dtype=bool)
    mask[:1] = False
    return TokenSequence(np.array(row.input_ids), mask)


def _compare(row: CachedSequence, again: SparseTargets, basis: TailBasis | None) -> ComparedRow:
    """Returns the comparison of a row. again: the targets of each of its positions.  basis: if there are coefficients."""
    stored, positions = row.targets, row.positions.astype(np.int64)
    own = again[positions]
    is_entry = stored.token_ids != PAD_ID
    found, now = _looked_up(stored.token_ids, own)
    judged = is_entry & found & (np.maximum(stored.logprobs, now) > np.log(JUDGED_PROBABILITY))
    with np.errstate(invalid="ignore"):
        differences = np.abs(stored.logprobs.astype(np.float64) - now)[judged]
    beyond = np.arange(own.token_ids.shape[1]) >= stored.num_entries[:, None]
    tail = np.exp(own.tail_logprob, dtype=np.float64) + np.where(beyond, np.exp(own.logprobs, dtype=np.float64), 0).sum(
        1
    )
    distances = {}
    for offset in OFFSETS:
        there = positions + offset
        inside = (there >= 0) & (there < len(again))
        found, now = _looked_up(stored.token_ids[inside], again[there[inside]])
        probs = np.where(is_entry[inside], np.exp(stored.logprobs[inside], dtype=np.float64), 0)
        distance = np.abs(probs - np.where(found & is_entry[inside], np.exp(now), 0)).sum(axis=1)
        distances[offset] = float(distance.mean()) if inside.any() else float("nan")
    coefficient_differences = divergences = np.zeros(0)
    if basis is not None:
        assert stored.tail_coefficients is not None and own.tail_coefficients is not None
        coefficient_differences = np.abs(stored.tail_coefficients.astype(np.float64) - own.tail_coefficients)
        divergences = _tail_divergences(stored.tail_coefficients, own, basis)
    return ComparedRow(
        row_id=row.row_id,
        differences_nats=differences,
        tail_differences=np.abs(np.exp(stored.tail_logprob, dtype=np.float64) - tail),
        same_best=stored.token_ids[:, :1].ravel() == own.token_ids[:, :1].ravel()
        if stored.token_ids.shape[1]
        else np.ones(len(stored), dtype=bool),
        distances=distances,
        coefficient_differences=coefficient_differences,
        tail_divergences=divergences,
    )


def _tail_divergences(coefficients: np.ndarray, teacher: SparseTargets, basis: TailBasis) -> np.ndarray:
    """Returns the divergence of the tails that coefficients [M, R] rebuild from the teacher's, at positions that have one."""
    samples, logprobs = teacher.sample_ids, teacher.sample_logprobs
    assert samples is not None and logprobs is not None
    found = []
    for start in range(0, len(teacher), POSITIONS_REBUILT):
        rows = slice(start, start + POSITIONS_REBUILT)
        rebuilt = (basis.offset + coefficients[rows] @ basis.directions.T).astype(np.float64)
        entries, drawn = teacher.token_ids[rows], samples[rows]
        position, entry = np.nonzero(entries != PAD_ID)
        rebuilt[position, entries[position, entry]] = -np.inf
        has_tail = drawn[:, 0] != PAD_ID
        rebuilt, drawn = rebuilt[has_tail], drawn[has_tail]
        log_shares = np.take_along_axis(rebuilt, drawn, axis=1) - np.logaddexp.reduce(rebuilt, axis=1, keepdims=True)
        own_shares = (logprobs[rows] - teacher.tail_logprob[rows, None])[has_tail]
        found.append((own_shares - log_shares).mean(axis=1))
    return np.concatenate(found)


def _looked_up(token_ids: np.ndarray, targets: SparseTargets) -> tuple[np.ndarray, np.ndarray]:
    """Returns whether each id [M, k] is among the entries of its position [M, j], and its log-probability there, float64."""
    order = np.argsort(targets.token_ids, axis=1)
    found = np.zeros(token_ids.shape, dtype=bool)
    logprobs = np.full(token_ids.shape, -np.inf)
    for position, (wanted, sorting) in enumerate(zip(token_ids, order, strict=True)):
        ids = targets.token_ids[position][sorting]
        at = np.minimum(np.searchsorted(ids, wanted), len(ids) - 1)
        found[position] = ids[at] == wanted
        logprobs[position] = np.where(found[position], targets.logprobs[position][sorting][at], -np.inf)
    return found, logprobs

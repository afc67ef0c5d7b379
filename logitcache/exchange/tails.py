"""Entries as a source has them → SparseTargets: sorted, cut to k, with a tail, adding up to 1."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from logitcache.exchange.values import BadRow
from logitcache.format.quantization import PRESETS, mass_tolerances
from logitcache.format.targets import PAD_ID, SparseTargets

LEAST_TAIL = 1e-6
"""Mass of a tail of which nothing is known but that entries add up to 1 or more."""
UNSEEN_EXCESS = 1e-5
"""By which entries may exceed 1, float32's own error of a sum, and stay as they are."""
APPROXIMATE = f"approximate (1 − Σp of a position's entries, at least {LEAST_TAIL:g})"
"""What fingerprints say of such a tail."""
MOST_MISSING = 0.25
"""By which entries and a known tail may miss 1: no rounding of a cache is as coarse."""


class Finished(NamedTuple):
    """The targets, and the number of positions whose entries had to be scaled."""

    targets: SparseTargets
    num_scaled: int


def finish_targets(
    ids: np.ndarray,
    logprobs: np.ndarray,
    tail: np.ndarray | None,
    positions: np.ndarray,
    *,
    vocab_size: int,
    top_k: int | None,
    precision: str,
    most_mass: float,
) -> Finished:
    """Returns what a cache stores of positions as a source has them.

    ids: int [N, k].  logprobs: float32 [N, k]; −inf is an entry that the position does not have.  tail: float32 [N], log of the
    mass outside the entries; if None, the tail is what the entries leave of 1.  positions: int [N], their names in messages.
    top_k: the most probable entries are kept, the others join the tail.  most_mass: what entries may add up to by their own
    rounding. Entries that exceed 1 are scaled to leave LEAST_TAIL, and beside a known tail those that miss it by more than the
    precision does.

    Raises BadRow naming a position with an id outside the vocabulary or twice, a log-probability that is no number, no entry at
    all, or a mass beyond most_mass.
    """
    present = ~np.isneginf(logprobs)
    order = np.argsort(-logprobs, axis=1, kind="stable")
    logprobs, present = np.take_along_axis(logprobs, order, axis=1), np.take_along_axis(present, order, axis=1)
    ids = np.where(present, np.take_along_axis(ids, order, axis=1), PAD_ID)
    with np.errstate(over="ignore", invalid="ignore"):
        mass = np.exp(logprobs, dtype=np.float64).sum(axis=1)
    ascending = np.sort(ids, axis=1)
    twice = ((np.diff(ascending, axis=1) == 0) & (ascending[:, 1:] != PAD_ID)).any(axis=1)
    outside = (present & ((ids < 0) | (ids >= vocab_size))).any(axis=1)
    wanted = np.full(len(mass), 1 - LEAST_TAIL) if tail is None else -np.expm1(tail.astype(np.float64))
    for wrong, what in [
        (np.isnan(logprobs).any(axis=1), "a log-probability that is not a number"),
        (outside, f"a token id outside the vocabulary of {vocab_size:,} (--vocab-size)"),
        (twice, "the same token id twice"),
        (~present.any(axis=1) & (tail is None), "no entry, though its token is trained"),
        (~(mass <= most_mass), f"probabilities that add up to more than {most_mass:g}: these are no log-probabilities"),
        ((np.abs(mass - wanted) > MOST_MISSING) & (tail is not None), "entries and tail that do not add up to 1"),
    ]:
        if wrong.any():
            raise BadRow(f"position {positions[np.argmax(wrong)]}: {what}")
    if tail is None:
        scale = mass > 1 + UNSEEN_EXCESS
    else:
        tolerance = mass_tolerances(logprobs, precision, PRESETS[precision])  # as `logitcache verify` has it
        scale = (np.abs(mass - wanted) > tolerance) & (wanted > 0) & (mass > 0)
    if scale.any():
        logprobs[scale] += np.log(wanted[scale] / mass[scale])[:, None].astype(np.float32)
    logprobs = np.where(present, np.minimum(logprobs, 0), -np.inf).astype(np.float32)
    kept = logprobs[:, :top_k]
    rest = np.exp(logprobs[:, kept.shape[1] :], dtype=np.float64).sum(axis=1)
    if tail is None:
        tail_mass = np.maximum(1 - np.exp(kept, dtype=np.float64).sum(axis=1), LEAST_TAIL)
    else:
        tail_mass = np.exp(tail.astype(np.float64)) + rest
    with np.errstate(divide="ignore"):
        tail_logprob = np.minimum(np.log(tail_mass), 0).astype(np.float32)
    if tail is not None:
        tail_logprob = np.where(rest > 0, tail_logprob, tail).astype(np.float32)
    targets = SparseTargets(ids[:, :top_k].astype(np.int32), kept, tail_logprob)
    return Finished(targets.cut_to_width(int(targets.num_entries.max(initial=0))), int(scale.sum()))

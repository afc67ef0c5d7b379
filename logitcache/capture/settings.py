"""The part of the teacher's distributions that a build captures, refused early if the teacher cannot give it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from logitcache.errors import UserError
from logitcache.format.quantization import DEFAULT_PRECISION, check_precision
from logitcache.format.tail_parts import TailParts

DEFAULT_RANK = 64
"""Coefficients of a position if the teacher's logits are seen and neither --tail-rank nor --tail-groups is given."""
BUCKET_TOP_K = 64
"""Entries of a position if --top-k is not given and there are no coefficients, or --top-p has to leave some of them out."""
LOW_RANK_TOP_K = 16
"""Entries of a position if --top-k is not given, beside coefficients."""
LOW_RANK_PROBES = 2
"""Probe tokens of a position beside coefficients."""


@dataclass(frozen=True)
class CaptureSettings:
    """The part of a distribution that becomes SparseTargets.

    top_k: entries of a position, the cap under `top_p`.  top_p: entries are taken until they hold this probability
    mass (1.0: always `top_k`).  min_k: floor under `top_p`, by default 32 or `top_k`; mass alone chooses badly for RKL and
    ToDi early in training.  tail_parts: what is stored of the tail beside its mass.  precision: how finely all that is stored,
    exact, balanced or compact (`logitcache.format.quantization`).
    """

    top_k: int = BUCKET_TOP_K
    top_p: float = 1.0
    min_k: int = None  # type: ignore[assignment]  # becomes a number at once
    tail_parts: TailParts = field(default_factory=TailParts)
    precision: str = DEFAULT_PRECISION

    def __post_init__(self) -> None:
        object.__setattr__(self, "min_k", min(32, self.top_k) if self.min_k is None else self.min_k)
        temperatures = tuple(sorted({float(t) for t in self.tail_parts.temperatures} - {1.0}))
        object.__setattr__(self, "tail_parts", replace(self.tail_parts, temperatures=temperatures))

    @classmethod
    def of_options(cls, given: Mapping[str, Any], vocab_size: int, most_rank: int) -> CaptureSettings:
        """Returns the settings of a build with these options, and with the defaults of all others.

        given: the options that have a value, by the names of `to_json`.  most_rank: of the default; 0 where no logits are seen.
        """
        rank = given.get("tail_rank", 0 if given.get("tail_groups") else min(DEFAULT_RANK, most_rank))
        few = rank and given.get("top_p", 1.0) >= 1
        top_k = max(LOW_RANK_TOP_K if few else BUCKET_TOP_K, given.get("min_k", 0))
        defaults = {
            "top_k": min(top_k, vocab_size),
            "min_k": None,
            "tail_rank": rank,
            "tail_probes": LOW_RANK_PROBES if rank else 0,
        }
        return cls.from_json({**cls().to_json(), **defaults, **given})

    def check(self, vocab_size: int, hidden_size: int | None = None) -> None:
        """Raises UserError for settings that a teacher with `vocab_size` tokens and such hidden states cannot meet."""
        check_precision(self.precision)
        for holds, message in [
            (
                1 <= self.top_k <= vocab_size,
                f"--top-k {self.top_k}: the teacher's vocabulary has {vocab_size} tokens, choose 1…{vocab_size}",
            ),
            (0 < self.top_p <= 1, f"--top-p {self.top_p}: choose a probability mass in (0, 1]"),
            (1 <= self.min_k <= self.top_k, f"--min-k {self.min_k}: choose 1…{self.top_k}, the value of --top-k"),
        ]:
            if not holds:
                raise UserError(message)
        for part, value in self.tail_parts.stored():
            for message in part.refusals(value, vocab_size):
                raise UserError(message)
        parts = self.tail_parts
        if hidden_size is not None and parts.rank > hidden_size:
            raise UserError(
                f"--tail-rank {parts.rank}: choose 0…{hidden_size}, the width of the teacher's hidden states"
            )
        if parts.probes and not parts.rank:
            raise UserError(f"--tail-probes {parts.probes} needs --tail-rank")

    @property
    def beyond_top_k(self) -> list[str]:
        """The options asked for that need the logits themselves, not only the top-k log-probabilities."""
        return [part.flag for part, _ in self.tail_parts.stored()]

    def to_json(self) -> dict[str, Any]:
        """Returns the settings as plain JSON types, for the fingerprint."""
        entries = {"top_k": self.top_k, "top_p": self.top_p, "min_k": self.min_k}
        return {**entries, **self.tail_parts.to_json("option"), "precision": self.precision}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CaptureSettings:
        """Returns the settings of `to_json`."""
        entries = {name: data[name] for name in ("top_k", "top_p", "min_k", "precision")}
        return cls(**entries, tail_parts=TailParts.from_json(data, "option"))

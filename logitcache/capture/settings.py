"""What to capture of the teacher at each position, refused early when it cannot be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from logitcache.errors import UserError


@dataclass(frozen=True)
class CaptureSettings:
    """Which part of a distribution becomes SparseTargets.

    top_k: entries of a position, the cap under `top_p`.  top_p: entries are taken until they hold this probability
    mass (1.0: always `top_k`).  min_k: floor under `top_p`; mass alone chooses badly for RKL and ToDi early in training.
    tail_groups: G, number of tail groups (0: none).  temperatures: the T ≠ 1 that training may use; the tempered tail
    log Σ p^(1/T) is stored for each.  tail_entropy: store it.  tail_samples: ids drawn from the tail per position.
    """

    top_k: int = 64
    top_p: float = 1.0
    min_k: int = 32
    tail_groups: int = 0
    temperatures: tuple[float, ...] = ()
    tail_entropy: bool = False
    tail_samples: int = 0

    @classmethod
    def checked(
        cls,
        vocab_size: int,
        top_k: int,
        top_p: float,
        min_k: int | None,
        tail_groups: int,
        temperatures: Sequence[float],
        tail_entropy: bool,
        tail_samples: int,
    ) -> CaptureSettings:
        """Settings in canonical form. Raises UserError for what a teacher with `vocab_size` tokens cannot give."""
        min_k = min(32, top_k) if min_k is None else min_k
        for holds, message in [
            (
                1 <= top_k <= vocab_size,
                f"--top-k {top_k}: the teacher's vocabulary has {vocab_size} tokens, choose 1…{vocab_size}",
            ),
            (0 < top_p <= 1, f"--top-p {top_p}: choose a probability mass in (0, 1]"),
            (1 <= min_k <= top_k, f"--min-k {min_k}: choose 1…{top_k}, the value of --top-k"),
            (
                0 <= tail_groups <= vocab_size,
                f"--tail-groups {tail_groups}: choose 0…{vocab_size}, the teacher's vocabulary",
            ),
            (
                all(0 < t < math.inf for t in temperatures),
                f"--temperatures {', '.join(map(str, temperatures))}: all must be positive and finite",
            ),
            (tail_samples >= 0, f"--tail-samples {tail_samples}: must not be negative"),
        ]:
            if not holds:
                raise UserError(message)
        tempered = tuple(sorted({float(t) for t in temperatures} - {1.0}))
        return cls(top_k, top_p, min_k, tail_groups, tempered, tail_entropy, tail_samples)

    @property
    def beyond_top_k(self) -> list[str]:
        """Options asked for that need the logits themselves, not only the top-k log-probabilities."""
        wanted = {
            "--tail-groups": self.tail_groups,
            "--temperatures": self.temperatures,
            "--tail-entropy": self.tail_entropy,
            "--tail-samples": self.tail_samples,
        }
        return [name for name, value in wanted.items() if value]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types, for the fingerprint."""
        return asdict(self) | {"temperatures": list(self.temperatures)}

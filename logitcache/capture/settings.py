"""The part of the teacher's distributions that a build captures, refused early if the teacher cannot give it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from logitcache.errors import UserError
from logitcache.format.layout import tempered_column
from logitcache.format.quantization import DEFAULT_PRECISION, check_precision


@dataclass(frozen=True)
class CaptureSettings:
    """Which part of a distribution becomes SparseTargets.

    top_k: entries of a position, the cap under `top_p`.  top_p: entries are taken until they hold this probability
    mass (1.0: always `top_k`).  min_k: floor under `top_p`, by default 32 or `top_k`; mass alone chooses badly for RKL and
    ToDi early in training.  tail_groups: G, number of tail groups (0: none).  temperatures: the T ≠ 1 that training may
    use; the tempered tail log Σ p^(1/T) is stored for each.  tail_entropy: store it.  tail_samples: ids drawn from the
    tail per position.  precision: how finely all that is stored, exact, balanced or compact (`logitcache.format.quantization`).
    """

    top_k: int = 64
    top_p: float = 1.0
    min_k: int = None  # type: ignore[assignment]  # becomes a number at once
    tail_groups: int = 0
    temperatures: Sequence[float] = ()
    tail_entropy: bool = False
    tail_samples: int = 0
    precision: str = DEFAULT_PRECISION

    def __post_init__(self) -> None:
        """Brings the settings into canonical form."""
        object.__setattr__(self, "min_k", min(32, self.top_k) if self.min_k is None else self.min_k)
        object.__setattr__(self, "temperatures", tuple(sorted({float(t) for t in self.temperatures} - {1.0})))

    def check(self, vocab_size: int) -> None:
        """Raises UserError for settings that a teacher with `vocab_size` tokens cannot meet."""
        check_precision(self.precision)
        for holds, message in [
            (
                1 <= self.top_k <= vocab_size,
                f"--top-k {self.top_k}: the teacher's vocabulary has {vocab_size} tokens, choose 1…{vocab_size}",
            ),
            (0 < self.top_p <= 1, f"--top-p {self.top_p}: choose a probability mass in (0, 1]"),
            (1 <= self.min_k <= self.top_k, f"--min-k {self.min_k}: choose 1…{self.top_k}, the value of --top-k"),
            (
                0 <= self.tail_groups <= vocab_size,
                f"--tail-groups {self.tail_groups}: choose 0…{vocab_size}, the teacher's vocabulary",
            ),
            (
                all(0 < t < math.inf for t in self.temperatures),
                f"--temperatures {', '.join(map(str, self.temperatures))}: all must be positive and finite",
            ),
            (
                len({tempered_column(t) for t in self.temperatures}) == len(self.temperatures),
                f"--temperatures {', '.join(map(str, self.temperatures))}: columns are named by six digits of them, "
                "in which all must differ",
            ),
            (self.tail_samples >= 0, f"--tail-samples {self.tail_samples}: must not be negative"),
        ]:
            if not holds:
                raise UserError(message)

    @property
    def beyond_top_k(self) -> list[str]:
        """The options asked for that need the logits themselves, not only the top-k log-probabilities."""
        wanted = {
            "--tail-groups": self.tail_groups,
            "--temperatures": self.temperatures,
            "--tail-entropy": self.tail_entropy,
            "--tail-samples": self.tail_samples,
        }
        return [name for name, value in wanted.items() if value]

    def to_json(self) -> dict[str, Any]:
        """Returns the settings as plain JSON types, for the fingerprint."""
        return asdict(self) | {"temperatures": list(self.temperatures)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> CaptureSettings:
        """Returns the settings of `to_json`."""
        return cls(**data)

"""The codebook of a shard is made of its first rows and stored in its file metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np

from logitcache.format.quantization import QuantizationSpec
from logitcache.format.targets import PAD_ID, SparseTargets

CODEBOOK_KEY = b"logitcache.codebook"
MOST_FREQUENT_IDS = 4096
LEAST_OCCURRENCES = 16
"""An id that comes up more rarely in the first rows of a shard costs more in the list than it saves."""


@dataclass(frozen=True)
class Codebook:
    """The reference that a shard's integers are counted from.

    frequent_ids: int32 [F], ids by how often they are entries. A token's rank is its place in this list, and for all others its
    id plus the length of the list: the ranks of a position's entries, ascending, lie close together whatever the vocabulary's
    own order.  group_profile: int32 [G], the typical log share of each tail group in steps of the layout's rounding; the
    positions' own shares differ from it by little.
    """

    frequent_ids: np.ndarray
    group_profile: np.ndarray

    @classmethod
    def of(cls, targets: SparseTargets, quantization: QuantizationSpec | None) -> Self:
        """Makes the codebook of a shard from its first rows."""
        ids = targets.token_ids[targets.token_ids != PAD_ID]
        counts = np.bincount(ids, minlength=1)
        frequent = np.argsort(-counts, kind="stable")[:MOST_FREQUENT_IDS]
        frequent = frequent[counts[frequent] >= LEAST_OCCURRENCES].astype(np.int32)
        groups = targets.group_logprobs
        profile = np.zeros(0 if groups is None else groups.shape[1], np.int32)
        if groups is not None and quantization:
            for group, logprobs in enumerate(groups.T):
                has_mass = np.isfinite(logprobs) & np.isfinite(targets.tail_logprob)
                if has_mass.any():
                    share = np.median(logprobs[has_mass] - targets.tail_logprob[has_mass])
                    profile[group] = np.rint(share / quantization.group_step)
        return cls(frequent, profile)

    def ranks_of_ids(self, vocab_size: int) -> np.ndarray:
        """Returns the rank of each token id, int32 [V]."""
        ranks = np.arange(vocab_size, dtype=np.int32) + np.int32(len(self.frequent_ids))
        ranks[self.frequent_ids] = np.arange(len(self.frequent_ids), dtype=np.int32)
        return ranks

    def ids_of_ranks(self, vocab_size: int) -> np.ndarray:
        """Returns the token id of each rank, int32 [F + V]; `PAD_ID` at the second rank of a frequent token.

        Raises ValueError for frequent ids that are outside the vocabulary or come twice.
        """
        frequent = self.frequent_ids
        if frequent.ndim != 1 or (frequent.size and not 0 <= frequent.min() <= frequent.max() < vocab_size):
            raise ValueError(f"its codebook has ids outside the vocabulary of {vocab_size:,}")
        others = np.arange(vocab_size, dtype=np.int32)
        others[frequent] = PAD_ID
        if np.count_nonzero(others == PAD_ID) != len(frequent):
            raise ValueError("its codebook has an id twice")
        return np.concatenate([frequent, others])

    def to_metadata(self) -> dict[bytes, bytes]:
        """Returns key and value in a Parquet file's metadata."""
        data = {"frequent_ids": self.frequent_ids.tolist(), "group_profile": self.group_profile.tolist()}
        return {CODEBOOK_KEY: json.dumps(data, separators=(",", ":")).encode()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[bytes, bytes] | None) -> Self:
        """Returns the codebook of `to_metadata`. Raises ValueError if it is missing or unreadable."""
        try:
            data = json.loads((metadata or {})[CODEBOOK_KEY])
            return cls(np.array(data["frequent_ids"], np.int32), np.array(data["group_profile"], np.int32))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"its codebook is unreadable ({error!r})") from error

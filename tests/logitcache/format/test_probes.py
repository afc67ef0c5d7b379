"""Probe tokens: as documented, the same for a row as for many, uniform."""

from __future__ import annotations

import hashlib
import re

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from logitcache.format.probes import probe_ids, probe_ids_of_rows
from tests.helpers.smallcaches import EVERYTHING, VOCAB, random_rows, small
from tests.test_architecture import README


def documented(row_id: str, position: int, j: int, vocab_size: int) -> int:
    """The documentation's definition, in whole numbers of any size."""
    mask = 2**64 - 1
    seed = int.from_bytes(hashlib.blake2b(row_id.encode(), digest_size=8).digest(), "little")
    x = seed + (position * 256 + j + 1) * 0x9E3779B97F4A7C15 & mask
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
    return ((x ^ x >> 31) >> 32) * vocab_size >> 32


@small
@given(
    row_id=st.text("0123456789abcdef", max_size=32),
    positions=st.lists(st.integers(0, 2**31 - 1), max_size=5),
    num_probes=st.integers(0, 255),
    vocab_size=st.integers(1, 2**31 - 1),
)
def test_the_generator_is_the_documented_one(
    row_id: str, positions: list[int], num_probes: int, vocab_size: int
) -> None:
    found = probe_ids(row_id, np.array(positions, np.int32), num_probes, vocab_size)
    assert found.dtype == np.int32 and found.shape == (len(positions), num_probes)
    assert found.tolist() == [[documented(row_id, i, j, vocab_size) for j in range(num_probes)] for i in positions]


def test_rows_have_the_same_probes_together_as_alone() -> None:
    sequences = [sequence for sequence, _ in random_rows(20, EVERYTHING)]
    positions = [sequence.positions for sequence in sequences]
    ids = [sequence.row_id for sequence in sequences]
    together = probe_ids_of_rows(ids, [len(part) for part in positions], np.concatenate(positions), 2, VOCAB)
    alone = [probe_ids(row_id, part, 2, VOCAB) for row_id, part in zip(ids, positions, strict=True)]
    assert np.array_equal(together, np.concatenate(alone))
    assert probe_ids_of_rows([], [], np.empty(0, np.int32), 2, VOCAB).shape == (0, 2)


def test_every_token_is_drawn_equally_often() -> None:
    counts = np.bincount(probe_ids("0" * 32, np.arange(50_000), 2, VOCAB).reshape(-1), minlength=VOCAB)
    assert ((counts - 2000) ** 2 / 2000).sum() < 95  # chi square of 49 degrees of freedom: 1 in 10,000


def test_the_readmes_test_vectors_are_right() -> None:
    rows = re.findall(r"^\| `([0-9a-f]{32})` \| (\d+) \| (\d+) \| ([\d, ]+) \|$", README, re.MULTILINE)
    assert len(rows) == 5
    for row_id, position, vocab_size, ids in rows:
        found = probe_ids(row_id, np.array([int(position)]), 3, int(vocab_size))
        assert found.tolist() == [[int(token) for token in ids.split(", ")]]
        assert found.tolist() == [[documented(row_id, int(position), j, int(vocab_size)) for j in range(3)]]

"""What is captured of a position travels as one row of int32."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logitcache import SparseTargets
from logitcache.capture.settings import CaptureSettings
from logitcache.capture.wire_format import position_width, unpack
from logitcache.format.layout import Layout
from logitcache.format.tail_parts import TailParts
from tests.helpers.smallcaches import full_distributions, small, sparse_targets

BY_HAND = CaptureSettings(2, 1.0, 1, tail_parts=TailParts(groups=3, temperatures=(0.5, 2.0), entropy=True, samples=1))


def bits(value: float) -> int:
    return int(np.float32(value).view(np.int32))


def packed(targets: SparseTargets) -> np.ndarray:
    """The rows that the order of columns prescribes, one position at a time."""
    rows = []
    for i in range(len(targets)):
        floats = [*targets.logprobs[i], targets.tail_logprob[i]]
        floats += [] if targets.group_logprobs is None else list(targets.group_logprobs[i])
        floats += [values[i] for values in targets.tempered_tail.values()]
        floats += [] if targets.tail_entropy is None else [targets.tail_entropy[i]]
        samples = [] if targets.sample_ids is None else [int(sample) for sample in targets.sample_ids[i]]
        sampled = [] if targets.sample_logprobs is None else list(targets.sample_logprobs[i])
        rows.append([*map(int, targets.token_ids[i]), *map(bits, floats), *samples, *map(bits, sampled)])
    return np.array(rows, dtype=np.int32)


@given(
    st.integers(1, 6), st.integers(0, 3), st.sampled_from([(), (2.0,), (0.5, 2.0)]), st.booleans(), st.integers(0, 3)
)
@small
def test_a_row_holds_every_quantity_bit_for_bit(
    k: int, groups: int, temperatures: tuple[float, ...], tail_entropy: bool, samples: int
) -> None:
    settings = CaptureSettings(
        k, 0.9, 1, tail_parts=TailParts(groups=groups, temperatures=temperatures, entropy=tail_entropy, samples=samples)
    )
    layout = Layout(50, TailParts(groups=groups, temperatures=temperatures, entropy=tail_entropy, samples=samples))
    full = full_distributions(np.random.default_rng(k), 5)
    expected = sparse_targets(full, [k, 1, k, 1, 1], layout)
    rows = packed(expected)
    assert rows.shape == (5, position_width(settings))
    found = unpack(rows, settings)
    assert packed(found).tolist() == rows.tolist()
    assert list(found.tempered_tail) == list(temperatures)
    for name in ("group_logprobs", "tail_entropy", "sample_ids", "sample_logprobs"):
        assert (getattr(found, name) is None) == (getattr(expected, name) is None)
        if getattr(found, name) is not None:
            assert getattr(found, name).shape == getattr(expected, name).shape


def test_the_order_of_columns_is_fixed() -> None:
    floats = [-0.5, -2.0, -1.0, -3.0, -4.0, -np.inf, 0.25, 0.75, -7.0]
    row = np.array([[11, 12, *map(bits, floats), 13, bits(-8.0)]], dtype=np.int32)
    assert position_width(BY_HAND) == row.shape[1] == 13
    found = unpack(row, BY_HAND)
    assert found.token_ids.tolist() == [[11, 12]]
    assert found.logprobs.tolist() == [[-0.5, -2.0]]
    assert found.tail_logprob.tolist() == [-1.0]
    assert found.group_logprobs is not None and found.group_logprobs.tolist() == [[-3.0, -4.0, -np.inf]]
    assert {t: values.tolist() for t, values in found.tempered_tail.items()} == {0.5: [0.25], 2.0: [0.75]}
    assert found.tail_entropy is not None and found.tail_entropy.tolist() == [-7.0]
    assert found.sample_ids is not None and found.sample_ids.tolist() == [[13]]
    assert found.sample_logprobs is not None and found.sample_logprobs.tolist() == [[-8.0]]


def test_unpacking_copies_nothing() -> None:
    rows = np.zeros((4, position_width(BY_HAND)), dtype=np.int32)
    found = unpack(rows, BY_HAND)
    arrays = [getattr(found, name) for name in ("token_ids", "logprobs", "tail_logprob", "group_logprobs")]
    arrays += [found.tail_entropy, found.sample_ids, found.sample_logprobs, *found.tempered_tail.values()]
    assert all(np.shares_memory(array, rows) for array in arrays)


@pytest.mark.parametrize("rows", [np.zeros((4, 12), np.int32), np.zeros((4, 13), np.float32), np.zeros(13, np.int32)])
def test_rows_of_other_settings_are_refused(rows: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"packed positions: received .* these settings pack int32 \[N, 13\]"):
        unpack(rows, BY_HAND)


@pytest.mark.slow
def test_packing_needs_no_torch() -> None:
    code = "import sys, logitcache.capture.wire_format; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

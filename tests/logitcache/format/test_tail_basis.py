"""The file of the tail basis: written and read, and refused where it is no basis."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import logitcache
from logitcache.format.layout import Layout
from logitcache.format.tail_basis import TailBasis, read_tail_basis, rebuilt, with_rank, write_tail_basis
from logitcache.format.tail_parts import TAIL_BASIS_NAME, TailParts
from logitcache.storage.atomic import file_sha256
from logitcache.storage.folder import Folder
from tests.helpers.smallcaches import (
    EVERYTHING,
    VOCAB,
    full_distributions,
    random_rows,
    small,
    sparse_targets,
    tail_basis,
    write_cache,
)

BASIS = tail_basis(EVERYTHING)


def stored(folder: Path, basis: TailBasis) -> bytes:
    write_tail_basis(Folder(folder), basis)
    return (folder / TAIL_BASIS_NAME).read_bytes()


def assert_same_basis(read: TailBasis, written: TailBasis) -> None:
    assert read.step == written.step
    for name in ("offset", "directions", "weights", "variances"):
        ours, theirs = getattr(read, name), getattr(written, name)
        assert ours.dtype == theirs.dtype == np.float32
        np.testing.assert_allclose(ours, theirs, atol=2e-3 if name == "directions" else 0, rtol=0, err_msg=name)
    assert (
        np.abs(read.weights.astype(np.float64) @ read.directions).max() <= 1e-7
    )  # centred, whatever half precision does


@pytest.mark.parametrize(("vocab_size", "rank"), [(VOCAB, 3), (2, 1), (40_000, 5)])
def test_a_basis_is_read_as_it_was_written(vocab_size: int, rank: int, tmp_path: Path) -> None:
    basis = tail_basis(Layout(vocab_size, TailParts(rank=rank)))
    assert_same_basis(read_tail_basis(io.BytesIO(stored(tmp_path, basis))), basis)
    assert basis.first(1).rank == 1


WRONG: dict[str, tuple[Callable[[TailBasis], dict[str, Any]], str]] = {
    "nan": (lambda b: {"offset": np.where(np.arange(VOCAB) == 7, np.nan, b.offset)}, "not finite"),
    "step": (lambda b: {"step": 0.0}, "rounds nothing"),
    "rising": (lambda b: {"variances": b.variances[::-1]}, "3 that fall"),
    "too few": (lambda b: {"variances": b.variances[:2]}, "3 that fall"),
    "negative": (lambda b: {"weights": b.weights - b.weights.max()}, "sum 1"),
    "sum": (lambda b: {"weights": b.weights * 2}, "sum 1"),
    "long": (lambda b: {"directions": b.directions * 2}, "orthonormal"),
    "off centre": (lambda b: {"directions": b.directions + np.float32(0.1)}, "centred"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_basis_is_refused(name: str, tmp_path: Path) -> None:
    change, message = WRONG[name]
    content = stored(tmp_path, replace(BASIS, **change(BASIS)))
    with pytest.raises(ValueError, match=message):
        read_tail_basis(io.BytesIO(content))


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    content = stored(tmp_path, BASIS)
    for damaged in (b"", content[:-9], content[: len(content) // 2] + content[len(content) // 2 + 20 :]):
        with pytest.raises(ValueError):
            read_tail_basis(io.BytesIO(damaged))
    table = pq.read_table(tmp_path / TAIL_BASIS_NAME)
    floats = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(3 * VOCAB, np.float32)), 3)
    others = [
        table.drop_columns("weight"),
        table.replace_schema_metadata({}),
        table.replace_schema_metadata({b"logitcache": b'{"step": []}'}),
        table.set_column(2, "directions", floats),
        table.set_column(2, "directions", pa.array(np.zeros(VOCAB, np.float32))),
        table.set_column(0, "offset", pa.array([None] * VOCAB, pa.float32())),
    ]
    for other in others:
        pq.write_table(other, file := io.BytesIO())
        with pytest.raises(ValueError):
            read_tail_basis(file)


def test_a_cache_has_its_basis_and_refuses_another(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    cache = write_cache(root, random_rows(3, EVERYTHING), EVERYTHING)
    assert cache.tail_basis is not None
    assert_same_basis(cache.tail_basis, BASIS)
    assert write_cache(tmp_path / "without", random_rows(3, Layout(VOCAB)), Layout(VOCAB)).tail_basis is None

    def refusal(basis: TailBasis) -> str:
        write_tail_basis(Folder(root), basis)
        files = {**cache.manifest.files, TAIL_BASIS_NAME: file_sha256(root / TAIL_BASIS_NAME)}
        replace(cache.manifest, files=files).write(Folder(root))
        with pytest.raises(logitcache.UserError) as refused:
            _ = logitcache.open(root).tail_basis
        return str(refused.value)

    larger = tail_basis(replace(EVERYTHING, vocab_size=VOCAB + 1))
    assert "3 directions of 51 ids" in refusal(larger)
    assert "1 directions of 50 ids" in refusal(BASIS.first(1))
    (root / TAIL_BASIS_NAME).write_bytes(b"altered")
    with pytest.raises(logitcache.UserError, match="SHA-256"):
        _ = logitcache.open(root).tail_basis


def test_with_every_direction_the_whole_distribution_is_rebuilt() -> None:
    layout = Layout(VOCAB, TailParts(rank=VOCAB - 1, probes=2), precision="exact")
    full = full_distributions(np.random.default_rng(0), 5)
    targets = sparse_targets(full, [0, 1, 8, VOCAB - 1, VOCAB], layout)
    found = rebuilt(targets, tail_basis(layout))
    assert found.dtype == np.float32 and found.shape == (5, VOCAB)
    np.testing.assert_allclose(np.exp(found, dtype=np.float64).sum(axis=1), 1, atol=1e-5)
    entries = targets.token_ids[targets.token_ids >= 0]
    rows = np.repeat(np.arange(5), targets.num_entries)
    assert np.array_equal(found[rows, entries], targets.logprobs[targets.token_ids >= 0])
    divergence = (np.exp(full) * (full - found)).sum(axis=1)
    assert (divergence <= 1e-4).all(), divergence  # directions are stored in half precision


@small
@given(rank=st.integers(1, 6), fewer=st.integers(1, 6), seed=st.integers(0, 2**32 - 1))
def test_fewer_coefficients_leave_what_a_capture_with_fewer_leaves(rank: int, fewer: int, seed: int) -> None:
    fewer = min(fewer, rank)
    layout = Layout(VOCAB, TailParts(rank=rank, probes=3), precision="exact")
    basis = tail_basis(layout)
    full = full_distributions(np.random.default_rng(seed), 4)
    targets = sparse_targets(full, [3] * 4, layout)
    found = with_rank(targets, basis, fewer)
    logits = full - basis.offset
    logits -= (logits @ basis.weights)[:, None]
    coefficients = logits * basis.weights @ basis.directions[:, :fewer]
    left = logits - coefficients @ basis.directions[:, :fewer].T
    assert targets.probe_ids is not None
    assert found.probe_residuals is not None and found.tail_coefficients is not None
    np.testing.assert_allclose(found.tail_coefficients, coefficients, atol=1e-5)
    np.testing.assert_allclose(found.probe_residuals, np.take_along_axis(left, targets.probe_ids, axis=1), atol=1e-4)
    assert found.probe_residuals.dtype == np.float32

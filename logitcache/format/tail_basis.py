"""The basis of the low-rank tail is stored as tail_basis.parquet: a row per token, step and variances in its metadata.

The teacher's logits l of a position, up to a shift, are about m + U·z for the position's coefficients z = Uᵀ diag(w) (l − m).
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from logitcache.errors import one_line
from logitcache.format.footer import check_pages, open_parquet, read_footer
from logitcache.format.layout import METADATA_KEY, Layout
from logitcache.format.quantization import MOST_STEP
from logitcache.format.tail_parts import TAIL_BASIS_NAME
from logitcache.format.targets import PAD_ID, SparseTargets
from logitcache.storage.folder import Folder

MAX_TAIL_BASIS_BYTES = 1 << 28
"""Of the file: 500 directions of a vocabulary of 262 144 tokens."""
ROWS_WRITTEN_AT_ONCE = 1 << 14
REBUILT_AT_ONCE = 1 << 24
"""Log-probabilities of rebuilt distributions that are held at a time."""
WEIGHT_TOLERANCE = 1e-3
"""By how much the weights' sum may miss 1."""
UNIT_TOLERANCE = 1e-2
"""By how much directions, which are rounded to half precision, may miss being centred and orthonormal."""


@dataclass(frozen=True, eq=False)
class TailBasis:
    """The basis in which all positions of a cache have their coefficients.

    offset: m, float32 [V].  directions: U, float32 [V, R], centred and orthonormal under the weights, in falling order of
    importance, so that any first ones are a basis too.  weights: w, float32 [V], ≥ 0, of sum 1.  step: of all coefficients at the
    bits of `balanced`; the layout of a cache has its own.  variances: of each coefficient where it was calibrated,
    float32 [R].
    """

    offset: np.ndarray
    directions: np.ndarray
    weights: np.ndarray
    step: float
    variances: np.ndarray

    @property
    def rank(self) -> int:
        """R, the number of directions."""
        return int(self.directions.shape[1])

    def first(self, rank: int) -> TailBasis:
        """Returns the basis of the first directions."""
        return TailBasis(self.offset, self.directions[:, :rank], self.weights, self.step, self.variances[:rank])


def write_tail_basis(folder: Folder, basis: TailBasis, name: str = TAIL_BASIS_NAME) -> None:
    """Writes a basis; its directions in half precision."""
    directions = pa.array(basis.directions.astype(np.float16).reshape(-1))
    columns = {
        "offset": pa.array(basis.offset.astype(np.float32)),
        "weight": pa.array(basis.weights.astype(np.float32)),
        "directions": pa.FixedSizeListArray.from_arrays(directions, basis.rank),
    }
    numbers = {"step": float(basis.step), "variances": basis.variances.astype(np.float64).tolist()}
    table = pa.table(columns).replace_schema_metadata({METADATA_KEY: json.dumps(numbers)})
    with folder.writing(name) as path:
        pq.write_table(
            table,
            path,
            compression="zstd",
            row_group_size=ROWS_WRITTEN_AT_ONCE,
            use_dictionary=False,
            use_byte_stream_split=["offset", "weight"],  # of half precision, few readers know it
            write_statistics=False,
            write_page_checksum=True,
        )


def read_tail_basis(file: BinaryIO) -> TailBasis:
    """Reads a basis. Its directions, whose weighted mean half precision has moved, are centred again.

    Raises ValueError if the file holds anything else, or what is no basis.
    """
    footer = read_footer(file, file.seek(0, os.SEEK_END))
    for group in footer.row_groups:
        check_pages(file, group)
    try:
        table = open_parquet(file, footer.metadata).read(use_threads=False).combine_chunks()
        numbers = json.loads(table.schema.metadata[METADATA_KEY])
        directions = table["directions"].combine_chunks()
        basis = TailBasis(
            _floats(table["offset"].combine_chunks(), pa.float32()),
            _floats(directions.flatten(), pa.float16()).reshape(len(table), directions.type.list_size),
            _floats(table["weight"].combine_chunks(), pa.float32()),
            float(numbers["step"]),
            np.array(numbers["variances"], np.float32),
        )
    except (OSError, LookupError, TypeError, AttributeError, pa.ArrowException) as error:
        raise ValueError(one_line(error)) from error
    _check(basis)
    return replace(basis, directions=centred(basis.directions, basis.weights))


def centred(directions: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns directions [V, R] less their weighted mean, so that a shift of the logits changes no coefficient."""
    result: np.ndarray = directions - (weights.astype(np.float64) @ directions).astype(np.float32)
    return result


def with_rank(targets: SparseTargets, basis: TailBasis, rank: int) -> SparseTargets:
    """Returns targets with their first coefficients; what the others say of the probe tokens' logits joins the residuals."""
    coefficients, residuals, ids = targets.tail_coefficients, targets.probe_residuals, targets.probe_ids
    assert coefficients is not None
    if residuals is not None and ids is not None:
        dropped = np.einsum("mpr,mr->mp", basis.directions[ids, rank:], coefficients[:, rank:])
        residuals = residuals + dropped.astype(np.float32)
    return replace(targets, tail_coefficients=coefficients[:, :rank], probe_residuals=residuals)


def rebuilt(targets: SparseTargets, basis: TailBasis) -> np.ndarray:
    """Returns log-probabilities of the whole vocabulary, float32 [M, V]: the entries', and the tail's by the basis."""
    assert targets.tail_coefficients is not None
    logits: np.ndarray = targets.tail_coefficients @ basis.directions.T + basis.offset
    rows, places = np.nonzero(targets.token_ids != PAD_ID)
    ids = targets.token_ids[rows, places]
    logits[rows, ids] = -np.inf
    largest = logits.max(axis=1, keepdims=True)
    logits -= np.where(np.isfinite(largest), largest, 0)  # of no tail at all
    with np.errstate(divide="ignore", invalid="ignore"):
        logits += (targets.tail_logprob - np.log(np.exp(logits).sum(axis=1)))[:, None]
    logits[rows, ids] = targets.logprobs[rows, places]
    return logits


def extended(targets: SparseTargets, basis: TailBasis, top_k: int) -> SparseTargets:
    """Returns `top_k` entries of each position: its own, then the likeliest of the tail as the basis rebuilds it.

    The tail keeps its rest; of its other parts nothing is returned.
    """
    num_positions, width = targets.token_ids.shape
    ids = np.full((num_positions, top_k), PAD_ID, np.int32)
    logprobs = np.full(ids.shape, -np.inf, np.float32)
    ids[:, :width], logprobs[:, :width] = targets.token_ids, targets.logprobs
    for start in range(0, num_positions, step := max(REBUILT_AT_ONCE // len(basis.offset), 1)):
        part = targets[start : start + step]
        of_tail = rebuilt(part, basis)
        rows, places = np.nonzero(part.token_ids != PAD_ID)
        of_tail[rows, part.token_ids[rows, places]] = -np.inf
        best = np.argpartition(-of_tail, top_k - 1, axis=1)[:, :top_k]
        values = np.take_along_axis(of_tail, best, axis=1)
        order = np.argsort(-values, axis=1, kind="stable")
        best, values = np.take_along_axis(best, order, axis=1), np.take_along_axis(values, order, axis=1)
        from_tail = np.arange(top_k) - part.num_entries[:, None]
        rows, places = np.nonzero((from_tail >= 0) & np.isfinite(np.take_along_axis(values, from_tail, axis=1)))
        taken = from_tail[rows, places]
        ids[start + rows, places], logprobs[start + rows, places] = best[rows, taken], values[rows, taken]
    added = np.exp(logprobs, dtype=np.float64).sum(axis=1) - np.exp(targets.logprobs, dtype=np.float64).sum(axis=1)
    with np.errstate(divide="ignore"):
        rest = np.log(np.maximum(np.exp(targets.tail_logprob, dtype=np.float64) - added, 0)).astype(np.float32)
    return SparseTargets(ids, logprobs, rest)


def check_tail_basis(basis: TailBasis, layout: Layout) -> None:
    """Raises ValueError if the positions of a cache with this layout cannot have their coefficients in this basis."""
    if len(basis.offset) != layout.vocab_size or basis.rank < layout.tail_parts.rank:
        raise ValueError(
            f"it has {basis.rank} directions of {len(basis.offset):,} ids, the cache "
            f"{layout.tail_parts.rank} of {layout.vocab_size:,}"
        )


def _floats(array: pa.Array, arrow_type: pa.DataType) -> np.ndarray:
    if array.type != arrow_type or array.null_count:
        raise ValueError(
            f"its numbers are {array.type}, {arrow_type} is wanted" + ", none missing" * bool(array.null_count)
        )
    numbers: np.ndarray = array.to_numpy(zero_copy_only=False).astype(np.float32)
    return numbers


def _check(basis: TailBasis) -> None:
    """Raises ValueError for numbers that are no basis."""
    weights, directions = basis.weights, basis.directions
    numbers = (basis.offset, directions, weights, basis.variances)
    if not all(np.isfinite(values).all() for values in numbers):
        raise ValueError("a number of it is not finite")
    if basis.variances.shape != (basis.rank,) or not basis.rank or np.any(np.diff(basis.variances) > 0):
        raise ValueError(f"its variances are not {basis.rank} that fall")
    if not 0 < basis.step <= MOST_STEP:
        raise ValueError(f"its step of {basis.step} rounds nothing")
    if np.any(weights < 0) or not abs(weights.sum(dtype=np.float64) - 1) <= WEIGHT_TOLERANCE:
        raise ValueError("its weights are not positive numbers of sum 1")
    products = directions.T @ np.column_stack([directions * weights[:, None], weights])
    wanted = np.eye(basis.rank, basis.rank + 1, dtype=np.float32)
    if not np.abs(products - wanted).max() <= UNIT_TOLERANCE:
        raise ValueError("its directions are not centred and orthonormal under its weights")

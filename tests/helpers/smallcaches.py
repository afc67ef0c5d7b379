"""Small caches and their parts, made from random distributions with numpy alone; computed the slow, obvious way."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Concatenate, ParamSpec
from unittest.mock import patch

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from logitcache import CachedSequence, LogitCache, SparseTargets
from logitcache.format import shards
from logitcache.format.layout import Layout
from logitcache.format.manifest import Manifest
from logitcache.format.probes import probe_ids
from logitcache.format.quantization import PRESETS, QuantizationSpec
from logitcache.format.sequences import TokenSequence
from logitcache.format.tail_basis import TailBasis, write_tail_basis
from logitcache.format.tail_groups import write_tail_groups
from logitcache.format.tail_parts import TAIL_BASIS_NAME, TAIL_GROUPS_NAME, TailParts
from logitcache.storage.atomic import file_sha256
from logitcache.storage.folder import Folder

VOCAB = 50
COLUMNS = {"id": "int64", "url": "string", "score": "double", "flag": "bool"}
COEFFICIENT_STEP = 0.125
EVERY_PART = TailParts(groups=3, temperatures=(0.5, 2.0), entropy=True, samples=2, rank=3, probes=2)
EVERYTHING = Layout(VOCAB, EVERY_PART, columns=COLUMNS).with_coefficient_step(COEFFICIENT_STEP)
FINGERPRINT = {
    "teacher": {"name": "tiny", "architecture": "Tiny", "dtype": "float32", "engine": "none", "engine_version": "0"},
    "corpus": {"sources": [{"name": "random"}]},
    "capture": {"top_k": 8},
}
Row = tuple[TokenSequence, SparseTargets]
P = ParamSpec("P")

small = settings(max_examples=50, deadline=None, database=None)


def full_distributions(random: np.random.Generator, positions: int, vocab_size: int = VOCAB) -> np.ndarray:
    """Log-probabilities of random teachers, float64 [M, V]."""
    logits = random.normal(scale=3, size=(positions, vocab_size))
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return logits


def tail_groups(layout: Layout) -> np.ndarray:
    """Every id its own group, as far as there are groups; the last group holds the rest."""
    return np.arange(layout.vocab_size, dtype=np.int32).clip(max=layout.tail_parts.groups - 1)


def at_precision(layout: Layout, precision: str) -> Layout:
    return replace(layout, precision=precision, quantization=None).with_coefficient_step(COEFFICIENT_STEP)


def tail_basis(layout: Layout, seed: int = 0) -> TailBasis:
    """Directions at random, with weights at random under which they are centred and orthonormal."""
    random = np.random.default_rng(seed)
    weights = random.random(layout.vocab_size) + 0.1
    weights /= weights.sum()
    raw = random.normal(size=(layout.vocab_size, layout.tail_parts.rank))
    raw -= weights @ raw
    orthonormal, _ = np.linalg.qr(raw * np.sqrt(weights)[:, None])
    directions = (orthonormal / np.sqrt(weights)[:, None]).astype(np.float16).astype(np.float32)
    variances = np.arange(layout.tail_parts.rank, 0, -1)
    offset = random.normal(size=layout.vocab_size)
    m, u, w, v = (values.astype(np.float32) for values in (offset, directions, weights, variances))
    return TailBasis(m, u, w, COEFFICIENT_STEP, v)


def low_rank(
    full: np.ndarray, layout: Layout, sequence: TokenSequence | None, basis: TailBasis | None = None
) -> dict[str, np.ndarray]:
    """Coefficients of the logits, and what these leave at the probe tokens of the sequence, or of another."""
    parts = layout.tail_parts
    if not parts.rank:
        return {}
    basis = basis or tail_basis(layout)
    centred = full - basis.offset
    centred -= (centred @ basis.weights)[:, None]
    coefficients = centred * basis.weights @ basis.directions
    found = {"tail_coefficients": coefficients.astype(np.float32)}
    if parts.probes:
        row_id, positions = (sequence.row_id, sequence.positions) if sequence else ("", np.arange(len(full)))
        ids = probe_ids(row_id, positions, parts.probes, layout.vocab_size)
        residuals = np.take_along_axis(centred - coefficients @ basis.directions.T, ids, axis=1)
        found |= {"probe_residuals": residuals.astype(np.float32), "probe_ids": ids}
    return found


def sparse_targets(
    full: np.ndarray,
    num_entries: Sequence[int],
    layout: Layout,
    groups: np.ndarray | None = None,
    seed: int = 0,
    sequence: TokenSequence | None = None,
) -> SparseTargets:
    """What a capture stores of `full` [M, V], position by position and in float64.  sequence: where it has probes."""
    random = np.random.default_rng(seed)
    k = max(num_entries, default=0)
    groups = tail_groups(layout) if groups is None else groups
    rows: list[dict[str | float, Any]] = []
    for logprobs, count in zip(full, num_entries, strict=True):
        order = np.argsort(-logprobs, kind="stable")
        entries, rest = order[:count], order[count:]
        mass = np.exp(logprobs[rest]).sum()
        drawn = (
            random.choice(rest, layout.tail_parts.samples, p=np.exp(logprobs[rest]) / mass)
            if mass > 0
            else np.full(layout.tail_parts.samples, -1)
        )
        rows.append(
            {
                "token_ids": [*entries, *[-1] * (k - count)],
                "logprobs": [*logprobs[entries], *[-np.inf] * (k - count)],
                "tail_logprob": _log(mass),
                "group_logprobs": [
                    _log(np.exp(logprobs[[i for i in rest if groups[i] == g]]).sum())
                    for g in range(layout.tail_parts.groups)
                ],
                **{T: _log((np.exp(logprobs[rest]) ** (1 / T)).sum()) for T in layout.tail_parts.temperatures},
                "tail_entropy": (np.exp(logprobs[rest]) * logprobs[rest]).sum() / mass if mass > 0 else 0.0,
                "sample_ids": drawn,
                "sample_logprobs": [logprobs[i] if i >= 0 else -np.inf for i in drawn],
            }
        )

    def column(name: Any, dtype: type, *width: int) -> np.ndarray:
        return np.array([row[name] for row in rows], dtype=dtype).reshape(len(rows), *width)

    return SparseTargets(
        token_ids=column("token_ids", np.int32, k),
        logprobs=column("logprobs", np.float32, k),
        tail_logprob=column("tail_logprob", np.float32),
        group_logprobs=column("group_logprobs", np.float32, layout.tail_parts.groups)
        if layout.tail_parts.groups
        else None,
        tempered_tail={T: column(T, np.float32) for T in layout.tail_parts.temperatures},
        tail_entropy=column("tail_entropy", np.float32) if layout.tail_parts.entropy else None,
        sample_ids=column("sample_ids", np.int32, layout.tail_parts.samples) if layout.tail_parts.samples else None,
        sample_logprobs=column("sample_logprobs", np.float32, layout.tail_parts.samples)
        if layout.tail_parts.samples
        else None,
        **low_rank(full, layout, sequence),
    )


def random_rows(count: int, layout: Layout, seed: int = 0, longest: int = 12, max_entries: int = 8) -> list[Row]:
    """Sequences of different lengths with gaps in their masks, ragged entries, and columns that are sometimes missing."""
    random = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        length = int(random.integers(2, longest + 1))
        mask = random.random(length) < 0.7
        mask[0], mask[-1] = False, True
        columns = {"id": number, "url": f"https://example.org/{number}", "score": number / 7, "flag": number % 2 == 0}
        kept = {name: columns[name] if random.random() < 0.7 else None for name in layout.columns}
        sequence = TokenSequence(random.integers(0, layout.vocab_size, length).astype(np.int32), mask, kept)
        full = full_distributions(random, len(sequence.positions), layout.vocab_size)
        counts = random.integers(1, max_entries + 1, len(full))
        rows.append((sequence, sparse_targets(full, counts.tolist(), layout, seed=number, sequence=sequence)))
    return rows


def made_once(make: Callable[Concatenate[Path, P], LogitCache]) -> Callable[Concatenate[Path, P], LogitCache]:
    """Makes a cache of the same arguments by copying the files of the first: patched code needs other arguments."""
    made: dict[bytes, dict[str, bytes]] = {}

    @functools.wraps(make)
    def copied(root: Path, /, *args: P.args, **kwargs: P.kwargs) -> LogitCache:
        key = pickle.dumps((args, kwargs))
        if key not in made:
            fresh = not root.exists() or not any(root.iterdir())
            cache = make(root, *args, **kwargs)
            if fresh:
                made[key] = {
                    str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()
                }
            return cache
        for name, content in made[key].items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content)
        return LogitCache(str(root))

    return copied


@made_once
def write_cache(
    root: Path, rows: Sequence[Row], layout: Layout, rows_per_shard: int = 1000, row_group_bytes: int = 4 << 20
) -> LogitCache:
    """A finished cache of `rows`."""
    parts = [rows[i : i + rows_per_shard] for i in range(0, len(rows), rows_per_shard)]
    infos = []
    with patch.object(shards, "ROW_GROUP_BYTES", row_group_bytes):
        for index, part in enumerate(parts):
            with shards.ShardWriter(Folder(root), shards.shard_name(index, len(parts)), layout) as writer:
                for sequence, targets in part:
                    writer.write(sequence, targets)
            infos.append(writer.info)
    files = {}
    if layout.tail_parts.groups:
        write_tail_groups(Folder(root), tail_groups(layout))
        files[TAIL_GROUPS_NAME] = file_sha256(root / TAIL_GROUPS_NAME)
    if layout.tail_parts.rank:
        write_tail_basis(Folder(root), tail_basis(layout))
        files[TAIL_BASIS_NAME] = file_sha256(root / TAIL_BASIS_NAME)
    Manifest(layout, FINGERPRINT, tuple(infos), {"empty": 2}, "tests", files).write(Folder(root))
    return LogitCache(str(root))


def assert_holds(cached: CachedSequence, row: Row, layout: Layout = EVERYTHING) -> None:
    """The cached row is the one that was written, up to the rounding that the layout declares."""
    sequence, written = row
    assert cached.row_id == sequence.row_id
    assert cached.input_ids.tolist() == sequence.input_ids.tolist()
    assert cached.loss_mask.tolist() == sequence.loss_mask.tolist()
    assert cached.positions.tolist() == [i - 1 for i, trained in enumerate(sequence.loss_mask) if trained]
    assert dict(cached.columns) == dict(sequence.columns)
    read, quantization = cached.targets, layout.quantization
    assert_same_entries(read, written, quantization)
    tail_step, sample_step = (quantization.tail_step, quantization.sample_step) if quantization else (0.0, 0.0)
    assert_within(read.tail_logprob, written.tail_logprob, tail_step / 2)
    assert read.tempered_tail.keys() == written.tempered_tail.keys()
    for temperature, values in written.tempered_tail.items():
        assert_within(read.tempered_tail[temperature], values, tail_step / 2)
    assert_within(read.tail_entropy, written.tail_entropy, tail_step / 2)
    # The share is rounded, and the tail that it is of.
    assert_within(
        read.group_logprobs, written.group_logprobs, quantization.group_step / 2 + tail_step if quantization else 0.0
    )
    assert (read.sample_ids is None) == (written.sample_ids is None)
    if written.sample_ids is not None:
        assert read.sample_ids is not None
        assert read.sample_ids.tolist() == written.sample_ids.tolist()
    assert_within(read.sample_logprobs, written.sample_logprobs, sample_step / 2)
    assert_within(
        read.tail_coefficients, written.tail_coefficients, ((quantization and quantization.coefficient_step) or 0.0) / 2
    )
    assert_within(read.probe_residuals, written.probe_residuals, quantization.probe_step / 2 if quantization else 0.0)
    assert np.array_equal(read.probe_ids, written.probe_ids)  # type: ignore[arg-type]


def assert_same_entries(read: SparseTargets, written: SparseTargets, quantization: QuantizationSpec | None) -> None:
    """The same ids at every position, most probable first, padded at the end; probabilities within the declared bound."""
    assert read.token_ids.shape == (len(written), int(written.num_entries.max(initial=0)))
    assert read.token_ids.dtype == np.int32
    assert read.logprobs.dtype == np.float32
    for position in range(len(written)):
        count = written.num_entries[position]
        assert (read.token_ids[position, count:] == -1).all()
        assert (read.logprobs[position, count:] == -np.inf).all()
        assert (read.logprobs[position, 1:] <= read.logprobs[position, :-1]).all()
        was = dict(zip(written.token_ids[position, :count], written.logprobs[position, :count], strict=True))
        now = dict(zip(read.token_ids[position, :count], read.logprobs[position, :count], strict=True))
        assert was.keys() == now.keys()
        values = np.array([(was[token], now[token]) for token in was], dtype=np.float32).reshape(-1, 2)
        assert_within(values[:, 1], values[:, 0], quantization.bound(values[:, 0]) if quantization else 0.0)


def assert_within(read: np.ndarray | None, written: np.ndarray | None, bound: float | np.ndarray) -> None:
    """Equal but for `bound`, and float32's own rounding on the way there; −inf where that was written."""
    assert (read is None) == (written is None)
    if read is None or written is None:
        return
    assert read.dtype == np.float32
    assert read.shape == written.shape
    finite = np.isfinite(written)
    assert np.array_equal(np.isfinite(read), finite)
    assert (read[~finite] == -np.inf).all()
    error = np.abs(read[finite].astype(np.float64) - written[finite])
    bounds = np.broadcast_to(bound, written.shape)[finite]
    assert (error <= bounds + 1e-6 * np.abs(written[finite]) * (bounds > 0)).all()


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Any choice of optional fields and kept columns."""
    rank = draw(st.integers(0, 3))
    layout = Layout(
        VOCAB,
        TailParts(
            rank=rank,
            probes=draw(st.integers(0, 2)) if rank else 0,
            groups=draw(st.integers(0, 3)),
            temperatures=tuple(sorted(draw(st.sets(st.sampled_from([0.5, 1.5, 2.0]))))),
            entropy=draw(st.booleans()),
            samples=draw(st.integers(0, 2)),
        ),
        columns={name: COLUMNS[name] for name in sorted(draw(st.sets(st.sampled_from(sorted(COLUMNS)))))},
        precision=draw(st.sampled_from(sorted(PRESETS))),
    )
    return layout.with_coefficient_step(COEFFICIENT_STEP) if rank else layout


_VALUES: dict[str, st.SearchStrategy[Any]] = {
    "id": st.integers(-(2**63), 2**63 - 1),
    "url": st.text(st.characters(exclude_categories=["Cs"])),
    "score": st.floats(allow_nan=False),
    "flag": st.booleans(),
}


@st.composite
def scored_rows(draw: st.DrawFn, layout: Layout, max_rows: int = 4) -> list[Row]:
    """Rows with any mask, any number of entries at each position, none and all included."""
    rows = []
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    for _ in range(draw(st.integers(1, max_rows))):
        mask = [False, *draw(st.lists(st.booleans(), min_size=1, max_size=8))]
        columns = {name: draw(st.none() | _VALUES[name]) for name in layout.columns}
        ids = random.integers(0, layout.vocab_size, len(mask)).astype(np.int32)
        sequence = TokenSequence(ids, np.array(mask), columns)
        counts = [draw(st.sampled_from([0, 1, 2, 3, 7, layout.vocab_size])) for _ in range(sum(mask))]
        full = full_distributions(random, len(counts), layout.vocab_size)
        rows.append((sequence, sparse_targets(full, counts, layout, sequence=sequence)))
    return rows


def _log(mass: float) -> float:
    return float(np.log(mass)) if mass > 0 else -np.inf

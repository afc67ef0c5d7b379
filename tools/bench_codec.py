"""Bytes against error of ways to store entry lists.

    python tools/bench_codec.py TOPK.npz [--k 64] [--vocab-size 32000] [--plot PICTURE.png]

TOPK.npz: `token_ids`, `logprobs` [M, ≥ k], `tail_logprob` [M] and `input_ids` [M] of a teacher at consecutive positions.

Bytes are those of a whole Parquet file, footer and list of frequent ids included, over its positions, in sequences of 128 tokens:
entries, tail, token ids, in columns of plain lists. A shard has many more positions for the same footer. `balanced`, `compact`,
`exact` are the product's own shards. Errors, against the same k entries unrounded:

    L1          mean over the positions of Σ|Δp|, the tail included
    max Δ       largest |Δ log p| where p > 1e-3
    1 − cos     of the gradient with respect to the logits, mean over the positions, for the students that stand in for an
                early and a late one (logitcache/capture/fidelity.py) on all stored entries and the tail

Rates are positions per second of one core's own time, to and from numpy, in memory.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitpacking
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from entry_codecs import CANDIDATES, Codec, frequent_ids, rank_tables
from measure import machine

from logitcache.capture.estimate.fidelity import SLOPES, STUDENTS, Outcomes, stand_in
from logitcache.format.codebook import Codebook
from logitcache.format.codec import DecodedRows, encode
from logitcache.format.layout import Layout
from logitcache.format.quantization import PRESETS, rounded
from logitcache.format.sequences import TokenSequence
from logitcache.format.shards import ShardWriter
from logitcache.format.targets import SparseTargets, concatenate
from logitcache.storage.folder import Folder
from logitcache.table import aligned

CONTEXT = 128
TAIL_STEP = 2.0**-14
CHOSEN = "balanced"
ENCODINGS = ("PLAIN", "BYTE_STREAM_SPLIT", "DELTA_BINARY_PACKED", "dictionary")
ZSTD_LEVELS = (1, 3, 6, 9, 19)
PAGES_KIB = (64, 256, 1024)
ROW_GROUPS = (512, 1024, 2048, 4096)
DICTIONARY_BYTES = 110 << 10
GRADIENTS = [(loss, stage) for loss in ("fkl", "todi") for stage in STUDENTS]


class Sample:
    """Targets of k entries at many positions, and a way to judge others."""

    def __init__(self, file: Path, k: int, vocab_size: int) -> None:
        with np.load(file) as arrays:
            wide = SparseTargets(arrays["token_ids"].astype(np.int32), arrays["logprobs"], arrays["tail_logprob"])
            input_ids = arrays["input_ids"].astype(np.int32)
        assert k < wide.token_ids.shape[1], f"--k {k}: {file} holds {wide.token_ids.shape[1]} entries"
        self.k, self.vocab_size = k, vocab_size
        self.num_positions = len(wide) // CONTEXT * CONTEXT
        wide = wide[: self.num_positions]
        dropped = np.exp(wide.logprobs[:, k:], dtype=np.float64).sum(axis=1)
        tail = np.log(np.exp(wide.tail_logprob, dtype=np.float64) + dropped)
        self.targets = SparseTargets(wide.token_ids[:, :k], wide.logprobs[:, :k], tail.astype(np.float32))
        tokens = np.append(input_ids, input_ids[:1])  # the last position's next token
        starts = range(0, self.num_positions, CONTEXT)
        self.sequences = [TokenSequence(tokens[s : s + CONTEXT + 1], np.arange(CONTEXT + 1) > 0) for s in starts]
        self.parts = [self.targets[s : s + CONTEXT] for s in starts]
        self._outcomes(wide)

    def _outcomes(self, wide: SparseTargets) -> None:
        """What the gradients are taken on: all entries of the file, and the tail as one more outcome."""
        mean = np.zeros(self.vocab_size)
        np.add.at(mean, wide.token_ids, np.exp(wide.logprobs, dtype=np.float64))
        mean += np.exp(wide.tail_logprob, dtype=np.float64).sum() / self.vocab_size
        mean /= mean.sum()
        known = SparseTargets(wide.token_ids, wide.logprobs, wide.tail_logprob, wide.tail_logprob[:, None])
        outcomes = Outcomes.of_targets(known, mean, np.zeros(self.vocab_size, dtype=int))
        self._sizes = np.maximum(outcomes.sizes, 1)
        self._students = {stage: stand_in(outcomes, stage) for stage in STUDENTS}
        self._exact = {key: self._gradients(self.targets, *key) for key in GRADIENTS}

    def _gradients(self, targets: SparseTargets, loss: str, stage: str) -> np.ndarray:
        """Of each position [M, E], in coordinates whose norm is that over the logits."""
        log_q = self._students[stage]
        q = np.exp(log_q)
        tail = targets.tail_logprob[:, None] - np.log(q[:, self.k :].sum(axis=1, keepdims=True))
        known = [targets.logprobs - log_q[:, : self.k], np.repeat(tail, q.shape[1] - self.k, axis=1)]
        slopes = SLOPES[loss](np.concatenate(known, axis=1), q, np.zeros(q.shape, dtype=bool))
        gradient: np.ndarray = q / np.sqrt(self._sizes) * (slopes - (q * slopes).sum(axis=1, keepdims=True))
        return gradient

    def judge(self, targets: SparseTargets) -> dict[str, float]:
        """Errors by name. targets: the same entries, in any order of equals."""
        theirs, ours = (np.argsort(t.token_ids, axis=1) for t in (targets, self.targets))
        restore = np.argsort(ours, axis=1)
        order = np.take_along_axis(theirs, restore, axis=1)
        assert (np.take_along_axis(targets.token_ids, order, axis=1) == self.targets.token_ids).all(), "other entries"
        found = SparseTargets(
            self.targets.token_ids, np.take_along_axis(targets.logprobs, order, axis=1), targets.tail_logprob
        )
        p, true_p = (np.exp(t.logprobs, dtype=np.float64) for t in (found, self.targets))
        t, true_t = (np.exp(x.tail_logprob, dtype=np.float64) for x in (found, self.targets))
        errors = {
            "L1": float((np.abs(p - true_p).sum(axis=1) + np.abs(t - true_t)).mean()),
            "max Δ": float(np.abs(found.logprobs - self.targets.logprobs)[true_p > 1e-3].max()),
        }
        for loss, stage in GRADIENTS:
            exact, other = self._exact[loss, stage], self._gradients(found, loss, stage)
            cosine = (exact * other).sum(axis=1) / (np.linalg.norm(exact, axis=1) * np.linalg.norm(other, axis=1))
            errors[f"{loss} {stage}"] = max(float((1 - cosine).mean()), 0.0)
        return errors


@dataclass(frozen=True)
class Result:
    """One way to store the sample."""

    name: str
    num_bytes: float
    errors: dict[str, float]
    preset: bool = False


def of_candidate(sample: Sample, codec: Codec) -> Result:
    """Written to a file, read back, judged."""
    frequent = frequent_ids(sample.targets.token_ids)
    ranks_of_ids, ids_of_ranks = rank_tables(frequent, sample.vocab_size)
    columns = codec.encode(sample.targets.token_ids, sample.targets.logprobs, ranks_of_ids)
    columns["tail_logprob"] = rounded(sample.targets.tail_logprob, TAIL_STEP)
    columns["input_ids"] = np.concatenate([s.input_ids for s in sample.sequences])
    table = pa.table({name: _lists(values, len(sample.sequences)) for name, values in columns.items()})
    if codec.order == "frequent":
        table = table.replace_schema_metadata({"frequent_ids": json.dumps(frequent.tolist(), separators=(",", ":"))})
    file = written(table, {**_options(columns), "compression_level": 6})
    read = {name: column.combine_chunks().flatten().to_numpy() for name, column in _read(file).items()}
    ids, logprobs = codec.decode(read, sample.k, ids_of_ranks)
    targets = SparseTargets(ids, logprobs, read["tail_logprob"])
    return Result(codec.name, len(file) / sample.num_positions, sample.judge(targets))


def of_preset(sample: Sample, precision: str) -> Result:
    """A shard as a build writes it."""
    layout = Layout(sample.vocab_size, precision=precision)
    with tempfile.TemporaryDirectory() as folder:
        with ShardWriter(Folder(Path(folder)), "shard.parquet", layout) as writer:
            for sequence, targets in zip(sample.sequences, sample.parts, strict=True):
                writer.write(sequence, targets)
        with pq.ParquetFile(Path(folder) / "shard.parquet") as file:
            groups = [DecodedRows(file.read_row_group(i), layout).targets for i in range(file.num_row_groups)]
    return Result(
        precision, writer.info.num_bytes / sample.num_positions, sample.judge(concatenate(groups)), preset=True
    )


def of_baseline(sample: Sample) -> tuple[list[Result], str]:
    """Packed bits, raw and after zstd; and the rates."""
    ids, logprobs, num = sample.targets.token_ids, sample.targets.logprobs, sample.num_positions
    packed = bitpacking.encode(ids, logprobs, sample.vocab_size)
    found_ids, found = bitpacking.decode(packed[0], packed[1], sample.k, sample.vocab_size)
    mass = np.exp(found, dtype=np.float64).sum(axis=1)
    tail = np.log(np.maximum(1 - mass, 2.0**-24)).astype(np.float32)
    errors = sample.judge(SparseTargets(found_ids, found, tail))
    raw = sum(part.shape[1] for part in packed)
    columns = dict(zip(("bytepacked_indices", "compressed_logprobs"), packed, strict=True))
    ends = pa.array(np.arange(0, num + 1, CONTEXT), pa.int32())
    table = pa.table(
        {name: pa.ListArray.from_arrays(ends, _lists(part.reshape(-1), num)) for name, part in columns.items()}
    )
    file = written(table, {"compression": "zstd", "compression_level": 6})
    alone = sum(len(zstandard.ZstdCompressor(6).compress(part.tobytes())) for part in packed)

    def read() -> None:
        read_back = _read(file)
        flat = [read_back[name].combine_chunks().flatten().flatten().to_numpy().reshape(num, -1) for name in columns]
        bitpacking.decode(flat[0], flat[1], sample.k, sample.vocab_size)

    def write() -> None:
        bitpacking.encode(ids, logprobs, sample.vocab_size)

    rates = f"decode {rate(read, num):,.0f} positions/s, packing alone {rate(write, num):,.0f}"
    sizes = {"bits": raw, "bits after zstd": alone / num, "lists of lists of bytes in Parquet, zstd": len(file) / num}
    return [Result(name, size, errors) for name, size in sizes.items()], rates


def written(table: pa.Table, options: dict[str, Any], row_group_size: int | None = None) -> bytes:
    """A Parquet file."""
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, table.schema, **options) as writer:
        writer.write_table(table, row_group_size=row_group_size or len(table))
    return sink.getvalue()


def _read(file: bytes) -> dict[str, pa.ChunkedArray]:
    table = pq.read_table(pa.BufferReader(file), use_threads=False)
    return {name: table[name] for name in table.column_names}


def _options(columns: Sequence[str] | dict[str, np.ndarray], encoding: str = "BYTE_STREAM_SPLIT") -> dict[str, Any]:
    leaves = [f"{name}.list.element" for name in columns]
    options: dict[str, Any] = {"compression": "zstd", "use_dictionary": leaves if encoding == "dictionary" else False}
    if encoding != "dictionary":
        options["column_encoding"] = dict.fromkeys(leaves, encoding)
    return options


def _lists(values: np.ndarray, rows: int) -> pa.ListArray:
    return pa.ListArray.from_arrays(
        pa.array(np.arange(0, len(values) + 1, len(values) // rows), pa.int32()), pa.array(values)
    )


def rate(run: Callable[[], object], positions: int, repeats: int = 7) -> float:
    """Positions per second of the process's own time, the best of several runs."""
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        run()
        times.append(time.process_time() - begin)
    return positions / min(times)


def pareto(results: Sequence[Result], error: str) -> list[Result]:
    """Those that no other beats in bytes and error, by bytes."""
    best, found = np.inf, []
    for result in sorted(results, key=lambda r: (r.num_bytes, r.errors[error])):
        if result.errors[error] < best:
            best = result.errors[error]
            found.append(result)
    return found


def frontier_table(results: Sequence[Result]) -> str:
    """By bytes; the best of their size in L1 are marked."""
    best = pareto(results, "L1")
    columns = list(results[0].errors)
    rows = [["", "bytes", *columns[:2], *(f"1−cos {c}" for c in columns[2:])]]
    for result in sorted(results, key=lambda r: r.num_bytes):
        mark = ("*" if result in best else " ") + (" > " if result.preset else "   ")
        rows.append([mark + result.name, f"{result.num_bytes:.1f}", *(f"{result.errors[c]:.3g}" for c in columns)])
    return aligned(rows)


def storage_table(sample: Sample) -> str:
    """The chosen columns under other Parquet settings."""
    layout = Layout(sample.vocab_size, precision=CHOSEN)
    codebook = Codebook.of(sample.targets, layout.quantization)
    table = encode(sample.sequences, sample.parts, layout, codebook)
    entries = ["id_gaps", "levels_above_lowest"]
    rows = [["", *entries, "whole file", "encode, write/s", "read, decode/s"]]

    def row(name: str, options: dict[str, Any], rows_per_group: int | None = None) -> list[str]:
        def write() -> bytes:
            return written(encode(sample.sequences, sample.parts, layout, codebook), options, rows_per_group)

        def read() -> None:
            got = pq.read_table(pa.BufferReader(file), use_threads=False)
            _ = DecodedRows(got.replace_schema_metadata(metadata), layout).targets

        file = write()
        metadata = {**(table.schema.metadata or {}), **codebook.to_metadata()}
        footer = pq.ParquetFile(pa.BufferReader(file)).metadata
        sizes = dict.fromkeys(entries, 0)
        for group in range(footer.num_row_groups):
            for index in range(footer.num_columns):
                column = footer.row_group(group).column(index)
                name_of = column.path_in_schema.split(".")[0]
                if name_of in sizes:
                    sizes[name_of] += column.total_compressed_size
        num = sample.num_positions
        return [
            name,
            *(f"{size / num:.1f}" for size in sizes.values()),
            f"{len(file) / num:.1f}",
            f"{rate(write, num):,.0f}",
            f"{rate(read, num):,.0f}",
        ]

    own = layout.parquet_options()
    for encoding in ENCODINGS:
        changed = _options(entries, encoding)
        options = {
            **own,
            "column_encoding": {**own["column_encoding"], **changed.get("column_encoding", {})},
            "use_dictionary": own["use_dictionary"] + (changed["use_dictionary"] or []),
        }
        if encoding == "dictionary":
            options["column_encoding"] = {
                leaf: how for leaf, how in own["column_encoding"].items() if leaf not in changed["use_dictionary"]
            }
        rows.append(row(encoding, options))
    rows += [row(f"zstd {level}", {**own, "compression_level": level}) for level in ZSTD_LEVELS]
    rows += [row(f"pages of {size} KiB", {**own, "data_page_size": size << 10}) for size in PAGES_KIB]
    rows += [row(f"row groups of {n:,} positions", own, n // CONTEXT) for n in ROW_GROUPS]
    return aligned(rows)


def dictionary_line(sample: Sample) -> str:
    """What a zstd dictionary, trained on other pages, would save: Parquet has no place for one."""
    layout = Layout(sample.vocab_size, precision=CHOSEN)
    table = encode(sample.sequences, sample.parts, layout, Codebook.of(sample.targets, layout.quantization))
    plain = trained = 0
    for name in ("id_gaps", "levels_above_lowest"):
        values = table[name].combine_chunks().flatten().to_numpy()
        pages = [_split(part) for part in np.array_split(values, 2)]
        chunks: list[bytes | bytearray | memoryview] = [pages[0][i : i + 2048] for i in range(0, len(pages[0]), 2048)]
        dictionary = zstandard.train_dictionary(DICTIONARY_BYTES, chunks)
        plain += len(zstandard.ZstdCompressor(6).compress(pages[1]))
        trained += len(zstandard.ZstdCompressor(6, dict_data=dictionary).compress(pages[1]))
    half = sample.num_positions / 2
    return (
        f"zstd dictionaries of {DICTIONARY_BYTES >> 10} KiB, trained on the first half, on one page of the second: "
        f"{trained / half:.1f} bytes per position against {plain / half:.1f}; Parquet has no place for them"
    )


def _split(values: np.ndarray) -> bytes:
    """BYTE_STREAM_SPLIT."""
    return values.astype("<i4").view(np.uint8).reshape(-1, 4).T.tobytes()


def draw(results: Sequence[Result], baseline: Sequence[Result], file: Path) -> None:
    """Bytes against L1 and against the late student's ToDi gradient."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), sharex=True)
    titles = {"L1": "mean L1 of probabilities, tail included", "todi late": "1 − cos of ToDi's gradient, late student"}
    for axis, (error, title) in zip(axes, titles.items(), strict=True):
        orders = {"rank": "in order of probability", "ascending": "ascending ids", "frequent": "frequent ids first"}
        for (order, label), marker in zip(orders.items(), "sv.", strict=True):
            some = [r for r in results if r.name.startswith(order)]
            axis.plot([r.num_bytes for r in some], [r.errors[error] for r in some], marker, markersize=5, label=label)
        packed = [(r.num_bytes, r.errors[error]) for r in baseline]
        axis.plot(*zip(*packed, strict=True), "x", color="black", label="bit-packing")
        best = [(r.num_bytes, r.errors[error]) for r in pareto(results, error) if r.errors[error] > 0]
        axis.plot(*zip(*best, strict=True), "-", color="grey", lw=1, zorder=0, label="frontier")
        least = min(r.errors[error] for r in results if r.name not in PRESETS) / 3
        for result in (r for r in results if r.preset):
            value = max(result.errors[error], least)
            axis.plot(result.num_bytes, value, "*", color="crimson", markersize=12)
            axis.annotate(
                result.name + (", no error" if value == least else ""),
                (result.num_bytes, value),
                xytext=(-10, -4) if value == least else (-10, -13),
                textcoords="offset points",
                ha="right",
                color="crimson",
            )
        axis.set(xscale="log", yscale="log", xlabel="bytes per position", title=title)
        ticks = [60, 80, 100, 150, 200, 300]
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.set_xlim(48, 400)
        axis.set_ylim(least / 3, 2 * max(r.errors[error] for r in results))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(file, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("topk", type=Path)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--plot", type=Path, help="a picture of the frontier")
    options = parser.parse_args()
    sample = Sample(options.topk, options.k, options.vocab_size)
    results = [of_candidate(sample, codec) for codec in CANDIDATES] + [of_preset(sample, p) for p in PRESETS]
    print(f"k = {sample.k}, {sample.num_positions:,} positions; * on the frontier of bytes and L1, > presets")
    print(frontier_table(results))
    print(f"\n{CHOSEN} under other Parquet settings; rates on one core ({machine()})")
    print(storage_table(sample))
    print(dictionary_line(sample))
    baseline, rates = of_baseline(sample)
    own, published = (
        bitpacking.bytes_per_position(*shape) for shape in ((sample.k, sample.vocab_size), (128, 151_936))
    )
    print(
        f"\nThe baseline, naive bit-packing, without tail and token ids; by arithmetic {own} bytes at k = {sample.k}, "
        f"V = {sample.vocab_size:,}, {published} at k = 128, V = 151,936"
    )
    print(frontier_table(baseline))
    print(rates)
    if options.plot:
        draw(results, baseline, options.plot)


if __name__ == "__main__":
    main()

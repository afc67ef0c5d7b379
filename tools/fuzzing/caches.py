"""Caches as a stranger may hand them over: manifests, shards and tokenizers altered, SHA-256 and all."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from damage import ODD_NUMBERS, damaged_bytes, damaged_json, damaged_tree
from trial import FIT, Command, Trial

from logitcache.format.manifest import CHECKSUM_NAME, MANIFEST_NAME

TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
ODD_IDS = [0, 1, -1, 260, 2**20, 2**30, 2**31 - 1, -(2**31)]


def manifests(trial: Trial) -> list[Command]:
    """logitcache.json as a damaged tree, or as damaged bytes."""
    cache = _copy(trial)
    manifest = cache / MANIFEST_NAME
    if trial.maybe(0.85):
        _write_manifest(cache, json.loads(manifest.read_text()))
    manifest.write_bytes(damaged_json(trial.random, manifest.read_bytes()))
    return readers(trial, cache)


def shards(trial: Trial) -> list[Command]:
    """A shard, or the file of tail groups or tail basis, damaged in its bytes, mostly in its footer, or with other values."""
    cache = _copy(trial)
    beside = sorted(cache.glob("tail_*.parquet"))
    shard = trial.choose(beside if beside and trial.maybe(0.25) else sorted((cache / "data").iterdir()))
    if trial.maybe(0.5):
        _rewrite(trial, shard)
    else:
        content = shard.read_bytes()
        at = len(content) - trial.choose([8, 500, 5000, len(content)])
        shard.write_bytes(content[: max(at, 0)] + damaged_bytes(trial.random, content[max(at, 0) :]))
    if trial.maybe(0.85):
        _vouch(cache, shard)
    return readers(trial, cache)


def tokenizers(trial: Trial) -> list[Command]:
    """tokenizer.json or tokenizer_config.json of a cache, of a teacher, or of a student."""
    if trial.maybe(0.5):
        cache = _copy(trial)
        file = _damage_tokenizer(trial, cache / "tokenizer")
        if trial.maybe(0.85):
            _vouch(cache, file)
        return readers(trial, cache)
    model = trial.copy(trial.material / "teacher")
    _damage_tokenizer(trial, model)
    if trial.maybe(0.4):
        return [_fit(trial, trial.material / "cache", str(model))]
    build = ["logitcache", "build", "--backend", "transformers", "--teacher", str(model), "--out", str(trial.path())]
    chat = trial.write(
        '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "the hen"}]}', ".jsonl"
    )
    return [[*build, "--top-k", "4", "--data", chat if trial.maybe(0.4) else str(trial.material / "documents.jsonl")]]


def readers(trial: Trial, cache: Path) -> list[Command]:
    """Some of the commands that read a cache."""
    path, other = str(cache), str(trial.material / "cache")
    commands: list[Command] = [
        ["logitcache", "info", path],
        ["logitcache", "verify", path],
        ["logitcache", "verify", path],
        ["logitcache", "view", path, "--out", str(trial.path(".html"))],
        ["logitcache", "recode", path, "--top-k", "2", "--out", str(trial.path())],
        [
            "logitcache",
            "slice",
            path,
            trial.choose(["--rows", "--sample"]),
            trial.choose(["0:3", "2"]),
            "--out",
            str(trial.path()),
        ],
        ["logitcache", "slice", path, "--where", "id < 5", "--out", str(trial.path())],
        ["logitcache", "merge", path, other, "--out", str(trial.path())],
        ["logitcache", "merge", other, path, "--out", str(trial.path())],
        ["logitcache", "push", path, str(trial.path(trial.choose(["", ".tar.zst"])))],
        ["logitcache", "pull", path, "--out", str(trial.path())],
        [
            "logitcache",
            "export",
            path,
            "--to",
            trial.choose(["topk", "axolotl", "axolotl-v2"]),
            *["--top-k", "9"] * trial.maybe(0.3),
            "--out",
            str(trial.path(".parquet")),
        ],
        ["trainer", "eval", str(trial.material / "student"), "--cache", path, "--out", str(trial.path(".json"))],
        _fit(trial, cache, str(trial.material / "student")),
    ]
    return trial.random.sample(commands, 2)


def _fit(trial: Trial, cache: Path, student: str) -> Command:
    trial.trains = trial.maybe(0.3)
    return ["trainer", "fit", "--cache", str(cache), "--student", student, *FIT, "--output_dir", str(trial.path())]


def _copy(trial: Trial) -> Path:
    return trial.copy(trial.material / "cache" if trial.maybe(0.7) else trial.material / "exact")


def _damage_tokenizer(trial: Trial, folder: Path) -> Path:
    file: Path = folder / trial.choose(TOKENIZER)
    file.write_bytes(damaged_json(trial.random, file.read_bytes()))
    return file


def _vouch(cache: Path, file: Path) -> None:
    """Puts the SHA-256 and the bytes of a file into the manifest."""
    manifest, name = json.loads((cache / MANIFEST_NAME).read_text()), file.relative_to(cache).as_posix()
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if name in manifest["files"]:
        manifest["files"][name] = digest
    for shard in manifest["shards"]:
        if shard["name"] == name:
            shard |= {"sha256": digest, "num_bytes": file.stat().st_size}
    manifest["num_bytes"] = sum(shard["num_bytes"] for shard in manifest["shards"])
    _write_manifest(cache, manifest)


def _write_manifest(cache: Path, manifest: dict[str, Any]) -> None:
    """Without a checksum of its own, as earlier versions wrote it, so that its content is looked at."""
    manifest.pop(CHECKSUM_NAME, None)
    (cache / MANIFEST_NAME).write_text(json.dumps(manifest))


def _rewrite(trial: Trial, shard: Path) -> None:
    """Writes a shard anew with some values of a column, its lists' lengths, its type or the codebook altered."""
    file = pq.ParquetFile(shard)
    table, groups = (
        file.read().combine_chunks(),
        [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)],
    )
    metadata = dict(file.metadata.metadata or {})
    if trial.maybe(0.25):
        for key, value in metadata.items():
            if key.startswith(b"logitcache"):
                metadata[key] = json.dumps(damaged_tree(trial.random, json.loads(value))).encode()
    else:
        number = trial.random.randrange(table.num_columns)
        column = _altered(trial, table.column(number).chunk(0))
        table = table.set_column(number, table.schema.field(number).with_type(column.type), column)
    with pq.ParquetWriter(shard, table.schema, compression="zstd", write_page_checksum=True) as writer:
        writer.add_key_value_metadata({key: value for key, value in metadata.items() if key != b"ARROW:schema"})
        at = 0
        for rows in groups:
            writer.write_table(table.slice(at, rows), row_group_size=max(rows, 1))
            at += rows


def _altered(trial: Trial, column: Any) -> Any:
    if pa.types.is_fixed_size_list(column.type) and trial.maybe(0.7):
        return pa.FixedSizeListArray.from_arrays(_odd_values(trial, column.flatten()), column.type.list_size)
    if pa.types.is_primitive(column.type) and trial.maybe(0.7):
        return _odd_values(trial, column)
    if not pa.types.is_list(column.type):
        return pa.array([None if trial.maybe(0.5) else value for value in column.to_pylist()], column.type)
    what = trial.choose(["values", "values", "values", "lengths", "nulls", "type"])
    if what == "nulls":
        return pa.array([None if trial.maybe(0.3) else value for value in column.to_pylist()], column.type)
    if what == "lengths":
        lists = [
            value[: trial.choose([len(value), 0, 1])] * trial.choose([1, 1, 2, 1000]) for value in column.to_pylist()
        ]
        return pa.array(lists, column.type)
    if what == "type":
        return pa.array([list(map(str, value)) for value in column.to_pylist()], pa.list_(pa.string()))
    return pa.ListArray.from_arrays(column.offsets, _odd_values(trial, column.values))


def _odd_values(trial: Trial, column: Any) -> Any:
    """Gives some numbers, or all, another value."""
    values = column.to_numpy(zero_copy_only=False).copy()
    chosen = np.array([trial.maybe(trial.choose([0.01, 1])) for _ in range(len(values))], dtype=bool)
    odd = trial.choose(
        ODD_IDS
        if values.dtype.kind in "iu"
        else [number for number in ODD_NUMBERS if abs(number) < 1e39 or number != number]
    )
    with np.errstate(over="ignore"):
        values[chosen] = np.array(bool(odd) if values.dtype == bool else odd).astype(values.dtype)
    return pa.array(values, column.type)

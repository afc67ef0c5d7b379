"""Training and streaming from an object store against the same cache in a folder, on one machine.

    python tools/bench_remote.py [--shards 16]

The store is moto's S3 server on loopback, in a process of its own. Each measurement runs in a process of its own with one
torch thread; ways alternate, the median of the rounds counts. cold: no shard was copied before; warm: all were; ranges:
LOGITCACHE_LOCAL_GB=0, every row group is fetched for itself. A stream is one shuffled pass; rows/s is counted from its first
batch on. Training is `DistillTrainer` with a small random student, shuffled, its first steps; the first tenth of them, in which
most shards are first needed, is left out of steps/s, and is in "all steps".
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from measure import machine, peak_mib, synthetic_rows

from logitcache.format.layout import Layout
from logitcache.format.manifest import Manifest
from logitcache.format.shards import ShardWriter, shard_name
from logitcache.storage.folder import Folder
from logitcache.table import aligned

K = 64
VOCAB = 4096
POSITIONS_PER_SHARD = 1 << 15
STEPS = 100
BATCH = 8
ROUNDS = 3
WAYS = ["local", "cold", "warm", "ranges"]


def stream(path: str) -> dict[str, float]:
    """Rows per second of one shuffled pass, and seconds until its first batch."""
    import logitcache

    began = time.perf_counter()
    rows = logitcache.open(path).iter_sequences(shuffle=True)
    for _ in range(BATCH):
        next(rows)
    first_batch_s = time.perf_counter() - began
    left = sum(1 for _ in rows)
    rate = left / (time.perf_counter() - began - first_batch_s)
    return {"rate": rate, "first_s": first_batch_s, "peak_mib": peak_mib()}


def train(path: str) -> dict[str, float]:
    """Steps per second, and seconds until the first is done."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

    import logitcache
    from trainer import DistillConfig, DistillTrainer

    torch.set_num_threads(1)
    torch.manual_seed(0)
    student = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    )

    class Clock(TrainerCallback):
        ends: list[float] = []  # noqa: RUF012

        def on_step_end(self, *given: Any, **more: Any) -> None:
            self.ends.append(time.perf_counter())

    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        settings = DistillConfig(
            output_dir=out,
            use_cpu=True,
            per_device_train_batch_size=BATCH,
            max_steps=STEPS,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
        )
        DistillTrainer(student, logitcache.open(path), settings, callbacks=[Clock()]).train()
    ends, skipped = Clock.ends, len(Clock.ends) // 10
    rate = (len(ends) - 1 - skipped) / (ends[-1] - ends[skipped])
    return {"rate": rate, "whole": len(ends) / (ends[-1] - began), "first_s": ends[0] - began, "peak_mib": peak_mib()}


def write_cache(root: Path, num_shards: int) -> None:
    """Shards of the same rows, each in another order: no two have the same SHA-256."""
    rows, layout = synthetic_rows(POSITIONS_PER_SHARD, K, VOCAB), Layout(VOCAB)
    infos = []
    for index in range(num_shards):
        with ShardWriter(Folder(root), shard_name(index, num_shards), layout) as writer:
            for sequence, targets in rows[index:] + rows[:index]:
                writer.write(sequence, targets)
        infos.append(writer.info)
    Manifest(layout, {}, tuple(infos), {}, "tools/bench_remote.py").write(Folder(root))


@contextmanager
def object_store() -> Iterator[str]:
    """Endpoint of an S3 server in a process of its own; credentials for it are in the environment."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    endpoint = f"http://127.0.0.1:{port}"
    try:
        while server.poll() is None:
            try:
                urllib.request.urlopen(endpoint)
                break
            except urllib.error.HTTPError:
                break
            except urllib.error.URLError:
                time.sleep(0.1)
        os.environ |= {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "bench",
            "AWS_SECRET_ACCESS_KEY": "bench",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        yield endpoint
    finally:
        server.terminate()
        server.wait()


def measured(what: str, way: str, paths: dict[str, str], homes: Path) -> dict[str, float]:
    """One measurement in a process of its own."""
    settings = {"LOGITCACHE_LOCAL_GB": "0" if way == "ranges" else "10", "LOGITCACHE_HOME": str(homes / "warm")}
    if way == "cold":
        settings["LOGITCACHE_HOME"] = tempfile.mkdtemp(dir=homes)
    command = [sys.executable, __file__, "--measure", what, paths["local" if way == "local" else "remote"]]
    done = subprocess.run(command, env=os.environ | settings, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shards", type=int, default=16, help=f"of {POSITIONS_PER_SHARD:,} positions each (default 16)"
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        what, path = options.measure
        print(json.dumps({"stream": stream, "train": train}[what](path)))
        return
    results: dict[tuple[str, str], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder, object_store():
        import fsspec

        paths = {"local": f"{folder}/cache", "remote": "s3://bench/cache"}
        write_cache(Path(paths["local"]), options.shards)
        num_bytes = sum(path.stat().st_size for path in Path(paths["local"]).rglob("*") if path.is_file())
        fsspec.filesystem("s3").mkdir("bench")
        fsspec.filesystem("s3").put(paths["local"], paths["remote"], recursive=True)
        homes = Path(folder) / "homes"
        homes.mkdir()
        measured("stream", "warm", paths, homes)  # which fills its home
        for _ in range(options.rounds):
            for what in ("stream", "train"):
                for way in WAYS:
                    results.setdefault((what, way), []).append(measured(what, way, paths, homes))
    print(f"{options.shards} shards, {num_bytes / 2**20:.0f} MiB, k = {K}, V = {VOCAB} ({machine()})\n")
    rows = [["stream, shuffled", "rows/s", "of local", "first batch, s", "peak MiB"]]
    rows += [_row(results, "stream", way, ["rate", "first_s"]) for way in WAYS]
    print(aligned(rows), end="\n\n")
    rows = [["training", "steps/s", "of local", "all steps", "first step, s", "peak MiB"]]
    rows += [_row(results, "train", way, ["rate", "whole", "first_s"]) for way in WAYS]
    print(aligned(rows))


def _row(results: dict[tuple[str, str], list[dict[str, float]]], what: str, way: str, names: list[str]) -> list[str]:
    median = {name: statistics.median(result[name] for result in results[what, way]) for name in results[what, way][0]}
    ratios = [
        mine["rate"] / local["rate"] for mine, local in zip(results[what, way], results[what, "local"], strict=True)
    ]
    rate, *others = [f"{median[name]:,.2f}" if median[name] < 100 else f"{median[name]:,.0f}" for name in names]
    return [way, rate, f"{statistics.median(ratios):.2f}", *others, f"{median['peak_mib']:,.0f}"]


if __name__ == "__main__":
    main()

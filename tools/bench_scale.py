"""A trillion positions on paper and by simulation: the manifest, a seek, one rank's plan of an epoch, requests to a store.

    python tools/bench_scale.py [--shards 1000 10000 100000] [--shard-positions 262144] [--world 1000]

The manifests hold the records that a build with the default options writes; their shards are sparse files under many names
(hard links), of which only the size is looked at. Each open runs in a process of its own, with the limit on a manifest's size
lifted. Requests are counted in s3fs, a shuffled pass over a small cache on moto's S3 server. What is printed as arithmetic names
its inputs: no GPU was measured.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from measure import machine, peak_mib

from logitcache.assembly.plan import SHARD_POSITIONS
from logitcache.format import manifest as manifest_module
from logitcache.format.layout import Layout
from logitcache.format.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest
from logitcache.format.shards import ROW_GROUP_BYTES, ShardInfo, shard_name
from logitcache.format.tail_parts import TailParts
from logitcache.reading.local_copies import LIMIT_BYTES
from logitcache.reading.shard_reader import COPIED_AT_ONCE_BYTES
from logitcache.storage.folder import Folder
from logitcache.table import aligned

TRILLION = 10**12
BYTES_PER_POSITION = 67
"""README, of a default cache: 16 entries and 64 coefficients."""
LAYOUT = Layout(128_000, tail_parts=TailParts(rank=64)).with_coefficient_step(0.01)
TOP_K = 16
ROW_POSITIONS = 256
NAMES_PER_FILE = 60_000
SEEKS = 1000
STORE_SHARDS = 4
FRONT_END_US, ENCODING_US = 0.8, 6.6
"""Per token and position of one core, README, at k = 64."""
RANKS, RANK_POSITIONS_PER_S = 1000, 10_000
TEACHER_PARAMETERS = 8e9
UTILIZATION = 0.4
PEAK_TFLOPS = {"A100": 312, "H100 and H200": 989, "B200": 2250}
"""Dense bfloat16, by the makers' data sheets."""


def record(index: int, count: int, positions: int) -> ShardInfo:
    """The record of a shard of rows of 256 positions."""
    rows = positions // ROW_POSITIONS
    per_position = 8 * TOP_K + 4 * sum(width for _, width in LAYOUT.values_per_position().values())
    per_group = -(-ROW_GROUP_BYTES // (5 * (ROW_POSITIONS + 1) + per_position * ROW_POSITIONS))
    groups = [min(per_group, rows - first) for first in range(0, rows, per_group)]
    name = shard_name(index, count)
    return ShardInfo(
        name=name,
        num_sequences=rows,
        num_tokens=positions + rows,
        num_positions=positions,
        num_entries=TOP_K * positions,
        longest=ROW_POSITIONS + 1,
        mean_tail_mass=0.0123456789012345,
        row_group_sizes=tuple(groups),
        num_bytes=BYTES_PER_POSITION * positions,
        sha256=hashlib.sha256(name.encode()).hexdigest(),
    )


def write_cache(root: Path, count: int, positions: int) -> None:
    """Writes a manifest of `count` shards, and for them sparse files."""
    shards = tuple(record(index, count, positions) for index in range(count))
    (root / "data").mkdir(parents=True)
    for index, shard in enumerate(shards):
        if index % NAMES_PER_FILE == 0:
            first = root / shard.name
            first.touch()
            os.truncate(first, shard.num_bytes)
        else:
            (root / shard.name).hardlink_to(first)
    Manifest(LAYOUT, {}, shards, {}, "tools/bench_scale.py").write(Folder(root))


def measure(root: Path, world: int) -> None:
    """Prints what opening, seeking and planning take, as JSON."""
    import logitcache

    manifest_module.MAX_MANIFEST_BYTES = (root / MANIFEST_NAME).stat().st_size
    began = time.perf_counter()
    cache = logitcache.open(root)
    opened_s, opened_mib = time.perf_counter() - began, peak_mib()
    began = time.perf_counter()
    cache.row_group_of(len(cache) // 2)
    first_seek_s = time.perf_counter() - began
    rows = np.random.default_rng(0).integers(0, len(cache), SEEKS).tolist()
    began = time.perf_counter()
    for row in rows:
        cache.row_group_of(row)
    seek_s = (time.perf_counter() - began) / SEEKS
    began = time.perf_counter()
    part = cache._part(True, 0, (world // 2, world))
    next(cache._steps(part, True, 0))
    planned_s = time.perf_counter() - began
    result = {
        "positions": cache.num_positions,
        "opened_s": opened_s,
        "opened_mib": opened_mib,
        "first_seek_s": first_seek_s,
        "seek_us": 1e6 * seek_s,
        "planned_s": planned_s,
        "peak_mib": peak_mib(),
        "row_groups": len(part),
        "shards": len(np.unique(cache._row_groups[part[:, 0], 0])),
    }
    print(json.dumps(result))


def count_requests() -> None:
    """Prints the requests of one shuffled pass, per shard where shards are copied and per row group where they are not."""
    import s3fs
    from bench_remote import object_store, write_cache

    import logitcache

    requests: Counter[str] = Counter()
    call = s3fs.S3FileSystem._call_s3

    async def counted(self: Any, method: str, *given: Any, **more: Any) -> Any:
        requests[method] += 1
        return await call(self, method, *given, **more)

    rows = [["", "row groups", "open", "pass", "pass, by row group", "of which"]]
    with tempfile.TemporaryDirectory() as folder, object_store():
        write_cache(Path(folder) / "cache", STORE_SHARDS)
        store = s3fs.S3FileSystem(endpoint_url=os.environ["AWS_ENDPOINT_URL"])
        store.mkdir("bench-scale")
        store.put(f"{folder}/cache", "bench-scale/cache", recursive=True)
        s3fs.S3FileSystem._call_s3 = counted
        os.environ["LOGITCACHE_HOME"] = f"{folder}/home"
        for way, limit_gb in [("copied", "1"), ("by ranges", "0")]:
            os.environ["LOGITCACHE_LOCAL_GB"] = limit_gb
            s3fs.S3FileSystem.clear_instance_cache()
            requests.clear()
            cache = logitcache.open("s3://bench-scale/cache")
            opened = requests.total()
            requests.clear()
            for _ in cache.iter_sequences(shuffle=True):
                pass
            groups = len(cache._row_groups)
            kinds = ", ".join(f"{count} {method}" for method, count in requests.most_common())
            per_group = f"{requests.total() / groups:.2f}"
            rows.append([way, str(groups), str(opened), str(requests.total()), per_group, kinds])
    print(f"requests to a store, {STORE_SHARDS} shards, k = 64, one shuffled pass")
    print(aligned(rows))


def print_arithmetic() -> None:
    """Prints what follows from README's figures."""
    print(f"{TRILLION:,} positions of {BYTES_PER_POSITION} bytes: {BYTES_PER_POSITION * TRILLION / 1e12:,.0f} TB")
    for positions in (SHARD_POSITIONS, 1 << 22):
        per_shard = len(json.dumps({"shards": [record(0, 10**5, positions).to_json()]}, indent=2)) - len(
            '{"shards": []}'
        )
        most = MAX_MANIFEST_BYTES // per_shard
        print(
            f"shards of {positions:,}: {TRILLION // positions:,} of {BYTES_PER_POSITION * positions / 1e6:,.0f} MB, "
            f"{len(record(0, 1, positions).row_group_sizes)} row groups each, {per_shard:,} bytes of manifest each, "
            f"{per_shard * TRILLION / positions / 1e9:,.1f} GB in all; {MAX_MANIFEST_BYTES >> 20} MiB hold "
            f"{most:,} shards, {most * positions / 1e9:,.0f} billion positions"
        )
        row_group = positions / len(record(0, 1, positions).row_group_sizes)
        per_s = RANKS * RANK_POSITIONS_PER_S / row_group
        copying = -(-BYTES_PER_POSITION * positions // COPIED_AT_ONCE_BYTES)
        print(
            f"  {RANKS:,} ranks at an assumed {RANK_POSITIONS_PER_S:,} positions/s each, every row group of another shard: "
            f"{2 * per_s:,.0f} requests/s by ranges (a footer and a row group), "
            f"{row_group * BYTES_PER_POSITION * per_s / 1e9:,.2f} GB/s of row groups; {copying * per_s:,.0f} requests/s and "
            f"{BYTES_PER_POSITION * positions * per_s / 1e9:,.0f} GB/s while shards "
            f"are copied whole, {LIMIT_BYTES // (BYTES_PER_POSITION * positions):,} of them before copies are full"
        )
    for what, microseconds in [("front end, k = 64", FRONT_END_US), ("encoding and writing, k = 64", ENCODING_US)]:
        print(f"{what}, {microseconds} µs: {microseconds * 1e-6 * TRILLION / 3600:,.0f} core-hours")
    for name, tflops in PEAK_TFLOPS.items():
        hours = 2 * TEACHER_PARAMETERS * TRILLION / (UTILIZATION * tflops * 1e12) / 3600
        print(
            f"prefill of {TEACHER_PARAMETERS / 1e9:.0f} G parameters at an assumed {UTILIZATION:.0%} of {tflops} "
            f"TFLOP/s, {name}: {hours:,.0f} GPU-hours"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--shard-positions", type=int, default=SHARD_POSITIONS)
    parser.add_argument("--world", type=int, default=1000)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--write", help=argparse.SUPPRESS)
    parser.add_argument("--requests", action="store_true", help="count requests to a store, nothing else")
    options = parser.parse_args()
    if options.measure:
        measure(Path(options.measure), options.world)
        return
    if options.write:
        write_cache(Path(options.write), options.shards[0], options.shard_positions)
        return
    if options.requests:
        count_requests()
        return
    print_arithmetic()
    head = [
        "shards",
        "positions",
        "manifest MB",
        "open s",
        "peak MiB then",
        "first seek s",
        "seek µs",
        "plan s",
        "in the end",
    ]
    rows = [[*head, "a rank's row groups", "in shards"]]
    for count in options.shards:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder) / "cache"
            # in a process of its own too: a child's peak begins with its parent's
            sizes = ["--shards", str(count), "--shard-positions", str(options.shard_positions)]
            subprocess.run([sys.executable, __file__, "--write", str(root), *sizes], check=True)
            command = [sys.executable, __file__, "--measure", str(root), "--world", str(options.world)]
            result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            rows.append(
                [
                    f"{count:,}",
                    f"{result['positions']:,}",
                    f"{(root / MANIFEST_NAME).stat().st_size / 1e6:,.1f}",
                    f"{result['opened_s']:.2f}",
                    f"{result['opened_mib']:,.0f}",
                    f"{result['first_seek_s']:.2f}",
                    f"{result['seek_us']:.1f}",
                    f"{result['planned_s']:.3f}",
                    f"{result['peak_mib']:,.0f}",
                    f"{result['row_groups']:,}",
                    f"{result['shards']:,}",
                ]
            )
    print(f"shards of {options.shard_positions:,} positions, a rank of {options.world:,} ({machine()})")
    print(aligned(rows))


if __name__ == "__main__":
    main()

"""Push and pull of a cache against a plain recursive copy of the same bytes, by s3fs to the same S3 server on loopback.

    python tools/bench_transfer.py [--positions 3145728] [--precision balanced] [--rounds 5]
        [--folder /dev/shm]

The server is moto's, in a process of its own, which keeps objects in memory: no network is measured, the rate is bound by the two
processes. A round does each once, in turn; medians of the rounds are shown. A push hashes every file before the first one is sent
and brings the card up to date; a pull hashes every file and has it on the disk before it gets its name; the copy does neither.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from measure import machine, synthetic_rows, write_synthetic_cache

from logitcache.format.layout import Layout
from logitcache.format.manifest import read_manifest
from logitcache.format.quantization import DEFAULT_PRECISION, PRESETS
from logitcache.sharing.pull import pull
from logitcache.sharing.push import push
from logitcache.storage.folder import Folder
from logitcache.table import aligned

K = 64
VOCAB = 128_000
POSITIONS_PER_SHARD = 1 << 18
URL = "s3://bench"
_SERVER = """
from moto.server import ThreadedMotoServer
import time
server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
time.sleep(1e6)
"""


@contextmanager
def object_store() -> Iterator[None]:
    """An S3 server with an empty bucket, named by the environment."""
    import s3fs

    command = [sys.executable, "-c", _SERVER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            assert server.stdout is not None
            os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{int(server.stdout.readline())}"
            os.environ["AWS_ACCESS_KEY_ID"] = os.environ["AWS_SECRET_ACCESS_KEY"] = "bench"
            os.environ["AWS_DEFAULT_REGION"] = "us-east-1"
            s3fs.S3FileSystem().mkdir(URL)
            yield
        finally:
            server.kill()


def timed(work: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=3 << 20)
    parser.add_argument("--precision", choices=list(PRESETS), default=DEFAULT_PRECISION)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where local files are (default: that of temporary files)")
    options = parser.parse_args()
    import s3fs

    copies = -(-options.positions // POSITIONS_PER_SHARD)
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as directory, object_store():
        root = Path(directory)
        rows = synthetic_rows(POSITIONS_PER_SHARD, K, VOCAB)
        write_synthetic_cache(root / "cache", rows, Layout(VOCAB, precision=options.precision), copies)
        manifest = read_manifest(Folder(root / "cache"))
        teacher = dict.fromkeys(("name", "architecture", "dtype", "engine", "engine_version"), "synthetic")
        replace(manifest, fingerprint={"teacher": teacher}).write(Folder(root / "cache"))
        push(root / "cache", f"{URL}/warm")
        num_bytes = sum(path.stat().st_size for path in (root / "cache").rglob("*") if path.is_file())
        files = s3fs.S3FileSystem()
        for number in range(options.rounds):
            copied, pushed = f"{URL}/copy{number}", f"{URL}/push{number}"
            kinds: dict[str, Callable[[], object]] = {
                "plain copy to S3": partial(files.put, f"{root}/cache/", f"{copied}/", recursive=True),
                "push to S3": partial(push, root / "cache", pushed),
                "push again, nothing new": partial(push, root / "cache", pushed),
                "plain copy from S3": partial(files.get, f"{URL}/warm/", f"{root}/got/", recursive=True),
                "pull from S3": partial(pull, f"{URL}/warm", root / "pulled"),
                "push to a bundle": partial(push, root / "cache", root / "cache.tar.zst", overwrite=True),
                "pull of a bundle": partial(pull, root / "cache.tar.zst", root / "unpacked"),
                "plain copy of files": partial(shutil.copytree, root / "cache", root / "copied"),
            }
            for kind, work in kinds.items():
                times.setdefault(kind, []).append(timed(work))
            for name in ("got", "pulled", "unpacked", "copied"):
                shutil.rmtree(root / name)
            for url in (copied, pushed):
                files.rm(url, recursive=True)
            os.sync()
    medians = {kind: statistics.median(measured) for kind, measured in times.items()}
    print(
        f"{copies} shards of {POSITIONS_PER_SHARD:,} positions, k = {K}, {options.precision}: {num_bytes / 2**20:,.0f} MiB, "
        f"medians of {options.rounds} rounds ({machine()})"
    )
    against = {"push to S3": "plain copy to S3", "pull from S3": "plain copy from S3"}
    table = [["", "s", "MiB/s", "of the plain copy's rate", "least", "most"]]
    for kind, median_s in medians.items():
        plain = f"{medians[against[kind]] / median_s:.2f}" if kind in against else ""
        spread = [f"{few(times[kind]):.2f}" for few in (min, max)]
        table.append([kind, f"{median_s:.2f}", f"{num_bytes / 2**20 / median_s:,.0f}", plain, *spread])
    print(aligned(table))


if __name__ == "__main__":
    main()

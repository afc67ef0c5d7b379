"""A TCP proxy that cuts connections in the middle."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import boto3
import pytest
from s3fs import S3FileSystem

from tests.helpers.objectstore import bucket, s3_endpoint  # noqa: F401  (fixtures)

CHUNK_BYTES = 4096


class CuttingProxy:
    """Relays to a port; after `after_bytes` in both directions together it resets the connection, `num_cuts` times."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._lock = threading.Lock()
        self.after_bytes, self.num_cuts, self._relayed_bytes = 0, 0, 0
        self._server = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.getsockname()[1]}"

    def cut(self, after_bytes: int, num_cuts: int) -> None:
        self.after_bytes, self.num_cuts, self._relayed_bytes = after_bytes, num_cuts, 0

    def close(self) -> None:
        self._server.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._server.accept()
                server = socket.create_connection(("127.0.0.1", self._port))
                for source, target in ((client, server), (server, client)):
                    threading.Thread(target=self._relay, args=(source, target), daemon=True).start()

    def _relay(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(CHUNK_BYTES):
                with self._lock:
                    self._relayed_bytes += len(data)
                    cut = self.num_cuts > 0 and self._relayed_bytes > self.after_bytes
                    if cut:
                        self.num_cuts -= 1
                        self._relayed_bytes = 0
                if cut:
                    break
                target.sendall(data)
        for each in (source, target):
            with suppress(OSError):
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                each.shutdown(socket.SHUT_RDWR)
                each.close()


@contextmanager
def connected_anew() -> Iterator[None]:
    """fsspec keeps connections, to endpoints that the environment named before."""
    S3FileSystem.clear_instance_cache()
    try:
        yield
    finally:
        S3FileSystem.clear_instance_cache()


@pytest.fixture
def proxy(bucket: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[CuttingProxy]:  # noqa: F811
    """Stands between s3fs and the server; nothing but what is tested tries again."""
    proxy = CuttingProxy(int(s3_endpoint.rpartition(":")[2]))
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(S3FileSystem, "retries", 1)
    monkeypatch.setattr("logitcache.sharing.transfer.FIRST_PAUSE_S", 0.01)
    with connected_anew():
        yield proxy
    proxy.close()


def objects(bucket: str, endpoint: str) -> set[str]:  # noqa: F811
    """Names of all objects of a bucket, past s3fs and any proxy."""
    store = boto3.client("s3", endpoint_url=endpoint)
    return {each["Key"] for each in store.list_objects_v2(Bucket=bucket.removeprefix("s3://")).get("Contents", [])}

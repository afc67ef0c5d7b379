"""A web server for tests: files of a folder for those who send the password, ranges, and a listing that says what it is told."""

from __future__ import annotations

import base64
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

USER, SECRET = "reader", "Pass-W0rd"


@dataclass
class Website:
    """host: with its port.  listing: HTML for every folder.  requests: paths that were asked for.  posted: sent to it."""

    root: Path
    host: str = ""
    listing: str | None = None
    password: str | None = None
    requests: tuple[str, ...] = ()
    posted: int = 0

    def url(self, name: str, password: str | None = None) -> str:
        """Of a file or folder, with the password that is asked for or another."""
        password = password or self.password
        return f"http://{f'{USER}:{password}@' if password else ''}{self.host}/{name}"


@contextmanager
def website(root: Path, password: str | None = None) -> Iterator[Website]:
    """Serves a folder while the block runs."""
    site = Website(root, password=password)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_POST(self) -> None:
            site.posted += 1
            self._answer(200, b"")

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            site.requests += (self.path,)
            asked = base64.b64encode(f"{USER}:{site.password}".encode()).decode()
            if site.password and self.headers.get("Authorization") != f"Basic {asked}":
                return self._answer(403, b"no")
            file = site.root / path
            if ".." not in path and file.is_file():
                return self._answer(200, file.read_bytes())
            if ".." not in path and file.is_dir() and site.listing is not None:
                return self._answer(200, site.listing.encode(), "text/html")
            return self._answer(404, b"nothing")

        def _answer(self, status: int, content: bytes, kind: str = "application/octet-stream") -> None:
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if status == 200 else None
            if wanted:
                begin, end = int(wanted[1]), min(int(wanted[2] or len(content) - 1), len(content) - 1)
                status, whole, content = 206, len(content), content[begin : end + 1]
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Accept-Ranges", "bytes")
            if wanted:
                self.send_header("Content-Range", f"bytes {begin}-{end}/{whole}")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, format: str, *arguments: Any) -> None:
            """Silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    site.host = f"127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()

"""An HTTP server that answers like vLLM's, from a made-up teacher, or fails as a test tells it to."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from typing import Any

import numpy as np

VOCAB_SIZE = 32
FINGERPRINT = "vllm-0.0-abc"
Answer = tuple[int, Any]


def true_logprobs(token: int) -> np.ndarray:
    """The made-up teacher's distribution after `token`, float64 [VOCAB_SIZE]."""
    logits = np.random.default_rng(token).normal(scale=2, size=VOCAB_SIZE)
    logits -= np.log(np.exp(logits).sum())
    return logits


def completion(request: dict[str, Any]) -> dict[str, Any]:
    """What vLLM answers: for each token but the first, the actual one and then the likeliest."""
    prompt = request["prompt"]
    rows: list[Any] = [None]
    for before, actual in pairwise(prompt):
        logprobs = true_logprobs(before)
        likeliest = np.argsort(-logprobs)[: request.get("prompt_logprobs", 0)].tolist()
        ranked = dict.fromkeys([actual, *likeliest])
        rows.append({str(i): {"logprob": logprobs[i], "rank": 1, "decoded_token": '{"'} for i in ranked})
    choice = {"index": 0, "text": "", "prompt_logprobs": rows, "prompt_token_ids": prompt}
    return {"id": "cmpl-0", "choices": [choice], "system_fingerprint": FINGERPRINT}


class FakeServer:
    """respond: request → (status, body) for /v1/completions; `requests` keeps what was asked and `keys` with which key.

    A body that is a string is sent as it is; a status of 0 closes the connection without an answer.
    """

    def __init__(self, respond: Callable[[dict[str, Any]], Answer] | None = None) -> None:
        self.respond = respond or (lambda request: (200, completion(request)))
        self.models = ["tiny"]
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.released = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def hang(self, request: dict[str, Any]) -> Answer:
        """Waits for the end of the test."""
        self.released.wait()
        return 0, None

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                answers = {
                    "/v1/models": {"data": [{"id": m, "root": f"/{m}", "max_model_len": 99} for m in fake.models]},
                    "/version": {"version": "0.0"},
                }
                self._send(200 if self.path in answers else 404, answers.get(self.path, "Not Found"))

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                fake.requests.append(request)
                fake.keys.add(self.headers["Authorization"])
                self._send(*fake.respond(request))

            def _send(self, status: int, body: Any) -> None:
                if status == 0:
                    self.close_connection = True
                    return
                data = (body if isinstance(body, str) else json.dumps(body)).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler

"""A running vLLM server as teacher, over HTTP: its prompt log-probabilities.

It gives top-k and the tail as 1 − Σp, as every route does that sees no logits. Prompts travel as token ids, so the server's
tokenizer decides nothing. The server's responses are JSON, 68 bytes an entry, and cost it far more than the engine's own
routes cost (1 ms a token at k = 64): this teacher is for a server that already runs.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from itertools import chain
from typing import Annotated, Any

import httpx2
import msgspec
import numpy as np

from logitcache.capture.selection import select_from_top_k
from logitcache.capture.settings import CaptureSettings
from logitcache.errors import UserError, one_line
from logitcache.format.sequences import TokenSequence
from logitcache.format.targets import SparseTargets

ENTRY_BYTES = 68
"""Bytes of one entry in a response's JSON, as vLLM 0.32 writes it."""
RESPONSES_BYTES = 1 << 28
"""Bytes of JSON that all responses under way may have, by this estimate; one longer response is still asked for, alone.

The server writes 10 to 20 µs an entry: more would only wait there, towards its timeout.
"""
LONGEST_DELAY_S = 30.0
MINUS_INFINITY = -9999.0
"""The number that the server writes for −inf, which JSON does not have."""


class ServerTeacher:
    """A model behind an OpenAI-compatible endpoint of vLLM. The key, if the server wants one, is read from OPENAI_API_KEY.

    model_name: as served, see `describe_server`.  vocab_size: ids beyond are padding.  most_entries: the largest top_k that
    will be asked for.  concurrency: requests under way at once, which wait for each other, so timeout_s must do for all of
    them.  attempts: tries of one request before the build stops.  backoff_s: the first delay between them; it doubles up to
    half a minute. Raises UserError if the server refuses a two-token request with that many entries.
    """

    def __init__(
        self,
        base_url: str,
        model_name: str,
        vocab_size: int,
        most_entries: int,
        concurrency: int = 16,
        timeout_s: float = 300.0,
        attempts: int = 6,
        backoff_s: float = 1.0,
    ) -> None:
        self._url = _checked(base_url)
        self._model_name = model_name
        self._vocab_size = vocab_size
        self._concurrency = concurrency
        self._timeout_s = timeout_s
        self._attempts = attempts
        self._backoff_s = backoff_s
        self._system_fingerprint: str | None = None
        self._free = asyncio.Semaphore(concurrency)
        # Servers drop connections that were idle for 5 s (uvicorn's default).
        limits = httpx2.Limits(max_connections=concurrency, keepalive_expiry=2.0)
        self._client = httpx2.AsyncClient(headers=_headers(), limits=limits, timeout=timeout_s)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="logitcache-server", daemon=True)
        self._thread.start()
        try:
            probing = self._completion(np.zeros(2, dtype=np.int32), most_entries)
            completion = asyncio.run_coroutine_threadsafe(probing, self._loop).result()
            self._system_fingerprint = completion.system_fingerprint
            _top_k(completion, np.zeros(2, dtype=np.int32), most_entries)
        except _Failure as failure:
            self.close()
            raise UserError(f"the server at {self._url} {failure}") from failure
        except BaseException:
            self.close()
            raise

    def score(self, sequences: Iterable[TokenSequence], settings: CaptureSettings) -> Iterator[SparseTargets]:
        """Yields the targets of each sequence, in order. Raises UserError for a wrong response."""
        asked: deque[tuple[int, Future[SparseTargets]]] = deque()
        try:
            for sequence in sequences:
                response_bytes = len(sequence.input_ids) * (settings.top_k + 1) * ENTRY_BYTES
                # Twice as many as run at once: one slow answer leaves no slot empty.
                while asked and (
                    len(asked) >= 2 * self._concurrency or sum(b for b, _ in asked) + response_bytes > RESPONSES_BYTES
                ):
                    yield asked.popleft()[1].result()
                scoring = asyncio.run_coroutine_threadsafe(self._score(sequence, settings), self._loop)
                asked.append((response_bytes, scoring))
            while asked:
                yield asked.popleft()[1].result()
        finally:
            for _, scoring in asked:
                scoring.cancel()

    def close(self) -> None:
        """Gives up the requests under way and closes the connections."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._disconnect(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _disconnect(self) -> None:
        running = asyncio.all_tasks() - {asyncio.current_task()}
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await self._client.aclose()

    async def _score(self, sequence: TokenSequence, settings: CaptureSettings) -> SparseTargets:
        try:
            completion = await self._completion(sequence.input_ids, settings.top_k)
            if completion.system_fingerprint != self._system_fingerprint:
                raise _Failure(
                    f"has other settings than when the build began (system_fingerprint {self._system_fingerprint}, now "
                    f"{completion.system_fingerprint}): start it as before"
                )
            # No await since the answer was decoded: objects of one answer exist at a time.
            token_ids, logprobs = _top_k(completion, sequence.input_ids, settings.top_k)
        except _Failure as failure:
            raise UserError(
                f"row {sequence.row_id}: the server at {self._url} {failure}; the finished shards are kept, the same "
                "command continues"
            ) from failure
        stored = sequence.positions
        return select_from_top_k(token_ids[stored], logprobs[stored], settings, self._vocab_size)

    async def _completion(self, input_ids: np.ndarray, k: int) -> _Completion:
        request = {
            "model": self._model_name,
            "prompt": input_ids.tolist(),
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": k,
            "return_token_ids": True,
        }
        async with self._free:
            answer = await self._post(request)
        try:
            return _decoder.decode(answer)
        except msgspec.DecodeError as error:
            raise _Failure(f"sent an answer that is no completion ({one_line(error)}): is it vLLM's?") from error

    async def _post(self, request: dict[str, Any]) -> bytes:
        """Returns the body of a response. Whatever may pass by itself is asked again, after a growing delay."""
        delay_s = self._backoff_s
        for attempt in range(1, self._attempts + 1):
            try:
                response = await self._client.post(f"{self._url}/completions", json=request)
            except httpx2.TimeoutException:
                failure = f"gave no answer within {self._timeout_s:g} s"
            except httpx2.RequestError as error:
                failure = f"broke the connection ({_reason(error)})"
            else:
                if response.is_success:
                    return response.content
                failure = f"answered {response.status_code}: {_message(response)}"
                if not _may_pass(response.status_code):
                    raise _Failure(_advice(failure, request))
            if attempt < self._attempts:
                await asyncio.sleep(delay_s * random.uniform(0.75, 1.0))
                delay_s = min(2 * delay_s, LONGEST_DELAY_S)
        raise _Failure(f"{failure}, at the last of {self._attempts} attempts: look into its log")


def describe_server(base_url: str, model_name: str | None) -> dict[str, Any]:
    """Returns what a server says about a model and about itself, for the fingerprint; model_name None stands for the only one.

    These are `name`, `root` (the checkpoint as the server was given it), `max_model_len`, `version` of vLLM and
    `system_fingerprint`, vLLM's hash of its settings; None for what the server does not say. Raises UserError if the server
    does not answer, or serves no such model.
    """
    url = _checked(base_url)
    with httpx2.Client(headers=_headers(), timeout=60.0) as client:
        served = {model["id"]: model for model in _ask(client, "GET", f"{url}/models").get("data", [])}
        names = ", ".join(sorted(served))
        if model_name is None and len(served) != 1:
            raise UserError(f"--base-url {url}: {len(served)} models are served, choose one with --model: {names}")
        if model_name is not None and model_name not in served:
            raise UserError(f"--model {model_name}: {url} does not serve it, only {names}")
        model = served[model_name or names]
        request = {"model": model["id"], "prompt": [0], "max_tokens": 1}
        completion = _ask(client, "POST", f"{url}/completions", json=request)
        try:
            version = _ask(client, "GET", f"{url.removesuffix('/v1')}/version").get("version")
        except UserError:  # a gateway may let only /v1 through
            version = None
    return {
        "name": model["id"],
        "root": model.get("root"),
        "max_model_len": model.get("max_model_len"),
        "version": version,
        # Neither dtype nor quantisation is told anywhere else than in this hash.
        "system_fingerprint": completion.get("system_fingerprint"),
    }


def _ask(client: httpx2.Client, method: str, url: str, **options: Any) -> dict[str, Any]:
    """Returns a JSON object from the server. Raises UserError, without a second attempt."""
    try:
        response = client.request(method, url, **options)
    except httpx2.RequestError as error:
        raise UserError(
            f"--base-url: no server answers at {url} ({_reason(error)}): start `vllm serve`, or correct the address"
        ) from error
    try:
        answer = response.json()
    except ValueError:
        answer = None
    if not response.is_success or not isinstance(answer, dict):
        raise UserError(
            f"--base-url: {url} answered {response.status_code}: {_message(response)} "
            "(the address of vLLM's server ends in /v1)"
        )
    return answer


class _Failure(Exception):
    """A failure of the server; the message continues a sentence that begins with its address."""


_TokenId = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]


class _Entry(msgspec.Struct, gc=False):
    logprob: float


class _Choice(msgspec.Struct):
    prompt_logprobs: list[dict[_TokenId, _Entry] | None] | None = None
    prompt_token_ids: list[int] | None = None


class _Completion(msgspec.Struct):
    choices: list[_Choice]
    system_fingerprint: str | None = None


_decoder = msgspec.json.Decoder(_Completion)


def _top_k(completion: _Completion, input_ids: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the k likeliest tokens after each prefix of the prompt and their log-probabilities, [T − 1, k], descending.

    `prompt_logprobs` has an object for each token, {id: {"logprob": …}}: the k likeliest tokens and the actual one, which
    may be among them. The first token's is null. Raises _Failure for a response that cannot be this prompt's.
    """
    choice = completion.choices[0] if completion.choices else _Choice()
    if choice.prompt_logprobs is None:
        raise _Failure("answers without prompt_logprobs: only vLLM's server gives them")
    rows = [row for row in choice.prompt_logprobs if row is not None]
    actual = input_ids[1:]
    if len(rows) != len(actual):
        raise _Failure(f"scored {len(rows)} tokens of {len(actual)}: update vLLM, or report this to it")
    counts = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    token_ids = np.fromiter(chain.from_iterable(rows), dtype=np.int32)
    logprobs = np.fromiter((entry.logprob for row in rows for entry in row.values()), dtype=np.float32)
    row_of = np.repeat(np.arange(len(rows)), counts)
    is_actual = token_ids == actual[row_of]
    echoed = choice.prompt_token_ids
    if is_actual.sum() != len(rows) or (echoed is not None and not np.array_equal(echoed, input_ids)):
        raise _Failure("scored other tokens than it was sent: update vLLM, or report this to it")
    if ((counts < k) | (counts > k + 1)).any():
        raise _Failure(f"gave {counts.min()} to {counts.max()} log-probabilities for a token, {k} were asked for")
    kept = ~(is_actual & (counts > k)[row_of])
    token_ids = token_ids[kept].reshape(-1, k)
    logprobs = logprobs[kept].reshape(-1, k)
    logprobs[logprobs <= MINUS_INFINITY] = -np.inf
    if (np.exp(logprobs, dtype=np.float64).sum(axis=1) > 1 + 1e-4).any():
        raise _Failure("gave values that are no log-probabilities: start it with --logprobs-mode raw_logprobs")
    descending = np.argsort(-logprobs, axis=1, kind="stable")
    return np.take_along_axis(token_ids, descending, axis=1), np.take_along_axis(logprobs, descending, axis=1)


def _checked(base_url: str) -> str:
    """Returns the address without its last slash. Raises UserError if no request can go there, or if it may hold a secret."""
    if set("@?#") & set(base_url):
        raise UserError(
            "--base-url: leave passwords, and all from ? or # on, out of the address (http://host:8000/v1); "
            "OPENAI_API_KEY is where a key is read from"
        )
    try:
        url = httpx2.URL(base_url)
    except httpx2.InvalidURL as error:
        raise UserError(f"--base-url: this is no address ({one_line(error)}), give http://host:8000/v1") from error
    if url.scheme not in ("http", "https") or not url.host:
        raise UserError(f"--base-url {base_url}: this is no address of a server, give http://host:8000/v1")
    return base_url.rstrip("/")


def _headers() -> dict[str, str]:
    key = os.environ.get("OPENAI_API_KEY", "").strip() or "EMPTY"
    if not (key.isascii() and key.isprintable()):
        raise UserError("OPENAI_API_KEY holds characters that no HTTP header may hold: set it anew")
    return {"Authorization": f"Bearer {key}"}


def _may_pass(status: int) -> bool:
    """Returns whether the same request may succeed later: a conflict, a full queue, a gateway without its server, a crash."""
    return status in (408, 409, 425, 429) or (status >= 500 and status != 501)


def _advice(failure: str, request: dict[str, Any]) -> str:
    if allowed := re.search(r"greater than max allowed: (\d+)", failure):
        return (
            f"allows at most {allowed[1]} log-probabilities per position: start it with "
            f"`--max-logprobs {request['prompt_logprobs']}`, or use --top-k {allowed[1]}"
        )
    if "not JSON compliant" in failure:
        return "computes values that are not numbers: restart it, with another --dtype if that happens again"
    return failure


def _message(response: httpx2.Response) -> str:
    """Returns the server's words about an error on one short line, and nothing of a refused key."""
    if response.status_code in (401, 403):
        return "it wants another key, set OPENAI_API_KEY"
    try:
        text = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        text = response.text
    return " ".join(str(text).split())[:300] or response.reason_phrase


def _reason(error: Exception) -> str:
    return one_line(error) or type(error).__name__

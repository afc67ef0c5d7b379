"""A running server as teacher: vLLM's own on loopback against transformers, and a fake one that fails in every way."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import psutil
import pytest

from logitcache.capture.settings import CaptureSettings
from logitcache.capture.teachers.server import ServerTeacher, describe_server
from logitcache.errors import UserError
from logitcache.format.sequences import CachedSequence, TokenSequence
from logitcache.format.targets import PAD_ID, find_defect
from tests.helpers.fakeserver import FINGERPRINT, VOCAB_SIZE, Answer, FakeServer, completion, true_logprobs
from tests.helpers.processes import started_command
from tests.helpers.references import assert_scores_agree

K = 4
SETTINGS = CaptureSettings(top_k=K)


def sequence(*ids: int) -> TokenSequence:
    return TokenSequence(np.array(ids, dtype=np.int32), np.arange(len(ids)) > 0)


PROBE = [0, 0]
ROW = sequence(1, 2, 3, 4)


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    server = FakeServer()
    yield server
    server.close()


@pytest.fixture
def connect(fake: FakeServer) -> Iterator[Callable[..., ServerTeacher]]:
    """A teacher on the fake server, impatient, and closed in the end."""
    teachers = []

    def connected(**options: Any) -> ServerTeacher:
        patience = {"concurrency": 4, "timeout_s": 20.0, "attempts": 3, "backoff_s": 0.01} | options
        teachers.append(ServerTeacher(fake.url, "tiny", VOCAB_SIZE, K, **patience))
        return teachers[-1]

    yield connected
    for teacher in teachers:
        teacher.close()


def after_the_probe(respond: Callable[[dict[str, Any]], Answer]) -> Callable[[dict[str, Any]], Answer]:
    """Answers as `respond` does, but the teacher's own first request well."""
    return lambda request: (200, completion(request)) if request["prompt"] == PROBE else respond(request)


def changed(change: Callable[[Any], None]) -> Callable[[dict[str, Any]], Answer]:
    """Answers well, but for what `change` does to the answer's choice."""

    def respond(request: dict[str, Any]) -> Answer:
        answer = completion(request)
        change(answer["choices"][0])
        return 200, answer

    return after_the_probe(respond)


def failure(teacher: ServerTeacher, row: TokenSequence = ROW) -> str:
    """The one line with which scoring `row` ends."""
    with pytest.raises(UserError) as caught:
        list(teacher.score([row], SETTINGS))
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"row {row.row_id}: the server at http://127.0.0.1:")
    assert message.endswith("; the finished shards are kept, the same command continues")
    return message


def asked(fake: FakeServer) -> int:
    """Requests for ROW that the server saw."""
    return [request["prompt"] for request in fake.requests].count(ROW.input_ids.tolist())


def test_scores_are_the_teachers_at_the_trained_positions(connect: Callable[..., ServerTeacher]) -> None:
    row = TokenSequence(np.array([5, 6, 7, 8], dtype=np.int32), np.array([False, True, False, True]))
    (targets,) = connect().score([row], SETTINGS)
    for m, before in enumerate([5, 7]):
        expected = true_logprobs(before)
        best = np.argsort(-expected)[:K]
        assert targets.token_ids[m].tolist() == best.tolist()
        np.testing.assert_allclose(targets.logprobs[m], expected[best], rtol=1e-6)
        np.testing.assert_allclose(np.exp(targets.tail_logprob[m]), 1 - np.exp(expected[best]).sum(), atol=1e-6)


@pytest.mark.parametrize("rank", [0, 2, K - 1, K, VOCAB_SIZE - 1])
def test_the_actual_token_does_not_displace_one_of_the_likeliest(
    connect: Callable[..., ServerTeacher], rank: int
) -> None:
    actual = int(np.argsort(-true_logprobs(3))[rank])
    (targets,) = connect().score([sequence(3, actual)], SETTINGS)
    assert targets.token_ids[0].tolist() == np.argsort(-true_logprobs(3))[:K].tolist()


def test_padding_ids_and_impossible_tokens_are_no_entries(
    fake: FakeServer, connect: Callable[..., ServerTeacher]
) -> None:
    def change(choice: Any) -> None:
        rows = {"2": -2.0, "1": -0.5, str(VOCAB_SIZE): -1.5, "3": -9999.0}
        choice["prompt_logprobs"][1] = {i: {"logprob": logprob} for i, logprob in rows.items()}

    fake.respond = changed(change)
    (targets,) = connect().score([sequence(9, 2)], SETTINGS)
    assert targets.token_ids[0].tolist() == [1, 2]
    assert np.exp(targets.tail_logprob[0]) == pytest.approx(1 - np.exp(-0.5) - np.exp(-2.0))


def test_a_sequence_of_one_token_has_no_positions(connect: Callable[..., ServerTeacher]) -> None:
    (targets,) = connect().score([sequence(1)], SETTINGS)
    assert targets.num_positions == 0


def test_results_come_in_order_although_the_first_answer_comes_last(
    fake: FakeServer, connect: Callable[..., ServerTeacher]
) -> None:
    rows = [sequence(i, 1) for i in range(3, 7)]
    others = threading.Barrier(2)

    def respond(request: dict[str, Any]) -> Answer:
        if request["prompt"][0] in (3, 6):  # the first waits for the last to be asked
            others.wait(timeout=20)
        return 200, completion(request)

    fake.respond = after_the_probe(respond)
    results = list(connect().score(rows, SETTINGS))
    expected = [np.argsort(-true_logprobs(i))[:K].tolist() for i in range(3, 7)]
    assert [targets.token_ids[0].tolist() for targets in results] == expected


@pytest.mark.slow
def test_requests_under_way_and_sequences_read_ahead_are_bounded(
    fake: FakeServer, connect: Callable[..., ServerTeacher]
) -> None:
    read, under_way, most = [], [], []

    def rows() -> Iterator[TokenSequence]:
        for i in range(40):
            read.append(i)
            yield sequence(i % VOCAB_SIZE, 1, 2)

    def respond(request: dict[str, Any]) -> Answer:
        under_way.append(request)
        most.append(len(under_way))
        time.sleep(0.01)
        under_way.remove(request)
        return 200, completion(request)

    fake.respond = after_the_probe(respond)
    for yielded, _ in enumerate(connect(concurrency=3).score(rows(), SETTINGS)):
        assert len(read) <= yielded + 1 + 2 * 3
    assert yielded == 39
    assert 1 < max(most) <= 3


def test_long_answers_are_asked_for_one_at_a_time(
    fake: FakeServer, connect: Callable[..., ServerTeacher], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logitcache.capture.teachers.server.RESPONSES_BYTES", 1)
    for yielded, _ in enumerate(connect().score([ROW] * 5, SETTINGS), start=1):
        assert asked(fake) == yielded


def test_a_server_that_recovers_is_asked_again(fake: FakeServer, connect: Callable[..., ServerTeacher]) -> None:
    answers: list[Answer] = [(500, {"error": {"message": "boom"}}), (429, "queue full"), (0, None)]
    fake.respond = after_the_probe(lambda request: answers.pop(0) if answers else (200, completion(request)))
    (targets,) = connect(attempts=4).score([ROW], SETTINGS)
    assert targets.num_positions == 3
    assert asked(fake) == 4


def test_a_server_that_fails_again_and_again(fake: FakeServer, connect: Callable[..., ServerTeacher]) -> None:
    fake.respond = after_the_probe(lambda request: (500, {"error": {"message": "EngineCore died\n"}}))
    assert "answered 500: EngineCore died, at the last of 3 attempts: look into its log" in failure(connect())
    assert asked(fake) == 3


@pytest.mark.slow
def test_a_server_that_hangs(fake: FakeServer, connect: Callable[..., ServerTeacher]) -> None:
    fake.respond = after_the_probe(fake.hang)
    assert "gave no answer within 0.5 s, at the last of 2 attempts" in failure(connect(timeout_s=0.5, attempts=2))


def test_a_server_that_dies_midway(fake: FakeServer, connect: Callable[..., ServerTeacher]) -> None:
    teacher = connect()
    results = teacher.score([sequence(i, 1) for i in range(20)], SETTINGS)
    next(results)
    fake.respond = lambda request: (0, None)
    with pytest.raises(UserError, match=r"broke the connection \(.+\), at the last of 3 attempts"):
        list(results)
    fake.close()
    assert "broke the connection (All connection attempts failed), at the last of 3 attempts" in failure(teacher)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(prompt_token_ids=[1, 2, 3, 5]), "scored other tokens than it was sent"),
        (
            lambda c: c["prompt_logprobs"].__setitem__(2, c["prompt_logprobs"][1]),
            "scored other tokens than it was sent",
        ),
        (lambda c: c["prompt_logprobs"].pop(), "scored 2 tokens of 3"),
        (lambda c: c["prompt_logprobs"].__setitem__(2, None), "scored 2 tokens of 3"),
        (lambda c: c.update(prompt_logprobs=None), "answers without prompt_logprobs: only vLLM's server gives them"),
        (
            lambda c: c["prompt_logprobs"].__setitem__(1, {"2": {"logprob": -1.0}}),
            "gave 1 to 5 log-probabilities for a token, 4 were asked for",
        ),
        (
            lambda c: [entry.update(logprob=3.0) for entry in c["prompt_logprobs"][1].values()],
            "gave values that are no log-probabilities: start it with --logprobs-mode raw_logprobs",
        ),
        (lambda c: c["prompt_logprobs"][1]["2"].update(logprob=float("nan")), "sent an answer that is no completion"),
    ],
)
def test_an_answer_that_cannot_be_the_prompts_is_refused_at_once(
    fake: FakeServer, connect: Callable[..., ServerTeacher], change: Callable[[Any], None], message: str
) -> None:
    fake.respond = changed(change)
    assert message in failure(connect())
    assert asked(fake) == 1


def test_a_server_that_was_restarted_with_other_settings(
    fake: FakeServer, connect: Callable[..., ServerTeacher]
) -> None:
    fake.respond = after_the_probe(lambda request: (200, completion(request) | {"system_fingerprint": "vllm-0.0-xyz"}))
    message = failure(connect())
    assert f"(system_fingerprint {FINGERPRINT}, now vllm-0.0-xyz): start it as before" in message


@pytest.mark.parametrize(
    ("says", "message"),
    [
        ("Token id 99 is out of vocabulary", "answered 400: Token id 99 is out of vocabulary;"),
        ("Out of range float values are not JSON compliant", "computes values that are not numbers: restart it"),
    ],
)
def test_a_refused_request_is_not_repeated(
    fake: FakeServer, connect: Callable[..., ServerTeacher], says: str, message: str
) -> None:
    fake.respond = after_the_probe(lambda request: (400, {"error": {"message": says}}))
    assert message in failure(connect())
    assert asked(fake) == 1


def test_a_refused_key_is_sent_but_never_shown(
    fake: FakeServer, connect: Callable[..., ServerTeacher], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    fake.respond = after_the_probe(lambda request: (401, {"error": {"message": "no such key: sk-secret"}}))
    message = failure(connect())
    assert "answered 401: it wants another key, set OPENAI_API_KEY" in message
    assert "secret" not in message
    assert fake.keys == {"Bearer sk-secret"}
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\nX: y")
    with pytest.raises(UserError, match="OPENAI_API_KEY holds characters") as caught:
        connect()
    assert "secret" not in str(caught.value)


def test_the_first_request_finds_a_server_that_cannot_do_it(
    fake: FakeServer, connect: Callable[..., ServerTeacher]
) -> None:
    fake.respond = lambda request: (200, {"choices": [{"text": "a plain OpenAI server"}]})
    with pytest.raises(UserError, match=r"^the server at http://127\S+/v1 answers without prompt_logprobs"):
        connect()
    assert "logitcache-server" not in [thread.name for thread in threading.enumerate()]


def test_closing_gives_up_what_is_under_way(fake: FakeServer, connect: Callable[..., ServerTeacher]) -> None:
    first = sequence(1, 2)
    fake.respond = lambda request: fake.hang(request) if request["prompt"] == [3, 4] else (200, completion(request))
    teacher = connect(timeout_s=600.0)
    results = teacher.score([first, *[sequence(3, 4)] * 6], SETTINGS)
    next(results)
    teacher.close()
    teacher.close()
    assert "logitcache-server" not in [thread.name for thread in threading.enumerate()]


def test_what_a_server_says_of_itself(fake: FakeServer) -> None:
    expected = {
        "name": "tiny",
        "root": "/tiny",
        "max_model_len": 99,
        "version": "0.0",
        "system_fingerprint": FINGERPRINT,
    }
    assert describe_server(fake.url, None) == expected
    assert describe_server(fake.url + "/", "tiny") == expected


def test_the_model_must_be_served_and_named_where_there_are_several(fake: FakeServer) -> None:
    with pytest.raises(UserError, match=r"--model other: \S+ does not serve it, only tiny$"):
        describe_server(fake.url, "other")
    fake.models = ["b", "a"]
    with pytest.raises(UserError, match=r"2 models are served, choose one with --model: a, b$"):
        describe_server(fake.url, None)
    assert describe_server(fake.url, "b")["root"] == "/b"


def test_an_address_where_no_such_server_answers(fake: FakeServer) -> None:
    with pytest.raises(
        UserError, match=r"/models answered 404: Not Found \(the address of vLLM's server ends in /v1\)"
    ):
        describe_server(fake.url.removesuffix("/v1"), None)
    fake.close()
    with pytest.raises(UserError, match=r"no server answers at .*: start `vllm serve`, or correct the address"):
        describe_server(fake.url, None)


@pytest.mark.parametrize("address", ["localhost:8000/v1", "http://", "ftp://host/v1", "http://host:port/v1", "tiny"])
def test_an_address_that_is_none(address: str) -> None:
    with pytest.raises(UserError, match="this is no address"):
        describe_server(address, None)


@pytest.mark.parametrize(
    "address", ["http://user:secret@host/v1", "user:secret@host/v1", "http://host/v1?api_key=secret", "host/v1#secret"]
)
def test_a_secret_in_the_address_is_refused_and_not_shown(address: str) -> None:
    with pytest.raises(UserError, match="leave passwords, and all from") as caught:
        describe_server(address, None)
    assert "secret" not in str(caught.value)


@pytest.fixture(scope="module")
def vllm_url(forked_vllm: None, teacher: Path) -> Iterator[str]:
    """vLLM's server on loopback, ended with all of its processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--max-logprobs", "16", "--max-model-len", "256", "--dtype", "float32", "--enforce-eager"]
    # `vllm serve`, whose own command line does not start from the CPU distribution: it asks for the version of "vllm".
    command = ["vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
    with started_command(*command, "--model", str(teacher), "--served-model-name", "tiny", *options) as server:
        while server.is_alive():
            try:
                httpx2.get(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except httpx2.RequestError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
        processes = psutil.Process(server.pid).children(recursive=True)
        os.killpg(server.pid, signal.SIGTERM)
        _, alive = psutil.wait_procs(processes, timeout=15)
        for process in alive:
            process.kill()


@pytest.mark.engine
def test_vllms_server_says_what_it_serves(vllm_url: str, teacher: Path) -> None:
    described = describe_server(vllm_url, None)
    assert (described["name"], described["root"], described["max_model_len"]) == ("tiny", str(teacher), 256)
    assert described["system_fingerprint"].startswith(f"vllm-{described['version']}-")


@pytest.mark.engine
def test_vllms_server_agrees_with_transformers_in_order(vllm_url: str, teacher: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [sequence(*rng.integers(0, 512, size=length)) for length in (255, 2, 90, 31, 200, 3, 120, 60)]
    server = ServerTeacher(vllm_url, "tiny", 512, 16, concurrency=4)
    results = list(server.score(rows, CaptureSettings(top_k=16)))
    server.close()
    scored: Any = [
        CachedSequence(row.row_id, row.input_ids, row.loss_mask, row.positions, targets)
        for row, targets in zip(rows, results, strict=True)
    ]
    assert all(find_defect(row.targets, 512) is None for row in scored)
    assert all((row.targets.token_ids != PAD_ID).all() and row.targets.token_ids.shape[1] == 16 for row in scored)
    assert_scores_agree(scored, teacher, list(range(len(rows))))


@pytest.mark.engine
def test_vllms_server_allows_fewer_entries_than_asked_for(vllm_url: str) -> None:
    with pytest.raises(UserError) as caught:
        ServerTeacher(vllm_url, "tiny", 512, 64)
    assert str(caught.value) == (
        f"the server at {vllm_url} allows at most 16 log-probabilities per position: "
        "start it with `--max-logprobs 64`, or use --top-k 16"
    )


@pytest.mark.engine
def test_vllms_server_refuses_a_prompt_beyond_its_context(vllm_url: str) -> None:
    server = ServerTeacher(vllm_url, "tiny", 512, K)
    assert "answered 400: " in failure(server, sequence(*range(256)))
    server.close()

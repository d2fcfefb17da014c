"""What the client makes of a server's answers; the server is a small one of the test, the HTTP real."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from megatron_rlt.rollout.vllm.client import EngineLostError, VllmServer

TIMEOUT_SECONDS = 0.5


class FakeServer:
    """Answers every path with what the test put there, and remembers what it was asked."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {}  # status and JSON, or a function of the body that gives them
        self.asked: list[tuple[str, Any, str | None]] = []
        self.delay_seconds = 0.0
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer(None)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                self._answer(json.loads(body) if body else None)

            def _answer(self, body: Any) -> None:
                owner.asked.append((self.path, body, self.headers.get("Authorization")))
                time.sleep(owner.delay_seconds)
                given = owner.answers[self.path]
                status, answer = given(body) if callable(given) else given
                sent = b"" if answer is None else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(sent)))
                self.end_headers()
                self.wfile.write(sent)

            def log_message(self, format: str, *args: Any) -> None:
                """Silent."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    server = FakeServer()
    yield server
    server.close()


def client(address: str, api_key: str | None = None) -> VllmServer:
    return VllmServer(address, api_key=api_key, timeout_seconds=TIMEOUT_SECONDS, process=None)


def choice(index: int, ids: list[int], finish_reason: str | None = "stop") -> dict[str, Any]:
    logprobs = {"token_logprobs": [-0.5 * token for token in ids]}
    return {
        "index": index,
        "token_ids": ids,
        "logprobs": logprobs,
        "finish_reason": finish_reason,
        "stop_reason": None,
    }


def test_token_ids_go_in_and_come_out_in_the_order_of_their_seeds(fake: FakeServer) -> None:
    fake.answers["/v1/completions"] = (200, {"choices": [choice(1, [4, 2]), choice(0, [3], "length")]})
    found = client(fake.address, "secret").complete([1, 2], {"temperature": 0.7}, n=2, seed=5)
    assert [(one.token_ids, one.logprobs, one.finish_reason) for one in found] == [
        ((3,), (-1.5,), "length"),
        ((4, 2), (-2.0, -1.0), "stop"),
    ]
    ((path, body, key),) = fake.asked
    assert (path, key) == ("/v1/completions", "Bearer secret")
    assert body == {
        "model": "policy",
        "prompt": [1, 2],
        "n": 2,
        "seed": 5,
        "return_token_ids": True,
        "temperature": 0.7,
    }


@pytest.mark.parametrize(
    ("status", "answer", "told"),
    [
        (200, {"choices": [choice(0, [3]), choice(1, [4], "abort")]}, "['stop', 'abort']"),
        (200, {"choices": [choice(0, [3]), choice(1, [4], None)]}, "['stop', None]"),
        (200, {"choices": [choice(0, [3])]}, "1 of 2 completions"),
        (500, {"error": "EngineCore encountered an issue"}, 'status 500: {"error": "EngineCore'),
        (503, None, "status 503"),
    ],
    ids=["aborted", "no reason", "too few", "engine dead", "unavailable"],
)
def test_an_answer_that_is_not_all_that_was_asked_for_is_lost(
    fake: FakeServer, status: int, answer: Any, told: str
) -> None:
    fake.answers["/v1/completions"] = (status, answer)
    with pytest.raises(EngineLostError) as raised:
        client(fake.address).complete([1], {}, n=2, seed=0)
    assert told in str(raised.value)


def test_a_request_that_hangs_is_lost_after_its_time(fake: FakeServer) -> None:
    fake.answers["/v1/completions"] = (200, {"choices": []})
    fake.delay_seconds = 4 * TIMEOUT_SECONDS
    start = time.monotonic()
    with pytest.raises(EngineLostError, match="ReadTimeout"):
        client(fake.address).complete([1], {}, n=1, seed=0)
    assert time.monotonic() - start < 3 * TIMEOUT_SECONDS


def test_an_address_that_refuses_is_lost() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(EngineLostError, match="ConnectError"):
            client(address).weight_version()
        assert not client(address).answers()


def test_what_the_server_refuses_is_the_users_fault_and_says_what_it_needs(fake: FakeServer) -> None:
    fake.answers["/weight_info"] = (404, {"detail": "Not Found"})
    with pytest.raises(ValueError, match=r"weight_info refuses \(status 404\).*VLLM_SERVER_DEV_MODE=1.*api_key_file"):
        client(fake.address).weight_version()


@pytest.mark.parametrize(("name", "length"), [("gpt2", 512), ("policy", 100)])
def test_a_server_of_another_model_is_refused(fake: FakeServer, name: str, length: int) -> None:
    fake.answers["/v1/models"] = (200, {"data": [{"id": name, "max_model_len": length}]})
    with pytest.raises(ValueError, match=rf"serves {name} \(max_model_len {length}\); it must .* at least 128"):
        client(fake.address).check_model(128)


def test_a_sync_pauses_loads_forgets_names_the_version_and_resumes(fake: FakeServer, tmp_path: Any) -> None:
    for path in ("/pause?mode=wait", "/collective_rpc", "/reset_prefix_cache", "/update_weight_version", "/resume"):
        fake.answers[path] = (200, None)
    client(fake.address).load_folder(tmp_path, 7)
    assert [(path, body) for path, body, _ in fake.asked] == [
        ("/pause?mode=wait", None),
        ("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(tmp_path)}}),
        ("/reset_prefix_cache", None),
        ("/update_weight_version", {"new_version": "7"}),
        ("/resume", None),
    ]

"""What the client makes of a server's answers, and a server of the client's requests."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_rlt.rollout.vllm.client import EngineLostError, ServerClient
from tests.rollout.small_server import SmallServer, choice

TIMEOUT_SECONDS = 0.5


@pytest.fixture
def server() -> Iterator[SmallServer]:
    server = SmallServer()
    yield server
    server.close()


def client(address: str, api_key: str | None = None) -> ServerClient:
    return ServerClient(address, api_key=api_key, timeout_seconds=TIMEOUT_SECONDS, process=None)


def test_token_ids_go_in_and_come_out_in_the_order_of_their_seeds(server: SmallServer) -> None:
    found = client(server.address).complete([1, 2], {"temperature": 0.5}, n=2, seed=40)
    assert [(one.token_ids, one.logprobs, one.finish_reason) for one in found] == [
        ((100, 40), (-200.0, -80.0), "length"),
        ((100, 41), (-200.0, -82.0), "length"),
    ]


def test_a_server_with_a_key_answers_only_to_it() -> None:
    server = SmallServer(api_key="secret")
    assert client(server.address, "secret").weight_version() == "none"
    with pytest.raises(ValueError, match=r"weight_info refuses \(status 401\).*api_key_file"):
        client(server.address, "other").weight_version()
    server.close()


def test_a_key_is_in_no_error_whether_it_cannot_be_sent_or_the_server_repeats_it() -> None:
    server = SmallServer(api_key="secret")
    with pytest.raises(EngineLostError, match="ProtocolError") as caught:
        client(server.address, "secret\nsecond line").weight_version()
    assert "secret" not in str(caught.value)
    assert "second" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    for status in (400, 500):
        server.faults["/weight_info"] = (status, {"detail": "Bearer secret\x1b[2J is wrong"})
        with pytest.raises((EngineLostError, ValueError), match=r"Bearer \*\*\* *.*is wrong") as shown:
            client(server.address, "secret").weight_version()
        assert "secret" not in str(shown.value)
    server.close()


def test_paths_that_answer_without_the_key_are_found() -> None:
    everywhere, only_v1 = SmallServer(api_key="secret"), SmallServer(api_key="secret", guarded="/v1")
    everywhere.faults["/openapi.json"] = only_v1.faults["/openapi.json"] = (200, {"paths": {"/pause": {}}})
    assert client(only_v1.address, "secret").open_paths() == [
        *("/", "/health", "/metrics", "/openapi.json", "/weight_info", "/collective_rpc", "/pause")
    ]
    del everywhere.faults["/openapi.json"]  # a server need not list its paths
    assert client(everywhere.address, "secret").open_paths() == []
    everywhere.close()
    only_v1.close()


@pytest.mark.parametrize(
    ("status", "answer", "told"),
    [
        (200, {"choices": [choice(0, [3]), choice(1, [4], finish_reason="abort")]}, "['length', 'abort']"),
        (200, {"choices": [choice(0, [3]), choice(1, [4], finish_reason=None)]}, "['length', None]"),
        (200, {"choices": [choice(0, [3])]}, "1 of 2 completions"),
        (500, {"error": "EngineCore encountered an issue"}, 'status 500: {"error": "EngineCore'),
        (503, None, "status 503"),
    ],
    ids=["aborted", "no reason", "too few", "engine dead", "unavailable"],
)
def test_an_answer_that_is_not_all_that_was_asked_for_is_lost(
    server: SmallServer, status: int, answer: Any, told: str
) -> None:
    server.faults["/v1/completions"] = (status, answer)
    with pytest.raises(EngineLostError) as raised:
        client(server.address).complete([1], {}, n=2, seed=0)
    assert told in str(raised.value)


def test_a_request_that_hangs_is_lost_after_its_time(server: SmallServer) -> None:
    server.delay_seconds = 4 * TIMEOUT_SECONDS
    start = time.monotonic()
    with pytest.raises(EngineLostError, match="ReadTimeout"):
        client(server.address).complete([1], {}, n=1, seed=0)
    assert time.monotonic() - start < 3 * TIMEOUT_SECONDS


def test_an_address_that_refuses_is_lost() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(EngineLostError, match="ConnectError"):
            client(address).weight_version()
        assert not client(address).answers()


def test_what_the_server_refuses_is_the_users_fault_and_says_what_it_needs(server: SmallServer) -> None:
    server.faults["/weight_info"] = (404, {"detail": "Not Found"})
    with pytest.raises(ValueError, match=r"weight_info refuses \(status 404\).*VLLM_SERVER_DEV_MODE=1.*api_key_file"):
        client(server.address).weight_version()


@pytest.mark.parametrize(("name", "length"), [("gpt2", 512), ("policy", 100)])
def test_a_server_of_another_model_is_refused(server: SmallServer, name: str, length: int) -> None:
    server.models = {name: length}
    with pytest.raises(ValueError, match=rf"serves {name} \(max_model_len {length}\); it must .* at least 128"):
        client(server.address).check_model(128)


def test_after_a_sync_a_server_samples_with_the_new_weights_and_names_their_version(
    server: SmallServer, tmp_path: Path
) -> None:
    save_file({"weight": torch.tensor([107.0])}, tmp_path / "model.safetensors")
    asked = client(server.address)
    assert asked.complete([1, 2], {}, n=1, seed=40)[0].token_ids == (100, 40), "and the prompt is in its cache"
    asked.load_folder(tmp_path, 7)  # the server refuses it unless it is paused
    assert asked.complete([1, 2], {}, n=1, seed=40)[0].token_ids == (107, 40), "neither paused nor from its cache"
    assert asked.weight_version() == "7"
